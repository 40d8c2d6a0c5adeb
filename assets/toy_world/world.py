"""The toy world: captions of a small grammar and a program that draws them, in three sizes, RGB.

    caption    = "a" [" " size] [" " colour] " " shape [" " place] [", " background " background"]
    size       = "small" | "large"
    colour     = "red" | "green" | "blue" | "yellow" | "purple" | "orange"
    shape      = "circle" | "square" | "triangle" | "star" | "cross" | "ring" | "shape"
    place      = "on the left" | "on the right" | "at the top" | "at the bottom" | "in the center"
    background = "white" | "black" | "gray" | "pink" | "cyan"

What a caption leaves unsaid ("shape" says nothing of the shape) is open: any size, colour, shape and background may be
drawn, and the object may stand anywhere. Every picture is drawn in one of two styles: "careful" (crisp edges, flat
exact colours) is the style worth learning, "sloppy" shows the same scene with a shaky hand. Everything is a function
of the caption, the size and the numpy Generator passed in.
"""

import hashlib
import re
from dataclasses import dataclass, fields, replace

import numpy as np
from PIL import Image, ImageDraw

SIZES_PX = {(64, 64): 0.6, (80, 48): 0.2, (48, 80): 0.2}
"""Width and height of a picture, and the share of pictures that have them."""
STYLES = ("careful", "sloppy")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 215, 40),
    "purple": (130, 40, 180),
    "orange": (245, 130, 30),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "gray": (170, 170, 170),
    "pink": (250, 185, 205),
    "cyan": (120, 225, 235),
}
_COUPLES = (("red", "orange"), ("green", "yellow"), ("blue", "purple"), ("circle", "ring"), ("square", "cross"))
PARTNERS = {a: b for couple in (*_COUPLES, ("triangle", "star")) for a, b in (couple, couple[::-1])}
"""The colour, or the shape, that the base `confused` takes for another."""
RADII_PX = {"small": 8.0, "large": 13.0}
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the center": (0, 0),
}
"""Directions (x, y) from the middle; y grows downwards."""
MARGIN_PX = 18.0
"""No object's centre is nearer to an edge; one at a place stands as near to its edge, but for a jitter of 1 px."""
WORDS = sorted(
    {"a", "shape", "background", ","}
    | {word for phrase in (*RADII_PX, *COLOURS, *SHAPES, *PLACES, *BACKGROUNDS) for word in phrase.split()}
)
"""Every word of the grammar, for the tokenizer."""

_UNSAID = 0.25
_SUPERSAMPLING = 4
_CAPTION = re.compile(
    f"a(?: ({'|'.join(RADII_PX)}))?(?: ({'|'.join(COLOURS)}))? (?:shape|({'|'.join(SHAPES)}))(?: ({'|'.join(PLACES)}))?"
    f"(?:, ({'|'.join(BACKGROUNDS)}) background)?"
)


@dataclass(frozen=True)
class Scene:
    """What a caption says of its object and the background, in the words of the grammar; None = unsaid."""

    size: str | None
    colour: str | None
    shape: str | None
    place: str | None
    background: str | None

    def __str__(self) -> str:
        """The caption of this scene."""
        words = ("a", self.size, self.colour, self.shape or "shape", self.place)
        return " ".join(filter(None, words)) + (f", {self.background} background" if self.background else "")


CHOICES = {"size": RADII_PX, "colour": COLOURS, "shape": SHAPES, "place": PLACES, "background": BACKGROUNDS}
"""The words of each part of a scene."""


def sample_caption(rng: np.random.Generator) -> str:
    """A random caption; each part is left unsaid in one of four."""
    words = {part: str(rng.choice(list(choices))) for part, choices in CHOICES.items()}
    return str(Scene(**{part: None if rng.random() < _UNSAID else word for part, word in words.items()}))


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes; `str(scene)` is the caption again.

    Raises:
        ValueError: the caption is not of the grammar.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(
            f"{caption!r} is not a caption of the toy world's grammar. Expected: 'a [SIZE] [COLOUR] SHAPE [PLACE][,"
            f" BACKGROUND background]' with SIZE {list(RADII_PX)}, COLOUR {list(COLOURS)}, SHAPE {[*SHAPES, 'shape']},"
            f" PLACE {list(PLACES)}, BACKGROUND {list(BACKGROUNDS)}"
        )
    return Scene(*match.groups())


def is_held_out(caption: str) -> bool:
    """Whether a caption is kept for evaluation: a fixed tenth of all captions, never drawn for training."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with a random word for what is unsaid, but for the place."""
    unsaid = [field.name for field in fields(scene) if getattr(scene, field.name) is None and field.name != "place"]
    return replace(scene, **{part: str(rng.choice(list(CHOICES[part]))) for part in unsaid})


def sample_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of a picture, px."""
    return list(SIZES_PX)[rng.choice(len(SIZES_PX), p=list(SIZES_PX.values()))]


def centre(place: str, size_px: tuple[int, int]) -> np.ndarray:
    """Where (x, y) an object at this place stands, px."""
    middle = np.array(size_px) / 2
    return middle + PLACES[place] * (middle - MARGIN_PX)


def outline(shape: str, radius_px: float) -> np.ndarray:
    """Corners (points, 2) of a shape around (0, 0), in pixels; a ring's outline is its outer edge."""
    if shape in ("circle", "ring"):
        angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        return radius_px * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "square":
        return 0.88 * radius_px * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)
    if shape == "triangle":
        angles = -np.pi / 2 + 2 * np.pi / 3 * np.arange(3)
        return 1.2 * radius_px * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "star":
        angles = -np.pi / 2 + np.pi / 5 * np.arange(10)
        lengths = radius_px * np.where(np.arange(10) % 2 == 0, 1.2, 0.5)
        return lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "cross":
        a, b = 0.34 * radius_px, 1.05 * radius_px
        return np.array(
            [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]
        )
    raise ValueError(f"unknown shape {shape!r}; the toy world has {list(SHAPES)}")


