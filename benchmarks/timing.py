"""Alternating runs, medians, ratios, and the hardware's matrix rate to hold them against."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def alternate(
    contenders: dict[str, Callable[[], None]], repeats: int, device: str, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every run. Contenders take turns, so that a drift of the machine meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
        print(f"\r{turn + 1}/{warmup + repeats} turns", end="", flush=True)
    print()
    return seconds


def synchronize(device: str) -> None:
    """Wait for what was given to the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, seconds."""
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"median": median, "lower_quartile": low, "upper_quartile": high, "runs": len(seconds)}


def paired_ratio(ours: list[float], other: list[float]) -> dict[str, float]:
    """How many times as long the other one takes, turn by turn."""
    return summary([b / a for a, b in zip(ours, other, strict=True)])


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs (2 for a multiply-add) of the matrix products and convolutions in `run`, which may be on `meta`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of large square matrix products, the best of 10."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


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
