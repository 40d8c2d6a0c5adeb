"""Every figure that only a GPU can show, in three parts of at most 8 minutes each on an H200.

    benchmarks/gpu.sh sd15 benchmarks/results/h200
    benchmarks/gpu.sh sdxl_train benchmarks/results/h200
    benchmarks/gpu.sh sdxl_draw benchmarks/results/h200
    benchmarks/gpu.sh all /tmp/small --device cpu --model toy

Each contender has a process of its own, the smallest first, and writes DIR/NAME.json as soon as it is done; what it
prints is in DIR/NAME.log. One that fails, as for want of memory, leaves its error in DIR/NAME.json, and the rest goes
on. A second call does what has no file yet. The exit code is 1 where a contender of the part has no figures.

Targets: `mfu` of a training step at least 0.45 for SDXL and 0.40 for SD 1.5, of drawing at least 0.50; twice the plain
loop's pairs a second; less than 5 % of a round outside its counted phases; peak memory of SDXL at 1024 px, one pair in
a step: at most 16 GB with LoRA, 40 GB with all weights and a factored optimizer.
"""

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import generate
import round as whole_round
import train_step
from models import MODELS

from spin_diffusion.store.files import read_json, write_json

SECONDS_OF_A_PART, SECONDS_OF_A_CONTENDER = 480.0, 240.0
SCRIPTS = {"train_step": train_step.main, "generate": generate.main, "round": whole_round.main}
SMALL = {
    "train_step": "--batch_size 1 --repeats 1",
    "generate": "--batch_size 1 --repeats 1 --num_inference_steps 2",
    "round": "--batch_size 2 --steps 2 --pairs 2 --num_inference_steps 2",
}
"""What another model than the part's own is given over the contender's arguments: only that it runs is seen."""


def draw(model: str, batch_size: int) -> dict[str, str]:
    """Contenders that draw, and their arguments."""
    common = f"generate --model {model} --batch_size {batch_size} --num_inference_steps 25 --repeats 2"
    return {
        f"{model}_draw_{who}{name}": f"{common} --contenders {who} --reference_batched{more}"
        for name, more in (("", ""), ("_compiled", " --compile blocks"))
        for who in ("ours", "diffusers")
    }


def train(model: str, kind: str, arguments: str) -> dict[str, str]:
    """Contenders that train, and their arguments."""
    common = f"train_step --model {model} --repeats 5 {arguments} --contenders"
    ways = {"ours": "ours", "ours_compiled": "ours --compile blocks", "plain": "plain"}
    return {f"{model}_{kind}_{name}": f"{common} {way}" for name, way in ways.items()}


ROUND = "--batch_size 1 --steps 8 --pairs 8 --num_inference_steps 25 --gradient_checkpointing true"
PARTS = {
    "sd15": draw("sd15", 16)
    | train("sd15", "lora", "--batch_size 8 --use_lora")
    | train("sd15", "full", "--batch_size 8")
    | {"sd15_round": "round --model sd15 --batch_size 8 --steps 8 --pairs 64 --num_inference_steps 25"},
    "sdxl_train": train("sdxl", "lora", "--batch_size 2 --use_lora")
    | train("sdxl", "full_recomputed", "--batch_size 2 --gradient_checkpointing")
    | train("sdxl", "full", "--batch_size 2"),
    "sdxl_draw": draw("sdxl", 8)
    | {
        "sdxl_round_lora": f"round --model sdxl {ROUND} --use_lora true",
        "sdxl_round_full": f"round --model sdxl {ROUND} --optimizer adafactor --fused_backward true --max_grad_norm 0",
    },
}


def contend(script: str, argv: list[str], log: Path) -> None:
    """Run a script of this folder; all that it prints, and why it failed, goes to `log`."""
    sys.stdout = sys.stderr = output = log.open("w", buffering=1)
    for number in (1, 2):  # of libraries that are not Python's too
        os.dup2(output.fileno(), number)
    try:
        SCRIPTS[script](argv)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def measure(name: str, words: list[str], folder: Path, device: str, seconds: float) -> str | None:
    """Let a contender run for so many seconds at most; why it has no figures, None = it has."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    # A child that is forked has the libraries already, but no GPU
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    child = context.Process(target=contend, args=(words[0], [*words[1:], "--json", str(result)], log))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        return f"took more than {seconds:.0f} s"
    if child.exitcode == 0:
        return None
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line[:300] for line in reversed(lines) if line.strip()), f"ended with code {child.exitcode}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", choices=MODELS, help="in place of each part's own, with next to no work")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    begun, without = time.monotonic(), []
    contenders = PARTS[args.part] if args.part != "all" else {n: w for part in PARTS.values() for n, w in part.items()}
    part_seconds = SECONDS_OF_A_PART * (len(PARTS) if args.part == "all" else 1)
    for name, arguments in contenders.items():
        result = args.folder / f"{name}.json"
        left = part_seconds - (time.monotonic() - begun)
        if not result.exists() and left > 0:
            words = [*arguments.split(), "--device", args.device]
            if args.model is not None:
                words += ["--model", args.model, *SMALL[words[0]].split()]
            print(f"== {name}", flush=True)
            error = measure(name, words, args.folder, args.device, min(left, SECONDS_OF_A_CONTENDER))
            # A contender that the part's end cut short is begun anew by the next call
            if error is not None and left >= SECONDS_OF_A_CONTENDER:
                write_json(result, {"error": error, "arguments": words})
        if not result.exists() or "error" in read_json(result):
            without.append(name)
    for name in without:
        result = args.folder / f"{name}.json"
        print(f"{name}: {read_json(result)['error'] if result.exists() else 'not done yet: call this again'}")
    return 1 if without else 0


if __name__ == "__main__":
    sys.exit(main())
