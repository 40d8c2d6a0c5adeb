"""Pixels as the scorers' models were trained to read them, by Pillow and torch alone.

Two ways lead to a square. `crop_middle` resizes the short side and cuts off the rest (CLIP, PickScore, ImageReward,
aesthetics); `letterbox` resizes the long side and fills up with black (HPS). Processors of libraries are not used: what
they return depends on which other packages are installed, and scores would with it.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.store.pictures import to_rgb

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of CLIP's training images, per channel, in units of white."""


def without_far_ends(image: Image.Image) -> Image.Image:
    """The image; of a long strip the middle, 16 times as long as wide: the rest is far from the middle square, and
    resized with it, it would take gigabytes."""
    width, height = image.size
    left, top = max(0, width - 16 * height) // 2, max(0, height - 16 * width) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def crop_middle(image: Image.Image, side: int, offset: Literal["floor", "round"]) -> Float[Tensor, "3 side side"]:
    """RGB, short side to `side` px (Pillow's bicubic), middle square, normalised with CLIP's mean and deviation.

    Args:
        offset: how half of an odd margin is made whole: "floor" as in transformers (CLIP, PickScore), "round" to even
            as in torchvision (ImageReward). It moves the square by one pixel, and only for odd margins.
    """
    image = without_far_ends(to_rgb(image))
    short, long = min(image.size), max(image.size)
    resized_long = int(side * long / short)
    size = (side, resized_long) if image.width <= image.height else (resized_long, side)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 if offset == "floor" else round((length - side) / 2) for length in size)
    return _normalised(_to_unit(image.crop((left, top, left + side, top + side))))


def crop_middle_floor(image: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """`crop_middle` with offsets rounded down: CLIP, PickScore, aesthetics."""
    return crop_middle(image, side, "floor")


def crop_middle_round(image: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """`crop_middle` with offsets rounded to the nearest even: ImageReward."""
    return crop_middle(image, side, "round")


def letterbox(image: Image.Image, side: int, antialias: bool = True) -> Float[Tensor, "3 side side"]:
    """RGB in [0, 1], long side to `side` px (bicubic on floats, not clipped), black bars, normalised: HPS.

    Args:
        antialias: torchvision resizes tensors with it since 0.17; older numbers of HPS may have been computed without.
    """
    unit = _to_unit(to_rgb(image))
    height, width = unit.shape[1:]
    scale = side / max(height, width)
    if scale != 1:
        # A bar of less than half a pixel would vanish.
        size = [max(1, round(length * scale)) for length in (height, width)]
        unit = torch.nn.functional.interpolate(
            unit[None], size=size, mode="bicubic", align_corners=False, antialias=antialias
        )[0]
    bars_y, bars_x = side - unit.shape[1], side - unit.shape[2]
    left, top = bars_x // 2, bars_y // 2
    return _normalised(torch.nn.functional.pad(unit, (left, bars_x - left, top, bars_y - top)))


def letterbox_without_antialias(image: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """`letterbox` as torchvision up to 0.16 computed it."""
    return letterbox(image, side, antialias=False)


def _to_unit(image: Image.Image) -> Float[Tensor, "3 height width"]:
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def _normalised(unit: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
    return (unit - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
