"""Examples of a data set of images, and what all of its layouts share: filter, caption, image check, repeats."""

import importlib
import math
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from spin_diffusion.data import table
from spin_diffusion.data.report import Bad, Expected, LeftOut, ReadReport
from spin_diffusion.data.rows import Plan, Row, image_bytes, require_column
from spin_diffusion.data.settings import DataSettings
from spin_diffusion.data.sources import open_source
from spin_diffusion.data.usable import Seen, short_hash, usable
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture

MIN_SIDE_PX = 8
"""An image with a smaller side is a placeholder, or too small for one cell of the latents."""


@dataclass(frozen=True)
class Example:
    """A prompt and the real image for it."""

    prompt: str
    """The caption without white space around it; never empty."""
    image: bytes
    """The real image, encoded as found; it was decoded once to check that it is whole."""
    loser: bytes | None
    """The worse image of a human pair, only if losers were asked for."""
    where: str
    """For messages: "train-00001.parquet row 17", "photos/cat.png"."""


def read_examples(
    settings: DataSettings, *, with_losers: bool = False, report: ReadReport | None = None
) -> Iterator[Example]:
    """The usable examples of a data set, in its own order, one in memory at a time.

    Args:
        with_losers: keep the worse image of each pair too; only for data with Pick-a-Pic's columns.
        report: a fresh one, filled while the examples are taken.
    Raises:
        InputError: at once if the data set, a column or a setting is wrong; while reading if a file is damaged, or over
            100 rows and more than half are bad; at the end if more than `max_bad_share` are bad or no row was usable.
    """
    report = ReadReport() if report is None else report
    assert report.read == 0, "a report counts one reading"
    source = open_source(settings)
    plan = find_layout(source.columns, settings).plan(source, settings, with_losers)
    columns = [*plan.columns]
    if settings.filter_column is not None:
        columns.append(require_column(source, settings.filter_column, "--filter_column"))
    seen = Seen()

    def example_of(row: Row) -> Example:
        return _example(row, plan, settings, with_losers, seen)

    wanted = tuple(dict.fromkeys(columns))
    return usable(source, wanted, example_of, report, settings.max_train_samples, settings.max_bad_share)


def find_layout(columns: Sequence[str], settings: DataSettings) -> ModuleType:
    """The module of this folder that recognises the columns, else `table`."""
    if settings.image_column is not None:
        return table
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [importlib.import_module(f"spin_diffusion.data.{name}") for name in names]
    layouts = [module for module in modules if hasattr(module, "recognises") and module.recognises(columns)]
    assert len(layouts) <= 1, f"several layouts claim the columns {columns}: {layouts}"
    return layouts[0] if layouts else table


def _example(row: Row, plan: Plan, settings: DataSettings, with_losers: bool, seen: "Seen") -> Example:
    """Check one row, the cheap checks first. Raises LeftOut if it is not to be used; otherwise `seen` knows it."""
    if settings.filter_column is not None:
        _check_filter(row.values.get(settings.filter_column), settings)
    candidate = plan.candidate(row)
    prompt = table.caption_text(candidate.caption)
    prompt_hash = short_hash(b"prompt", prompt.encode())
    if settings.one_image_per_prompt and prompt_hash in seen:
        raise LeftOut(Expected.REPEATED_PROMPT, f"an image of {prompt[:80]!r} was used already")
    image = image_bytes(row, candidate.image)
    loser = image_bytes(row, candidate.loser) if with_losers else None
    example_hash = short_hash(prompt_hash, image, loser or b"")  # one winner against two losers makes two pairs
    if example_hash in seen:
        raise LeftOut(Expected.REPEATED_EXAMPLE, f"the same image with the caption {prompt[:80]!r} was used already")
    _check_image(image)
    if loser is not None:
        _check_image(loser)
    # Only what is used counts as seen: the next row of this prompt may take the place of a corrupt one.
    seen.add(example_hash)
    if settings.one_image_per_prompt:
        seen.add(prompt_hash)
    return Example(prompt, image, loser, row.where)


def _check_image(encoded: bytes) -> None:
    """Decode the whole image and drop the pixels; LeftOut if it cannot be read or is smaller than MIN_SIDE_PX."""
    try:
        width, height = open_picture(encoded).size
    except InputError as error:
        raise LeftOut(Bad.CORRUPT_IMAGE, str(error)) from error
    if min(width, height) < MIN_SIDE_PX:
        raise LeftOut(Bad.CORRUPT_IMAGE, f"{width} x {height} px is smaller than {MIN_SIDE_PX} px a side")


def _check_filter(value: object, settings: DataSettings) -> None:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise LeftOut(Expected.FILTERED, f"{settings.filter_column} is {value!r}, not a number")
    if settings.filter_max is not None and number > settings.filter_max:
        raise LeftOut(Expected.FILTERED, f"{settings.filter_column} is {number:g}, above {settings.filter_max:g}")
    if settings.filter_min is not None and number < settings.filter_min:
        raise LeftOut(Expected.FILTERED, f"{settings.filter_column} is {number:g}, below {settings.filter_min:g}")