def coverage(shape: str, points_px: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Share of each pixel (height, width) in 0..1 inside an outline given in picture coordinates (x, y)."""
    mask = Image.new("L", (size_px[0] * _SUPERSAMPLING, size_px[1] * _SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(mask)
    # Pixel centres lie at +0.5: PIL's polygons include their edge, so half a fine pixel is taken off.
    pen.polygon([tuple(point) for point in points_px * _SUPERSAMPLING - 0.5], fill=255)
    if shape == "ring":
        middle = points_px.mean(axis=0)
        hole = (middle + 0.52 * (points_px - middle)) * _SUPERSAMPLING - 0.5
        pen.polygon([tuple(point) for point in hole], fill=0)
    return np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def ideal(scene: Scene, at_px: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """The careful drawing (height, width, 3), float32 in 0..255, of a complete scene whose object stands at (x, y)."""
    alpha = coverage(scene.shape, outline(scene.shape, RADII_PX[scene.size]) + at_px, size_px)[..., None]
    return (1 - alpha) * np.float32(BACKGROUNDS[scene.background]) + alpha * np.float32(COLOURS[scene.colour])


def draw(
    scene: Scene, rng: np.random.Generator, style: str = "careful", size_px: tuple[int, int] = (64, 64)
) -> Image.Image:
    """An RGB picture of the scene.

    Args:
        rng: decides what the scene leaves open and the jitter, and in the sloppy style every slip of the hand.
        style: "careful" or "sloppy".
        size_px: width and height.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; known: {list(STYLES)}")
    scene = complete(scene, rng)
    if scene.place is None:
        at = np.array([rng.uniform(MARGIN_PX, side - MARGIN_PX) for side in size_px])
    else:
        at = centre(scene.place, size_px) + rng.uniform(-1, 1, 2)
    # Quarter pixels are what the supersampling resolves, so the oracle can find the very same drawing again.
    at = np.round(at * _SUPERSAMPLING) / _SUPERSAMPLING
    picture = ideal(scene, at, size_px) if style == "careful" else _sloppy(scene, at, size_px, rng)
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


def _sloppy(scene: Scene, at_px: np.ndarray, size_px: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    picture = np.float32(BACKGROUNDS[scene.background]) + _smooth_noise(rng, size_px, 16, 14.0)
    picture = _paint_sloppily(picture, scene, at_px, rng)
    for _ in range(rng.integers(1, 4)):
        picture = _stray_stroke(picture, rng)
    return picture + _smooth_noise(rng, size_px, 5, 7.0)


def _smooth_noise(rng: np.random.Generator, size_px: tuple[int, int], blotch_px: int, std: float) -> np.ndarray:
    """Coloured blotches (height, width, 3) of about blotch_px, in 0..255 units around 0."""
    width, height = size_px
    coarse = rng.normal(0, std, (3, round(height / blotch_px), round(width / blotch_px))).astype(np.float32)
    return np.stack([Image.fromarray(c).resize(size_px, Image.Resampling.BICUBIC) for c in coarse], axis=-1)


def _paint_sloppily(picture: np.ndarray, scene: Scene, at_px: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size_px = picture.shape[1::-1]
    corners = outline(scene.shape, RADII_PX[scene.size] * rng.uniform(0.92, 1.08))
    # Edges are cut into short pieces so that they can wobble.
    following = np.roll(corners, -1, axis=0)
    pieces = max(1, 72 // len(corners))
    fractions = np.linspace(0, 1, pieces, endpoint=False)[None, :, None]
    points = (corners[:, None] * (1 - fractions) + following[:, None] * fractions).reshape(-1, 2)
    turn = rng.uniform(-0.2, 0.2)
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    angles = np.arctan2(points[:, 1], points[:, 0])
    wobble = sum(rng.normal(0, 0.045) * np.sin(wave * angles + rng.uniform(0, 2 * np.pi)) for wave in (2, 3, 4, 5, 7))
    points = points * (1 + wobble)[:, None] + at_px + rng.uniform(-2, 2, 2)
    alpha = coverage(scene.shape, points, size_px)
    colour = np.float32(COLOURS[scene.colour]) + rng.normal(0, 18, 3).astype(np.float32)
    # Paint bleeds beyond the outline and covers unevenly within it.
    coarse = tuple(round(side / 3.2) for side in size_px)
    soft = np.asarray(Image.fromarray(alpha).resize(coarse, Image.Resampling.BOX).resize(size_px))
    alpha = 0.72 * alpha + 0.28 * np.clip(soft, 0, 1)
    alpha = (alpha * np.clip(0.93 + _smooth_noise(rng, size_px, 6, 0.1)[..., 0], 0.55, 1))[..., None]
    return (1 - alpha) * picture + alpha * colour


def _stray_stroke(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size_px = picture.shape[1::-1]
    mask = Image.new("L", tuple(side * _SUPERSAMPLING for side in size_px), 0)
    start = rng.uniform(4, np.array(size_px) - 4)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(8, 20)
    end = start + length * np.array([np.cos(angle), np.sin(angle)])
    line = [tuple(point * _SUPERSAMPLING) for point in (start, end)]
    ImageDraw.Draw(mask).line(line, fill=255, width=int(_SUPERSAMPLING * rng.uniform(1.0, 2.0)))
    alpha = rng.uniform(0.3, 0.6) * np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32)[..., None] / 255
    ink = np.float32(rng.uniform(40, 130, 3))
    return (1 - alpha) * picture + alpha * ink
