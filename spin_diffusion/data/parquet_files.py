"""Parquet files as a Source, a few rows in memory at a time."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.data.report import BROKEN_TEXT, LeftOut
from spin_diffusion.data.rows import Row, Source, file_reader, one_line
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.opening import open_regular
from spin_diffusion.store.text import printable

BATCH_ROWS = 16
"""Rows decoded at once; with Pick-a-Pic's two images a row about 10 MB."""
BUFFER_BYTES = 1 << 20
"""Read-ahead per column. Without it a whole column of a row group is held; with it, one page as its writer cut them."""


def open_parquet(name: str, files: Sequence[Path]) -> Source:
    """All rows of the files, one file after the other. Raises InputError if one is not parquet or lacks columns.

    An image may be given by its path, relative to the folder of its file.
    """
    columns = column_names(files[0])
    return Source(name, columns, lambda wanted: _rows(files, wanted))


def column_names(path: Path) -> tuple[str, ...]:
    """The columns of a parquet file. Raises InputError if it is none."""
    try:
        with open_regular(path) as file:
            return tuple(pq.read_schema(file).names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(path)} is not a readable parquet file: {one_line(error)}") from error


def parquet_rows(path: Path, wanted: Sequence[str] | None = None) -> Iterator[dict[str, object] | LeftOut]:
    """The values of every row, or why they cannot be had: a text that is not UTF-8, which a writer need not check.

    Args:
        wanted: columns; None = all.
    Raises:
        InputError: the file is damaged.
    """
    index = 0
    try:
        with open_regular(path) as raw, pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            columns = None if wanted is None else list(wanted)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                for values in _values(batch):
                    yield values
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{printable(path)} is damaged after row {index}: {one_line(error)}; fetch it again"
        ) from error


def _values(batch: pa.RecordBatch) -> list[dict[str, object] | LeftOut]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [LeftOut(BROKEN_TEXT, one_line(error))]
        return [row for index in range(batch.num_rows) for row in _values(batch.slice(index, 1))]


def _rows(files: Sequence[Path], wanted: Sequence[str]) -> Iterator[Row]:
    root = Path(os.path.commonpath([path.parent for path in files]))
    for path in files:
        label = path.relative_to(root).as_posix()
        read_file = file_reader(path.parent)
        for column in wanted:
            if column not in (columns := column_names(path)):
                raise InputError(
                    f"{path} has no column {column!r}, unlike {files[0].name}; it has {', '.join(columns)}"
                )
        for index, values in enumerate(parquet_rows(path, wanted)):
            if isinstance(values, LeftOut):
                yield Row(f"{label} row {index}", {}, read_file, values)
            else:
                yield Row(f"{label} row {index}", values, read_file)
