"""Objectives against closed forms and the plain formulas in fp64."""

import math

import pytest
import torch

from spin_diffusion.selfplay.objectives import OBJECTIVES, PairScores, bind, dpo, sft, space, spin


def scores(pairs: int = 64, seed: int = 0, scale: float = 1.0) -> PairScores:
    generator = torch.Generator().manual_seed(seed)
    return PairScores(*(scale * torch.randn(pairs, generator=generator) for _ in range(4)))


def zeros() -> PairScores:
    same_real, same_generated = torch.tensor([-0.3, -2.0]), torch.tensor([-1.0, 0.5])
    return PairScores(same_real, same_generated, same_real, same_generated)


def test_spin_is_ln_2_where_player_and_opponent_agree():
    assert torch.allclose(spin(zeros(), beta=5000.0), torch.full((2,), math.log(2)))


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0, 7.0])
def test_space_has_its_closed_form_where_player_and_opponent_agree(mu):
    expected = math.log(1 + mu) + mu * math.log(1 + 1 / mu)
    assert torch.allclose(space(zeros(), mu=mu, beta=2000.0), torch.full((2,), expected))


def test_spin_on_denoising_scores_is_the_diffusion_dpo_loss_with_its_half():
    generator = torch.Generator().manual_seed(1)
    e = [torch.rand(32, generator=generator, dtype=torch.float64) * 1e-3 for _ in range(4)]
    beta = 5000.0
    published = -torch.log(torch.sigmoid(-beta / 2 * ((e[0] - e[2]) - (e[1] - e[3]))))
    ours = spin(PairScores(*(-0.5 * error.float() for error in e)), beta=beta)
    assert torch.allclose(ours.double(), published, atol=1e-4)


def test_space_is_binary_cross_entropy_with_logit_r_minus_ln_mu():
    s, mu, beta = scores(), 3.0, 2.0
    real, generated = torch.sigmoid(beta * s.r_real - math.log(mu)), torch.sigmoid(beta * s.r_generated - math.log(mu))
    assert torch.allclose(space(s, mu, beta), -torch.log(real) - mu * torch.log(1 - generated), atol=1e-5)


def test_dpo_is_spin_on_human_pairs():
    assert torch.equal(dpo(scores(), 2000.0), spin(scores(), 2000.0))
    assert OBJECTIVES["dpo"].generated == "data"


def test_sft_ignores_everything_but_the_real_sample():
    s = scores()
    assert torch.equal(sft(s), -s.player_real)


def test_a_constant_on_both_r_leaves_spin_and_changes_space():
    s = scores()
    moved = PairScores(s.player_real + 0.5, s.player_generated + 0.5, s.opponent_real, s.opponent_generated)
    assert torch.allclose(spin(moved), spin(s), atol=1e-6)
    assert not torch.allclose(space(moved), space(s), atol=1e-2)


def test_swapping_real_and_generated_negates_the_margin():
    s = scores()
    swapped = PairScores(s.player_generated, s.player_real, s.opponent_generated, s.opponent_real)
    assert torch.equal(swapped.margin, -s.margin)


@pytest.mark.parametrize("name", ["spin", "space", "dpo"])
def test_gradients_raise_the_real_score_and_lower_the_generated_one(name):
    real, generated = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    bind(name, beta=2.0, mu=1.0)(PairScores(real, generated, torch.zeros(4), torch.zeros(4))).sum().backward()
    assert (real.grad < 0).all() and (generated.grad > 0).all()


def test_losses_stay_finite_at_scores_far_out():
    for name in OBJECTIVES:
        assert bind(name, beta=5000.0, mu=3.0)(scores(scale=100.0)).isfinite().all()


def test_bind_gives_an_objective_only_the_settings_it_knows():
    assert torch.equal(bind("sft", beta=1.0, mu=2.0)(scores()), sft(scores()))
    assert torch.equal(bind("space", beta=2.0, mu=3.0)(scores()), space(scores(), 3.0, 2.0))
