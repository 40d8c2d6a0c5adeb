"""The gallery of images: each as a small picture inside of the page."""

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from spin_diffusion.evaluation.report.rows import SampleRow
from spin_diffusion.store.input_error import MAX_PICTURE_BYTES, InputError, read_bytes
from spin_diffusion.store.pictures import open_picture

MAX_SIDE_PX = 256
_EXACT_SIDE_PX = 128  # up to here a picture is kept without loss: the page shows its pixels enlarged
_QUALITY = 82


@dataclass(frozen=True)
class ImageRow(SampleRow):
    """One picture that a model was asked for at the headline's guidance scale."""

    file: str | None
    """Relative to the evaluation's folder; None = there is no picture."""
    sha256: str | None
    state: str
    reference: ClassVar[None] = None
    """The real image is not kept."""


@dataclass(frozen=True)
class Picture:
    """A picture inside of the page."""

    data: str
    """A data: address."""
    width: int
    """px"""
    height: int
    pixelated: bool
    """Enlarge it by whole pixels."""


def thumbnail(directory: Path, row: ImageRow) -> Picture | str:
    """The picture of a row at no more than MAX_SIDE_PX, or in words why there is none."""
    if row.file is None:
        return f"no picture: {row.state}" if row.state else "no picture"
    root = directory.resolve()
    try:
        path = (root / row.file).resolve()
        if not path.is_relative_to(root):
            return "not shown: its file lies outside of the evaluation's folder"
        if not path.is_file():
            return "its file is missing"
        data = read_bytes(path, MAX_PICTURE_BYTES)
    except (OSError, ValueError, RuntimeError):  # a path may hold a NUL, be too long, or go round in links
        return "its file cannot be read"
    if row.sha256 and hashlib.sha256(data).hexdigest() != row.sha256:
        return "not shown: its file is not the one that was scored"
    try:
        image = open_picture(data)
    except InputError:
        return "its file cannot be decoded"
    exact = max(image.size) <= _EXACT_SIDE_PX
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # method: how hard the encoder tries, not the quality
    image.save(buffer, "WEBP", lossless=exact, quality=_QUALITY, method=4)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/webp;base64,{encoded}", image.width, image.height, exact)
