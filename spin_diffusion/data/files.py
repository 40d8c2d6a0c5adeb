"""Files of rows as a Source: parquet; JSON of one object a line, or of one list of objects; tars of webdataset.

Of parquet, lines and tars a few rows are in memory at a time; a list of JSON is read whole.
To add a kind of file, make a `TableFile` of a path (`source_of_files` does the rest), and name it in `sources`.
"""

import gzip
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.data.rows import Bad, LeftOut, Row, Source, Values
from spin_diffusion.store.input_error import (
    MAX_PICTURE_BYTES,
    InputError,
    leads_out,
    one_line,
    open_regular,
    printable,
    read_bytes,
    read_lines,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".jfif", ".gif", ".bmp", ".tif", ".tiff")
"""How files of the formats that can be read are called; what they are, their bytes say."""
BATCH_ROWS = 16
"""Rows decoded at once; with Pick-a-Pic's two images a row about 10 MB."""
BUFFER_BYTES = 1 << 20
"""Read-ahead per column. Without it a whole column of a row group is held; with it, one page as its writer cut them."""
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PEEK_LINES = 100
"""Lines of a file that are looked at for one that can be read."""
MAX_LIST_BYTES = 4 << 30
"""A list of objects is read whole, so a longer one is refused."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
TEXT_EXTENSIONS = ("txt", "text", "caption")
MAX_MEMBER_BYTES = 256 << 20
"""A larger member is no image and no caption, and would not fit in memory."""
PEEK_SAMPLES = 5
"""Samples of the first tar that are looked at for the columns."""
EXAMPLE = '{"prompt": "...", "completion": "..."}'

Records = Iterator[tuple[str, Values | LeftOut]]
"""For each row, in the order of its file, its place ("line 3") and its values or why they cannot be had."""


@dataclass(frozen=True)
class TableFile:
    """A file of rows."""

    path: Path
    columns: tuple[str, ...]
    """Those that can be asked for; none where they are not known before the file is read."""
    records: Callable[[Sequence[str] | None], Records]
    """Columns that are not among the wanted ones may be passed over; None = all are wanted."""


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


# Parquet


def open_parquet(name: str, files: Sequence[Path]) -> Source:
    """All rows of the files, one file after the other. Raises InputError if one is not parquet or lacks columns.

    An image may be given by its path, relative to the folder of its file.
    """
    return source_of_files(name, [parquet_file(path) for path in files], file_reader)


def parquet_file(path: Path) -> TableFile:
    """The rows of a parquet file; a text that is not UTF-8, which a writer need not check, leaves its row out. Raises
    InputError: it is none; while its rows are read, it is damaged."""
    try:
        with open_regular(path) as file:
            columns = tuple(pq.read_schema(file).names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(path)} is not a readable parquet file: {one_line(error)}") from error
    return TableFile(path, columns, partial(_parquet_records, path))


def _parquet_records(path: Path, wanted: Sequence[str] | None) -> Records:
    index = 0
    try:
        with open_regular(path) as raw, pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            columns = None if wanted is None else list(wanted)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                for values in _values(batch):
                    yield f"row {index}", values
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{printable(path)} is damaged after row {index}: {one_line(error)}; fetch it again"
        ) from error


def _values(batch: pa.RecordBatch) -> list[Values | LeftOut]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [LeftOut(Bad.BROKEN_TEXT, one_line(error))]
        return [row for index in range(batch.num_rows) for row in _values(batch.slice(index, 1))]


# JSON


def open_json(name: str, files: Sequence[Path]) -> Source:
    """All rows of the files, one file after the other; the first row that can be read shows a file's columns.

    A line that is not JSON becomes a row that is left out. Raises InputError for a file with nothing but such lines,
    and if the first is empty.
    """
    opened = [_json_file(path) for path in files]
    if not opened[0].columns:
        raise InputError(f"{files[0]} has no rows")
    return source_of_files(name, opened)


def _json_file(path: Path) -> TableFile:
    return TableFile(path, _json_columns(path), lambda wanted: json_records(path))


def json_records(path: Path, example: str = EXAMPLE) -> Records:
    """The objects of a file, each with its place: "line 3", or "entry 3" of a list; both count from 1. `example`: what
    a right line looks like, for messages."""
    number, is_first = 0, True
    try:
        with open_regular(path) as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for number, line in enumerate(read_lines(file, path), start=1):
                if not line.strip():
                    continue
                if is_first and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    yield from _entries(path, line + file.read(MAX_LIST_BYTES), example)
                    return
                is_first = False
                yield f"line {number}", _parsed(line, example)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged after line {number}: {one_line(error)}; fetch it again") from error


def _json_columns(path: Path) -> tuple[str, ...]:
    """The keys of the first row that can be read; none in an empty file. Raises InputError if there is only rubbish."""
    malformed = []
    for place, values in islice(json_records(path), PEEK_LINES + 1):
        if not isinstance(values, LeftOut):
            return tuple(values)
        malformed.append(f"{place} is {values.detail}")
    if malformed:
        raise InputError(f"{path}: {malformed[0]}; one object like {EXAMPLE} a line is right, or one list of them")
    return ()


def _parsed(line: bytes, example: str) -> Values | LeftOut:
    try:
        # A byte that is not UTF-8 harms no more than the text that it stands in
        return _object(json.loads(line.decode("utf-8-sig", "surrogateescape")), example)
    except json.JSONDecodeError as error:
        return LeftOut(Bad.MALFORMED, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        return LeftOut(Bad.MALFORMED, f"not JSON: {one_line(error)}")


def _object(value: object, example: str) -> Values | LeftOut:
    return value if isinstance(value, dict) else LeftOut(Bad.MALFORMED, f"not an object like {example}")


def _entries(path: Path, data: bytes, example: str) -> Records:
    if len(data) > MAX_LIST_BYTES:
        raise InputError(f"{path} is a list of more than {MAX_LIST_BYTES:,} bytes: write one object a line instead")
    try:
        entries = json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} begins with '[' but is not one JSON list: {one_line(error)}; one list of objects is right, or one "
            f"object like {example} a line"
        ) from error
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", _object(entry, example)


# Webdataset: members of a tar that share a name up to the first dot are one sample. Its columns are the extensions, the
# keys of its .json, and "image", the first image by the extension. Members are read in the order of the tar and never
# extracted; .pyd, .pickle, .pth, ... are not even opened, and a link is no member but a row that is left out.


@dataclass
class _Sample:
    """The members of one sample, as far as they can be used."""

    key: str
    members: set[str] = field(default_factory=set)
    """Every extension, also those that are not opened."""
    values: dict[str, object] = field(default_factory=dict)
    left_out: LeftOut | None = None


def open_webdataset(name: str, files: Sequence[Path]) -> Source:
    """The samples of the tars, one tar after the other. Raises InputError if the first is no tar or has no samples."""
    columns: dict[str, None] = {}
    for sample in islice((sample for sample in _samples(files[0]) if sample.values), PEEK_SAMPLES):
        columns.update(dict.fromkeys(sample.values))
    if not columns:
        raise InputError(
            f"{files[0]} has no samples: its members should be named like 00001.jpg and 00001.txt or 00001.json"
        )
    # The other tars are not opened before their turn
    return source_of_files(name, [TableFile(path, tuple(columns), partial(_tar_records, path)) for path in files])


def flatten_json(values: dict[str, object], document: object) -> None:
    """Add the keys of a sample's .json as columns; a column that is there already stays."""
    if isinstance(document, dict):
        for key, value in document.items():
            values.setdefault(key, value)


