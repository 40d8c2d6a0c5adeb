"""Embeddings of DINOv2, learnt from pictures without words: of those that are published, distances in them agree best
with what people see (arXiv 2306.04675, which takes the large model).

`dinov2=PATH` is a folder or a hub id in transformers' layout (config.json, model.safetensors); a larger or smaller
model is named like this, such as dinov2=facebook/dinov2-large.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.embeddings import About
from spin_diffusion.store.files import read_json
from spin_diffusion.store.input_error import InputError

if TYPE_CHECKING:
    from transformers import Dinov2Model

SIDE_PX = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels on ImageNet, as DINOv2 was trained."""
ABOUT = About(
    title="DINOv2",
    scale="the class token behind the last normalisation: 768 features of the base model, 384 of the small one, 1024 "
    "of the large one",
    checkpoint="facebook/dinov2-base",
    preprocessing="RGB, short side to 224 px (Pillow bicubic), middle square, ImageNet's mean and std",
    licence="Apache-2.0",
    citation="arXiv 2304.07193",
)


def load(device: str, path: str | None = None) -> "Embedding":
    """The embedding; `path` is a folder or a hub id, default ABOUT.checkpoint.

    Raises:
        InputError: it cannot be had, or is no DINOv2.
    """
    from transformers import Dinov2Model

    from spin_diffusion.evaluation.scorers._checkpoints import open_place

    files = open_place(ABOUT.place(path))
    config, weights = files.get("config.json"), files.get("model.safetensors")
    if (kind := read_json(config).get("model_type")) != "dinov2":
        raise InputError(f"{config} describes a model of type {kind!r}, not 'dinov2'")
    for file in (config, weights):
        files.record(file)
    # transformers translates the names of published tensors; what it did not find it would draw at random
    model, info = Dinov2Model.from_pretrained(weights.parent, local_files_only=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{weights}: key {missing[0]} is missing; is it another model's file?")
    return Embedding(model.float().eval().to(device), device, dict(files.read))


@dataclass(frozen=True, eq=False)
class Embedding:
    """The class token of a picture."""

    model: "Dinov2Model"
    device: str
    checkpoint: dict[str, str]

    def __call__(self, images: list[Image.Image]) -> Float[Tensor, "batch width"]:
        """One row per image."""
        from spin_diffusion.evaluation.scorers._inputs import crop_middle, full_precision

        pixels = torch.stack([crop_middle(image, SIDE_PX, "floor", MEAN, STD) for image in images])
        with full_precision(self.device):
            return self.model(pixel_values=pixels.to(self.device)).pooler_output
