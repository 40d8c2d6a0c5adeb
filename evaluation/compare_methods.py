"""Compare methods from one base, several seeds, one report: `spin-diffusion compare`.

python evaluation/compare_methods.py --config evaluation/configs/compare_toy.yaml --jobs 2
python evaluation/compare_methods.py --config CONFIG.yaml --only_methods spin,space --budget steps
"""

import sys

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.compare import compare


def main(argv: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    return run_command(compare, argv)


if __name__ == "__main__":
    sys.exit(main())
