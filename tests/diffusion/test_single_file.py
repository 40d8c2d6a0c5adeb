"""Single files have each tensor under its original name, and are the same model to whoever reads them."""

import hashlib
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spin_diffusion.diffusion.base import Base, load_checkpoint, parts_hash
from spin_diffusion.diffusion.families import sd, sdxl
from spin_diffusion.diffusion.model_sources import read_source
from spin_diffusion.diffusion.noising import read_noising
from spin_diffusion.diffusion.original import origins_of
from spin_diffusion.diffusion.single_file import write_single_file, write_unet_file
from spin_diffusion.runs.image_lines import loading_code
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.weights import config_of

FAMILIES = ("sd1", "sd2", "sdxl")
ABOUT = {"modelspec.title": "a title"}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    """A pipeline's folder. diffusers tells SDXL's encoders by their widths, which differ here as in the real one."""
    tiny = request.getfixturevalue(f"{request.param}_dir")
    if request.param != "sdxl":
        return tiny
    pipeline = load_checkpoint(str(tiny))[1]
    encoder = CLIPTextConfig(**pipeline.text_encoder_2.config.to_dict() | {"hidden_size": 40})
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(encoder)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, cross_attention_dim=72)
    pipeline.save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


@pytest.fixture
def written(folder, tmp_path):
    """A pipeline and its whole checkpoint in one file."""
    pipeline = load_checkpoint(str(folder))[1]
    write_single_file(tmp_path / "whole.safetensors", pipeline, torch.float32, ABOUT)
    return pipeline, tmp_path / "whole.safetensors"


def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    how = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a red fox", generator=torch.Generator().manual_seed(0), **how).images


def test_diffusers_reads_every_tensor_back_and_draws_the_same_picture(written, folder):
    pipeline, path = written
    found = type(pipeline).from_single_file(str(path), config=str(folder), local_files_only=True, safety_checker=None)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            own, read = part.state_dict(), getattr(found, name).state_dict()
            assert own.keys() == read.keys()
            assert all(torch.equal(own[key], read[key]) for key in own), name
    assert torch.equal(picture(pipeline), picture(found))


def test_a_files_marks_say_what_is_predicted(written, folder):
    pipeline, path = written
    v, zero = ("sd2" in folder.name,) * 2
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["modelspec.prediction_type"] == ("v" if v else "epsilon") and said["modelspec.title"] == "a title"
    assert ("v_pred" in load_file(path), "ztsnr" in load_file(path)) == (v, zero)


def test_an_encoder_that_single_files_do_not_have_is_refused_with_the_forms_that_do(sd1_dir, tmp_path):
    pipeline = load_checkpoint(str(sd1_dir))[1]
    pipeline.text_encoder.config.hidden_act = "relu"
    with pytest.raises(InputError, match="hidden_act 'relu', .* --format diffusers, or its UNet with unet_file"):
        write_single_file(tmp_path / "whole.safetensors", pipeline, torch.float32, {})
    assert not any(tmp_path.iterdir())


def test_a_unets_file_is_its_part_of_the_whole_in_the_type_that_is_asked_for(written, tmp_path):
    pipeline, path = written
    write_unet_file(tmp_path / "unet.safetensors", pipeline, torch.float16, {})
    whole, unet = load_file(path), load_file(tmp_path / "unet.safetensors")
    expected = {name: tensor.half() for name, tensor in whole.items() if name.startswith("model.diffusion_model.")}
    marks = {name for name in unet if unet[name].numel() == 0}
    assert unet.keys() - marks == expected.keys()
    assert all(torch.equal(unet[name], tensor) for name, tensor in expected.items())
    assert {name.removeprefix("model.diffusion_model.") for name in marks} == {"v_pred", "ztsnr"} & whole.keys()


# A single file as a base


def changed(path, change, **metadata):
    """Apply a function to the tensors of a file, and add to what it says of itself."""
    with safe_open(path, "pt") as file:
        said = {**(file.metadata() or {}), **metadata}
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, said)


def refused(path, *words, **options):
    with pytest.raises(InputError) as error:
        load_checkpoint(Base(str(path), **options))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.fixture
