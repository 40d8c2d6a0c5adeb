"""Time a whole round of the real training command on random weights: seconds, work and memory of every phase.

    python benchmarks/round.py --model toy --device cpu
    python benchmarks/round.py --model sdxl --device cuda --batch_size 1 --use_lora true --gradient_checkpointing true
    python benchmarks/round.py --model sdxl --device cuda --batch_size 1 --optimizer adafactor --fused_backward true \
        --max_grad_norm 0 --gradient_checkpointing true

What this script does not know goes to the training command (training/train_spin_sdxl.py). The first round warms up, the
second is told, beside what `spin-diffusion plan` had predicted of it. Its data are pictures of noise; nothing of what
is trained is of any use.
"""

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from models import MODELS, build, family_of
from PIL import Image
from timing import machine, report

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.plan import plan
from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.runs.image_run import run
from spin_diffusion.selfplay.record import COUNTED
from spin_diffusion.store.files import read_json


def write_pairs(path: Path, pairs: int, size: int) -> None:
    """Captions and smooth noise as JPEG, in a parquet file."""
    rng, rows = np.random.default_rng(0), []
    for number in range(pairs):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        rows.append({"caption": f"noise number {number}", "image": {"bytes": buffer.getvalue(), "path": None}})
    pq.write_table(pa.Table.from_pylist(rows), path)


def told(record: dict[str, Any], planned: dict[str, float]) -> dict[str, Any]:
    """A round's record as figures to read, with the seconds that were planned for its phases."""
    seconds = record["seconds"]
    counted = sum(took for phase, took in seconds.items() if phase in COUNTED)
    return {
        "phases": {
            phase: entry | {"planned_seconds": planned.get(phase)}
            for phase, entry in record["ledger"].items()
            if entry["seconds"] > 0
        },
        "seconds": sum(seconds.values()),
        "share_outside_counted_phases": 1 - counted / sum(seconds.values()),
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in record["ledger"].values()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--pairs", type=int, default=32, help="real images")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs in a step")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps in a round")
    parser.add_argument("--resolution", type=int, help="px; default: the model's own")
    args, training = parser.parse_known_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        base, data, out = (Path(folder) / name for name in ("base", "data.parquet", "run"))
        pipeline, resolution = build(args.model, args.device)
        family = family_of(pipeline).__name__.rsplit(".", 1)[-1]
        if args.device == "cuda":
            pipeline.to(dtype=torch.bfloat16)  # half the disk
        pipeline.save_pretrained(base)
        del pipeline
        write_pairs(data, args.pairs, args.resolution or resolution)
        words = [
            "--pretrained_model_name_or_path", str(base), "--dataset_name", str(data), "--output_dir", str(out),
            "--resolution", str(args.resolution or resolution), "--rounds", "2",
            "--max_train_steps", str(args.steps), "--train_batch_size", str(args.batch_size),
            "--generation_batch_size", str(args.batch_size), "--learning_rate", "1e-8", "--lr_warmup_steps", "0",
            "--mixed_precision", "bf16" if args.device == "cuda" else "no", "--checkpointing_steps", "100000",
            "--report_to", "none", *training,
        ]  # fmt: skip

        def play(words: list[str]) -> None:
            run(parse_config(words), family_name=family)

        for command in (plan, play):
            if code := run_command(command, words):
                raise SystemExit(code)
        record, planned = read_json(out / "round-2" / "round.json"), read_json(out / "plan.json")["rounds"][1]
    settings = {"pairs": args.pairs, "batch_size": args.batch_size, "steps": args.steps, "training": training}
    about = {"benchmark": "round", "model": args.model, "resolution": args.resolution or resolution}
    report(about | settings | {"machine": machine(args.device)} | told(record, planned), args.json)


if __name__ == "__main__":
    main()
