"""Examples of a data set of images: what its columns mean, filter, caption, image check, repeats.

To add a layout, write a function from a Source to a Plan, and say in `find_layout` which columns it is for. It says
which columns to read, and how a row becomes a Candidate; it raises InputError for a column that does not exist
(`rows.require_column` says it well), and `LeftOut` for a row that is not to be used. All else is common.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from spin_diffusion.data.rows import (
    Bad,
    Example,
    Expected,
    LeftOut,
    ReadReport,
    Row,
    Seen,
    Source,
    find_column,
    fresh,
    require_column,
    short_hash,
    usable,
    whole_text,
)
from spin_diffusion.data.settings import DataSettings, FilterSettings
from spin_diffusion.data.sources import open_source
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture
from spin_diffusion.store.sharing import done_ahead

MIN_SIDE_PX = 8
"""An image with a smaller side is a placeholder, or too small for one cell of the latents."""
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt")
"""The names that are looked for, in this order, when none is given."""
PAIR_COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1")
"""Pick-a-Pic's: two generated images of one caption, and which of them a person preferred (label 1)."""


@dataclass(frozen=True)
class Candidate:
    """What a layout finds in a row, as it is in the data: nothing of it is checked yet."""

    caption: object
    image: object
    """The real image: bytes, {"bytes", "path"}, or a path that the row's `read_file` understands."""
    loser: object = None
    """The worse image of a human pair, in the same forms."""


@dataclass(frozen=True)
class Plan:
    """How a layout reads a source."""

    columns: tuple[str, ...]
    candidate: Callable[[Row], Candidate]
    """Raises LeftOut for a row that is not to be used."""


def read_examples(
    settings: DataSettings, *, with_losers: bool = False, report: ReadReport | None = None
) -> Iterator[Example]:
    """The usable examples of a data set, in its own order. Images are checked on all cores, a few rows ahead.

    Args:
        with_losers: keep the worse image of each pair too; only for data with Pick-a-Pic's columns.
        report: a fresh one, filled while the examples are taken.
    Raises:
        InputError: at once if the data set, a column or a setting is wrong; while reading if a file is damaged, or over
            100 rows and more than half are bad; at the end if more than `max_bad_share` are bad or no row was usable.
    """
    source = open_source(settings)
    plan = find_layout(source.columns, settings)(source, settings, with_losers)
    columns = [*plan.columns]
    if settings.filter.column is not None:
        columns.append(require_column(source, settings.filter.column, "--filter column"))
    wanted, reader = tuple(dict.fromkeys(columns)), _Reader(plan, settings, with_losers)
    rows = done_ahead(lambda row: (row, reader.find(row)), source.rows(wanted))
    return usable(source, rows, reader.example, fresh(report), settings.max_train_samples, settings.max_bad_share)


def with_held_out(settings: DataSettings) -> DataSettings:
    """The settings by which all examples are read, those to train on and those to hold out."""
    limit = settings.max_train_samples
    return replace(settings, max_train_samples=limit and limit + settings.num_held_out)


@dataclass(frozen=True)
class _Found:
    """What a row says by itself, whichever rows came before it.

    Attributes:
        prompt: "" where a problem was met before it.
        image, loser: as of Example; image is b"" where a problem was met before it.
        problem: what was met.
    """

    where: str
    prompt: str = ""
    image: bytes = b""
    loser: bytes | None = None
    problem: LeftOut | InputError | None = None


class _Reader:
    """Examples of rows: `find` may be asked by several threads at once, `example` by one, in the order of the rows."""

    def __init__(self, plan: Plan, settings: DataSettings, with_losers: bool) -> None:
        self.plan, self.settings, self.with_losers = plan, settings, with_losers
        self.seen = Seen()

    def find(self, row: Row) -> _Found:
        """What the row says, its images wholly decoded; nothing of one that is left out already."""
        found = _Found(row.where)
        if row.left_out is not None:
            return found
        try:
            # The cheap checks first
            if self.settings.filter.column is not None:
                _check_filter(row.values.get(self.settings.filter.column), self.settings.filter)
            candidate = self.plan.candidate(row)
            found = replace(found, prompt=caption_text(candidate.caption))
            if self._is_repeated(found.prompt):
                return found
            image = image_bytes(row, candidate.image)
            loser = image_bytes(row, candidate.loser) if self.with_losers else None
            found = replace(found, image=image, loser=loser)
            for encoded in (image, *([loser] if loser is not None else [])):
                _check_image(encoded)
        except (LeftOut, InputError) as problem:
            return replace(found, problem=problem)
        return found

    def example(self, found: _Found) -> Example:
        """The example of the next row; LeftOut or InputError says why there is none."""
        if found.prompt and self._is_repeated(found.prompt):
            raise LeftOut(Expected.REPEATED_PROMPT, f"an image of {found.prompt[:80]!r} was used already")
        prompt_hash = _prompt_hash(found.prompt)
        # One winner against two losers makes two pairs
        example_hash = short_hash(prompt_hash, found.image, found.loser or b"")
        if found.image and example_hash in self.seen:
            raise LeftOut(
                Expected.REPEATED_EXAMPLE, f"the same image with the caption {found.prompt[:80]!r} was used already"
            )
        if found.problem is not None:
            raise found.problem
        # Only what is used counts as seen: the next row of this prompt may take the place of a corrupt one.
        self.seen.add(example_hash)
        if self.settings.one_image_per_prompt:
            self.seen.add(prompt_hash)
        return Example(found.prompt, found.image, found.loser, found.where)

    def _is_repeated(self, prompt: str) -> bool:
        return self.settings.one_image_per_prompt and _prompt_hash(prompt) in self.seen


