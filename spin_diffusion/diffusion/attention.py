"""Which of torch's attention kernels the networks use: the one that was fastest on this device for this UNet's shapes.

diffusers' `set_attention_backend` has no effect on `UNet2DConditionModel`; torch's own choice is made here instead.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from spin_diffusion.diffusion.settings import Kernel
from spin_diffusion.selfplay.ledger import wait_for

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

Shape = tuple[int, int, int, int]
"""Heads, queries, keys, channels of a head."""


def attention_shapes(unet: UNet2DConditionModel, latent_size: int, tokens: int = 77) -> list[Shape]:
    """Those of one forward pass, each as often as it is computed.

    Args:
        latent_size: height and width of the latents.
        tokens: of a prompt.
    """
    shapes: list[Shape] = []
    depths = len(unet.config.block_out_channels)
    sides = [latent_size // 2**depth for depth in range(depths)]
    blocks = [
        *zip(unet.down_blocks, sides, strict=True),
        (unet.mid_block, sides[-1]),
        *zip(unet.up_blocks, sides[::-1], strict=True),
    ]
    for block, side in blocks:
        for layer in (module for module in block.modules() if type(module).__name__ == "BasicTransformerBlock"):
            for attention, keys in ((layer.attn1, side * side), (layer.attn2, tokens)):
                heads = attention.heads
                shapes.append((heads, side * side, keys, attention.to_q.out_features // heads))
    return shapes


def measure(shapes: list[Shape], batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
    """Seconds of all these attentions, forward and backward, by kernel; None = it cannot compute one of them."""
    found: dict[str, float | None] = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                found[name] = sum(_seconds(shape, batch, device, dtype) * shapes.count(shape) for shape in {*shapes})
        except (RuntimeError, torch.OutOfMemoryError):
            found[name] = None  # this kernel lacks the device, the precision, the width of a head, or the memory
    return found


def _seconds(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype, runs: int = 3) -> float:
    heads, queries, keys, width = shape
    q, k, v = (
        torch.randn(batch, heads, length, width, device=device, dtype=dtype, requires_grad=True)
        for length in (queries, keys, keys)
    )
    times = []
    for _ in range(1 + runs):
        wait_for(device)
        started = time.perf_counter()
        scaled_dot_product_attention(q, k, v).sum().backward()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])  # the first one loads the kernel


def prefer(kernel: str) -> AbstractContextManager[None]:
    """Where this kernel comes first, and the others after it for what it cannot compute (the VAE's fp32, say)."""
    if kernel == "math":  # which can compute everything
        return sdpa_kernel(SDPBackend.MATH)
    others = [backend for name, backend in BACKENDS.items() if name != kernel]
    return sdpa_kernel([BACKENDS[kernel], *others], set_priority=True)


@contextmanager
def attention(
    kernel: Kernel,
    unet: UNet2DConditionModel,
    latent_size: int,
    batch: int,
    accelerator: Accelerator,
    dtype: torch.dtype | None,
) -> Iterator[str]:
    """Where attention is computed as a setting says; the kernel's name, the same on all processes.

    Args:
        kernel: torch = as torch chooses; measure = the fastest of all; or a kernel's name.
        latent_size: height and width of the latents.
        batch: images in a training step.
        dtype: in which attention is computed; None = fp32.
    """
    chosen = kernel
    if kernel == "measure":
        seconds = measure(attention_shapes(unet, latent_size), batch, accelerator.device, dtype or torch.float32)
        able = {name: took for name, took in seconds.items() if took is not None}
        chosen = broadcast_object_list([min(able, key=lambda name: able[name])])[0]
    if chosen == "torch":
        yield "torch"
        return
    with prefer(chosen):
        yield chosen
