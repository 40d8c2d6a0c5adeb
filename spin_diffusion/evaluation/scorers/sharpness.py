"""Sharpness: how much neighbouring pixels differ. An alarm for drift, not a measure of quality.

Self-play can win its game by a texture (grids, stippling) or by blur. Both move this number long before they hurt a
learned scorer, so compare it with the real images and with the base model: neither up nor down is good in itself.
"""

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.scorers import About, Scorer
from spin_diffusion.samples.photometry import mean_absolute_laplacian

ABOUT = About(title="Sharpness", scale="mean absolute Laplacian of the luma, 0 to 4", role="drift")


def load(device: str, path: str | None = None) -> Scorer:
    """The scorer; it has no weights and runs on the CPU whatever `device` says."""
    return sharpness


def sharpness(images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
    """The `mean_absolute_laplacian` of each image."""
    return torch.tensor([mean_absolute_laplacian(image) for image in images], dtype=torch.float32)
