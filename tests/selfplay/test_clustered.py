"""The interval of a mean over samples of which some share a prompt."""

import numpy as np
import pytest
from scipy import stats

from spin_diffusion.selfplay.clustered import clustered_mean, interval_text, is_above_zero


def test_of_one_sample_per_prompt_it_is_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(1, 2, 9).tolist()
    found = clustered_mean(values, [f"{n}" for n in range(9)])
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert found == pytest.approx({"mean": np.mean(values), "low": expected.low, "high": expected.high})


def test_copies_of_a_prompt_are_no_evidence() -> None:
    values, prompts = [1.0, 4.0, 2.0], ["a", "b", "c"]
    once, often = clustered_mean(values, prompts), clustered_mean(values * 7, prompts * 7)
    assert often == pytest.approx(once)


def test_the_interval_over_prompts_holds_the_mean_where_one_over_samples_would_not() -> None:
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        of_prompt = rng.normal(size=12)
        prompts = rng.integers(0, 12, 60)  # of unequal numbers
        values = of_prompt[prompts] + 0.3 * rng.normal(size=60)
        found = clustered_mean(values.tolist(), [f"{n}" for n in prompts])
        held += found["low"] <= 0 <= found["high"]
    assert held >= 0.90 * 300


def test_without_a_spread_between_prompts_there_is_no_interval() -> None:
    for values, prompts in (([0.5], ["a"]), ([0.5, 0.7], ["a", "a"]), ([0.5, 0.5], ["a", "b"])):
        found = clustered_mean(values, prompts)
        assert found["low"] is found["high"] is None and "no interval" in interval_text(found) and is_above_zero(found)
    assert not is_above_zero(clustered_mean([0.0, 0.0], ["a", "b"]))
    assert not is_above_zero(clustered_mean([-1.0, 1.5, 1.0], ["a", "b", "c"])), "its interval holds 0"
