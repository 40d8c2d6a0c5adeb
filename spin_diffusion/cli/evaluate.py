"""Compare models: the same prompts and seeds for all, scores with intervals, a report to look at.

    spin-diffusion evaluate --config toy \
        --models base=assets/toy_world/sloppy round3=runs/toy/round-3 --output_dir runs/evaluation

Several GPUs: python -m spin_diffusion.cli.launch --multi_gpu --num_processes 8 -m spin_diffusion.cli evaluate ...
The same command again goes on where it stopped.
"""

from spin_diffusion.cli.command import exit_code
from spin_diffusion.runs.evaluate_settings import parse_settings


def evaluate(argv: list[str]) -> int:
    """Read the settings, then draw, score and report; the exit code is 3 where --fail_on holds."""
    settings = parse_settings(argv)
    # After the settings: a misspelt flag is not answered only when all libraries are there
    from spin_diffusion.runs.evaluate_models import evaluate_models

    return exit_code(evaluate_models(settings))
