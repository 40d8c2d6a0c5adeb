"""Compare models on the same prompts and seeds, with a report to look at: `spin-diffusion evaluate`.

    python evaluation/evaluate.py --config evaluation/configs/toy.yaml \\
        --models base=assets/toy_world/sloppy round3=runs/toy/round-3 --output_dir runs/evaluation

Several GPUs: python -m spin_diffusion.cli.launch --multi_gpu evaluation/evaluate.py ...
The same command again resumes.
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.evaluate import evaluate


def main(argv: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    return run_command(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
