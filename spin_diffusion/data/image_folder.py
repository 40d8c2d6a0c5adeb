"""A folder of images with a metadata file, or with a .txt of the same name beside each image, as a Source.

A metadata file has a column file_name, relative to its own folder, and any others (the caption, a score to filter by).
Several subfolders may each have one. The columns are the metadata's plus "image", which is the file.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from spin_diffusion.data.files import IMAGE_SUFFIXES, TableFile, file_reader, json_records, parquet_file
from spin_diffusion.data.rows import Bad, Expected, LeftOut, Row, Source, Values, describe_columns, whole_text
from spin_diffusion.store.input_error import InputError, broken_character, one_line, open_text, printable, read_bytes

FILE_NAME = "file_name"
MAX_CAPTION_BYTES = 1 << 20
"""A larger text file beside an image is no caption."""
MAX_CSV_BYTES = 4 << 30
"""A larger metadata file is refused if it is csv; parquet has no limit."""
METADATA_SUFFIXES = (".csv", ".jsonl", ".parquet")
SEEN_SUFFIXES = (*IMAGE_SUFFIXES, ".avif", ".heic", ".heif", ".jp2", ".jxl", ".jpe", ".ppm", ".psd", ".svg", ".tga")
"""Files that somebody meant as an image: those of a format that cannot be read are counted, not passed over."""


def is_metadata(path: Path) -> bool:
    """Whether this is a metadata file by its name."""
    return path.stem == "metadata" and path.suffix.lower() in METADATA_SUFFIXES


def is_image(path: Path) -> bool:
    """Whether somebody meant this file as an image, by its name."""
    return path.suffix.lower() in SEEN_SUFFIXES


def open_image_folder(folder: Path, files: Sequence[Path]) -> Source:
    """The images of a folder with their captions.

    Args:
        files: every file in the folder and its subfolders, sorted.
    Raises: InputError if there are no images, no captions, or a metadata file that cannot be read.
    """
    metadata = [_metadata_file(path) for path in files if is_metadata(path)]
    images = [path for path in files if is_image(path)]
    if metadata:
        return _metadata_source(folder, metadata, images)
    if not images:
        raise InputError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
    captions = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    if not any(path.with_suffix("") in captions for path in images):
        line = json.dumps({FILE_NAME: images[0].relative_to(folder).as_posix(), "text": "what this image shows"})
        raise InputError(
            f"{folder} has {len(images)} images but no captions: put a metadata.jsonl into it with a line per image, "
            f"like {line}, or a .txt of the same name beside each image"
        )
    return Source(str(folder), ("image", "text"), lambda wanted: _sidecar_rows(folder, images, captions))


def _metadata_source(folder: Path, metadata: list[TableFile], images: list[Path]) -> Source:
    by_folder: dict[Path, TableFile] = {}
    for file in metadata:
        other = by_folder.setdefault(file.path.parent, file)
        if other is not file:
            raise InputError(f"{file.path.parent} has both {other.path.name} and {file.path.name}: keep one of them")
        if FILE_NAME not in file.columns:
            raise InputError(f"{file.path} has no column {FILE_NAME!r}; {describe_columns(file.columns, [FILE_NAME])}")
    # The file itself is the image, whatever the metadata means by a column of that name.
    columns = ("image", *dict.fromkeys(column for file in metadata for column in file.columns if column != "image"))
    return Source(str(folder), columns, lambda wanted: _metadata_rows(folder, metadata, images))


def _metadata_rows(folder: Path, metadata: list[TableFile], images: list[Path]) -> Iterator[Row]:
    named: set[Path] = set()
    for file in metadata:
        base = file.path.parent
        read_file = file_reader(base)
        for place, values in file.records(None):
            where = f"{file.path.relative_to(folder).as_posix()} {place}"
            if not isinstance(values, LeftOut):
                name = values.get(FILE_NAME) or None
                if isinstance(name, str):
                    named.add(base / name)
                    where = (base.relative_to(folder) / name).as_posix()
                values = {**values, "image": name if isinstance(name, str) else None}
            yield Row.read(where, values, read_file)
    for path in images:
        if path not in named:
            left_out = LeftOut(Expected.NOT_IN_METADATA, "no metadata file names this image")
            yield Row.read(path.relative_to(folder).as_posix(), left_out, file_reader(folder))


def _sidecar_rows(folder: Path, images: list[Path], captions: dict[Path, Path]) -> Iterator[Row]:
    read_file = file_reader(folder)
    for path in images:
        name = path.relative_to(folder).as_posix()
        try:
            yield Row(name, {"image": name, "text": _caption(path, captions)}, read_file)
        except LeftOut as left_out:
            yield Row.read(name, left_out, read_file)


def _caption(image: Path, captions: Mapping[Path, Path]) -> str:
    """The text beside an image. Raises LeftOut if there is none, or it is no whole UTF-8 text."""
    sidecar = captions.get(image.with_suffix(""))
    if sidecar is None:
        raise LeftOut(Bad.EMPTY_CAPTION, f"there is no {image.with_suffix('.txt').name} beside it")
    try:
        data = read_bytes(sidecar, MAX_CAPTION_BYTES)
    except InputError as error:
        raise LeftOut(Bad.EMPTY_CAPTION, str(error)) from error
    return whole_text(data.decode("utf-8-sig", "surrogateescape"), sidecar.name)


def _metadata_file(path: Path) -> TableFile:
    """Open a metadata file and find its columns. Raises InputError if it is not what its name says."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_file(path)
    if suffix == ".csv":
        return TableFile(path, _csv_columns(path), lambda wanted: _csv_records(path))

    # A key may be absent from some lines, so all of them are read: a line is small beside its image.
    columns = dict.fromkeys(key for _, values in _json_records(path) for key in values)
    return TableFile(path, tuple(columns), lambda wanted: _json_records(path))


def _json_records(path: Path) -> Iterator[tuple[str, Values]]:
    for place, values in json_records(path, '{"file_name": "0.png", "text": "..."}'):
        if isinstance(values, LeftOut):
            raise InputError(f"{path} {place} is {values.detail}")
        yield place, values


def _csv_columns(path: Path) -> tuple[str, ...]:
    with open_text(path, MAX_CSV_BYTES) as file:
        try:
            columns = tuple(next(csv.reader(file), ()))
        except csv.Error as error:
            raise InputError(f"{path} is not a UTF-8 csv file: {one_line(error)}") from error
    if any(broken_character(column) for column in columns):
        raise InputError(f"{path} is not a UTF-8 csv file: {printable(', '.join(columns))}")
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} names a column twice: {', '.join(columns)}")
    return columns


def _csv_records(path: Path) -> Iterator[tuple[str, Values]]:
    with open_text(path, MAX_CSV_BYTES) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                if None in values:
                    raise InputError(
                        f"{path} line {reader.line_num} has more than {len(reader.fieldnames or ())} fields: "
                        "put quotes around a caption with commas"
                    )
                yield f"line {reader.line_num}", dict(values)
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num} is not UTF-8 csv: {one_line(error)}") from error
