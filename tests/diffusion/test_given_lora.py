"""A run that starts from somebody's adapter: what the base is then, and which files are refused."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from spin_diffusion.diffusion.base import Base, load_checkpoint
from spin_diffusion.diffusion.given_lora import split_strength
from spin_diffusion.diffusion.lora import KOHYA_WEIGHTS, WEIGHTS
from spin_diffusion.runs.image_lines import loading_code
from spin_diffusion.store.input_error import InputError
from tests.diffusion.test_kohya import EVERYWHERE, in_fp16
from tests.diffusion.test_lora import LORA, move, prediction
from tests.playing import make_game


@pytest.fixture
def adapter(sdxl_dir, tmp_path):
    """The folder of an adapter in both forms, with alpha other than its rank, and the game that has it."""
    game = make_game(sdxl_dir, lora=replace(LORA, lora_target_modules=EVERYWHERE))
    in_fp16(game)
    game.save(tmp_path, prove=False)
    return tmp_path / "lora", game


@pytest.mark.parametrize("file", [WEIGHTS, KOHYA_WEIGHTS])
def test_the_base_has_the_adapter_in_its_weights_at_its_strength(file, sdxl_dir, adapter):
    folder, game = adapter
    expected = DiffusionPipeline.from_pretrained(sdxl_dir)
    expected.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name="given")
    for given, strength in ((f"{folder / file}", 1.0), (f"{folder / file}@0.7", 0.7)):
        expected.set_adapters("given", strength)
        unet = load_checkpoint(Base(str(sdxl_dir), lora=given))[1].unet
        assert torch.allclose(prediction(unet, game), prediction(expected.unet, game), atol=1e-5)
        assert not any("lora" in name for name in unet.state_dict())


def test_it_is_what_the_run_goes_back_to_and_trains_beside(sdxl_dir, adapter, tmp_path):
    given = Base(str(sdxl_dir), lora=str(adapter[0]))
    fused, plain = make_game(given), make_game(sdxl_dir)
    assert fused.base_hash != plain.base_hash and str(adapter[0]) in str(fused.base)
    before = fused.player_hash()
    assert before == fused.base_hash
    with torch.no_grad():
        fused.player.conv_in.bias += 1
    fused.restore(None)
    assert fused.player_hash() == before
    beside = make_game(given, lora=LORA)
    move(beside)
    beside.save(tmp_path / "trained")  # loaded afresh it predicts the same
    code = loading_code(given, "StableDiffusionXLPipeline", "lora", repr(str(tmp_path / "trained/lora")))
    names: dict[str, object] = {}
    exec(code, names)
    loaded = prediction(names["pipeline"].unet, beside)
    assert torch.allclose(loaded, prediction(beside.player, beside), atol=1e-5)


def test_what_it_has_for_the_text_encoders_is_fused_too(sdxl_dir, adapter, tmp_path):
    tensors, given = load_file(adapter[0] / KOHYA_WEIGHTS), torch.Generator().manual_seed(0)
    pipeline = load_checkpoint(str(sdxl_dir))[1]
    expected = {}
    for number, name in ((1, "text_encoder"), (2, "text_encoder_2")):
        weights = getattr(pipeline, name).state_dict()
        # sd-scripts trains all of these
        for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1"):
            (full,) = (found for found in weights if found.endswith(f"layers.0.{layer}.weight"))
            key = f"lora_te{number}_text_model_encoder_layers_0_{layer.replace('.', '_')}"
            rows, columns = weights[full].shape
            down, up = torch.randn(2, columns, generator=given), torch.randn(rows, 2, generator=given)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(3.0)}
            expected[name, full] = weights[full] + 0.5 * 3.0 / 2 * up @ down
    save_file(tensors, tmp_path / "both.safetensors")
    fused = load_checkpoint(Base(str(sdxl_dir), lora=f"{tmp_path / 'both.safetensors'}@0.5"))[1]
    for (name, layer), weight in expected.items():
        assert torch.allclose(getattr(fused, name).state_dict()[layer], weight, atol=1e-5)


def test_other_files_are_refused_in_one_line(sdxl_dir, sd1_dir, adapter, tmp_path):
    kohya = adapter[0] / KOHYA_WEIGHTS
    (tmp_path / "cut.safetensors").write_bytes(kohya.read_bytes()[:-100])
    (tmp_path / "pickle.ckpt").write_bytes(b"x")
    make_game(sd1_dir, lora=LORA).save(tmp_path / "sd1", prove=False)
    tensors = load_file(kohya)
    layer = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    nowhere = {f"lora_unet_middle_block_7_x.lora_{part}.weight": torch.ones(1, 1) for part in ("down", "up")}
    for name, content in {
        "lokr": {f"{layer}.lokr_w1": torch.ones(1)},
        "dora": tensors | {f"{layer}.dora_scale": torch.ones(1)},
        "flux": {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(1, 1)},
        "unet": {"conv_in.weight": torch.ones(1)},
        "nan": tensors | {f"{layer}.lora_down.weight": torch.full((4, 32), torch.nan)},
        "half": {key: tensor for key, tensor in tensors.items() if key != f"{layer}.lora_up.weight"},
        "nowhere": tensors | nowhere,
        # diffusers passes over what is of none of the pipeline's parts
        "passed over": load_file(adapter[0] / WEIGHTS)
        | {f"vae.x.lora_{side}.weight": torch.ones(1, 1) for side in "AB"},
    }.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    for name, said in {
        "cut.safetensors": "is damaged",
        "pickle.ckpt": "may run code",
        "absent.safetensors": "--init_lora .*absent.safetensors is not there",
        "owner/name": "is not there",
        "sd1/lora": "does not fit|no place",
        f"sd1/lora/{KOHYA_WEIGHTS}": "does not fit|no place",
        "lokr.safetensors": "no plain LoRA",
        "dora.safetensors": "no plain LoRA",
        "flux.safetensors": "such as Flux",
        "unet.safetensors": "is no LoRA",
        "nan.safetensors": "not finite",
        "half.safetensors": "does not fit|no place",
        "nowhere.safetensors": "does not fit|no place",
        "passed over.safetensors": "2 of its .* tensors have no place",
    }.items():
        with pytest.raises(InputError, match=said) as error:
            load_checkpoint(Base(str(sdxl_dir), lora=str(tmp_path / name)))
        assert "\n" not in str(error.value), name


def test_a_strength_is_what_stands_behind_the_last_at_sign(tmp_path):
    assert split_strength("runs/a@0.7") == ("runs/a", 0.7)
    assert split_strength("a@b/c") == ("a@b/c", 1.0)
    (tmp_path / "x@2").mkdir()
    assert split_strength(str(tmp_path / "x@2")) == (str(tmp_path / "x@2"), 1.0)
    with pytest.raises(InputError, match="must be a number"):
        split_strength("runs/a@nan")
