"""Alternating runs, medians, ratios, and what a figure has to be read with."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spin_diffusion.selfplay.device import wait_for


def alternate(
    contenders: dict[str, Callable[[], None]], repeats: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every run. Contenders take turns, so that a drift of the machine meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
        print(f"\r{turn + 1}/{warmup + repeats} turns", end="", flush=True)
    print()
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, seconds."""
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"median": median, "lower_quartile": low, "upper_quartile": high, "runs": len(seconds)}


def paired_ratio(ours: list[float], other: list[float]) -> dict[str, float]:
    """How many times as long the other one takes, turn by turn."""
    return summary([b / a for a, b in zip(ours, other, strict=True)])


def machine(device: str) -> dict[str, Any]:
    """What a figure has to be read with."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }


def report(result: dict[str, Any], path: Path | None) -> None:
    """Print, and write to `path`."""
    text = json.dumps(result, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
