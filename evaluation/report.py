"""Build report.html again from what an evaluation or a training run left, without scoring anything.

python evaluation/report.py runs/toy
"""

import argparse
import sys
from pathlib import Path

from spin_diffusion.cli.command import run_command


def report(argv: list[str]) -> None:
    """Write the page and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--output_dir of an evaluation or of a run")
    parser.add_argument("--output", type=Path, help="the page's file; default: report.html in the folder")
    arguments = parser.parse_args(argv)
    # After the arguments: --help does not wait for the libraries
    from spin_diffusion.evaluation.records import read_results
    from spin_diffusion.evaluation.report import write_report
    from spin_diffusion.store.folder import take_marked

    if arguments.output is None:
        read_results(arguments.folder / "results.json")  # before the folder is taken: it may hold something else
        take_marked(arguments.folder, "--output")
    print(f"Report: {write_report(arguments.folder, arguments.output)}")


def main(argv: list[str] | None = None) -> int:
    """Build the page and return the exit code."""
    return run_command(report, argv)


if __name__ == "__main__":
    sys.exit(main())
