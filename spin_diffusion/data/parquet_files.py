"""Parquet files as a Source, a few rows in memory at a time."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.data.report import Bad, LeftOut
from spin_diffusion.data.rows import Source, TableFile, Values, file_reader, source_of_files
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.opening import open_regular
from spin_diffusion.store.text import one_line, printable

BATCH_ROWS = 16
"""Rows decoded at once; with Pick-a-Pic's two images a row about 10 MB."""
BUFFER_BYTES = 1 << 20
"""Read-ahead per column. Without it a whole column of a row group is held; with it, one page as its writer cut them."""


def open_parquet(name: str, files: Sequence[Path]) -> Source:
    """All rows of the files, one file after the other. Raises InputError if one is not parquet or lacks columns.

    An image may be given by its path, relative to the folder of its file.
    """
    return source_of_files(name, [parquet_file(path) for path in files], file_reader)


def parquet_file(path: Path) -> TableFile:
    """The rows of a parquet file; a text that is not UTF-8, which a writer need not check, leaves its row out.

    Raises:
        InputError: it is none; while its rows are read, it is damaged.
    """
    try:
        with open_regular(path) as file:
            columns = tuple(pq.read_schema(file).names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(path)} is not a readable parquet file: {one_line(error)}") from error
    return TableFile(path, columns, partial(_records, path))


def _records(path: Path, wanted: Sequence[str] | None) -> Iterator[tuple[str, Values | LeftOut]]:
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
