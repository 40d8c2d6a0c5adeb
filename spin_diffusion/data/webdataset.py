"""Webdataset tars as a Source: members that share a name up to the first dot are one sample.

The columns are the extensions (jpg, txt, ...), the keys of a sample's .json, and "image": its first image by the
extension. Members are read in the order of the tar and never extracted; .pyd, .pickle, .pth, ... are not even opened,
and a link is no member but a row that is left out.
"""

import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

from spin_diffusion.data.report import Bad, LeftOut
from spin_diffusion.data.rows import IMAGE_SUFFIXES, Source, TableFile, Values, source_of_files
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.opening import open_regular
from spin_diffusion.store.text import one_line, printable

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
TEXT_EXTENSIONS = ("txt", "text", "caption")
MAX_MEMBER_BYTES = 256 << 20
"""A larger member is no image and no caption, and would not fit in memory."""
PEEK_SAMPLES = 5
"""Samples of the first tar that are looked at for the columns."""


@dataclass
class Sample:
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
    return source_of_files(name, [TableFile(path, tuple(columns), partial(_records, path)) for path in files])


def flatten_json(values: dict[str, object], document: object) -> None:
    """Add the keys of a sample's .json as columns; a column that is there already stays."""
    if isinstance(document, dict):
        for key, value in document.items():
            values.setdefault(key, value)


def _records(path: Path, wanted: Sequence[str] | None) -> Iterator[tuple[str, Values | LeftOut]]:
    for sample in _samples(path, wanted):
        yield f"sample {sample.key}", sample.left_out or sample.values


def _samples(path: Path, wanted: Sequence[str] | None = None) -> Iterator[Sample]:
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
                sample = sample or Sample(key)
                sample.members.add(extension)
                _read_member(tar, member, extension, sample, wanted)
            _check_end(tar, path)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        after = f" after sample {printable(sample.key)}" if sample is not None else ""
        raise InputError(f"{printable(path)} is not a whole tar: {one_line(error)}{after}; fetch it again") from error
    if sample is not None:
        yield _finished(sample)


def _read_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: Sample, wanted: Sequence[str] | None
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
    file: IO[bytes] | None = tar.extractfile(member)
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


def _finished(sample: Sample) -> Sample:
    # Last, so that the members' own names win over keys of the .json.
    flatten_json(sample.values, sample.values.get("json"))
    return sample


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """tarfile takes damage between two members for the end; a whole tar ends in a block of zeros."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it ends at byte {tar.offset} without the mark of the end")
