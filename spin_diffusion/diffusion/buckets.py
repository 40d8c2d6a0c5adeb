"""Aspect-ratio buckets: images keep about their own shape, cropped to one of a few sizes of about the same area.

SDXL was trained so (arXiv 2307.01952, section 2.3), with sizes of up to 4 : 1 that are multiples of 64 px.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Size = tuple[int, int]
"""Height and width, px."""


def bucket_sizes(resolution: int, multiple: int, max_aspect_ratio: float) -> list[Size]:
    """The square first, then the wide sizes and the tall ones, none with more pixels than the square.

    For every long side, in steps of about a sixteenth of the square's, the longest short side that fits.

    Args:
        resolution: sides of the square, px; a multiple of `multiple`.
        multiple: of the sides that the networks take, px.
        max_aspect_ratio: of the long side to the short one; 1 = the square alone.
    """
    step = multiple * math.ceil(resolution / 16 / multiple)
    if resolution % step:
        step = multiple
    wide = []
    for long in itertools.count(resolution + step, step):
        short = resolution**2 // long // step * step
        if short < step or long / short > max_aspect_ratio:
            break
        wide.append((short, long))
    return [(resolution, resolution), *wide, *((long, short) for short, long in wide)]


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The size whose aspect ratio is the nearest; of equally near ones the first."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def places_by_size(sizes: Iterable[Size]) -> dict[Size, list[int]]:
    """Where each size occurs, in order."""
    places: dict[Size, list[int]] = {}
    for place, size in enumerate(sizes):
        places.setdefault(size, []).append(place)
    return places


def packed(rows: list[Tensor], cells: int) -> Tensor:
    """Rows of (channels, height, width) that differ in size as one (rows, channels, cells), filled up with 0."""
    together = rows[0].new_zeros(len(rows), len(rows[0]), cells)
    for row, values in zip(together, rows, strict=True):
        row[:, : values[0].numel()] = values.flatten(1)
    return together


def unpacked(rows: Tensor, height: int, width: int) -> Tensor:
    """Rows of one size out of `packed`: (rows, channels, height, width)."""
    return rows[:, :, : height * width].unflatten(2, (height, width))


def area_share(sizes: Sequence[Size], which: Tensor) -> float:
    """Mean area of the images of these sizes, given by their places in `sizes`, in parts of the square's."""
    areas = torch.tensor([height * width for height, width in sizes], dtype=torch.float64)
    return float(areas[which.long()].mean() / areas[0])


def sizes_in_words(sizes: Sequence[Size], which: Tensor, most: int = 4) -> str:
    """How many images have which size, for people: the most frequent ones by name."""
    counts = Counter(which.tolist()).most_common()
    named = ", ".join(f"{sizes[place][1]} x {sizes[place][0]} ({count:,})" for place, count in counts[:most])
    rest = f" and {len(counts) - most} more" if len(counts) > most else ""
    return f"{named}{rest}, width x height in px"
