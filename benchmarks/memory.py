"""Measure that memory does not grow with the data set: reading it, and taking pairs and prompts of it at random.

    python benchmarks/memory.py --rows 10000 100000 1000000 --json benchmarks/results/memory.json

Each size is measured in a process of its own: a parquet file of small synthetic images with captions is read as a run
reads its data set, and prepared with a game whose tensors are a few numbers; then random pairs are fetched and every
prompt is gone through. What is told is the growth of resident memory over that after the imports.
"""

import argparse
import io
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image
from timing import machine, report

from spin_diffusion.data import read_examples
from spin_diffusion.data.settings import DataSettings
from spin_diffusion.diffusion.game import example_id
from spin_diffusion.selfplay.samples import prepare
from spin_diffusion.selfplay.shards import ENCODED, Part
from spin_diffusion.selfplay.stored_pairs import Column, Side, open_pairs


def write_synthetic(path: Path, rows: int, at_a_time: int = 4096) -> None:
    """Small images with captions of usual length, each another one."""
    schema = pa.schema(
        [("caption", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, at_a_time):
            table = [{"caption": _CAPTION.format(number), "image": {"bytes": _image(number), "path": None}}
                     for number in range(start, min(start + at_a_time, rows))]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(table, schema))


_CAPTION = "a photograph of thing number {}, in soft light, with some words more to fill the line"


def _image(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.frombuffer(number.to_bytes(8, "big") * 24, np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Numbers:
    """The part of a game that preparing needs."""

    def encode(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros(len(rows), 16, dtype=torch.float16)}


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(rows: int, rows_per_shard: int, folder: Path) -> dict[str, Any]:
    """Growth of resident memory, bytes, after each thing that a run does with its data."""
    accelerator, source, found = Accelerator(cpu=True), folder.with_suffix(".parquet"), {"rows": rows}
    before, started = resident(), time.perf_counter()

    def stored() -> Iterator[dict[str, Any]]:
        for example in read_examples(DataSettings(dataset_name=str(source))):
            yield {"id": example_id(example), "prompt": example.prompt, "image": example.image}

    prepare(folder, stored, {}, rows_per_shard, Numbers(), accelerator)
    found["prepared"] = resident() - before
    pairs = open_pairs(folder, Side(folder / ENCODED), None, Part(), 1)
    for step in range(200):
        batch = pairs.batch(list(range(step * 16, step * 16 + 16)), 0, 1)
        assert len(batch.prompts) == 16
    found["pairs"] = resident() - before
    prompts = Column(folder, "prompt")
    count = sum(1 for _ in prompts)
    assert count == rows
    found["prompts"] = resident() - before
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return found | {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rows_per_shard", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            # In another process, whose memory this one's peak does not know
            writer = multiprocessing.get_context("spawn").Process(
                target=write_synthetic, args=(data.with_suffix(".parquet"), args.only)
            )
            writer.start()
            writer.join()
            print(json.dumps(measure(args.only, args.rows_per_shard, data)))
        return
    measured = []
    for rows in args.rows:
        command = [sys.executable, __file__, "--only", str(rows), "--rows_per_shard", str(args.rows_per_shard)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{rows:>10,} rows: " + ", ".join(f"{k} {v / 1e6:+.0f} MB" for k, v in measured[-1].items()
                                                if k not in ("rows", "seconds")), flush=True)  # fmt: skip
    report(
        {"benchmark": "memory", "machine": machine("cpu"), "rows_per_shard": args.rows_per_shard,
         "growth_of_resident_bytes": measured},
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