def _prompt_hash(prompt: str) -> bytes:
    return short_hash(b"prompt", prompt.encode())


def _check_image(encoded: bytes) -> None:
    """Decode the whole image and drop the pixels; LeftOut if it cannot be read or is smaller than MIN_SIDE_PX."""
    try:
        width, height = open_picture(encoded).size
    except InputError as error:
        raise LeftOut(Bad.CORRUPT_IMAGE, str(error)) from error
    if min(width, height) < MIN_SIDE_PX:
        raise LeftOut(Bad.CORRUPT_IMAGE, f"{width} x {height} px is smaller than {MIN_SIDE_PX} px a side")


def _check_filter(value: object, bounds: FilterSettings) -> None:
    number = _number(value)
    if math.isnan(number):
        raise LeftOut(Expected.FILTERED, f"{bounds.column} is {value!r}, not a number")
    if bounds.max is not None and number > bounds.max:
        raise LeftOut(Expected.FILTERED, f"{bounds.column} is {number:g}, above {bounds.max:g}")
    if bounds.min is not None and number < bounds.min:
        raise LeftOut(Expected.FILTERED, f"{bounds.column} is {number:g}, below {bounds.min:g}")


def image_bytes(row: Row, value: object) -> bytes:
    """Encoded bytes of an image in a column. Raises LeftOut if there are none, InputError for another kind of value."""
    if isinstance(value, Mapping):
        # The path beside bytes is only where they once came from.
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value)
        if value:
            return value
        raise LeftOut(Bad.CORRUPT_IMAGE, "the image has 0 bytes")
    if value is None or value == "":
        raise LeftOut(Bad.MISSING_IMAGE_FILE, "the row has no image")
    if isinstance(value, str):
        return row.read_file(value)
    raise InputError(
        f"{row.where}: the image column holds {type(value).__name__}; "
        "encoded bytes, {'bytes', 'path'} or a path would be right"
    )


# Layouts


def find_layout(columns: Sequence[str], settings: DataSettings) -> Callable[[Source, DataSettings, bool], Plan]:
    """Pick-a-Pic's layout for its columns; else, or where a column of images is named, any table's."""
    is_pairs = settings.image_column is None and set(PAIR_COLUMNS) <= set(columns)
    return plan_pairs if is_pairs else plan_table


def plan_table(source: Source, settings: DataSettings, with_losers: bool) -> Plan:
    """One image and one caption a row. Raises InputError for a column that is missing, and if losers are asked for."""
    if with_losers:
        raise InputError(
            f"{source.name} has no worse images: pairs need Pick-a-Pic's columns {', '.join(PAIR_COLUMNS)}; "
            f"its columns are {', '.join(source.columns)}"
        )
    image = find_column(source, settings.image_column, IMAGE_COLUMNS, "--image_column")
    caption = find_column(source, settings.caption_column, CAPTION_COLUMNS, "--caption_column")
    return Plan((image, caption), lambda row: Candidate(row.values.get(caption), row.values.get(image)))


def caption_text(value: object) -> str:
    """The caption without white space around it; of a list of captions the first. Raises LeftOut if nothing is left."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if value is None:
        raise LeftOut(Bad.EMPTY_CAPTION, "the row has no caption")
    if not isinstance(value, str):
        raise LeftOut(Bad.EMPTY_CAPTION, f"the caption is {type(value).__name__}, not text")
    text = value.strip()
    if not text:
        raise LeftOut(Bad.EMPTY_CAPTION, "the caption is blank")
    return whole_text(text, "the caption")


def plan_pairs(source: Source, settings: DataSettings, with_losers: bool) -> Plan:
    """Pick-a-Pic v1 and v2: the winner is the real image, the loser is there only if asked for.

    A tie says that neither image is the good one, so it is left out, as Diffusion-DPO does; so is a row without a
    label. Raises InputError if the caption column does not exist.
    """
    caption_column = require_column(source, settings.caption_column or "caption", "--caption_column")
    flags = [column for column in ("has_label", "are_different") if column in source.columns]

    def candidate(row: Row) -> Candidate:
        values = row.values
        if values.get("has_label") is False:
            raise LeftOut(Expected.NO_LABEL, "has_label is false")
        labels = (_number(values["label_0"]), _number(values["label_1"]))
        if labels == (0.5, 0.5):
            raise LeftOut(Expected.TIE, "both labels are 0.5")
        if labels not in ((1.0, 0.0), (0.0, 1.0)):
            given = f"{values['label_0']!r} and {values['label_1']!r}"
            raise LeftOut(Expected.NO_LABEL, f"the labels are {given}, not 1 and 0")
        winner = labels.index(1.0)
        if with_losers and values.get("are_different") is False:
            raise LeftOut(Expected.TIE, "the two images are the same one")
        loser = values[f"jpg_{1 - winner}"] if with_losers else None
        return Candidate(values[caption_column], values[f"jpg_{winner}"], loser)

    return Plan((caption_column, *PAIR_COLUMNS, *flags), candidate)


def _number(value: object) -> float:
    """The number in a column; nan where there is none."""
    try:
        return float(str(value))
    except ValueError:
        return math.nan
