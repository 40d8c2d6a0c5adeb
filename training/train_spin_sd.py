"""Fine-tune Stable Diffusion 1.x or 2.x by self-play, all rounds in one command: `spin-diffusion train sd`.

    accelerate launch -q training/train_spin_sd.py --config sd15_lora_8gb --train_data_dir MY_PICTURES

Several GPUs: python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 training/train_spin_sd.py ...
Two processes on CPU: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 training/train_spin_sd.py ...
Running the same command again goes on where it stopped.
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.train import train_sd


def main(argv: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    return run_command(train_sd, argv)


if __name__ == "__main__":
    sys.exit(main())
