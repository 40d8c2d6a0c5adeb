"""Time the change from the player's adapter to the opponent's and back, which every step makes: ours beside peft's own.

    python benchmarks/adapters.py

On SDXL's UNet in its real shape, without memory (on `meta`), with its 560 layers that have adapters. The host does all
of it, so a CPU shows what a GPU waits for.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from models import HERE
from timing import alternate, machine, paired_ratio, report, summary

from spin_diffusion.diffusion.lora import OPPONENT, PLAYER, Adapters
from spin_diffusion.selfplay.train_settings import LoraSettings


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--repeats", type=int, default=20, help="timed changes of each")
    args = parser.parse_args(argv)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**json.loads((HERE / "configs" / "sdxl.json").read_text())["unet"])
    unet.requires_grad_(False)
    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
    # Nothing is saved or loaded here: no base, no form for other programs
    adapters = Adapters(unet, LoraSettings(use_lora=True), "", lambda: None, None)

    def ours() -> None:
        with adapters.as_opponent():
            pass

    def peft() -> None:
        for name in (OPPONENT, PLAYER):
            unet.set_adapter(name)

    seconds = alternate({"ours": ours, "peft": peft}, args.repeats, torch.device("cpu"))
    report(
        {
            "benchmark": "adapters", "layers": len(adapters.layers), "machine": machine("cpu"),
            "seconds": {name: summary(times) for name, times in seconds.items()},
            "times_faster": paired_ratio(seconds["ours"], seconds["peft"]),
        },
        args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