def file(request, tmp_path):
    """Writes the file of a tiny pipeline; its path, and its folder."""

    def write(name, dtype=torch.float32):
        folder = request.getfixturevalue(f"{name}_dir")
        write_single_file(tmp_path / "whole.safetensors", load_checkpoint(str(folder))[1], dtype, {})
        return tmp_path / "whole.safetensors", str(folder)

    return write


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_and_a_single_file_of_the_same_weights_are_the_same_base(file, name):
    path, config = file(name)
    family, found = load_checkpoint(Base(str(path), config=config))
    known, usual = load_checkpoint(config)
    assert family is known and not any(part.training for part in (found.unet, found.vae, found.text_encoder))
    assert weights_hash(found.unet) == weights_hash(usual.unet) and config_of(found.unet) == config_of(usual.unet)
    assert parts_hash(found) == parts_hash(usual)
    assert torch.equal(picture(found), picture(usual))


def test_a_file_of_half_precision_is_its_own_numbers_in_fp32(file):
    path, config = file("sd1", torch.float16)
    found = load_checkpoint(Base(str(path), config=config))[1]
    usual = load_checkpoint(config)[1]
    for part in ("unet", "vae", "text_encoder"):
        own = getattr(found, part).state_dict()
        assert all(torch.equal(own[key], t.half().float()) for key, t in getattr(usual, part).state_dict().items())


@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.middle", "first_stage_model.decoder", "conditioner.embedders.0", "conditioner.embedders.1"],
)
def test_every_tensor_comes_from_the_file_and_every_one_of_the_file_is_used(file, prefix):
    path, config = file("sdxl")
    whole = load_file(path)
    name = next(name for name in sorted(whole) if name.startswith(prefix) and whole[name].ndim > 1)

    def refused_when(change, *words):
        save_file(whole, path)
        changed(path, change)
        refused(path, *words, config=config)

    refused_when(lambda tensors: tensors.pop(name), name, "lack")
    refused_when(lambda tensors: tensors.update({name + "x": torch.zeros(1)}), name + "x", "no place")
    refused_when(lambda tensors: tensors.update({name: torch.zeros(3, 5)}), name, "(3, 5)")
    refused_when(lambda tensors: tensors.update({name: tensors[name] * float("nan")}), "not finite")
    refused_when(lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}), "quantised")


def test_what_training_programs_leave_beside_the_weights_is_known(file):
    path, config = file("sd2")
    clip = "cond_stage_model.model."

    def leave(tensors):
        last = {name: t for name, t in tensors.items() if ".resblocks.1." in name}
        tensors |= {name.replace(".resblocks.1.", ".resblocks.2."): tensor.clone() for name, tensor in last.items()}
        tensors |= {f"{clip}text_projection": torch.zeros(32, 32), f"{clip}logit_scale": torch.tensor(4.6)}
        tensors |= {"model_ema.decay": torch.tensor(1), "alphas_cumprod": torch.ones(10), "betas": torch.ones(10)}

    changed(path, leave)
    found = load_checkpoint(Base(str(path), config=config))[1]
    assert parts_hash(found) == parts_hash(load_checkpoint(config)[1])
    changed(path, lambda tensors: tensors.update({"edm_mean": torch.zeros(4)}))
    refused(path, "edm_mean", "another kind", config=config)


