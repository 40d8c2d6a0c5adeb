"""Invariants at a round's start, and alarms: each in a case where it fires and one where it does not."""

import math

import pytest
import torch

from spin_diffusion.selfplay import health


def start(r: float = 0.0, loss: float = math.log(2), beta: float = 5000.0) -> None:
    zero, rs = torch.zeros(4), torch.full((4,), r)
    health.check_start(rs, zero, torch.full((4,), loss), torch.full((4,), math.log(2)), 1e-5, beta)


def test_a_round_that_starts_with_equal_models_passes():
    start()


@pytest.mark.parametrize("r, loss", [(1e-3, math.log(2)), (-1e-3, math.log(2)), (0.0, 2.35)])
def test_a_round_that_starts_with_unequal_models_is_stopped(r, loss):
    with pytest.raises(AssertionError, match="step 0"):
        start(r, loss)


@pytest.mark.parametrize("loss, norm, what", [(math.nan, 1.0, "loss"), (1.0, math.inf, "gradient norm")])
def test_what_is_not_finite_stops_the_run_with_step_timesteps_and_samples(loss, norm, what):
    with pytest.raises(FloatingPointError) as error:
        health.check_finite(
            loss, norm, step=7, levels=torch.tensor([0.1, 0.9]), ids=["a1", "b2"], round_=2, level_name="timesteps"
        )
    for part in ("round 2", "step 7", what, "0.100", "0.900", "a1, b2"):
        assert part in str(error.value)


def test_finite_values_pass():
    health.check_finite(0.5, 3.0, step=0, levels=torch.tensor([0.5]), ids=["a"], round_=1, level_name="timesteps")


def watched(r_real: float, saturation: float, steps: int = 40, stop: float | None = None) -> health.Watch:
    watch = health.Watch(stop)
    for step in range(steps):
        watch.update(r_real * (1 + 0.1 * (-1) ** step), saturation)
    return watch


def test_losing_the_real_samples_raises_an_alarm_once_and_names_a_setting():
    watch = watched(-1e-4, 0.0)
    sentence = watch.alarm(beta=2000.0)
    assert "learning_rate" in sentence
    assert watch.alarm(beta=2000.0) is None


@pytest.mark.parametrize("r_real", [1e-4, -1e-6])
def test_gaining_or_noise_raises_no_alarm(r_real):
    assert watched(r_real, 0.0).alarm(beta=2000.0) is None


def test_no_alarm_before_the_window_is_full():
    assert watched(-1e-2, 0.0, steps=10).alarm(beta=2000.0) is None


def test_saturation_ends_a_round_early_only_when_asked_and_reached():
    assert watched(0.0, 0.8, stop=0.5).should_stop()
    assert not watched(0.0, 0.2, stop=0.5).should_stop()
    assert not watched(0.0, 1.0, stop=None).should_stop()


def test_saturation_counts_pairs_beyond_four():
    assert health.saturated(torch.tensor([0.1, -0.1, 0.01]), beta=50.0).tolist() == [1.0, 1.0, 0.0]


def test_quarters_average_their_own_pairs():
    values, levels = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.2, 0.999])
    assert health.by_quarter(values, levels) == [2.0, None, None, 5.0]
