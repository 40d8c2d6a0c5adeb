"""What accelerate calls mixed precision, in torch's words."""

import torch


def autocast_dtype(mixed_precision: str) -> torch.dtype | None:
    """In which linear layers and convolutions are computed; None = as they are."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
