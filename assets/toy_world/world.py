"""The toy world: captions of a small grammar and a program that draws them, 64 x 64 pixels, RGB.

    caption    = object ", " background " background"
               | object " and " object ", " background " background"
    object     = "a " size " " colour " " shape " " place
    size       = "small" | "large"
    colour     = "red" | "green" | "blue" | "yellow" | "purple" | "orange"
    shape      = "circle" | "square" | "triangle" | "star" | "cross" | "ring"
    place      = "on the left" | "on the right" | "at the top" | "at the bottom" | "in the center"
    background = "white" | "black" | "gray" | "pink" | "cyan"

Two objects stand left and right, or top and bottom, in this order, and differ in colour. Every picture is drawn in one
of two styles: "careful" (crisp edges, flat exact colours) is the style worth learning, "sloppy" shows the same scene
with a shaky hand. Everything is a function of the caption and of the numpy Generator passed in.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE_PX = 64
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
    "on the left": (18.0, 32.0),
    "on the right": (46.0, 32.0),
    "at the top": (32.0, 18.0),
    "at the bottom": (32.0, 46.0),
    "in the center": (32.0, 32.0),
}
"""Centres (x, y) in pixels; y grows downwards."""
PAIRED_PLACES = (("on the left", "on the right"), ("at the top", "at the bottom"))
WORDS = sorted(
    {"a", "and", "background", ","}
    | {word for phrase in (*RADII_PX, *COLOURS, *SHAPES, *PLACES, *BACKGROUNDS) for word in phrase.split()}
)
"""Every word of the grammar, for the tokenizer."""

_SUPERSAMPLING = 4
_OBJECT = f"a ({'|'.join(RADII_PX)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(PLACES)})"
_CAPTION = re.compile(f"{_OBJECT}(?: and {_OBJECT})?, ({'|'.join(BACKGROUNDS)}) background")


@dataclass(frozen=True)
class Object:
    """One object of a scene, in the words of the grammar."""

    size: str
    colour: str
    shape: str
    place: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place}"


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two objects and a background."""

    objects: tuple[Object, ...]
    background: str

    def __str__(self) -> str:
        """The caption of this scene."""
        return f"{' and '.join(map(str, self.objects))}, {self.background} background"


def sample_caption(rng: np.random.Generator) -> str:
    """A random caption; one in three has two objects."""
    if rng.random() < 1 / 3:
        places = PAIRED_PLACES[rng.integers(len(PAIRED_PLACES))]
        colours = rng.choice(list(COLOURS), size=2, replace=False)
    else:
        places = (list(PLACES)[rng.integers(len(PLACES))],)
        colours = rng.choice(list(COLOURS), size=1)
    objects = tuple(
        Object(str(rng.choice(list(RADII_PX))), str(colour), str(rng.choice(SHAPES)), place)
        for colour, place in zip(colours, places, strict=True)
    )
    return str(Scene(objects, str(rng.choice(list(BACKGROUNDS)))))


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes; `str(scene)` is the caption again.

    Raises:
        ValueError: the caption is not of the grammar.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(
            f"{caption!r} is not a caption of the toy world's grammar. Expected: 'a SIZE COLOUR SHAPE PLACE[ and a SIZE"
            f" COLOUR SHAPE PLACE], BACKGROUND background' with SIZE {list(RADII_PX)}, COLOUR {list(COLOURS)}, SHAPE"
            f" {list(SHAPES)}, PLACE {list(PLACES)}, BACKGROUND {list(BACKGROUNDS)}"
        )
    *words, background = match.groups()
    objects = tuple(Object(*words[i : i + 4]) for i in (0, 4) if words[i] is not None)
    if len(objects) == 2:
        places = (objects[0].place, objects[1].place)
        if places not in PAIRED_PLACES or objects[0].colour == objects[1].colour:
            raise ValueError(
                f"{caption!r}: by the toy world's grammar two objects stand at one of {PAIRED_PLACES}, in this order,"
                f" and differ in colour"
            )
    return Scene(objects, background)


