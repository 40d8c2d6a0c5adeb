"""ImageReward's BLIP as transformers' BlipVisionModel and BlipTextModel, and its state dict's names.

The text tower is built as a decoder, so that it has cross-attention, and called as an encoder, so that every word sees
every other: ImageReward was trained that way. Its LayerNorms have eps 1e-6 (vision) and 1e-12 (text).
"""

from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from spin_diffusion.evaluation.scorers._checkpoints import count_blocks, fill, take
from spin_diffusion.evaluation.scorers._linear_head import LinearHead, build_head
from spin_diffusion.store.input_error import InputError, one_line

VISION_HEADS, TEXT_HEADS = 16, 12
BASE_WIDTH = 768
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
PRETRAINING = ("blip.vision_proj.", "blip.text_proj.")
"""What BLIP was pretrained with and ImageReward does not use."""
VISION_NAMES = (
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
)
"""Part of BlipVisionModel's key -> part of the file's; the text tower and the head have the same names."""


@dataclass(frozen=True, eq=False)
class Blip:
    """BLIP with ImageReward's head."""

    vision: BlipVisionModel
    text: BlipTextModel
    head: LinearHead

    def __call__(
        self,
        pixels: Float[Tensor, "batch 3 side side"],
        ids: Int[Tensor, "batch tokens"],
        mask: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, " batch"]:
        """The head's number for [CLS], which has read the prompt and all of the image; not yet standardised."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches, is_decoder=False)
        return self.head(read.last_hidden_state[:, 0].float())

    def to(self, device: str) -> "Blip":
        """The same on `device`."""
        return Blip(self.vision.to(device), self.text.to(device), self.head.to(device))


def build_blip(tensors: dict[str, Tensor], where: str) -> Blip:
    """BLIP and head of ImageReward's state dict; sizes are read from the shapes.

    Args:
        where: the file, for the error.

    Raises:
        InputError: a key is missing, unexpected or of another shape.
    """
    parts: dict[str, dict[str, Tensor]] = {VISION: {}, TEXT: {}, HEAD: {}}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is not None:
            parts[prefix][name.removeprefix(prefix)] = tensor
        elif not name.startswith(PRETRAINING):
            raise InputError(f"{where}: key {name} is not expected; is it another model's file?")
    try:
        with torch.device("meta"):
            vision = BlipVisionModel(_vision_config(tensors, where))
            text = BlipTextModel(_text_config(tensors, where), add_pooling_layer=False)
    except (TypeError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"{where}: its sizes make no BLIP: {one_line(error)}") from error
    names = {_vision_name(name): name for name in vision.state_dict()}
    patches = {names.get(name, name): tensor for name, tensor in parts[VISION].items()}
    fill(vision, patches, where, in_file=lambda name: VISION + _vision_name(name))
    fill(text, parts[TEXT], where, in_file=lambda name: TEXT + name)
    return Blip(vision, text, build_head(parts[HEAD], where, prefix=HEAD))


def _vision_name(name: str) -> str:
    for ours, in_file in VISION_NAMES:
        name = name.replace(ours, in_file)
    return name


def _shape(tensors: dict[str, Tensor], name: str, where: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(take(dict(tensors), name, where).shape)
    if len(shape) != dimensions:
        raise InputError(f"{where}: {name} has shape {shape}, {dimensions} dimensions are expected")
    return shape


def _vision_config(tensors: dict[str, Tensor], where: str) -> BlipVisionConfig:
    width, _, patch, _ = _shape(tensors, f"{VISION}patch_embed.proj.weight", where, 4)
    _, positions, _ = _shape(tensors, f"{VISION}pos_embed", where, 3)
    inner, _ = _shape(tensors, f"{VISION}blocks.0.mlp.fc1.weight", where, 2)
    _check_heads(width, VISION_HEADS, where)
    if width == BASE_WIDTH:
        raise InputError(f"{where} holds BLIP's base model; ImageReward has the large one, 1024 wide")
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=count_blocks(tensors, f"{VISION}blocks."),
        num_attention_heads=VISION_HEADS,
        patch_size=patch,
        image_size=patch * round((positions - 1) ** 0.5),
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(tensors: dict[str, Tensor], where: str) -> BlipTextConfig:
    vocabulary, width = _shape(tensors, f"{TEXT}embeddings.word_embeddings.weight", where, 2)
    positions, _ = _shape(tensors, f"{TEXT}embeddings.position_embeddings.weight", where, 2)
    inner, _ = _shape(tensors, f"{TEXT}encoder.layer.0.intermediate.dense.weight", where, 2)
    _, vision_width = _shape(tensors, f"{TEXT}encoder.layer.0.crossattention.self.key.weight", where, 2)
    _check_heads(width, TEXT_HEADS, where)
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=inner,
        num_hidden_layers=count_blocks(tensors, f"{TEXT}encoder.layer."),
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=positions,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,
    )


def _check_heads(width: int, heads: int, where: str) -> None:
    if width % heads:
        raise InputError(f"{where}: a width of {width} is not divided by ImageReward's {heads} heads")