def _tar_records(path: Path, wanted: Sequence[str] | None) -> Records:
    for sample in _samples(path, wanted):
        yield f"sample {sample.key}", sample.left_out or sample.values


def _samples(path: Path, wanted: Sequence[str] | None = None) -> Iterator[_Sample]:
    """The samples of one tar; images of columns that are not in `wanted` are passed over, None reads all."""
    sample = None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            while (member := tar.next()) is not None:
                # It keeps a record of every member otherwise: gigabytes over a big set. No name of typeshed's
                tar.members.clear()  # type: ignore[attr-defined]
                parts = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name)
                if parts is None or member.isdir():
                    continue
                key, extension = parts[1], parts[2].lower()
                if sample is not None and (sample.key != key or extension in sample.members):
                    yield _finished(sample)
                    sample = None
                sample = sample or _Sample(key)
                sample.members.add(extension)
                _read_member(tar, member, extension, sample, wanted)
            _check_end(tar, path)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        after = f" after sample {printable(sample.key)}" if sample is not None else ""
        raise InputError(f"{printable(path)} is not a whole tar: {one_line(error)}{after}; fetch it again") from error
    if sample is not None:
        yield _finished(sample)


def _read_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: _Sample, wanted: Sequence[str] | None
) -> None:
    kind = extension.rsplit(".", 1)[-1]
    if kind not in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS, "json"):
        return
    is_an_image = kind in IMAGE_EXTENSIONS
    if is_an_image and wanted is not None and "image" not in wanted and extension not in wanted:
        return
    if not member.isfile():
        reason = Bad.MISSING_IMAGE_FILE if is_an_image else Bad.EMPTY_CAPTION
        sample.left_out = LeftOut(reason, f"{member.name} is a link or a device, not a file")
        return
    if member.size > MAX_MEMBER_BYTES:
        reason = Bad.CORRUPT_IMAGE if is_an_image else Bad.EMPTY_CAPTION
        sample.left_out = LeftOut(reason, f"{member.name} has {member.size} bytes, more than {MAX_MEMBER_BYTES}")
        return
    file = tar.extractfile(member)
    assert file is not None, "it is a file"
    data = file.read()
    if is_an_image:
        sample.values[extension] = data
        if extension == kind:
            sample.values.setdefault("image", data)
        return
    text = data.decode("utf-8-sig", "surrogateescape")
    try:
        sample.values[extension] = json.loads(text) if kind == "json" else text
    except (ValueError, RecursionError) as error:
        sample.left_out = LeftOut(Bad.EMPTY_CAPTION, f"{member.name} cannot be read: {one_line(error)}")


def _finished(sample: _Sample) -> _Sample:
    # Last, so that the members' own names win over keys of the .json.
    flatten_json(sample.values, sample.values.get("json"))
    return sample


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """tarfile takes damage between two members for the end; a whole tar ends in a block of zeros."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it ends at byte {tar.offset} without the mark of the end")
