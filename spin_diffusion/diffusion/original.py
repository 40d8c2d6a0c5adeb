"""Tensors as the original code of Stable Diffusion names them, in which single files are shared.

UNet and VAE are named as in latent diffusion (arXiv 2112.10752) and its successor, SDXL's `sgm`; a text encoder as in
transformers where it is OpenAI's CLIP, or as in open_clip, with queries, keys and values in one tensor, where it is
one of LAION's. Which block has which number follows from diffusers' own names, so no configuration is asked.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from spin_diffusion.store.input_error import InputError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
Form = Literal["same", "transposed", "kernel"]
"""How a tensor differs from diffusers': not at all; a matrix is transposed; it is the kernel of a 1 x 1 convolution."""


@dataclass(frozen=True)
class Origin:
    """What a tensor of the original layout is made of.

    Attributes:
        names: of tensors of diffusers' or transformers', one below the other.
    """

    names: tuple[str, ...]
    form: Form = "same"

    def tensor(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor of the original layout."""
        parts = [tensors[name] for name in self.names]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.form == "kernel":
            return whole[:, :, None, None]
        return whole.T if self.form == "transposed" else whole

    def tensors(self, whole: Tensor) -> dict[str, Tensor]:
        """The tensors that one of the original layout is made of, by name."""
        if self.form == "transposed":
            whole = whole.T
        elif self.form == "kernel":
            whole = whole.flatten(1)  # some files have the matrix itself
        return dict(zip(self.names, whole.chunk(len(self.names)), strict=True))


Origins = dict[str, Origin]
"""By the names of the original layout."""


def origins_of(family: ModuleType, part: str, model: Any) -> Origins:
    """The original layout of a part of a pipeline. Raises InputError where that layout has no place for it.

    Args:
        part: its name in the pipeline: unet, vae, or a text encoder's.
        model: a network of diffusers' or transformers', with or without weights.
    """
    names = list(model.state_dict())
    if part == "unet":
        return unet_origins(names)
    if part == "vae":
        return vae_origins(names)
    activation, prefixes = model.config.hidden_act, family.ENCODER_PREFIXES[part]
    if activation not in prefixes:
        raise InputError(
            f"the {part} has hidden_act {activation!r}, and single files hold one with {' or '.join(prefixes)}: write "
            "it with --format diffusers, or its UNet with unet_file; read the file with the --base_config that it is of"
        )
    return encoder_origins(names, prefixes[activation])


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_origins(names: Collection[str]) -> Origins:
    """The original layout of a UNet2DConditionModel.

    Args:
        names: of all its tensors.
    """
    inputs, outputs = _first_numbers(names, "down"), _first_numbers(names, "up")

    def original(name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module in _UNET:
            return f"{_UNET[module]}.{kind}"
        side, block, part, number, inner = _place(name)
        if side == "mid":
            place = f"middle_block.{1 if part == 'attentions' else 2 * number}"
        else:
            first = (inputs if side == "down" else outputs)[block]
            blocks, after = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
            if part == "downsamplers":
                return f"{blocks}.{first + after + _count(names, side, block)}.0.op.{kind}"
            if part == "upsamplers":
                # It shares the last number with what comes before it
                before = 2 if any(_is_of(other, side, block, "attentions") for other in names) else 1
                return f"{blocks}.{first + _count(names, side, block) - 1}.{before}.conv.{kind}"
            place = f"{blocks}.{first + after + number}.{1 if part == 'attentions' else 0}"
        if part == "resnets":
            layer, _, kind = inner.rpartition(".")
            inner = f"{_RESNET[layer]}.{kind}"
        return f"{place}.{inner}"

    return {UNET + original(name): Origin((name,)) for name in names}


def _place(name: str) -> tuple[str, int, str, int, str]:
    """Where a tensor stands in blocks of diffusers: side (down, mid or up), block, what it is a part of (resnets,
    attentions, ...), the number of that, and its name there."""
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        raise InputError(f"the tensor {name} has no place in the original layout of Stable Diffusion")
    return match[1] or match[3], int(match[2] or 0), match[4], int(match[5]), match[6]


def _is_of(name: str, side: str, block: int, part: str) -> bool:
    return name.startswith(f"{side}_blocks.{block}.{part}.")


def _count(names: Iterable[str], side: str, block: int) -> int:
    """How many residual blocks a block has."""
    return len({_place(name)[3] for name in names if _is_of(name, side, block, "resnets")})


def _first_numbers(names: Collection[str], side: Literal["down", "up"]) -> list[int]:
    """How many of the original blocks of one side come before each of diffusers': a downsampler is one by itself."""
    numbers, block = [0], 0
    while count := _count(names, side, block):
        resized = side == "down" and any(_is_of(name, side, block, "downsamplers") for name in names)
        numbers.append(numbers[-1] + count + resized)
        block += 1
    return numbers


def vae_origins(names: Collection[str]) -> Origins:
    """The original layout of an AutoencoderKL.

    Args:
        names: of all its tensors.
    """
    levels = len({_place(name.partition(".")[2])[1] for name in names if name.startswith("decoder.up_blocks.")})

    def original(name: str) -> tuple[str, Form]:
        half, _, rest = name.partition(".")
        if half not in ("encoder", "decoder") or not re.match(r"(down|up|mid)_block", rest):
            return name.replace("conv_norm_out", "norm_out"), "same"
        side, block, part, number, inner = _place(rest)
        layer, _, kind = inner.rpartition(".")
        if part == "attentions":
            is_matrix = kind == "weight" and layer != "group_norm"
            return f"{half}.mid.attn_{number + 1}.{_VAE_ATTENTION[layer]}.{kind}", "kernel" if is_matrix else "same"
        inner = inner.replace("conv_shortcut", "nin_shortcut")
        if side == "mid":
            return f"{half}.mid.block_{number + 1}.{inner}", "same"
        # The decoder's levels are numbered from the full resolution down
        level = block if side == "down" else levels - 1 - block
        place = f"block.{number}" if part == "resnets" else f"{side}sample"
        return f"{half}.{side}.{level}.{place}.{inner}", "same"

    return {VAE + new: Origin((name,), form) for name in names for new, form in [original(name)]}


def encoder_origins(names: Collection[str], prefix: str) -> Origins:
    """The original layout of a text encoder.

    Args:
        names: of all its tensors.
        prefix: of the original names; it ends in `.model.` where they are open_clip's.
    """
    if not prefix.endswith(".model."):
        return {f"{prefix}text_model.{_bare(name)}": Origin((name,)) for name in names}
    origins: Origins = {}
    for name in names:
        bare = _bare(name)
        if bare == "text_projection.weight":
            origins[f"{prefix}text_projection"] = Origin((name,), "transposed")
        elif bare in _OPEN_CLIP:
            origins[prefix + _OPEN_CLIP[bare]] = Origin((name,))
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", bare):
            block, layer, kind = f"{prefix}transformer.resblocks.{match[1]}.", match[2], match[3]
            if layer in _OPEN_CLIP_LAYER:
                origins[f"{block}{_OPEN_CLIP_LAYER[layer]}.{kind}"] = Origin((name,))
            elif layer == "self_attn.q_proj":
                parts = (name.replace("q_proj", f"{letter}_proj") for letter in "qkv")
                origins[f"{block}attn.in_proj_{kind}"] = Origin(tuple(parts))
    return origins


def _bare(name: str) -> str:
    """A tensor's name in a text encoder of any version of transformers: the later ones leave the prefix out."""
    return name.removeprefix("text_model.")
