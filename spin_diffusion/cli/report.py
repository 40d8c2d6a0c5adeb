"""Build report.html again from what an evaluation or a training run left, without scoring anything.

spin-diffusion report runs/toy
spin-diffusion report runs/new --against runs/old --fail_on regressed
"""

import argparse
from pathlib import Path
from typing import get_args

from spin_diffusion.cli.command import exit_code
from spin_diffusion.evaluation.records import FailOn


def report(argv: list[str]) -> int:
    """Write the page and print where it is; the exit code is 3 where --fail_on holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--output_dir of an evaluation or of a run")
    parser.add_argument("--output", type=Path, help="the page's file; default: report.html in the folder")
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="OLD",
        help="folders of older evaluations or runs of the same protocol: the page sets its model against theirs",
    )
    parser.add_argument(
        "--fail_on",
        choices=get_args(FailOn),
        help="exit with code 3 where a verdict is this or worse (improved, inconclusive, suspect, regressed), for CI",
    )
    arguments = parser.parse_args(argv)
    # After the arguments: --help does not wait for the libraries
    from spin_diffusion.evaluation.report import write_report
    from spin_diffusion.evaluation.report.history import look_back
    from spin_diffusion.evaluation.report.reading import read_evaluation
    from spin_diffusion.evaluation.verdicts import failing
    from spin_diffusion.store.folder import take_marked

    now = read_evaluation(arguments.folder)  # before the folder is taken: it may hold something else
    if arguments.output is None:
        take_marked(arguments.folder, "--output")
    past = [look_back(now, older) for older in arguments.against]
    print(f"Report: {write_report(arguments.folder, arguments.output, past)}")
    return exit_code(failing(now.results, arguments.fail_on, [one.verdict for one in past]))
