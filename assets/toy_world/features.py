"""What a toy-world picture looks like, in 54 numbers: what the oracle sees, without knowing the caption.

An embedding: `load(device)` returns images -> features (batch, 54). Everything is measured behind a blur of 1 pixel.

    border      mean and spread of each colour along the outermost 2 pixels: the background, and how flat it is
    places      on a 4 x 4 grid, how much of each cell differs from the border's colour
    paint       mean and spread of each colour where the picture differs from the border's
    edges       share of pixels at each of 6 strengths of the gradient; of the strong ones, shares of 8 directions
    corners     share of pixels at each of 6 strengths of the smaller eigenvalue of the structure tensor
    grain       mean absolute second difference of each colour, 3; of all together by size of the step, 3

Each is standardised over drawings of the world in both styles. It has no weights and runs on the CPU.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from spin_diffusion.evaluation.embeddings import About

ABOUT = About(
    title="Toy features",
    scale="54 numbers of border, places, paint, edges, corners and grain, standardised over drawings in both styles",
    preprocessing="RGB, as large as it is",
    licence="Apache-2.0",
)
_DRAWINGS = 400
_BLUR_PX = 1.0
"""Standard deviation of the blur that goes first: the world's VAE softens edges by about as much, whatever drew them,
and without it that alone would take every picture that passed it away from the real ones."""
_STRENGTHS = np.array([0.01, 0.03, 0.08, 0.2, 0.4])
"""Bounds between the bins of gradients, in units of white per pixel; of corners, half of them."""


def _load_world() -> ModuleType:
    """world.py beside this file, also when this file is itself loaded by its path."""
    spec = importlib.util.spec_from_file_location("toy_world_world", Path(__file__).resolve().with_name("world.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is executed
    spec.loader.exec_module(module)
    return module


world = _load_world()


def load(device: str) -> Callable[[list[Image.Image]], torch.Tensor]:
    """The embedding; it runs on the CPU whatever `device` says."""
    mean, spread = _statistics()

    def embed(images: list[Image.Image]) -> torch.Tensor:
        return torch.from_numpy((np.stack([measure(image) for image in images]) - mean) / spread).float()

    return embed


@functools.cache
def _statistics() -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the measures of drawings, half of them careful, (54,) each."""
    rng = np.random.default_rng(0)
    drawings = [
        world.draw(world.parse_caption(world.sample_caption(rng)), rng, style)
        for style in world.STYLES
        for _ in range(_DRAWINGS // len(world.STYLES))
    ]
    measured = np.stack([measure(drawing) for drawing in drawings])
    return measured.mean(axis=0), np.maximum(measured.std(axis=0), 1e-3)


def measure(image: Image.Image) -> np.ndarray:
    """The measures of a picture before they are standardised, (54,), in units of white or as shares."""
    pixels = ndimage.gaussian_filter(np.asarray(image.convert("RGB"), dtype=np.float64) / 255, (_BLUR_PX, _BLUR_PX, 0))
    outer = np.ones(pixels.shape[:2], dtype=bool)
    outer[2:-2, 2:-2] = False
    border = pixels[outer]
    apart = np.clip(np.abs(pixels - np.median(border, axis=0)).max(axis=2) * 4 - 0.4, 0, 1)
    cells = [cell.mean() for row in np.array_split(apart, 4) for cell in np.array_split(row, 4, axis=1)]
    weights = apart.reshape(-1, 1) / max(apart.sum(), 1)
    flat = pixels.reshape(-1, 3)
    paint = (weights * flat).sum(axis=0)
    spread = np.sqrt((weights * (flat - paint) ** 2).sum(axis=0))
    return np.concatenate(
        [border.mean(axis=0), border.std(axis=0), cells, paint, spread, *_edges(pixels), _grain(pixels)]
    )


def _edges(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strengths (6,) and directions (8,) of edges, and strengths of corners (6,), as shares of the pixels."""
    down, right = (np.stack([ndimage.sobel(pixels[..., c], axis) for c in range(3)], axis=2) / 8 for axis in (0, 1))
    products = ((right, right), (down, down), (right, down))
    tensor = [ndimage.gaussian_filter((a * b).sum(axis=2), 1.0) for a, b in products]
    strength = np.sqrt((down**2 + right**2).sum(axis=2))
    # The direction across the edge of the colour that changes most; a line has no head
    most = (down**2 + right**2).argmax(axis=2)[..., None]
    angle = np.arctan2(np.take_along_axis(down, most, 2), np.take_along_axis(right, most, 2))[..., 0] % np.pi
    directions = np.bincount((angle[strength > 0.1] / np.pi * 8).astype(int).clip(max=7), minlength=8) / strength.size
    mean, half = (tensor[0] + tensor[1]) / 2, np.hypot((tensor[0] - tensor[1]) / 2, tensor[2])
    smaller = np.sqrt(np.maximum(mean - half, 0))
    edges, corners = (
        np.bincount(np.digitize(value.ravel(), bounds), minlength=6) / value.size
        for value, bounds in ((strength, _STRENGTHS), (smaller, _STRENGTHS / 2))
    )
    return edges, directions, corners


def _grain(pixels: np.ndarray) -> np.ndarray:
    """Mean absolute second difference of each colour, (3,), and of their mean over steps of 1, 2 and 4 pixels."""

    def second(values: np.ndarray, step: int) -> np.ndarray:
        rows = np.abs(values[2 * step :] - 2 * values[step:-step] + values[: -2 * step]).mean(axis=(0, 1))
        across = values.transpose(1, 0, 2)
        return rows + np.abs(across[2 * step :] - 2 * across[step:-step] + across[: -2 * step]).mean(axis=(0, 1))

    return np.concatenate([second(pixels, 1), [second(pixels, step).mean() for step in (1, 2, 4)]])
