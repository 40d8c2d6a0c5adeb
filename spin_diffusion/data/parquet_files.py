"""Parquet files as a Source, a few rows in memory at a time."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.data.rows import Row, Source, file_reader, one_line
from spin_diffusion.input_error import InputError

BATCH_ROWS = 16
"""Rows decoded at once; with Pick-a-Pic's two images a row about 10 MB."""
BUFFER_BYTES = 1 << 20
"""Read-ahead per column. Without it a whole column of a row group is held; with it, one page as its writer cut them."""


def open_parquet(name: str, files: Sequence[Path]) -> Source:
    """All rows of the files, one file after the other. Raises InputError if one is not parquet or lacks columns.

    An image may be given by its path, relative to the folder of its file.
    """
    columns = _columns(files[0])
    return Source(name, columns, lambda wanted: _rows(files, wanted))


def _columns(path: Path) -> tuple[str, ...]:
    try:
        return tuple(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {one_line(error)}") from error


def _rows(files: Sequence[Path], wanted: Sequence[str]) -> Iterator[Row]:
    root = Path(os.path.commonpath([path.parent for path in files]))
    for path in files:
        label = path.relative_to(root).as_posix()
        read_file = file_reader(path.parent)
        for column in wanted:
            if column not in (columns := _columns(path)):
                raise InputError(
                    f"{path} has no column {column!r}, unlike {files[0].name}; it has {', '.join(columns)}"
                )
        index = 0
        try:
            with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=list(wanted), use_threads=False):
                    for values in batch.to_pylist():
                        yield Row(f"{label} row {index}", values, read_file)
                        index += 1
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged after row {index}: {one_line(error)}; fetch it again") from error