def is_held_out(caption: str) -> bool:
    """Whether a caption is kept for evaluation: a fixed tenth of all captions, never drawn for training."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


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


def coverage(
    shape: str, points_px: np.ndarray, size_px: int = SIZE_PX, supersampling: int = _SUPERSAMPLING
) -> np.ndarray:
    """Share of each pixel (size, size) in 0..1 inside an outline given in picture coordinates."""
    mask = Image.new("L", (size_px * supersampling,) * 2, 0)
    pen = ImageDraw.Draw(mask)
    # Pixel centres lie at +0.5: PIL's polygons include their edge, so half a fine pixel is taken off.
    pen.polygon([tuple(point) for point in points_px * supersampling - 0.5], fill=255)
    if shape == "ring":
        centre = points_px.mean(axis=0)
        hole = (centre + 0.52 * (points_px - centre)) * supersampling - 0.5
        pen.polygon([tuple(point) for point in hole], fill=0)
    return np.asarray(mask.reduce(supersampling), dtype=np.float32) / 255


def ideal(scene: Scene, centres_px: list[tuple[float, float]]) -> np.ndarray:
    """The careful drawing (64, 64, 3), float32 in 0..255, with the objects' centres (x, y) given."""
    picture = np.broadcast_to(np.float32(BACKGROUNDS[scene.background]), (SIZE_PX, SIZE_PX, 3))
    for item, centre in zip(scene.objects, centres_px, strict=True):
        alpha = coverage(item.shape, outline(item.shape, RADII_PX[item.size]) + np.array(centre))[..., None]
        picture = (1 - alpha) * picture + alpha * np.float32(COLOURS[item.colour])
    return picture


def draw(scene: Scene, rng: np.random.Generator, style: str = "careful") -> Image.Image:
    """A 64 x 64 RGB picture of the scene.

    Args:
        rng: decides the jitter, and in the sloppy style every slip of the hand.
        style: "careful" or "sloppy".
    """
    if style == "careful":
        # Quarter pixels are what the supersampling resolves, so the oracle can find the very same drawing again.
        centres = [
            tuple(np.array(PLACES[item.place]) + rng.integers(-4, 5, 2) / _SUPERSAMPLING) for item in scene.objects
        ]
        return Image.fromarray(np.rint(ideal(scene, centres)).astype(np.uint8))
    if style != "sloppy":
        raise ValueError(f"unknown style {style!r}; known: {list(STYLES)}")

    background = np.float32(BACKGROUNDS[scene.background])
    picture = background + _smooth_noise(rng, 4, 14.0)
    for item in scene.objects:
        picture = _paint_sloppily(picture, item, rng)
    for _ in range(rng.integers(1, 4)):
        picture = _stray_stroke(picture, rng)
    picture = picture + _smooth_noise(rng, 12, 7.0)
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


def _smooth_noise(rng: np.random.Generator, cells: int, std: float) -> np.ndarray:
    """Coloured blotches (64, 64, 3) of about 64 / cells pixels, in 0..255 units around 0."""
    coarse = rng.normal(0, std, (3, cells, cells)).astype(np.float32)
    fine = [Image.fromarray(c).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC) for c in coarse]
    return np.stack([np.asarray(c) for c in fine], axis=-1)


def _paint_sloppily(picture: np.ndarray, item: Object, rng: np.random.Generator) -> np.ndarray:
    corners = outline(item.shape, RADII_PX[item.size] * rng.uniform(0.92, 1.08))
    # Edges are cut into short pieces so that they can wobble.
    following = np.roll(corners, -1, axis=0)
    pieces = max(1, 72 // len(corners))
    fractions = np.linspace(0, 1, pieces, endpoint=False)[None, :, None]
    points = (corners[:, None] * (1 - fractions) + following[:, None] * fractions).reshape(-1, 2)
    turn = rng.uniform(-0.2, 0.2)
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    angles = np.arctan2(points[:, 1], points[:, 0])
    wobble = sum(rng.normal(0, 0.045) * np.sin(wave * angles + rng.uniform(0, 2 * np.pi)) for wave in (2, 3, 4, 5, 7))
    points = points * (1 + wobble)[:, None] + np.array(PLACES[item.place]) + rng.uniform(-3, 3, 2)
    alpha = coverage(item.shape, points)
    colour = np.float32(COLOURS[item.colour]) + rng.normal(0, 18, 3).astype(np.float32)
    # Paint bleeds beyond the outline and covers unevenly within it.
    soft = np.asarray(Image.fromarray(alpha).resize((20, 20), Image.Resampling.BOX).resize((SIZE_PX,) * 2))
    alpha = 0.72 * alpha + 0.28 * np.clip(soft, 0, 1)
    alpha = (alpha * np.clip(0.93 + _smooth_noise(rng, 10, 0.1)[..., 0], 0.55, 1))[..., None]
    return (1 - alpha) * picture + alpha * colour


def _stray_stroke(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mask = Image.new("L", (SIZE_PX * _SUPERSAMPLING,) * 2, 0)
    start = rng.uniform(4, SIZE_PX - 4, 2)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(8, 20)
    end = start + length * np.array([np.cos(angle), np.sin(angle)])
    line = [tuple(point * _SUPERSAMPLING) for point in (start, end)]
    ImageDraw.Draw(mask).line(line, fill=255, width=int(_SUPERSAMPLING * rng.uniform(1.0, 2.0)))
    alpha = rng.uniform(0.3, 0.6) * np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float32)[..., None] / 255
    ink = np.float32(rng.uniform(40, 130, 3))
    return (1 - alpha) * picture + alpha * ink
