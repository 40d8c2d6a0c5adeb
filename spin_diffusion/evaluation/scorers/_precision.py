"""Scores in full fp32, whatever precision training chose for the process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Without autocast, and with TF32 and bf16 products switched off (they move PickScore by tenths of a point).

    Args:
        device: where the computation runs, such as "cpu" or "cuda:0".
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
