"""What can be said of an image without a model: saturation, clipped luma, sharpness, whether it has one colour."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from spin_diffusion.store.pictures import to_rgb

MEASURES = ("saturation", "clipped", "sharpness")
"""Names of the numbers of a `Photometry`."""


@dataclass(frozen=True)
class Photometry:
    """The measures of one image."""

    saturation: float
    """Mean over pixels of (max - min) / max of R, G and B, 0 to 1."""
    clipped: float
    """Share of pixels whose luma is at most 1 or at least 254 of 255, 0 to 1."""
    sharpness: float
    """`mean_absolute_laplacian`, 0 to 4; the score of the scorer `sharpness`."""
    state: Literal["ok", "constant"]
    """"constant" = no channel varies by more than 2 of 255, as in the black image of a safety filter."""


def measure_image(image: Image.Image) -> Photometry:
    """The measures of an image of any mode, as most scorers see it. Raises InputError: as `to_rgb`."""
    rgb = to_rgb(image)
    pixels = np.asarray(rgb)  # (height, width, 3) of 0..255
    brightest, darkest = pixels.max(axis=2).astype(np.float64), pixels.min(axis=2).astype(np.float64)
    saturation = (brightest - darkest) / np.maximum(brightest, 1)  # black has none
    luma = np.asarray(rgb.convert("L"))
    constant = bool((np.ptp(pixels, axis=(0, 1)) <= 2).all())
    return Photometry(
        saturation=float(saturation.mean()),
        clipped=float(((luma <= 1) | (luma >= 254)).mean()),
        sharpness=float(np.float32(mean_absolute_laplacian(rgb))),
        state="constant" if constant else "ok",
    )


def mean_absolute_laplacian(image: Image.Image) -> float:
    """Mean absolute Laplacian of the luma, in units of white (0 to 4). It depends on the size of the image in px."""
    luma = np.asarray(image.convert("L"), dtype=np.float64) / 255
    padded = np.pad(luma, 1, mode="edge")
    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return float(np.abs(neighbours - 4 * luma).mean())
