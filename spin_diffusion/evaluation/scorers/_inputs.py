"""What scorers' models read: pixels and tokens as they were trained with, and products in full fp32.

Two ways lead from an image to a square. `crop_middle` resizes the short side and cuts off the rest (CLIP, PickScore,
ImageReward, aesthetics); `letterbox` resizes the long side and fills up with black (HPS). It is Pillow and torch alone:
what processors of libraries return depends on which other packages are installed, and scores would with it.
"""

import html
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import to_rgb

Colour = tuple[float, float, float]
"""Red, green and blue, in units of white."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of CLIP's training images, per channel, in units of white."""


def without_far_ends(image: Image.Image) -> Image.Image:
    """The image; of a long strip the middle, 16 times as long as wide: the rest is far from the middle square, and
    resized with it, it would take gigabytes."""
    width, height = image.size
    left, top = max(0, width - 16 * height) // 2, max(0, height - 16 * width) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def crop_middle(
    image: Image.Image, side: int, offset: Literal["floor", "round"], mean: Colour = MEAN, std: Colour = STD
) -> Float[Tensor, "3 side side"]:
    """RGB, short side to `side` px (Pillow's bicubic), middle square, normalised, by default with CLIP's mean and
    deviation.

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
    return _normalised(_to_unit(image.crop((left, top, left + side, top + side))), mean, std)


def crop_middle_floor(image: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """`crop_middle` with offsets rounded down: CLIP, PickScore, aesthetics."""
    return crop_middle(image, side, "floor")


def crop_middle_round(image: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """`crop_middle` with offsets rounded to the nearest even: ImageReward."""
    return crop_middle(image, side, "round")


def letterbox(image: Image.Image, side: int) -> Float[Tensor, "3 side side"]:
    """RGB in [0, 1], long side to `side` px (bicubic on floats, antialiased, not clipped), black bars, normalised:
    HPS."""
    unit = _to_unit(to_rgb(image))
    height, width = unit.shape[1:]
    scale = side / max(height, width)
    if scale != 1:
        # A bar of less than half a pixel would vanish.
        size = [max(1, round(length * scale)) for length in (height, width)]
        unit = torch.nn.functional.interpolate(
            unit[None], size=size, mode="bicubic", align_corners=False, antialias=True
        )[0]
    bars_y, bars_x = side - unit.shape[1], side - unit.shape[2]
    left, top = bars_x // 2, bars_y // 2
    return _normalised(torch.nn.functional.pad(unit, (left, bars_x - left, top, bars_y - top)))


def _to_unit(image: Image.Image) -> Float[Tensor, "3 height width"]:
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def _normalised(
    unit: Float[Tensor, "3 height width"], mean: Colour = MEAN, std: Colour = STD
) -> Float[Tensor, "3 height width"]:
    return (unit - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@dataclass(frozen=True, eq=False)
class ClipText:
    """Token ids for a CLIP text tower: start token, words, end token."""

    tokenizer: Any
    """transformers' CLIPTokenizer."""
    limit: int
    """Tokens that the tower reads, start and end included."""
    clean: Callable[[str], str] | None = None
    """Applied to a prompt first."""
    reads_special_tokens: bool = True
    """Whether "<|endoftext|>" written in a prompt ends it, as in CLIP's processor; otherwise it is plain text."""

    def ids(self, prompts: list[str]) -> Int[Tensor, "batch tokens"]:
        """Ids, filled up with end tokens behind the first one (causal attention never sees them).

        A longer prompt is cut and its last id becomes the end token: the tower is pooled there, and a prompt without
        one would be pooled at its start, whatever it says.
        """
        end = self.tokenizer.eos_token_id
        rows = [row if len(row) <= self.limit else [*row[: self.limit - 1], end] for row in self._rows(prompts)]
        longest = max(map(len, rows))
        return torch.tensor([row + [end] * (longest - len(row)) for row in rows])

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts have words behind the limit, or behind an end token written in the prompt."""
        end = self.tokenizer.eos_token_id
        return [len(row) > self.limit or row.index(end) < len(row) - 1 for row in self._rows(prompts)]

    def _rows(self, prompts: list[str]) -> list[list[int]]:
        texts = [self.clean(prompt) for prompt in prompts] if self.clean else prompts
        # verbose: no warning for long prompts, they are counted
        return self.tokenizer(
            texts, split_special_tokens=not self.reads_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]


@dataclass(frozen=True, eq=False)
class BertText:
    """Token ids for a BERT text tower: [CLS], words, [SEP], always `limit` of them."""

    tokenizer: Any
    """transformers' BertTokenizer."""
    limit: int

    def ids(self, prompts: list[str]) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Ids, and a mask that is 1 for tokens and 0 for filling."""
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.limit, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def truncated(self, prompts: list[str]) -> list[bool]:
        """Which prompts have words behind the limit."""
        return [len(row) > self.limit for row in self.tokenizer(prompts, verbose=False)["input_ids"]]


def load_ftfy() -> Any:
    """The package ftfy, with which open_clip's tokenizer mends every prompt first.

    Raises:
        InputError: it is not installed. Curly quotes alone move HPS by 0.06, so there is no score without it.
    """
    try:
        return importlib.import_module("ftfy")
    except ImportError as error:
        raise InputError(
            "it needs the package ftfy, by which its authors mend prompts, and scores of curly quotes differ without: "
            "pip install ftfy"
        ) from error


def clean_like_open_clip(prompt: str) -> str:
    """Broken encodings mended by ftfy, HTML entities resolved twice, white space joined, lower case."""
    return " ".join(html.unescape(html.unescape(load_ftfy().fix_text(prompt))).split()).lower()


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Without autocast, and with TF32 and bf16 products switched off (they move PickScore by tenths of a point).

    Args:
        device: where the computation runs, such as "cpu" or "cuda:0".
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
