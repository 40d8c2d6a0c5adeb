"""Whether fine-tuning still gains at any rate: what the intervals mean. The command is tested with the scripts."""

import numpy as np
import pytest
from scipy import stats

from spin_diffusion.runs.plateau import for_all, verdict


@pytest.mark.parametrize(
    ("intervals", "begins"),
    [
        ([(-0.001, 0.001), (0.001, 0.002), (0.001, 0.003)], "It still gains at 3e-05 and 0.0001, so supervised"),
        ([(-0.001, 0.002), (-0.002, -0.001)], "It gains at no rate beyond chance"),
        ([(-0.002, -0.001), (-0.004, -0.001)], "It loses at every rate"),
        ([(None, None)], "That says nothing yet"),
    ],
)
def test_what_the_gains_of_fine_tuning_mean_for_self_play(intervals, begins):
    found = {
        rate: {"mean": 0.0, "low": low, "high": high}
        for rate, (low, high) in zip((1e-5, 3e-5, 1e-4), intervals, strict=False)
    }
    assert verdict(found).startswith(begins)


def test_the_intervals_of_all_rates_hold_together():
    values = np.random.default_rng(0).normal(size=30)
    one, all_four = (stats.ttest_1samp(values, 0).confidence_interval(level) for level in (0.95, 1 - 0.05 / 4))
    gap = {"mean": values.mean(), "low": one.low, "high": one.high, "num_samples": 30}
    found = for_all(gap, 4)
    assert (found["low"], found["high"]) == pytest.approx((all_four.low, all_four.high))
