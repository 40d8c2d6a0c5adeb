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

from spin_diffusion.selfplay.device import forget_peak_memory, matrix_rate, peak_memory, wait_for
from spin_diffusion.store.files import write_json

DATA_SHEETS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""FLOP/s of bf16 matrix products, fp32 sums, without sparsity, by NVIDIA's data sheets; the first name that a device's
name has in it counts."""


def alternate(
    contenders: dict[str, Callable[[], None]], repeats: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every run. Contenders take turns, so that a drift of the machine meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        if turn == warmup:
            forget_peak_memory(device)
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


def utilisation(
    device: torch.device, pace: dict[str, float], flops: dict[str, int], recomputed: int = 0
) -> dict[str, Any]:
    """Shares of the matrix rate that is measured here: `mfu` by the FLOPs that the method needs, as a run's ledger has
    it, `hfu` with those of activations that are computed again (arXiv 2204.02311, appendix B).

    Args:
        pace: pairs or images a second, by contender.
        flops: needed for one.
        recomputed: further FLOPs for one.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate, name = matrix_rate(device, dtype), torch.cuda.get_device_name() if device.type == "cuda" else ""
    sheet = next((peak for part, peak in DATA_SHEETS.items() if part in name), None)
    return {
        "matrix_flops_per_second": {"measured": rate, "data_sheet": sheet},
        "mfu": {who: pace[who] * flops[who] / rate for who in pace},
        "hfu": {who: pace[who] * (flops[who] + recomputed) / rate for who in pace},
    }


def memory_peak(device: torch.device) -> int | None:
    """Bytes that torch held on a GPU at most in the timed turns; None on a CPU, where imports take more."""
    return peak_memory(device) if device.type == "cuda" else None


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
        write_json(path, result)
