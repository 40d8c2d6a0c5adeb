"""Fine-tune Stable Diffusion 1.x or 2.x by self-play, all rounds in one command.

    accelerate launch training/train_spin_sd.py --config training/configs/sd15_pickapic_card.yaml

Several GPUs: accelerate launch --multi_gpu --num_processes 8 training/train_spin_sd.py ...
Two processes on CPU: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 training/train_spin_sd.py ...
Running the same command again goes on where it stopped.
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.diffusion.config import parse_config


def play(argv: list[str]) -> None:
    """Read the settings, then play."""
    config = parse_config(argv)
    # After the settings: a misspelt flag is not answered only when all libraries are there
    from spin_diffusion.runs.image_run import run

    run(config, family_name="sd")


def main(argv: list[str] | None = None) -> int:
    """Parse, play, and return the exit code."""
    return run_command(play, argv)


if __name__ == "__main__":
    sys.exit(main())
