"""Forward process, targets and errors against diffusers and fp64."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from spin_diffusion.diffusion import errors
from spin_diffusion.diffusion.noising import draw, read_noising
from spin_diffusion.store.input_error import InputError

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def inputs(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(batch, 4, 8, 8, generator=generator) for _ in range(2))
    return x_0, eps, torch.randint(1000, (batch,), generator=generator)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_targets_equal_diffusers(prediction_type, zero_snr):
    config = SCHEDULE | {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    noising, scheduler = read_noising(config, "a checkpoint"), DDPMScheduler.from_config(config)
    x_0, eps, t = inputs()
    x_t, target = noising.noised_and_target(x_0, eps, t)
    assert torch.allclose(x_t, scheduler.add_noise(x_0, eps, t), atol=1e-6)
    theirs = eps if prediction_type == "epsilon" else scheduler.get_velocity(x_0, eps, t)
    assert torch.allclose(target, theirs, atol=1e-6)


def test_zero_terminal_snr_leaves_no_signal_at_the_last_timestep():
    assert read_noising(SCHEDULE | {"rescale_betas_zero_snr": True}, "x").abar[-1] == 0
    assert read_noising(SCHEDULE, "x").abar[-1] > 0


def test_an_unknown_prediction_type_is_refused_with_what_is_supported():
    with pytest.raises(InputError, match="'sample'.*epsilon, v_prediction"):
        read_noising(SCHEDULE | {"prediction_type": "sample"}, "a checkpoint")


def test_the_score_is_minus_half_the_mean_squared_error():
    x, y = inputs()[:2]
    expected = -0.5 * ((x.double() - y.double()) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(errors.score(x, y).double(), expected, atol=1e-6)


def test_errors_of_half_precision_predictions_are_computed_in_fp32():
    x, y = (values.bfloat16() for values in inputs()[:2])
    assert errors.denoising_error(x, y).dtype == torch.float32
    assert torch.equal(errors.denoising_error(x, y), errors.denoising_error(x.float(), y.float()))


def test_draws_depend_on_their_own_seed_alone():
    together, alone = draw([3, 5], (4, 8, 8), 1000, 0.5), draw([5], (4, 8, 8), 1000, 0.5)
    assert torch.equal(together.eps[1:], alone.eps) and together.t[1] == alone.t[0]
    assert together.dropped[1:] == alone.dropped
    assert not torch.equal(together.eps[0], together.eps[1])


def test_captions_are_dropped_as_often_as_asked():
    dropped = draw(list(range(4000)), (1, 1, 1), 1000, 0.2).dropped
    assert 0.17 < sum(dropped) / 4000 < 0.23


def test_the_winner_preserving_scale_keeps_its_share_of_the_real_sides_descent():
    generator = torch.Generator().manual_seed(2)
    target = torch.zeros(200, 4, 4, 4)
    real = torch.randn(200, 4, 4, 4, generator=generator)
    generated = real + 2 * torch.randn(200, 4, 4, 4, generator=generator)
    for mu in (0.0, 0.5, 0.9):
        scale = errors.winner_preserving_scale(real, target, generated, target, mu)
        g_real, g_generated = real.flatten(1), generated.flatten(1)
        # The real error's change along -(g_real - scale g_generated), to first order
        kept = (g_real * (g_real - scale[:, None] * g_generated)).sum(dim=1)
        assert (kept >= mu * g_real.square().sum(dim=1) - 1e-3).all()
        assert ((scale >= 0) & (scale <= 1)).all() and (scale < 1).any()


def test_the_winner_preserving_scale_is_one_where_the_generated_side_helps():
    real, target = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert errors.winner_preserving_scale(real, target, -real, target, 0.9).item() == 1


def test_scaling_a_gradient_leaves_the_value():
    values = torch.tensor([2.0, 3.0], requires_grad=True)
    scaled = errors.scale_gradient(values, torch.tensor([0.5, 0.0]))
    assert torch.equal(scaled, values)
    scaled.sum().backward()
    assert values.grad.tolist() == [0.5, 0.0]


def test_ddim_configured_from_a_checkpoint_does_not_clip_latents():
    from spin_diffusion.diffusion.sampling import SAMPLERS

    assert isinstance(SAMPLERS["ddim"](SCHEDULE), DDIMScheduler)
    assert SAMPLERS["ddim"](SCHEDULE).config.clip_sample is False
