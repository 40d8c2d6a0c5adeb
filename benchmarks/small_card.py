"""Which way to save memory suffices on a small card: gradients let go at once, or one side of a pair after the other.

    python benchmarks/small_card.py --json benchmarks/results/small_card.json

A training step on pairs by the UNets of SD 1.5 and SDXL in their real sizes, with torch's fake tensors: no memory is
taken and no number is computed, so any machine does. Counted are the bytes that autograd keeps of a forward pass for
the backward pass (bf16 autocast). From these follow the bytes at the two places where a step holds most, without
optimizer state and opponent, which no way changes:

plain           both sides in one batch: weights and activations at the start of the backward pass, weights and all
                gradients at its end
fused           the same, each gradient let go once its weight is updated
two passes      the scores without gradients first, then the gradient of one side after the other: while the second
                side's activations are kept, all gradients of the first one are there
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from timing import machine, report
from torch._subclasses.fake_tensor import FakeTensorMode

CONFIGS = Path(__file__).parent / "configs"


def rows_of(unet: UNet2DConditionModel, rows: int, px: int) -> dict[str, Any]:
    """What the UNet is given for so many images."""
    size = px // 8
    given: dict[str, Any] = {
        "sample": torch.zeros(rows, unet.config.in_channels, size, size),
        "timestep": torch.zeros(rows, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(rows, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type is not None:
        given["added_cond_kwargs"] = {"text_embeds": torch.zeros(rows, 1280), "time_ids": torch.zeros(rows, 6)}
    return given


def kept(unet: UNet2DConditionModel, rows: int, px: int) -> int:
    """Bytes that a forward pass of so many images keeps beside the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    stored: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            stored[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        unet(**rows_of(unet, rows, px))
    return sum(storage.nbytes() for storage in stored.values())


def measure(model: str, checkpointing: bool, pairs: int) -> dict[str, Any]:
    """GB of a step of so many pairs by each way, and operations relative to the plain way's."""
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    with FakeTensorMode():
        unet = UNet2DConditionModel(**config["unet"]).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        weights = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())
        both, one = (kept(unet, rows, config["resolution"]) for rows in (2 * pairs, pairs))
    passes = 4 if checkpointing else 3  # a pass back is two; activations that were let go are computed once more
    held = {
        "plain": weights + max(both, weights),
        "fused": weights + both,
        "two passes": weights + max(one + weights, weights),
    }
    return {
        "model": model,
        "pairs": pairs,
        "gradient_checkpointing": checkpointing,
        "activations_of_both_sides_gb": both / 1e9,
        "gradients_gb": weights / 1e9,
        "held_gb": {way: size / 1e9 for way, size in held.items()},
        "work": {"plain": passes / 3, "fused": passes / 3, "two passes": (passes + 1) / 3},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--models", nargs="+", choices=("sd15", "sdxl"), default=["sd15", "sdxl"])
    parser.add_argument("--pairs", type=int, default=1, help="in a step")
    args = parser.parse_args()
    measured = []
    for model in args.models:
        for checkpointing in (False, True):
            measured.append(measure(model, checkpointing, args.pairs))
            print(json.dumps(measured[-1]), flush=True)
    report({"benchmark": "small_card", "machine": machine("cpu"), "measured": measured}, args.json)


if __name__ == "__main__":
    main()
