"""The oracle: how well a picture shows its toy-world caption, known exactly because the world is drawn by rule.

A scorer plug-in: `load(device)` returns `(images, captions) -> scores (batch,)`, higher = better, in 0..1. With

    object    = mean(colour, shape, size, place)                 each in 0..1
    right     = (background + 2 object) / 3
    clean     = 1 / (1 + (rmse / 0.07)^2)                        rmse in 0..1 units against the ideal drawing
    score     = right * (0.5 + 0.5 * clean)

What a picture shows is first measured without its caption (`measure`): the background from the border, the object from
what differs from the background, its colour by the nearest palette colour, its shape and size by the best overlap
(soft IoU) with templates of every shape and radius. What the caption leaves unsaid may be anything that can be drawn:
the word that fits the picture best is taken, and the object may stand anywhere. `rmse` compares the picture with the
careful drawing of that scene, its object put where the picture has it (at most 3 px from its place, if that is said).
Runs on the CPU whatever the device; knows nothing about models.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from spin_diffusion.evaluation.scorers import About

ABOUT = About(
    title="Oracle",
    scale="0 to 1: how much of the caption the picture shows, times how cleanly it is drawn",
    role="truth",
    preprocessing="64 x 64, 80 x 48 or 48 x 80 pixels, whichever is nearest in shape, RGB",
    text="captions of the toy world's grammar",
    licence="Apache-2.0",
)


def _load_world() -> ModuleType:
    """world.py beside this file, also when this file is itself loaded by its path."""
    path = Path(__file__).resolve().with_name("world.py")
    spec = importlib.util.spec_from_file_location("toy_world_world", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is executed
    spec.loader.exec_module(module)
    return module


world = _load_world()

_WINDOW_PX = 40
_RADII_PX = np.arange(5.0, 17.01, 0.5)
_BACKGROUND_RGB = np.array(list(world.BACKGROUNDS.values()), dtype=np.float32)
_COLOUR_RGB = np.array(list(world.COLOURS.values()), dtype=np.float32)
_MIN_OBJECT_PX = 20.0


@dataclass(frozen=True)
class Seen:
    """What a picture shows; where there is no object, its numbers are 0."""

    pixels: np.ndarray
    """(height, width, 3), float32 in 0..255."""
    backgrounds: np.ndarray
    """Share of the border, a frame 2 px wide, that is nearest to each background's colour (5,)."""
    colours: np.ndarray
    """Share of the object that is nearest to each colour (6,)."""
    coverage: np.ndarray
    """How far each pixel is from the background's towards the object's colour (height, width), in 0..1."""
    centre_px: np.ndarray
    """Of the object, (x, y)."""
    overlaps: np.ndarray
    """Soft IoU with each shape in its best radius (6,), in 0..1."""
    radii_px: np.ndarray
    """Those radii (6,)."""


def load(device: str = "cpu") -> Callable[[list[Image.Image], list[str]], torch.Tensor]:
    """The scorer. `device` is accepted for the plug-in's signature; the oracle is numpy on the CPU.

    Returns:
        (images, captions) -> float32 scores (batch,) in 0..1, higher = better. A caption that is not of the toy
        world's grammar is a ValueError.
    """

    def score(images: list[Image.Image], captions: list[str]) -> torch.Tensor:
        scores = [details(image, caption)["score"] for image, caption in zip(images, captions, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    return score


def details(image: Image.Image, caption: str) -> dict[str, float]:
    """Every part of the score, each in 0..1: background, colour, shape, size, place, right, clean and score."""
    return compare(measure(image), world.parse_caption(caption))


def compare(seen: Seen, scene: "world.Scene") -> dict[str, float]:
    """`details` of a picture that has been measured, against a scene."""
    size_px = seen.pixels.shape[1::-1]
    full = complete(scene, seen)
    shape, size = list(world.SHAPES).index(full.shape), full.size
    allowed = _allowed_px(scene.place, size_px)
    parts = {"background": float(seen.backgrounds[list(world.BACKGROUNDS).index(full.background)])}
    parts |= {"colour": 0.0, "shape": 0.0, "size": 0.0, "place": 0.0}
    if seen.overlaps.any():
        margin = seen.overlaps[shape] - np.delete(seen.overlaps, shape).max()
        off = abs(np.log(seen.radii_px[shape] / world.RADII_PX[size]))
        midway = np.log(world.RADII_PX["large"] / world.RADII_PX["small"]) / 2
        away = float(np.linalg.norm(seen.centre_px - seen.centre_px.clip(*allowed)))
        parts["colour"] = _ramp(seen.colours[list(world.COLOURS).index(full.colour)], 0.3, 0.8)
        # Half credit where another shape fits as well as the wanted one.
        parts["shape"] = _ramp(margin, -0.06, 0.06) * _ramp(seen.overlaps[shape], 0.4, 0.75)
        parts["size"] = _ramp(midway - off, -0.08, 0.14)
        parts["place"] = _ramp(-away, -5.0, -2.0)
    right = (parts["background"] + 2 * np.mean([parts[p] for p in ("colour", "shape", "size", "place")])) / 3
    at = _best_centre(seen.coverage, seen.centre_px, shape, world.RADII_PX[size])
    rmse = np.sqrt(np.mean((seen.pixels - world.ideal(full, at.clip(allowed[0] - 3, allowed[1] + 3), size_px)) ** 2))
    clean = 1 / (1 + (rmse / 255 / 0.07) ** 2)
    return parts | {"right": float(right), "clean": float(clean), "score": float(right * (0.5 + 0.5 * clean))}


def complete(scene: "world.Scene", seen: Seen) -> "world.Scene":
    """The scene with what fits the picture best for what is unsaid, but for the place."""
    shape = scene.shape or world.SHAPES[seen.overlaps.argmax()]
    radius = seen.radii_px[world.SHAPES.index(shape)] or 1.0
    return replace(
        scene,
        shape=shape,
        size=scene.size or min(world.RADII_PX, key=lambda word: abs(np.log(radius / world.RADII_PX[word]))),
        colour=scene.colour or list(world.COLOURS)[seen.colours.argmax()],
        background=scene.background or list(world.BACKGROUNDS)[seen.backgrounds.argmax()],
    )


def measure(image: Image.Image) -> Seen:
    """What a picture shows, whatever its caption."""
    if image.size not in world.SIZES_PX:
        aspect = image.width / image.height
        nearest = min(world.SIZES_PX, key=lambda size: abs(np.log(size[0] / size[1] / aspect)))
        image = image.resize(nearest, Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[2:-2, 2:-2] = True
    border = pixels[~inner]
    labels = _nearest(border, _BACKGROUND_RGB)
    backgrounds = np.bincount(labels, minlength=len(_BACKGROUND_RGB)) / len(labels)
    background_rgb = np.median(border[labels == backgrounds.argmax()], axis=0)
    nothing = np.zeros(len(world.SHAPES))
    middle = np.array(image.size) / 2
    without = Seen(pixels, backgrounds, np.zeros(len(_COLOUR_RGB)), 0 * pixels[..., 0], middle, nothing, nothing)

    distance = np.linalg.norm(pixels - background_rgb, axis=-1)
    core = distance > 75
    if core.sum() < _MIN_OBJECT_PX:
        return without
    sample = _inside(pixels, core)
    colours = np.bincount(_nearest(sample, _COLOUR_RGB), minlength=len(_COLOUR_RGB)) / len(sample)
    direction = np.median(sample, axis=0) - background_rgb
    alpha = np.clip((pixels - background_rgb) @ direction / max(float(direction @ direction), 1.0), 0, 1)
    alpha = np.where((distance > 30) & (alpha > 0.12), alpha, 0).astype(np.float32)
    # Strokes and specks far from the object do not move its centre: second look around the first centre.
    centre = _mean_place(alpha)
    for _ in range(2):
        near = alpha * (_distance_from(centre, alpha.shape) < 19)
        if near.sum() < _MIN_OBJECT_PX:
            return without
        centre = _mean_place(near)
    iou = _overlaps(alpha, centre)
    return Seen(pixels, backgrounds, colours, alpha, centre, iou.max(axis=1), _RADII_PX[iou.argmax(axis=1)])


def _nearest(rgb: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the nearest colour (pixels,)."""
    return ((rgb[:, None] - palette) ** 2).sum(-1).argmin(axis=1)


def _inside(pixels: np.ndarray, core: np.ndarray) -> np.ndarray:
    """The object's pixels (n, 3) whose neighbours belong to it too: edges blend with the background."""
    inside = core & np.roll(core, 1, 0) & np.roll(core, -1, 0) & np.roll(core, 1, 1) & np.roll(core, -1, 1)
    return pixels[inside if inside.sum() >= 12 else core]


def _mean_place(weights: np.ndarray) -> np.ndarray:
    """Weighted mean place (x, y), px."""
    rows, columns = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
    return np.array([np.average(columns, weights=weights), np.average(rows, weights=weights)])


def _distance_from(centre: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Distance (height, width) of each pixel from a place (x, y), px."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    return np.hypot(columns - centre[0], rows - centre[1])


def _allowed_px(place: str | None, size_px: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest centre (x, y) that the place allows, but for jitter."""
    if place is None:
        low = np.full(2, world.MARGIN_PX)
        return low, np.array(size_px) - low
    return world.centre(place, size_px), world.centre(place, size_px)


def _ramp(value: float, low: float, high: float) -> float:
    """0 below low, 1 above high, linear between."""
    return float(np.clip((value - low) / (high - low), 0, 1))


def _overlaps(alpha: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Soft IoU (shapes, radii) between a coverage map and every template centred at `centre` (x, y)."""
    window, fraction = _window(np.pad(alpha, _WINDOW_PX // 2), centre)
    templates, areas = _templates(*fraction)
    intersection = np.minimum(templates, window).sum(axis=-1)
    return intersection / (areas + window.sum() - intersection)


def _best_centre(alpha: np.ndarray, centre: np.ndarray, shape: int, radius_px: float) -> np.ndarray:
    """The centre (x, y), to a quarter pixel near the one given, where the wanted shape and size overlap most."""
    radius = int(np.abs(_RADII_PX - radius_px).argmin())
    padded = np.pad(alpha, _WINDOW_PX // 2)
    steps = np.arange(-0.75, 0.76, 0.25)
    candidates = [np.round(centre * 4) / 4 + (dx, dy) for dx in steps for dy in steps]

    def overlap(candidate: np.ndarray) -> float:
        window, fraction = _window(padded, candidate)
        templates, areas = _templates(*fraction)
        intersection = np.minimum(templates[shape, radius], window).sum()
        return intersection / (areas[shape, radius] + window.sum() - intersection)

    return max(candidates, key=overlap)


def _window(padded: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The coverage (pixels,) around a centre (x, y) to a quarter pixel, and that centre's fractions of a pixel."""
    snapped = np.round(centre * 4) / 4
    corner = np.floor(snapped).astype(int)
    window = padded[corner[1] : corner[1] + _WINDOW_PX, corner[0] : corner[0] + _WINDOW_PX]
    return window.ravel(), (float(snapped[0] - corner[0]), float(snapped[1] - corner[1]))


@functools.lru_cache(maxsize=16)
def _templates(x_fraction: float, y_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Templates (shapes, radii, window pixels) centred in the window plus a fraction of a pixel, and their areas."""
    centre = _WINDOW_PX / 2 + np.array([x_fraction, y_fraction])
    size_px = (_WINDOW_PX, _WINDOW_PX)
    templates = np.array(
        [
            [world.coverage(shape, world.outline(shape, radius) + centre, size_px).ravel() for radius in _RADII_PX]
            for shape in world.SHAPES
        ]
    )
    return templates, templates.sum(axis=-1)
