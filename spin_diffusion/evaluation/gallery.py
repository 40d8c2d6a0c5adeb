"""A contact sheet: one column per model, one row per prompt, the same seed along a row; and pictures in trackers."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

from spin_diffusion.store.pictures import read_picture
from spin_diffusion.store.run_dir import write_file

_MIN_CELL_PX = 160  # smaller images are enlarged by a whole factor to at least this
_MAX_CELL_PX = 512
_MAX_SHEET_PX = 25_000_000  # area of all cells; many rows get smaller cells
_CAPTION_WIDTH_PX = 250
_MAX_CAPTION_LINES = 6
_GAP_PX = 8
_MARGIN_PX = 24
_FONT_PX = 14
_LINE_PX = 22
_INK, _FAINT, _PAPER = (34, 34, 38), (120, 120, 128), (255, 255, 255)


def picture_or_grey(path: Path, side_px: int) -> Image.Image:
    """A picture that was drawn; a grey square where it is lost, or was spoilt."""
    return read_picture(path) if path.is_file() else Image.new("RGB", (side_px, side_px), "grey")


def draw_gallery(columns: list[str], rows: list[tuple[str, list[Image.Image]]], path: Path) -> None:
    """Write the sheet as a PNG file; it appears whole or not at all.

    Tiny images are enlarged by nearest neighbour, so that their pixels can be seen; large ones are reduced.

    Args:
        columns: name of each model, such as "base", "round 1".
        rows: prompt and its images, one per column. Long prompts are wrapped and shortened.

    Raises:
        ValueError: no column, no row, or a row without exactly one image per column.
    """
    if not columns or not rows:
        raise ValueError(f"a gallery needs columns and rows, got {len(columns)} and {len(rows)}")
    for prompt, images in rows:
        if len(images) != len(columns):
            raise ValueError(f"{len(images)} images do not match {len(columns)} columns, prompt {prompt[:80]!r}")

    limit = max(16, min(_MAX_CELL_PX, math.isqrt(_MAX_SHEET_PX // (len(rows) * len(columns)))))
    fitted = [(prompt, [_fitted(image, limit) for image in images]) for prompt, images in rows]
    cell_width = max(image.width for _, images in fitted for image in images)
    heights = [max(image.height for image in images) for _, images in fitted]
    regular, bold = _font("DejaVuSansMono.ttf"), _font("DejaVuSansMono-Bold.ttf")

    headings = [_wrapped(column, bold, cell_width, 2) for column in columns]
    header_height = max(len(lines) for lines in headings) * _LINE_PX + _GAP_PX
    left = _MARGIN_PX + _CAPTION_WIDTH_PX + 2 * _GAP_PX
    width = left + len(columns) * (cell_width + _GAP_PX) - _GAP_PX + _MARGIN_PX
    height = _MARGIN_PX + header_height + sum(heights) + (len(rows) - 1) * _GAP_PX + _MARGIN_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)

    for number, lines in enumerate(headings):
        centre = left + number * (cell_width + _GAP_PX) + cell_width // 2
        top = _MARGIN_PX + header_height - _GAP_PX - len(lines) * _LINE_PX
        _write(pen, lines, (centre, top), bold, _INK, anchor="ma")

    top = _MARGIN_PX + header_height
    for (prompt, images), row_height in zip(fitted, heights, strict=True):
        num_lines = max(1, min(_MAX_CAPTION_LINES, row_height // _LINE_PX))
        lines = _wrapped(prompt, regular, _CAPTION_WIDTH_PX, num_lines) or ["(empty prompt)"]
        caption_top = top + (row_height - len(lines) * _LINE_PX) // 2
        _write(pen, lines, (_MARGIN_PX, caption_top), regular, _INK if prompt.strip() else _FAINT, anchor="la")
        for number, image in enumerate(images):
            x = left + number * (cell_width + _GAP_PX) + (cell_width - image.width) // 2
            sheet.paste(image, (x, top + (row_height - image.height) // 2))
        top += row_height + _GAP_PX

    write_file(path, lambda part: sheet.save(part, format="PNG"))


def log_pictures(
    name: str, pictures: Sequence[tuple[str, Image.Image]], step: int, accelerator: Accelerator, axis: str | None = None
) -> None:
    """Show pictures of one size with their prompts to TensorBoard, wandb or trackio; called on the main process.

    Args:
        axis: what `name_axis` was told, where the pictures belong to a step of training.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(picture) for _, picture in pictures])
            tracker.writer.add_images(name, stacked, step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            library = __import__(tracker.name)
            images = [library.Image(picture, caption=prompt) for prompt, picture in pictures]
            if tracker.name == "wandb":
                tracker.log({name: images} | ({} if axis is None else {f"{axis}/step": step}))
            else:  # it leaves out lists without a word
                tracker.log({f"{name}/{number}": image for number, image in enumerate(images, start=1)})


def _fitted(image: Image.Image, limit: int) -> Image.Image:
    """RGB, its longer side at most `limit` px and, where whole factors allow, at least _MIN_CELL_PX."""
    image = image.convert("RGB")
    longer = max(image.size)
    if longer > limit:
        width, height = (max(1, round(side * limit / longer)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = max(1, min(math.ceil(_MIN_CELL_PX / longer), limit // longer))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font(name: str) -> ImageFont.FreeTypeFont:
    # matplotlib ships this font, so that the sheet does not depend on what the system has; its characters are of one
    # width
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), _FONT_PX)


def _write(
    pen: ImageDraw.ImageDraw,
    lines: list[str],
    position: tuple[int, int],
    font: ImageFont.FreeTypeFont,
    ink: tuple[int, int, int],
    anchor: str,
) -> None:
    for number, line in enumerate(lines):
        pen.text((position[0], position[1] + number * _LINE_PX), line, fill=ink, font=font, anchor=anchor)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` px; what does not fit into `max_lines` is cut and marked. Unprintable characters go."""
    # A prompt may be a megabyte: no more is looked at than could ever be shown
    printable = "".join(character if character.isprintable() else " " for character in text[:20_000])
    characters = max(1, int(width / font.getlength("x")))
    return textwrap.wrap(printable, characters, max_lines=max_lines, placeholder="\u2026")
