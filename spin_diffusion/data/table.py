"""Any table with an image column and a caption column: the layout of whatever no other layout recognises."""

from spin_diffusion.data.report import Bad, LeftOut
from spin_diffusion.data.rows import Candidate, Plan, Row, Source, describe_columns, require_column, whole_text
from spin_diffusion.data.settings import DataSettings
from spin_diffusion.store.input_error import InputError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt")
"""The names that are looked for, in this order, when none is given."""


def plan(source: Source, settings: DataSettings, with_losers: bool) -> Plan:
    """One image and one caption a row. Raises InputError for a column that is missing, and if losers are asked for."""
    if with_losers:
        raise InputError(
            f"{source.name} has no worse images: pairs need Pick-a-Pic's columns jpg_0, jpg_1, label_0, label_1; "
            f"its columns are {', '.join(source.columns)}"
        )
    image_column = find_column(source, settings.image_column, IMAGE_COLUMNS, "--image_column")
    caption_column = find_column(source, settings.caption_column, CAPTION_COLUMNS, "--caption_column")

    def candidate(row: Row) -> Candidate:
        return Candidate(row.values.get(caption_column), row.values.get(image_column))

    return Plan((image_column, caption_column), candidate)


def find_column(source: Source, given: str | None, names: tuple[str, ...], flag: str) -> str:
    """The column given, else the first of `names` that exists. Raises InputError with the columns there are."""
    if given is not None:
        return require_column(source, given, flag)
    for name in names:
        if name in source.columns:
            return name
    raise InputError(
        f"{source.name} has none of the columns {', '.join(names)}; {describe_columns(source.columns, names)}; "
        f"name the right one with {flag}"
    )


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
