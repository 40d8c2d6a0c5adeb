"""Print the table of one run, or of several that differ in seed and objective alone, from what they scored.

python evaluation/table.py runs/toy
python evaluation/table.py runs/table/plateau-* --sweep 1 3     # Markdown, with each model's best guidance
"""

import argparse
import sys
from pathlib import Path

from spin_diffusion.command import run_command
from spin_diffusion.evaluation.comparison import as_markdown, compare, print_table, sweep_as_markdown
from spin_diffusion.evaluation.in_rounds import rows_of_runs


def table(argv: list[str]) -> None:
    """Read the runs' scores and print their comparison with the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument(
        "--sweep", nargs="+", type=float, metavar="SCALE", help="guidance scales to show beside the best"
    )
    arguments = parser.parse_args(argv)
    rows = rows_of_runs(arguments.runs)
    if arguments.sweep:
        print(sweep_as_markdown(rows, "base", arguments.sweep))
        return
    comparisons = compare(rows, "base")
    if arguments.markdown:
        print(as_markdown(comparisons))
    else:
        print_table(comparisons)


def main(argv: list[str] | None = None) -> int:
    """Print the table and return the exit code."""
    return run_command(table, argv)


if __name__ == "__main__":
    sys.exit(main())
