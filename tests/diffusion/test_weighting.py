"""Weights of noise levels: predictions converted from space to space in fp64, and diffusers' SNR."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.nn.functional import softplus

from spin_diffusion.diffusion.errors import timestep_weights
from spin_diffusion.diffusion.noising import read_noising
from spin_diffusion.selfplay.objectives import spin
from spin_diffusion.store.input_error import InputError
from tests.diffusion.test_game import batch_of, nudge
from tests.playing import make_game

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("weighting", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_weighted_error_is_the_error_of_the_prediction_in_that_space(prediction_type, weighting):
    noising = read_noising(SD | {"prediction_type": prediction_type}, "here")
    generator = torch.Generator().manual_seed(0)
    x_0, eps, wrong = torch.randn(3, 1000, 6, generator=generator, dtype=torch.float64)
    abar = noising.abar.double()[:, None]
    a, s = abar.sqrt(), (1 - abar).sqrt()
    x_t, own = a * x_0 + s * eps, eps if prediction_type == "epsilon" else a * eps - s * x_0
    predicted = own + wrong
    predicted_x_0 = (x_t - s * predicted) / a if prediction_type == "epsilon" else a * x_t - s * predicted
    predicted_eps = (x_t - a * predicted_x_0) / s
    by_space = {
        "epsilon": predicted_eps - eps,
        "x0": predicted_x_0 - x_0,
        "v": a * predicted_eps - s * predicted_x_0 - (a * eps - s * x_0),
    }
    expected = by_space[weighting].square().mean(dim=1)
    weighted = timestep_weights(noising, weighting).double() * (predicted - own).square().mean(dim=1)
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("prediction_type", "own"), [("epsilon", "epsilon"), ("v_prediction", "v")])
def test_in_the_models_own_space_all_levels_weigh_the_same(prediction_type, own):
    noising = read_noising(SD | {"prediction_type": prediction_type}, "here")
    assert (timestep_weights(noising, None) == 1).all() and (timestep_weights(noising, own) == 1).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_the_papers_weight(prediction_type):
    config = SD | {"prediction_type": prediction_type}
    t = torch.arange(1000)
    ratio = compute_snr(DDPMScheduler(**config), t)
    # The usual form in training scripts
    plain = torch.stack([ratio, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    plain = plain / (ratio if prediction_type == "epsilon" else ratio + 1)
    assert torch.allclose(timestep_weights(read_noising(config, "here"), "min_snr"), plain, rtol=1e-5)


def test_without_any_signal_weights_are_finite_or_refused():
    ends = {"epsilon": {"epsilon": 1.0, "min_snr": 1.0}, "v_prediction": {"epsilon": 0, "v": 1, "x0": 1, "min_snr": 0}}
    for prediction_type, known in ends.items():
        noising = read_noising(SD | {"prediction_type": prediction_type, "rescale_betas_zero_snr": True}, "here")
        assert noising.abar[-1] == 0
        for weighting, end in known.items():
            found = timestep_weights(noising, weighting)
            assert found.isfinite().all() and found[-1] == end
        for weighting in {"epsilon", "v", "x0", "min_snr"} - known.keys():
            with pytest.raises(InputError, match=rf"^--score_weighting {weighting}: .*\(zero terminal SNR\)"):
                timestep_weights(noising, weighting)


def test_a_weight_stands_inside_the_objective(sdxl_dir):
    found = []
    for game in (make_game(sdxl_dir), make_game(sdxl_dir, score_weighting="v")):
        nudge(game.player)
        found.append(game.scores(game.player, batch_of(game)))
    plain, weighted = (batch.scores for batch in found)
    times = 1 / game.noising.abar[(found[0].level * 1000).round().long()]
    assert times.max() > 10 * times.min()
    # Scores are subtracted in fp32, so what they round is as many times as large
    rounding = 1e-6 * times
    assert ((weighted.margin - times * plain.margin).abs() < rounding).all()
    assert ((spin(weighted, 100.0) - softplus(-100 * times * plain.margin)).abs() < 100 * rounding).all()
