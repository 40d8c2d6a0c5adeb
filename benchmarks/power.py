"""How large a difference must be to be seen with so many prompts: the README's table, by simulation.

    python benchmarks/power.py

In standard deviations of the paired difference over prompts, for normal differences: what the 95 % interval sees 4
times in 5, and what the verdict calls improved 4 times in 5 when one held-out scorer of five improves and four do not
change.
"""

import argparse
import sys

import numpy as np
from scipy import stats

from spin_diffusion.evaluation.statistics import SIGNIFICANCE, half_width, holm


def shares_seen(effect: float, prompts: int, scorers: int, sets: int, seed: int = 0) -> tuple[float, float]:
    """How often the first scorer's interval lies above 0, and how often `verdict` calls it improved.

    Args:
        effect: mean difference by the first scorer, in standard deviations; the others' is 0.
    """
    rng = np.random.default_rng(seed)
    first = rng.normal(effect, 1, (sets, prompts))
    above = first.mean(axis=1) > half_width(first, 1 - SIGNIFICANCE)
    wins = np.column_stack([(first > 0).sum(axis=1), rng.binomial(prompts, 0.5, (sets, scorers - 1))])
    p = np.minimum(1, 2 * stats.binom.cdf(np.minimum(wins, prompts - wins), prompts, 0.5))  # the sign test
    p[:, 0] = np.maximum(p[:, 0], stats.ttest_1samp(first, 0.0, axis=1).pvalue)
    sure = np.array([holm(of_set)[0] for of_set in p]) < SIGNIFICANCE
    return float(above.mean()), float((above & sure & (wins[:, 0] > prompts / 2)).mean())


def smallest(place: int, prompts: int, scorers: int, sets: int, power: float = 0.8) -> float:
    """The effect that is seen with this power, by bisection; infinite where none is."""
    low, high = 0.0, 5.0
    if shares_seen(high, prompts, scorers, sets)[place] < power:
        return float("inf")
    while high - low > 0.0005:
        middle = (low + high) / 2
        low, high = (low, middle) if shares_seen(middle, prompts, scorers, sets)[place] >= power else (middle, high)
    return high


def main(argv: list[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 20, 50, 100, 200, 500, 1632])
    parser.add_argument("--scorers", type=int, default=5)
    parser.add_argument("--sets", type=int, default=4000, help="simulated evaluations for each number")
    args = parser.parse_args(argv)
    print("| prompts | seen by the interval | called improved |\n|---:|---:|---:|")
    for prompts in args.prompts:
        seen, called = (smallest(place, prompts, args.scorers, args.sets) for place in (0, 1))
        print(f"| {prompts} | {np.ceil(100 * seen) / 100:.2f} sd | {np.ceil(100 * called) / 100:.2f} sd |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
