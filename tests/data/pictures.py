"""Tiny pictures and the files that hold them, for the tests of this room."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.rows import Example, ReadReport
from spin_diffusion.data.settings import DataSettings


def picture(colour: str, side_px: int = 16, format: str = "PNG") -> bytes:
    """An image of one colour: equal calls give equal bytes, other colours give others."""
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), colour).save(buffer, format=format)
    return buffer.getvalue()


def cut_short(format: str = "JPEG") -> bytes:
    """An image whose header is fine and whose second half is missing."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, format=format)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(settings: DataSettings, with_losers: bool = False) -> tuple[list[Example], ReadReport]:
    """All examples, and the report, which must account for every row."""
    report = ReadReport()
    examples = list(read_examples(settings, with_losers=with_losers, report=report))
    assert report.used == len(examples)
    assert report.read == report.used + sum(report.left_out.values())
    return examples, report


def counts(report: ReadReport) -> dict[str, int]:
    """The reasons that occurred."""
    return {reason: count for reason, count in report.left_out.items() if count}
