"""What sources hand to layouts, and layouts to `reading`: Source -> Row -> Candidate. What columns and paths hold."""

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spin_diffusion.data.report import Bad, LeftOut
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.names import leads_out
from spin_diffusion.store.opening import MAX_PICTURE_BYTES, read_bytes
from spin_diffusion.store.text import broken_character, printable

Values = dict[str, object]
"""The values of a row by its columns."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".jfif", ".gif", ".bmp", ".tif", ".tiff")
"""How files of the formats that can be read are called; what they are, their bytes say."""


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    where: str
    """For messages, printable: "train-00001.parquet row 17" (rows count from 0), "photos/cat.png"."""
    values: Mapping[str, object]
    """Column -> value, at least for the columns that were asked for and that the row has."""
    read_file: Callable[[str], bytes]
    """Bytes of an image given by path. Raises LeftOut if it is not there, InputError if it may not be read."""
    left_out: LeftOut | None = None
    """Set when the source itself found that the row cannot be used."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", printable(self.where))

    @classmethod
    def read(cls, where: str, values: Values | LeftOut, read_file: Callable[[str], bytes]) -> "Row":
        """The row with these values, or the row that is left out because they cannot be had."""
        return cls(where, {}, read_file, values) if isinstance(values, LeftOut) else cls(where, values, read_file)


@dataclass(frozen=True)
class Source:
    """A data set as rows, in its own order."""

    name: str
    """For messages: what the user typed."""
    columns: tuple[str, ...]
    """Every column that can be asked for."""
    rows: Callable[[Sequence[str]], Iterator[Row]]
    """The rows with the values of these columns; images of other columns are not read."""


@dataclass(frozen=True)
class TableFile:
    """A file of rows."""

    path: Path
    columns: tuple[str, ...]
    """Those that can be asked for; none where they are not known before the file is read."""
    records: Callable[[Sequence[str] | None], Iterator[tuple[str, Values | LeftOut]]]
    """For each row, in the order of the file, its place ("line 3") and its values or why they cannot be had. Columns
    that are not among the wanted ones may be passed over; None = all are wanted."""


def source_of_files(
    name: str, files: Sequence[TableFile], reader_beside: Callable[[Path], Callable[[str], bytes]] | None = None
) -> Source:
    """The rows of files, one file after the other, with the columns of the first.

    Args:
        reader_beside: from a file's folder to what reads the images that its rows name by path; None = its rows hold
            their images themselves.
    """
    root = Path(os.path.commonpath([file.path.parent for file in files]))

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        for file in files:
            if missing := [column for column in wanted if file.columns and column not in file.columns]:
                raise InputError(
                    f"{file.path} has no column {missing[0]!r}, unlike {files[0].path.name}; it has "
                    f"{', '.join(file.columns)}"
                )
        for file in files:
            label = file.path.relative_to(root).as_posix()
            read_file = reader_beside(file.path.parent) if reader_beside is not None else no_files(file.path.name)
            for place, values in file.records(wanted):
                yield Row.read(f"{label} {place}", values, read_file)

    return Source(name, files[0].columns, rows)


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


def require_column(source: Source, column: str, flag: str) -> str:
    """Return `column` if the source has it. Raises InputError that names the columns there are and the nearest."""
    if column not in source.columns:
        raise InputError(
            f"{source.name} has no column {column!r} ({flag}); {describe_columns(source.columns, [column])}"
        )
    return column


def describe_columns(columns: Sequence[str], wanted: Sequence[str]) -> str:
    """The columns that exist and the one most like any of `wanted`, for an error."""
    if not columns:
        return "it has no columns"
    likeness = {
        column: max(difflib.SequenceMatcher(None, column.lower(), name.lower()).ratio() for name in wanted)
        for column in columns
    }
    nearest = max(columns, key=lambda column: likeness[column])
    return printable(f"its columns are {', '.join(columns)}; the nearest is {nearest!r}")


def whole_text(text: str, what: str) -> str:
    """The text itself. Raises LeftOut if it has broken characters; `what` names it there."""
    if (place := broken_character(text)) is not None:
        raise LeftOut(Bad.BROKEN_TEXT, f"character {place} of {what} is half of one, or its bytes are not UTF-8")
    return text


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


def file_reader(folder: Path) -> Callable[[str], bytes]:
    """Reader of files in `folder` by relative name. The names are not trusted: none may lead out of the folder."""

    def read_file(name: str) -> bytes:
        if "://" in name:
            raise InputError(
                f"{folder}: the image {name!r} is an address: download the images and give their file names"
            )
        path = inside(folder, name)
        if not os.path.lexists(path):
            raise LeftOut(Bad.MISSING_IMAGE_FILE, f"{name} does not exist in {folder.name}")
        if not os.path.exists(path):
            raise LeftOut(Bad.MISSING_IMAGE_FILE, f"{name} is a link to {os.readlink(path)}, which does not exist")
        try:
            return read_bytes(path, MAX_PICTURE_BYTES)
        except InputError as error:
            raise LeftOut(Bad.MISSING_IMAGE_FILE, str(error)) from error

    return read_file


def inside(folder: Path, name: str) -> Path:
    """The file of this name in the folder. Raises InputError for a name that leads out of it.

    By the name alone: links inside the folder are its owner's, and the hub's cache is made of them.
    """
    if leads_out(name):
        raise InputError(
            f"{printable(folder)}: the file name {name!r} leads out of the folder; give it relative to the folder"
        )
    return folder / name


def no_files(name: str) -> Callable[[str], bytes]:
    """Reader for sources that hold their images themselves: a path in them points nowhere."""

    def read_file(path: str) -> bytes:
        raise LeftOut(Bad.MISSING_IMAGE_FILE, f"{name} names the file {path!r} but does not hold it")

    return read_file
