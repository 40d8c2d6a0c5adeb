"""Weights of noise levels against diffusers' SNR and the plain formula."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from spin_diffusion.diffusion.errors import min_snr, timestep_weights
from spin_diffusion.diffusion.noising import read_noising
from spin_diffusion.diffusion.settings import DenoiserSettings
from spin_diffusion.selfplay.objectives import spin
from spin_diffusion.store.input_error import InputError
from tests.diffusion.test_game import batch_of, nudge
from tests.playing import make_game

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_the_papers_weight(prediction_type):
    config = SD | {"prediction_type": prediction_type}
    t = torch.arange(1000)
    ratio = compute_snr(DDPMScheduler(**config), t)
    # The usual form in training scripts
    plain = torch.stack([ratio, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    plain = plain / (ratio if prediction_type == "epsilon" else ratio + 1)
    assert torch.allclose(min_snr(read_noising(config, "here"), 5.0), plain, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_stays_finite_without_any_signal(prediction_type):
    noising = read_noising(SD | {"prediction_type": prediction_type, "rescale_betas_zero_snr": True}, "here")
    assert noising.abar[-1] == 0
    found = min_snr(noising, 5.0)
    assert found.isfinite().all() and found[-1] == (1.0 if prediction_type == "epsilon" else 0.0)


def test_without_a_gamma_all_levels_weigh_the_same():
    noising = read_noising(SD, "here")
    assert torch.equal(timestep_weights(noising, 5.0), min_snr(noising, 5.0))
    assert (timestep_weights(noising, None) == 1).all()


def test_a_weight_stands_inside_the_objective(sdxl_dir):
    plain, weighted = make_game(sdxl_dir), make_game(sdxl_dir)
    weighted.questions.weights = 3 * plain.questions.weights
    found = []
    for game in (plain, weighted):
        nudge(game.player)
        found.append(game.scores(game.player, batch_of(game)).scores)
    assert torch.allclose(found[1].margin, 3 * found[0].margin, atol=1e-6) and found[0].margin.abs().max() > 0
    assert torch.allclose(spin(found[1], 100.0), spin(found[0], 300.0), rtol=1e-4)


def test_a_gamma_that_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="--snr_gamma 0.0 must be above 0"):
        DenoiserSettings(snr_gamma=0.0)
