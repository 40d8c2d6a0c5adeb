"""Fine-tune SDXL by self-play, all rounds in one command: `spin-diffusion train sdxl`.

    accelerate launch -q training/train_spin_sdxl.py --config sdxl_lora_24gb --train_data_dir MY_PICTURES

Several GPUs: python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 training/train_spin_sdxl.py ...
Two processes on CPU: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 training/train_spin_sdxl.py ...
Running the same command again goes on where it stopped.
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.train import train_sdxl


def main(argv: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    return run_command(train_sdxl, argv)


if __name__ == "__main__":
    sys.exit(main())
