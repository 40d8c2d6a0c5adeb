"""Compare models: the same prompts and seeds for all, scores with intervals, a report to look at.

python evaluation/evaluate.py --config evaluation/configs/toy.yaml \
    --models base=assets/toy_world/sloppy round1=runs/toy/round-1 round3=runs/toy/round-3 --output_dir runs/evaluation

With several GPUs: accelerate launch evaluation/evaluate.py ... The same command again resumes.
"""

import sys

from spin_diffusion.cli.command import exit_code, run_command
from spin_diffusion.runs.evaluate_settings import parse_settings


def evaluate(argv: list[str]) -> int:
    """Read the settings, then draw, score and report; the exit code is 3 where --fail_on holds."""
    settings = parse_settings(argv)
    # After the settings: a misspelt flag is not answered only when all libraries are there
    from spin_diffusion.runs.evaluate_models import evaluate_models

    return exit_code(evaluate_models(settings))


def main(argv: list[str] | None = None) -> int:
    """Evaluate and return the exit code."""
    return run_command(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
