"""Fine-tune a language model by self-play, all rounds in one command: `spin-diffusion train llm`.

    accelerate launch -q training/train_space_llm.py --config training/configs/space_mistral_7b.yaml

Several GPUs: python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 training/train_space_llm.py ...
Two processes on CPU: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 training/train_space_llm.py ...
Running the same command again goes on where it stopped.
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.train import train_llm


def main(argv: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    return run_command(train_llm, argv)


if __name__ == "__main__":
    sys.exit(main())
