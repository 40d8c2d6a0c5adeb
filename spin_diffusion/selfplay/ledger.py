"""What each phase of a round took: seconds, samples a second, counted work, its share of what the device can do."""

import functools
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spin_diffusion.selfplay.record import LedgerEntry

COUNTED = ("generated", "cached", "probed", "trained", "evaluated")
"""Phases that do a round's work; the rest of its time is overhead."""


@dataclass(frozen=True)
class Costs:
    """What a game's phases take in floating-point operations.

    Attributes:
        flops: (round, phase, samples) -> their FLOPs, a multiplication and an addition being two; None = not known.
        matrix_rate: FLOP/s of large matrix products on one process's device, in the run's precision.
    """

    flops: Callable[[int, str, int], int | None]
    matrix_rate: float


class Stopwatch:
    """Looks at the device's memory from now on."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        forget_peak_memory(accelerator.device)

    def entry(
        self, seconds: float, samples: int | None, flops: int | None, matrix_rate: float | None, run_dir: Path
    ) -> LedgerEntry:
        """The ledger's entry of a phase that took so many seconds.

        Args:
            samples: that this process worked on; what a killed run had done before is not among them. None = nobody
                counted them.
            flops: of the samples of all processes.
            run_dir: the run's whole folder.
        """
        rate = None if flops is None or not matrix_rate else flops / seconds / matrix_rate
        return {
            "seconds": round(seconds, 3),
            "samples": samples,
            "samples_per_second": samples / seconds if samples else None,
            "flops": flops,
            "matrix_share": None if rate is None else rate / self.accelerator.num_processes,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
            "disk_bytes": bytes_in(run_dir) if self.accelerator.is_main_process else None,
        }


def everywhere(samples: int, accelerator: Accelerator) -> int:
    """The sum over all processes."""
    return int(accelerator.reduce(torch.tensor(samples, device=accelerator.device)).item())


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder and below it."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another process may have renamed it since
                found += (Path(parent) / name).lstat().st_size
    return found


def counted(call: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of a call by torch's counter (a multiplication and an addition are two), and what it returns."""
    # The counter has no formula for the CPU's fused attention, which it would pass over in silence
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of 10; measured once in a process."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait_for(device)
        started = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` of a GPU begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: torch's largest allocation on a GPU since it was last reset; on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
