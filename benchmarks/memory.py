"""Measure that memory does not grow with the data set: reading it, and taking pairs and prompts of it at random.

    python benchmarks/memory.py --rows 10000 100000 1000000 --json benchmarks/results/memory.json
    python benchmarks/memory.py --of answers --rows 10000 100000 --json benchmarks/results/memory_answers.json

Each size is measured in a process of its own. Of images, a parquet file of small synthetic ones with captions is read
as a run reads its data set, and prepared with a game whose tensors are a few numbers. Of answers, a JSONL file of short
conversations is read, some rows of it held out, and prepared as the toy language's model writes them. Then random pairs
are fetched, and the prompts of an evaluation are looked for among all others. What is told is the growth of resident
memory over that after the imports.
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

from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.settings import DataSettings, TextDataSettings
from spin_diffusion.data.text import read_held_out, read_text_examples
from spin_diffusion.diffusion.game import example_id
from spin_diffusion.evaluation.alarm_rules import normalised, trained_among
from spin_diffusion.llm.base import LanguageBase
from spin_diffusion.llm.game import LanguageGame
from spin_diffusion.llm.settings import GenerationSettings, LanguageModelSettings
from spin_diffusion.runs.language_run import load_language_model
from spin_diffusion.samples.pairs import Column, Side, open_pairs
from spin_diffusion.samples.real import prepare
from spin_diffusion.samples.sample import ENCODED
from spin_diffusion.samples.shards import Part

LANGUAGE = Path(__file__).resolve().parents[1] / "assets" / "toy_language" / "base"


def write_answers(path: Path, rows: int) -> None:
    """Short conversations, each another one."""
    with path.open("w") as file:
        for number in range(rows):
            asked = f"tell me about old dog number {number}, which waited for the other {number % 97} dogs"
            answer = "often the old dogs wait. " * (1 + number % 4)
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def write_images(path: Path, rows: int, at_a_time: int = 4096) -> None:
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

    def encoder_hash(self) -> str:
        return "zeros"

    def encode(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros(len(rows), 16, dtype=torch.float16)}


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(of: str, rows: int, rows_per_shard: int, folder: Path) -> dict[str, Any]:
    """Growth of resident memory, bytes, after each thing that a run does with its data."""
    accelerator, found = Accelerator(cpu=True), {"rows": rows}
    read = _images if of == "images" else _answers
    game, held_out, stored = read(folder, accelerator)
    before, started = resident(), time.perf_counter()
    if held_out is not None:
        held_out()
        found["held out"] = resident() - before
    prepare(folder, stored, {}, rows_per_shard, game, accelerator)
    found["prepared"] = resident() - before
    pairs = open_pairs(folder, Side(folder / ENCODED), None, Part(), 1)
    for step in range(200):
        batch = pairs.batch(list(range(step * 16, step * 16 + 16)), 0, 1)
        assert len(batch.prompts) == 16
    found["pairs"] = resident() - before
    prompts = Column(folder, "prompt")
    wanted = [normalised(prompt) for prompt in ("another", prompts[len(prompts) // 2])]
    assert len(trained_among(prompts, wanted)) == 1
    found["prompts"] = resident() - before
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return found | {"seconds": time.perf_counter() - started}


def _images(folder: Path, accelerator: Accelerator) -> tuple[Any, None, Any]:
    def stored() -> Iterator[dict[str, Any]]:
        for example in read_examples(DataSettings(dataset_name=str(folder.with_suffix(".parquet")))):
            yield {"id": example_id(example), "prompt": example.prompt, "image": example.image}

    return Numbers(), None, stored


def _answers(folder: Path, accelerator: Accelerator) -> tuple[Any, Any, Any]:
    settings = TextDataSettings(
        dataset_name=str(folder.with_suffix(".jsonl")), num_held_out=200, held_out_by="row"
    )  # fmt: skip
    model, tokenizer = load_language_model(LanguageBase(str(LANGUAGE)))
    game = LanguageGame(
        model, tokenizer, LanguageBase(str(LANGUAGE)), settings=LanguageModelSettings(max_length=128),
        generation=GenerationSettings(max_new_tokens=64), accelerator=accelerator,
    )  # fmt: skip

    def stored() -> Iterator[dict[str, Any]]:
        return (game.real_row(example) for example in read_text_examples(settings))

    return game, lambda: read_held_out(settings), stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=["images", "answers"], default="images")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rows_per_shard", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            # In another process, whose memory this one's peak does not know
            write, suffix = (write_images, ".parquet") if args.of == "images" else (write_answers, ".jsonl")
            writer = multiprocessing.get_context("spawn").Process(
                target=write, args=(data.with_suffix(suffix), args.only)
            )
            writer.start()
            writer.join()
            print(json.dumps(measure(args.of, args.only, args.rows_per_shard, data)))
        return
    measured = []
    for rows in args.rows:
        command = [sys.executable, __file__, "--of", args.of, "--only", str(rows),
                   "--rows_per_shard", str(args.rows_per_shard)]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{rows:>10,} rows: " + ", ".join(f"{k} {v / 1e6:+.0f} MB" for k, v in measured[-1].items()
                                                if k not in ("rows", "seconds")), flush=True)  # fmt: skip
    report(
        {"benchmark": "memory", "of": args.of, "machine": machine("cpu"), "rows_per_shard": args.rows_per_shard,
         "growth_of_resident_bytes": measured},
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
