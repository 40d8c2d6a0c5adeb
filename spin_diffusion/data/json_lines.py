"""JSON files as a Source: one object a line, read as a stream, or one list of objects, read whole; .gz of both."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from spin_diffusion.data.report import MALFORMED, LeftOut
from spin_diffusion.data.rows import Row, Source, no_files, one_line
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.opening import open_regular, read_lines

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PEEK_LINES = 100
"""Lines of a file that are looked at for one that can be read."""
MAX_LIST_BYTES = 4 << 30
"""A list of objects is read whole, so a longer one is refused."""
DAMAGE = (OSError, EOFError, zlib.error)
EXAMPLE = '{"prompt": "...", "completion": "..."}'


def open_json(name: str, files: Sequence[Path]) -> Source:
    """All rows of the files, one file after the other; the first row that can be read shows a file's columns.

    A line that is not JSON becomes a row that is left out. Raises InputError for a file with nothing but such lines,
    and if the first is empty.
    """
    columns = {path: _columns(path) for path in files}
    if not columns[files[0]]:
        raise InputError(f"{files[0]} has no rows")
    return Source(name, columns[files[0]], lambda wanted: _rows(columns, wanted))


def parse_object(line: bytes, like: str) -> dict[str, object]:
    """The JSON object on a line. Raises ValueError that says what the line is instead; `like` is an example."""
    try:
        # A byte that is not UTF-8 harms no more than the text that it stands in
        values = json.loads(line.decode("utf-8-sig", "surrogateescape"))
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise ValueError(f"is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"is not an object like {like}")
    return values


def _rows(files: Mapping[Path, Sequence[str]], wanted: Sequence[str]) -> Iterator[Row]:
    """Args: files: and the columns of each."""
    first, root = next(iter(files)), Path(os.path.commonpath([path.parent for path in files]))
    for path, columns in files.items():
        if missing := [column for column in wanted if columns and column not in columns]:
            raise InputError(f"{path} has no column {missing[0]!r}, unlike {first.name}; it has {', '.join(columns)}")
    for path in files:
        label, read_file = path.relative_to(root).as_posix(), no_files(path.name)
        for place, values in _records(path):
            if isinstance(values, dict):
                yield Row(f"{label} {place}", values, read_file)
            else:
                yield Row(f"{label} {place}", {}, read_file, LeftOut(MALFORMED, str(values).removeprefix("is ")))


def _columns(path: Path) -> tuple[str, ...]:
    """The keys of the first row that can be read; none in an empty file. Raises InputError if there is only rubbish."""
    first_error = None
    for number, (place, values) in enumerate(_records(path)):
        if isinstance(values, dict):
            return tuple(values)
        first_error = first_error or f"{place} {values}"
        if number == PEEK_LINES:
            break
    if first_error is not None:
        raise InputError(f"{path}: {first_error}; one object like {EXAMPLE} a line is right, or one list of them")
    return ()


def _records(path: Path) -> Iterator[tuple[str, dict[str, object] | ValueError]]:
    """("line 3", its values or what is wrong with it), in the order of the file; lines and entries count from 1."""
    number, is_first = 0, True
    try:
        with open_regular(path) as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for number, line in enumerate(read_lines(file, path), start=1):
                if not line.strip():
                    continue
                if is_first and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    yield from _entries(path, line + file.read(MAX_LIST_BYTES))
                    return
                is_first = False
                yield f"line {number}", _parsed(line)
    except DAMAGE as error:
        raise InputError(f"{path} is damaged after line {number}: {one_line(error)}; fetch it again") from error


def _parsed(line: bytes) -> dict[str, object] | ValueError:
    try:
        return parse_object(line, EXAMPLE)
    except ValueError as error:
        return error


def _entries(path: Path, data: bytes) -> Iterator[tuple[str, dict[str, object] | ValueError]]:
    if len(data) > MAX_LIST_BYTES:
        raise InputError(f"{path} is a list of more than {MAX_LIST_BYTES:,} bytes: write one object a line instead")
    try:
        entries = json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} begins with '[' but is not one JSON list: {one_line(error)}; one list of objects is right, or one "
            f"object like {EXAMPLE} a line"
        ) from error
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", entry if isinstance(entry, dict) else ValueError(f"is not an object like {EXAMPLE}")
