"""Single files have each tensor under its original name, and are the same model to whoever reads them."""

import hashlib
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spin_diffusion.diffusion.base import load_checkpoint
from spin_diffusion.diffusion.families import sd, sdxl
from spin_diffusion.diffusion.original import origins_of
from spin_diffusion.diffusion.single_file import write_single_file, write_unet_file

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


def test_a_unets_file_is_its_part_of_the_whole_in_the_type_that_is_asked_for(written, tmp_path):
    pipeline, path = written
    write_unet_file(tmp_path / "unet.safetensors", pipeline, torch.float16, {})
    whole, unet = load_file(path), load_file(tmp_path / "unet.safetensors")
    expected = {name: tensor.half() for name, tensor in whole.items() if name.startswith("model.diffusion_model.")}
    marks = {name for name in unet if unet[name].numel() == 0}
    assert unet.keys() - marks == expected.keys()
    assert all(torch.equal(unet[name], tensor) for name, tensor in expected.items())
    assert {name.removeprefix("model.diffusion_model.") for name in marks} == {"v_pred", "ztsnr"} & whole.keys()


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
