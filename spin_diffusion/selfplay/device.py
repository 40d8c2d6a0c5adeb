"""A device: tensors on their way to it, its precision, its memory, its rate, and how much work a call is."""

import functools
import resource
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The host does not wait: an ordinary copy to a GPU returns when all that the GPU was given
    before is done."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def autocast_dtype(mixed_precision: str) -> torch.dtype | None:
    """In which dtype linear layers and convolutions are computed; None = as they are."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)


def cast_for_autocast(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep linear and convolution weights in the dtype to which autocast would cast them at every call: the same
    numbers in half the memory. Norms stay fp32, as autocast computes them.

    Args:
        dtype: None = no autocast, all stays as it is.
    """
    if dtype is not None:
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)


@torch.no_grad()
def relative_distance(weights: Iterable[tuple[Tensor, Tensor]]) -> float:
    """|a - b| / |b| of all pairs (a, b) of tensors together; the host waits for the device once."""
    squares = [
        torch.stack([(a.float() - b.float()).square().sum(), b.float().square().sum()]).double() for a, b in weights
    ]
    moved, length = torch.stack(squares).sum(dim=0).tolist()
    return float((moved / length) ** 0.5)


def counted(call: Callable[[], T]) -> tuple[int, T]:
    """FLOPs of a call by torch's counter (a multiplication and an addition are two), and what it returns."""
    # The counter has no formula for the CPU's fused attention, which it would pass over in silence
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


MATRIX_ON_A_GPU = 8192
"""Rows and columns that it takes to keep a GPU busy."""
MOST_S = 1.0
"""After which no more products are begun."""


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of 10 or of as many as there is time for (a CPU may have no
    bf16 of its own); measured once in a process."""
    size = MATRIX_ON_A_GPU if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    for _ in range(10):
        if time.perf_counter() - begun > MOST_S:
            break
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
