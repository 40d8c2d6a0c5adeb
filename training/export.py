"""Write what a run made in the form that another program reads: `spin-diffusion export`.

python training/export.py runs/toy --format kohya
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.export import export


def main(argv: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    return run_command(export, argv)


if __name__ == "__main__":
    sys.exit(main())
