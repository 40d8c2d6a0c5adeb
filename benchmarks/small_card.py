"""Which way to save memory suffices on a small card: gradients let go at once, or one side of a pair after the other.

    python benchmarks/small_card.py --json benchmarks/results/small_card.json

One training step on one pair by the UNets of SD 1.5 and SDXL in their real sizes, with torch's fake tensors: no memory
is taken and no number is computed, so any machine does. Told are the peak of what the player's step holds (weights in
fp32, activations in bf16, gradients; no optimizer state and no opponent, which no way changes) and the work in
floating-point operations, for:

plain           both sides in one batch, all gradients kept until the update
fused           the same, each gradient let go in the backward pass once its weight is updated
two passes      the scores without gradients first, then the gradient of one side after the other
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from timing import machine, report
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

CONFIGS = Path(__file__).parent / "configs"
WAYS = ("plain", "fused", "two passes")


def rows_of(unet: UNet2DConditionModel, rows: int, px: int) -> dict[str, Any]:
    """What the UNet is given for so many images."""
    channels, size = unet.config.in_channels, px // 8
    given: dict[str, Any] = {
        "sample": torch.zeros(rows, channels, size, size),
        "timestep": torch.zeros(rows, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(rows, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type is not None:
        given["added_cond_kwargs"] = {"text_embeds": torch.zeros(rows, 1280), "time_ids": torch.zeros(rows, 6)}
    return given


def step(unet: UNet2DConditionModel, px: int, way: str, between: Callable[[], None]) -> None:
    """One step's passes over a pair; `between` is called after each."""
    if way == "two passes":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            unet(**rows_of(unet, 2, px))
        between()
    for rows in (1, 1) if way == "two passes" else (2,):
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(**rows_of(unet, rows, px)).sample
        predicted.float().square().mean().backward()
        del predicted
        between()


def measure(model: str, way: str, checkpointing: bool) -> dict[str, Any]:
    """Peak bytes and operations of a step."""
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    with FakeTensorMode():
        unet = UNet2DConditionModel(**config["unet"]).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        if way == "fused":
            for weight in unet.parameters():
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        tracker = MemTracker()
        tracker.track_external(unet)
        with tracker:
            step(unet, config["resolution"], way, tracker.reset_mod_stats)
        peak = tracker.get_tracker_snapshot("peak")
        unet.zero_grad()
        with FlopCounterMode(display=False) as counter:
            step(unet, config["resolution"], way, lambda: None)
    held = next(iter(peak.values()))
    return {
        "model": model, "way": way, "gradient_checkpointing": checkpointing,
        "peak_bytes": max(kinds["Total"] for kinds in peak.values()),
        "by_kind": {str(kind): size for kind, size in held.items()}, "flops": counter.get_total_flops(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--models", nargs="+", choices=("sd15", "sdxl"), default=["sd15"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # of storages of fake tensors
    measured = []
    for model in args.models:
        for checkpointing in (False, True):
            for way in WAYS:
                measured.append(measure(model, way, checkpointing))
                one = measured[-1]
                print(
                    f"{model}, {way}{', gradient checkpointing' * checkpointing}: {one['peak_bytes'] / 2**30:.1f} GiB, "
                    f"{one['flops'] / 1e12:.2f} TFLOP {one['by_kind']}", flush=True,
                )  # fmt: skip
    report({"benchmark": "small_card", "machine": machine("cpu"), "measured": measured}, args.json)


if __name__ == "__main__":
    main()
