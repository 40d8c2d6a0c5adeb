"""Compare methods from one base: equal steps and equal compute, each at its own best rate, several seeds, one report.

python evaluation/compare_methods.py --config evaluation/configs/compare_toy.yaml --jobs 2
python evaluation/compare_methods.py --config CONFIG.yaml --only_methods spin,space --only_worlds sloppy --budget steps

Worlds, methods and their training settings stand in the file. The same command again goes on where it stopped.
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.comparing.settings import parse_settings


def compare(argv: list[str]) -> None:
    """Read the settings, then train, draw, score and report."""
    settings = parse_settings(argv)
    # After the settings: a misspelt flag is not answered only when all libraries are there
    from spin_diffusion.comparing.compare import compare_methods

    compare_methods(settings)


def main(argv: list[str] | None = None) -> int:
    """Compare and return the exit code."""
    return run_command(compare, argv)


if __name__ == "__main__":
    sys.exit(main())
