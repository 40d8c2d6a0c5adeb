"""Build report.html again from what an evaluation or a training run left: `spin-diffusion report`.

python evaluation/report.py runs/toy
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.report import report


def main(argv: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    return run_command(report, argv)


if __name__ == "__main__":
    sys.exit(main())