@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        ((), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
        ((), {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        (("v_pred",), {}, ("v_prediction", False)),
        (("v_pred", "ztsnr"), {}, ("v_prediction", True)),
    ],
)
def test_what_a_file_says_of_its_noise_is_what_is_trained(file, marks, metadata, expected):
    path, config = file("sdxl")
    changed(path, lambda tensors: tensors.update({mark: torch.zeros(0) for mark in marks}), **metadata)
    base = Base(str(path), config=config)
    noising = read_noising(dict(load_checkpoint(base)[1].scheduler.config), "x")
    assert (noising.prediction_type, bool(noising.abar[-1] < 1e-6)) == expected


def test_the_lines_that_load_it_run(file, sd1_dir):
    path, config = file("sd1")
    changed(path, lambda tensors: tensors.update({"v_pred": torch.zeros(0)}))
    code = loading_code(Base(str(path), config=config), "StableDiffusionPipeline", "unet", f"{str(sd1_dir / 'unet')!r}")
    found = {}
    exec(code, found)
    assert found["pipeline"].unet is found["unet"]
    assert found["pipeline"].scheduler.config.prediction_type == "v_prediction"


def test_a_scheduler_without_what_the_file_says_is_refused(file):
    path, config = file("sd1")
    changed(path, lambda tensors: tensors.update({"ztsnr": torch.zeros(0)}))
    refused(path, "rescale_betas_zero_snr", "PNDMScheduler", "--base_config", config=config)


def test_where_a_files_configuration_is_from(file, sd1_dir, sdxl_dir, tmp_path):
    path, config = file("sd2")
    refused(path, "noise or v", "--base_config")
    refused(path, "no model_index.json", config=str(sd1_dir / "unet"))
    refused(path, "StableDiffusionXLPipeline", config=str(sdxl_dir))
    refused(path, "its UNet", "configuration", config=str(sd1_dir))
    refused(path, "--variant fp16", "leave it out", config=config, variant="fp16")
    refused(path, "--revision main", "leave it out", config=config, revision="main")
    refused(sd1_dir, "no single file", config=config)
    path, _ = file("sdxl")  # the hub is out of reach
    refused(path, "stabilityai/stable-diffusion-xl-base-1.0", "--base_config")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.alpha"], ["LoRA", "made for"]),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], ["LoRA"]),
        (["lora_unet_down_blocks_0.hada_w1_a"], ["adapter"]),
        (["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"], ["LoRA"]),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], ["no checkpoint of Stable Diffusion", "double_blocks"]),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "vae.x"], ["other families"]),
        (["model.diffusion_model.input_blocks.0.0.weight"], ["only a part of a pipeline"]),
        (["down_blocks.0.resnets.0.conv1.weight"], ["only a part of a pipeline"]),
        (["conditioner.embedders.0.model.x", "model.diffusion_model.input_blocks.0.0.weight"], ["only a part"]),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path, sdxl_dir, names, words):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", *words, config=str(sdxl_dir))


def test_a_file_that_cannot_be_read_is_refused(file, tmp_path):
    path, config = file("sd1")
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "cut short or damaged", config=config)
    path.write_bytes(b"junk")
    refused(path, "damaged", config=config)
    torch.save({}, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", "not safetensors", "get the .safetensors file", config=config)
    with pytest.raises(InputError, match="--models 'x=.*not safetensors"):
        read_source(f"x={tmp_path / 'model.ckpt'}")


# The real models, whose figures are those of their public configurations


UNETS = {
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def real_parts(name):
    """The networks of a real pipeline, without weights."""
    size = 128 if name == "sdxl" else 64
    with torch.device("meta"):
        parts = {"unet": UNet2DConditionModel(sample_size=size, **UNETS[name])}
        parts["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        encoder = CLIPTextConfig(**CLIP_H, hidden_act="gelu") if name == "sd2" else CLIPTextConfig(**CLIP_L)
        parts["text_encoder"] = CLIPTextModel(encoder)
        if name == "sdxl":
            encoder = CLIPTextConfig(**CLIP_G, projection_dim=1280, hidden_act="gelu")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(encoder)
    return parts


def original_shapes(name):
    """The shape of every tensor of a real checkpoint, by its original name."""
    family, shapes = (sdxl if name == "sdxl" else sd), {}
    for part, model in real_parts(name).items():
        own = model.state_dict()
        shapes |= {key: tuple(o.tensor(own).shape) for key, o in origins_of(family, part, model).items()}
    return shapes


PEER = {
    "sd1": ({"model": 686, "first_stage_model": 248, "cond_stage_model": 196}, "7fec4aa8c8857925"),
    "sd2": ({"model": 686, "first_stage_model": 248, "cond_stage_model": 280}, "25ea8724b8e03098"),
    "sdxl": ({"model": 1680, "first_stage_model": 248, "conditioner": 585}, "ff2ff3f6f49326c6"),
}
"""What kohya's sd-scripts (48d368fa) make of the same state dicts by tables of their own: how many tensors there are of
each kind, and a hash of all names and shapes."""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_and_shapes_of_the_real_checkpoints_are_those_of_a_peer(name):
    shapes, (counts, digest) = original_shapes(name), PEER[name]
    assert Counter(key.split(".")[0] for key in shapes) == counts
    lines = "".join(f"{key} {shapes[key]}\n" for key in sorted(shapes))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest
