"""The oracle: how well a picture shows its toy-world caption, known exactly because the world is drawn by rule.

A scorer plug-in: `load(device)` returns `(images, captions) -> scores (batch,)`, higher = better, in 0..1. With

    object    = mean(colour, shape, size, place)                 each in 0..1, per object of the caption
    right     = (background + sum of object over the objects) / (1 + number of objects), weights 1 : 2 per object
    clean     = 1 / (1 + (rmse / 0.07)^2)                        rmse in 0..1 units against the ideal drawing
    score     = right * (0.5 + 0.5 * clean)

`rmse` compares the picture with the careful drawing of the caption, its objects put where the picture has them (at
most 3 px from their place). The picture's own background and objects are found from its pixels: the background from
the border, an object from what differs from the background (for two objects, in its half of the picture), its colour by
the nearest palette colour, its shape and size by the best overlap (soft IoU) with templates of every shape and radius.
Runs on the CPU whatever the device; knows nothing about models.
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

from spin_diffusion.evaluation.scorers import About

ABOUT = About(
    title="Oracle",
    scale="0 to 1: how much of the caption the picture shows, times how cleanly it is drawn",
    role="truth",
    preprocessing="64 x 64 pixels, RGB",
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
_FRACTIONS = (0.0, 0.25, 0.5, 0.75)
_RADII_PX = np.arange(5.0, 17.01, 0.5)
_BACKGROUND_NAMES, _COLOUR_NAMES = list(world.BACKGROUNDS), list(world.COLOURS)
_BACKGROUND_RGB = np.array([world.BACKGROUNDS[name] for name in _BACKGROUND_NAMES], dtype=np.float32)
_COLOUR_RGB = np.array([world.COLOURS[name] for name in _COLOUR_NAMES], dtype=np.float32)
_MIN_OBJECT_PX = 20.0


def load(device: str = "cpu") -> Callable[[list[Image.Image], list[str]], torch.Tensor]:
    """The scorer. `device` is accepted for the plug-in's signature; the oracle is numpy on the CPU.

    Returns:
        (images, captions) -> float32 scores (batch,) in 0..1, higher = better. A caption that is not of the toy
        world's grammar is a ValueError.
    """

    def score(images: list[Image.Image], captions: list[str]) -> torch.Tensor:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images for {len(captions)} captions; one caption per image is needed")
        return torch.tensor(
            [details(image, caption)["score"] for image, caption in zip(images, captions, strict=True)],
            dtype=torch.float32,
        )

    return score


def details(image: Image.Image, caption: str) -> dict[str, float]:
    """Every part of the score, each in 0..1: background, colour, shape, size, place (means over the caption's objects),
    right, clean and score."""
    return scene_details(image, world.parse_caption(caption))


def scene_details(image: Image.Image, scene: "world.Scene") -> dict[str, float]:
    """`details` of a scene, which may be one that no caption describes: two objects of one colour."""
    if image.size != (world.SIZE_PX, world.SIZE_PX):
        image = image.resize((world.SIZE_PX, world.SIZE_PX), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)

    border = _border(pixels)
    labels = np.argmin(((border[:, None] - _BACKGROUND_RGB) ** 2).sum(-1), axis=1)
    background = float(np.mean(labels == _BACKGROUND_NAMES.index(scene.background)))
    majority = np.bincount(labels, minlength=len(_BACKGROUND_NAMES)).argmax()
    background_rgb = np.median(border[labels == majority], axis=0)

    found = [_inspect(pixels, background_rgb, item, len(scene.objects)) for item in scene.objects]
    parts = {name: float(np.mean([entry[name] for entry, _ in found])) for name in ("colour", "shape", "size", "place")}
    right = (background + 2 * len(found) * float(np.mean(list(parts.values())))) / (1 + 2 * len(found))

    centres = [
        tuple(np.clip(centre - np.array(world.PLACES[item.place]), -3, 3) + world.PLACES[item.place])
        for item, (_, centre) in zip(scene.objects, found, strict=True)
    ]
    rmse = float(np.sqrt(np.mean((pixels - world.ideal(scene, centres)) ** 2))) / 255
    clean = 1 / (1 + (rmse / 0.07) ** 2)
    return {"background": background, **parts, "right": right, "clean": clean, "score": right * (0.5 + 0.5 * clean)}


def _border(pixels: np.ndarray) -> np.ndarray:
    """The pixels (n, 3) of a frame 2 px wide, which no object reaches."""
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[2:-2, 2:-2] = True
    return pixels[~inner]


def _inspect(
    pixels: np.ndarray, background_rgb: np.ndarray, item: "world.Object", num_objects: int
) -> tuple[dict[str, float], np.ndarray]:
    """Scores of the object found where `item` should be, and its centre (x, y) in pixels."""
    place = np.array(world.PLACES[item.place])
    distance = np.linalg.norm(pixels - background_rgb, axis=-1)
    if num_objects == 2:
        # Each object owns its half of the picture.
        axis = 1 if item.place in world.PAIRED_PLACES[0] else 0
        half = np.arange(world.SIZE_PX) < world.SIZE_PX // 2
        mine = half if item.place in ("on the left", "at the top") else ~half
        distance = np.where(mine[None, :] if axis == 1 else mine[:, None], distance, 0)
    core = distance > 75
    nothing = {"colour": 0.0, "shape": 0.0, "size": 0.0, "place": 0.0}
    if core.sum() < _MIN_OBJECT_PX:
        return nothing, place

    # The colour is read inside the object; edges blend with the background.
    inside = core & np.roll(core, 1, 0) & np.roll(core, -1, 0) & np.roll(core, 1, 1) & np.roll(core, -1, 1)
    sample = pixels[inside if inside.sum() >= 12 else core]
    labels = np.argmin(((sample[:, None] - _COLOUR_RGB) ** 2).sum(-1), axis=1)
    share = float(np.mean(labels == _COLOUR_NAMES.index(item.colour)))
    colour_rgb = np.median(sample, axis=0)

    # Soft coverage: how far a pixel is from the background towards the object's colour.
    direction = colour_rgb - background_rgb
    alpha = np.clip((pixels - background_rgb) @ direction / max(float(direction @ direction), 1.0), 0, 1)
    alpha = np.where((distance > 30) & (alpha > 0.12), alpha, 0).astype(np.float32)
    rows, columns = np.mgrid[: world.SIZE_PX, : world.SIZE_PX] + 0.5
    # Strokes and specks far from the object do not move its centre: second look around the first centre.
    centre = np.array([np.average(columns, weights=alpha), np.average(rows, weights=alpha)])
    for _ in range(2):
        near = alpha * (np.hypot(columns - centre[0], rows - centre[1]) < 19)
        if near.sum() < _MIN_OBJECT_PX:
            return nothing, place
        centre = np.array([np.average(columns, weights=near), np.average(rows, weights=near)])

    iou = _overlaps(alpha, centre)
    per_shape = iou.max(axis=1)
    wanted = world.SHAPES.index(item.shape)
    rival = np.delete(per_shape, wanted).max()
    radius = _RADII_PX[iou[wanted].argmax()]
    off = abs(np.log(radius / world.RADII_PX[item.size]))
    midway = np.log(world.RADII_PX["large"] / world.RADII_PX["small"]) / 2
    return {
        "colour": _ramp(share, 0.3, 0.8),
        # Half credit where another shape fits as well as the wanted one.
        "shape": _ramp(per_shape[wanted] - rival, -0.06, 0.06) * _ramp(per_shape[wanted], 0.4, 0.75),
        "size": _ramp(midway - off, -0.08, 0.14),
        "place": _ramp(-float(np.hypot(*(centre - place))), -9.0, -2.5),
    }, _best_centre(alpha, centre, wanted, world.RADII_PX[item.size])


def _ramp(value: float, low: float, high: float) -> float:
    """0 below low, 1 above high, linear between."""
    return float(np.clip((value - low) / (high - low), 0, 1))


def _overlaps(alpha: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Soft IoU (shapes, radii) between a coverage map (64, 64) and every template centred at `centre` (x, y)."""
    window, templates, areas = _window(alpha, centre)
    intersection = np.minimum(templates, window).sum(axis=-1)
    return intersection / (areas + window.sum() - intersection)


def _best_centre(alpha: np.ndarray, centre: np.ndarray, shape_index: int, radius_px: float) -> np.ndarray:
    """The centre (x, y), to a quarter pixel near the one given, where the wanted shape and size overlap most."""
    radius_index = int(np.abs(_RADII_PX - radius_px).argmin())
    steps = np.arange(-0.75, 0.76, 0.25)
    candidates = [np.round(centre * 4) / 4 + (dx, dy) for dx in steps for dy in steps]

    def overlap(candidate: np.ndarray) -> float:
        window, templates, areas = _window(alpha, candidate)
        intersection = np.minimum(templates[shape_index, radius_index], window).sum()
        return intersection / (areas[shape_index, radius_index] + window.sum() - intersection)

    return max(candidates, key=overlap)


def _window(alpha: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The coverage (pixels,) around a centre (x, y), and the templates and areas that are centred alike."""
    half = _WINDOW_PX // 2
    snapped = np.round(centre * 4) / 4
    corner = np.floor(snapped).astype(int)
    x_fraction, y_fraction = snapped - corner
    padded = np.pad(alpha, half)
    window = padded[corner[1] : corner[1] + _WINDOW_PX, corner[0] : corner[0] + _WINDOW_PX]
    return window.ravel(), *_templates(float(x_fraction), float(y_fraction))


@functools.lru_cache(maxsize=16)
def _templates(x_fraction: float, y_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Templates (shapes, radii, window pixels) centred in the window plus a fraction of a pixel, and their areas."""
    centre = _WINDOW_PX / 2 + np.array([x_fraction, y_fraction])
    templates = np.array(
        [
            [world.coverage(shape, world.outline(shape, radius) + centre, _WINDOW_PX).ravel() for radius in _RADII_PX]
            for shape in world.SHAPES
        ]
    )
    return templates, templates.sum(axis=-1)
