"""JSON files as a Source: one object a line, read as a stream, or one list of objects, read whole; .gz of both."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from spin_diffusion.data.report import Bad, LeftOut
from spin_diffusion.data.rows import Source, TableFile, Values, source_of_files
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.opening import open_regular, read_lines
from spin_diffusion.store.text import one_line

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PEEK_LINES = 100
"""Lines of a file that are looked at for one that can be read."""
MAX_LIST_BYTES = 4 << 30
"""A list of objects is read whole, so a longer one is refused."""
EXAMPLE = '{"prompt": "...", "completion": "..."}'


def open_json(name: str, files: Sequence[Path]) -> Source:
    """All rows of the files, one file after the other; the first row that can be read shows a file's columns.

    A line that is not JSON becomes a row that is left out. Raises InputError for a file with nothing but such lines,
    and if the first is empty.
    """
    opened = [TableFile(path, _columns(path), partial(json_records, path)) for path in files]
    if not opened[0].columns:
        raise InputError(f"{files[0]} has no rows")
    return source_of_files(name, opened)


def json_records(
    path: Path, wanted: Sequence[str] | None = None, example: str = EXAMPLE
) -> Iterator[tuple[str, Values | LeftOut]]:
    """The objects of a file, each with its place: "line 3", or "entry 3" of a list; both count from 1.

    Args:
        wanted: every object is read whole, whatever is wanted of it.
        example: what a right line looks like, for messages.
    """
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


def _columns(path: Path) -> tuple[str, ...]:
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


def _entries(path: Path, data: bytes, example: str) -> Iterator[tuple[str, Values | LeftOut]]:
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
