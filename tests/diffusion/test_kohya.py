"""Adapters in kohya's form: the names that other programs look for, and that they mean what the adapter itself does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from spin_diffusion.diffusion.lora import KOHYA_WEIGHTS, PLAYER, WEIGHTS
from tests.diffusion.test_lora import LORA, move, prediction
from tests.playing import make_game

ATTENTIONS = [f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")]
EVERYWHERE = ["to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
EVERYWHERE += ["time_emb_proj", "conv_shortcut", "conv", "conv_in", "conv_out"]
EVERYWHERE += ["time_embedding.linear_1", "time_embedding.linear_2"]

# By hand from ComfyUI's rule (comfy/utils.py, unet_to_diffusers) for the tiny UNet: two levels of one ResNet each,
# attention on the second, so two ResNets a level on the way up
SDXL = {
    "attentions": ["input_blocks_3_1", "middle_block_1", "output_blocks_0_1", "output_blocks_1_1"],
    "resnets": ["input_blocks_1_0", "input_blocks_3_0", "middle_block_0", "middle_block_2"]
    + [f"output_blocks_{n}_0" for n in range(4)],
    "of a resnet": ["in_layers_2", "out_layers_3", "emb_layers_1"],
    "shortcuts": [
        f"{place}_0_skip_connection" for place in ("input_blocks_3", *(f"output_blocks_{n}" for n in range(4)))
    ],
    "others": ["input_blocks_2_0_op", "output_blocks_1_2_conv", "input_blocks_0_0", "out_2", "time_embed_0"]
    + ["time_embed_2"],
}
SD = {
    "attentions": [f"{place}_attentions_{n}" for place, n in
                   (("down_blocks_1", 0), ("mid_block", 0), ("up_blocks_0", 0), ("up_blocks_0", 1))],
    "resnets": [f"{place}_resnets_{n}" for place, n in
                (("down_blocks_0", 0), ("down_blocks_1", 0), ("mid_block", 0), ("mid_block", 1), ("up_blocks_0", 0),
                 ("up_blocks_0", 1), ("up_blocks_1", 0), ("up_blocks_1", 1))],
    "of a resnet": ["conv1", "conv2", "time_emb_proj"],
    "shortcuts": [f"{place}_conv_shortcut" for place in ("down_blocks_1_resnets_0", "up_blocks_0_resnets_0",
                  "up_blocks_0_resnets_1", "up_blocks_1_resnets_0", "up_blocks_1_resnets_1")],
    "others": ["down_blocks_0_downsamplers_0_conv", "up_blocks_0_upsamplers_0_conv", "conv_in", "conv_out"]
    + ["time_embedding_linear_1", "time_embedding_linear_2"],
}  # fmt: skip


def in_fp16(game) -> None:
    """The player's adapter somewhere else, where fp16 has every number of it."""
    move(game, size=0.2)
    with torch.no_grad():
        for parameter in game.models.parameters(PLAYER):
            parameter.copy_(parameter.half())


def named(file) -> set[str]:
    return {key.partition(".")[0].removeprefix("lora_unet_") for key in load_file(file)}


@pytest.mark.parametrize(("base", "table"), [("sdxl_dir", SDXL), ("sd1_dir", SD), ("sd2_dir", SD)])
def test_every_layer_has_the_name_that_other_programs_know(base, table, request, tmp_path):
    folder = request.getfixturevalue(base)
    make_game(folder, lora=LORA).save(tmp_path / "attention", prove=False)
    in_attention = {f"{place}_transformer_blocks_0_{part}" for place in table["attentions"] for part in ATTENTIONS}
    assert named(tmp_path / "attention/lora" / KOHYA_WEIGHTS) == in_attention
    game = make_game(folder, lora=replace(LORA, lora_target_modules=EVERYWHERE))
    game.save(tmp_path / "all", prove=False)
    expected = in_attention | {f"{place}_{proj}" for place in table["attentions"] for proj in ("proj_in", "proj_out")}
    fully = ("ff_net_0_proj", "ff_net_2")
    expected |= {f"{place}_transformer_blocks_0_{part}" for place in table["attentions"] for part in fully}
    expected |= {f"{place}_{part}" for place in table["resnets"] for part in table["of a resnet"]}
    expected |= {*table["shortcuts"], *table["others"]}
    file = tmp_path / "all/lora" / KOHYA_WEIGHTS
    assert named(file) == expected
    assert {key.partition(".")[2] for key in load_file(file)} == {"lora_down.weight", "lora_up.weight", "alpha"}


@pytest.mark.parametrize("targets", [None, EVERYWHERE])
@pytest.mark.parametrize("base", ["sdxl_dir", "sd1_dir"])
def test_it_draws_the_pixels_of_the_adapter_and_comes_back_equal(base, targets, request, tmp_path):
    folder = request.getfixturevalue(base)
    game = make_game(folder, lora=replace(LORA, lora_target_modules=targets))
    base_predicts = prediction(game.player, game)
    in_fp16(game)
    game.save(tmp_path, prove=False)
    drawn, predicted = {}, {}
    for file in (WEIGHTS, KOHYA_WEIGHTS):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(tmp_path / "lora", weight_name=file)
        predicted[file] = prediction(pipeline.unet, game)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        image = pipeline("a fox", num_inference_steps=2, height=32, width=32, generator=generator, output_type="np")
        drawn[file] = image.images
    assert (predicted[KOHYA_WEIGHTS] - base_predicts).abs().max() > 1e-3
    assert torch.allclose(predicted[KOHYA_WEIGHTS], predicted[WEIGHTS], atol=1e-5)
    assert np.allclose(drawn[KOHYA_WEIGHTS], drawn[WEIGHTS], atol=1e-4)
    read = get_peft_model_state_dict(pipeline.unet, adapter_name=pipeline.get_active_adapters()[0])
    (tmp_path / "again").write_bytes(game.models.kohya.file(read, LORA.rank, LORA.alpha, torch.float16, {}))
    once, again = load_file(tmp_path / "lora" / KOHYA_WEIGHTS), load_file(tmp_path / "again")
    assert once.keys() == again.keys() and all(torch.equal(once[key], again[key]) for key in once)


def test_a_round_s_change_has_its_own_alpha_and_the_file_says_what_it_is(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir, lora=LORA)
    move(game)
    game.promote()
    game.save(tmp_path / "first", prove=False)
    move(game, seed=5)
    game.save(tmp_path / "second", prove=False)
    fresh = DiffusionPipeline.from_pretrained(sdxl_dir)
    fresh.load_lora_weights(tmp_path / "first/lora", weight_name=KOHYA_WEIGHTS, adapter_name="before")
    fresh.load_lora_weights(tmp_path / "second/lora_round", weight_name=KOHYA_WEIGHTS, adapter_name="change")
    fresh.set_adapters(["before", "change"])
    assert torch.allclose(prediction(fresh.unet, game), prediction(game.player, game), atol=1e-3)
    with safe_open(tmp_path / "second/lora_round" / KOHYA_WEIGHTS, framework="pt") as opened:
        said = opened.metadata()
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == (str(2 * LORA.rank), "12")
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (said["modelspec.prediction_type"], said["modelspec.resolution"]) == ("epsilon", "32x32")
    assert said["spin_diffusion.base"] == game.base_hash
    assert json.dumps(said).count(said["sshs_model_hash"]) == 2
