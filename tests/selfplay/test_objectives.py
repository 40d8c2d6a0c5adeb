"""Objectives against closed forms and the plain formulas in fp64."""

import math
from dataclasses import replace

import pytest
import torch

from spin_diffusion.selfplay.game import PairScores
from spin_diffusion.selfplay.objective_names import OBJECTIVES, Objective, title_of
from spin_diffusion.selfplay.objectives import (
    bind,
    check_options,
    ddo,
    dpo,
    dro,
    hinge,
    ipo,
    kto,
    loss_of,
    mapo,
    nca,
    options_for,
    options_of,
    sft,
    space,
    spin,
    sspo,
    with_anchor,
)
from spin_diffusion.selfplay.round_settings import RoundSettings, objective_of, objectives_of, source_of
from spin_diffusion.store.input_error import InputError


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


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_ddo_and_nca_are_their_papers_sums_of_log_sigmoids(beta):
    s = scores(scale=2.0)
    real, generated = (beta * r.double() for r in (s.r_real, s.r_generated))
    for_real, against_real, against_generated = (-torch.log(torch.sigmoid(x)) for x in (real, -real, -generated))
    for alpha in (0.5, 1.0, 4.0):
        assert torch.allclose(ddo(s, alpha, beta).double(), for_real + alpha * against_generated, atol=1e-5)
    assert torch.allclose(nca(s, beta).double(), for_real + (against_real + against_generated) / 2, atol=1e-5)


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


@pytest.mark.parametrize("name", ["spin", "space", "dpo", "hinge", "ipo", "kto", "ddo", "nca", "dro"])
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


# Each rival against its paper's formula in terms of denoising errors, pair by pair, in fp64


def errors(seed: int = 3) -> tuple[list[list[float]], PairScores]:
    """(player real, player generated, opponent real, opponent generated) errors of eight pairs, and their scores."""
    generator = torch.Generator().manual_seed(seed)
    e = 0.05 + 0.01 * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    return e.T.tolist(), PairScores(*(-0.5 * row for row in e))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_hinge_lets_go_of_a_wide_margin():
    beta, (rows, s) = 200.0, errors()
    plain = [max(0.0, 1 - -(beta / 2) * ((pr - o_r) - (pg - og))) for pr, pg, o_r, og in rows]
    assert hinge(s, beta).tolist() == pytest.approx(plain, rel=1e-9)
    assert 0.0 in plain and max(plain) > 0


def test_ipo_has_its_minimum_where_the_paper_puts_it():
    beta, (rows, s) = 200.0, errors()
    # The paper's loss on log-likelihoods -e / 2, times beta^2
    plain = [beta**2 * (-0.5 * (pr - o_r) + 0.5 * (pg - og) - 1 / (2 * beta)) ** 2 for pr, pg, o_r, og in rows]
    assert ipo(s, beta).tolist() == pytest.approx(plain, rel=1e-9)
    zero = torch.zeros(1)
    assert ipo(PairScores(torch.tensor([1 / (2 * beta)]), zero, zero, zero), beta).item() == pytest.approx(0, abs=1e-9)


def test_sspo_pulls_the_generated_side_up_where_the_player_is_behind_on_the_real_one():
    beta, (rows, s) = 200.0, errors()
    plain = []
    for pr, pg, o_r, og in rows:
        sign = 1 if pr - o_r < 0 else -1
        plain.append(-math.log(sigmoid(-(beta / 2) * ((pr - o_r) - sign * (pg - og)))))
    assert sspo(s, beta).tolist() == pytest.approx(plain, rel=1e-9)
    generated = torch.zeros(2, requires_grad=True)
    ahead_behind = PairScores(torch.tensor([0.1, -0.1]), generated, torch.zeros(2), torch.zeros(2))
    sspo(ahead_behind, 1.0).sum().backward()
    assert generated.grad[0] > 0 > generated.grad[1]


def test_kto_is_the_papers_utility_around_its_point_of_reference():
    beta, (rows, s) = 400.0, errors()
    rewards = [[-(pr - o_r), -(pg - og)] for pr, pg, o_r, og in rows]  # as the paper's code has them: twice our r
    z = max(0.0, sum(map(sum, rewards)) / 16)
    plain = [
        0.8 * (1 - sigmoid(beta / 2 * (real - z))) + 1.2 * (1 - sigmoid(-beta / 2 * (generated - z)))
        for real, generated in rewards
    ]
    assert kto(s, beta, real_weight=0.8, generated_weight=1.2).tolist() == pytest.approx(plain, rel=1e-9)
    # With every r above 0 the reference is above 0 too, and it has no gradient (of unlike weights: else it cancels)
    raised = [tensor.clone() + shift for tensor, shift in ((s.opponent_real, 0.02), (s.opponent_generated, 0.01))]
    real, generated = (tensor.requires_grad_() for tensor in raised)
    moved = PairScores(real, generated, s.opponent_real, s.opponent_generated)
    kto(moved, beta, generated_weight=3.0).sum().backward()
    u = torch.sigmoid(-beta * (torch.tensor(0.02 - 0.015)))
    assert torch.allclose(real.grad, (-beta * u * (1 - u)).double(), rtol=1e-4)


def test_mapo_is_the_papers_loss_and_needs_no_opponent():
    rows, s = errors()

    def h(e: float) -> float:
        return 0.5 * e / (math.exp(0.5 * e) - 1)

    plain = [pr - 0.1 * math.log(sigmoid(1000 * (h(pr) - h(pg)))) for pr, pg, _, _ in rows]
    assert mapo(s).tolist() == pytest.approx(plain, rel=1e-9)
    moved = PairScores(s.player_real, s.player_generated, s.opponent_real + 1, s.opponent_generated - 1)
    assert torch.equal(mapo(moved), mapo(s))
    exact = torch.zeros(1, requires_grad=True)
    mapo(PairScores(exact, exact, exact, exact)).sum().backward()
    assert exact.grad.isfinite().all()


def test_dro_ranks_errors_without_a_sigmoid():
    rows, s = errors()
    plain = [max(0.0, 0.001 + (pr - o_r) - (pg - og)) for pr, pg, o_r, og in rows]
    assert dro(s).tolist() == pytest.approx(plain, rel=1e-9)
    assert 0.0 in plain and max(plain) > 0


def test_the_anchor_adds_the_real_sides_loss():
    s = scores()
    assert torch.allclose(with_anchor(spin, 3.0)(s), spin(s) - 3.0 * s.player_real)


def test_options_are_those_of_the_objectives_that_are_played():
    assert options_of("mapo") == {"weight": 0.1, "snr": 0.5, "steps": 1000.0, "sft_weight": 0.0}
    assert options_of("spin") == {"sft_weight": 0.0} and options_of("space") == {"mu": 1.0, "sft_weight": 0.0}
    check_options(["spin", "dro"], {"threshold": 0.01})
    with pytest.raises(InputError, match="treshold: --objective spin, dro has sft_weight, threshold"):
        check_options(["spin", "dro"], {"treshold": 0.01})
    with pytest.raises(InputError, match="--objective spin has sft_weight"):
        check_options(["spin"], {"threshold": 0.01})
    for options, words in (({"mu": 0.0}, "mu 0 must be above 0"), ({"sft_weight": -1.0}, "-1 must be at least 0")):
        with pytest.raises(InputError, match=words):
            check_options(["space"], options)


def test_a_rival_is_played_with_those_options_that_it_has():
    rounds = RoundSettings(objective="space", objective_options={"mu": 2.0, "sft_weight": 0.5})
    assert rounds.numbers(1) == {"beta": 5000.0, "mu": 2.0, "sft_weight": 0.5}
    for name, options in (("spin", {"sft_weight": 0.5}), ("space", rounds.objective_options)):
        assert options_for(name, rounds.objective_options) == options
        replace(rounds, objective=name, objective_options=options)
    assert options_for("sft", None) == {} and RoundSettings(num_generated=3).numbers(1)["mu"] == 3.0


# An objective of a file


OWN = """
import torch

GENERATED, METHOD, PAPER = "none", "my method", "1234.56789"


def loss(scores, beta=1.0, power=2.0):
    return (beta * scores.player_real).abs() ** power
"""


def test_an_objective_of_a_file_is_bound_like_any_other(tmp_path):
    path = str(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text(OWN)
    s = scores()
    assert torch.equal(bind(path, beta=3.0, mu=1.0, power=1.0)(s), (3 * s.player_real).abs())
    assert options_of(path) == {"power": 2.0, "sft_weight": 0.0}
    assert objective_of(path) == Objective("none", "my method", "1234.56789") and title_of(path) == "mine"
    settings = RoundSettings(objective=["spin", path], objective_options={"power": 1.0})
    assert objectives_of(settings) == ["spin", path] and source_of(settings, path) == "none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must define `loss`"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("def loss(scores): return scores.real", "its loss cannot be computed: AttributeError"),
        ("def loss(scores): return scores.margin.mean()", "one number for each pair, a tensor .2. for two, not \\[\\]"),
        ("def loss(scores): return 1.0", "not float"),
        ("GENERATED = 'model'\ndef loss(scores): return scores.margin", "GENERATED is 'model': give one of opponent"),
    ],
)
def test_a_file_that_holds_no_objective_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError, match=words) as refused:
        RoundSettings(objective=str(tmp_path / "mine.py"))
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="nowhere.py does not exist"):
        RoundSettings(objective="nowhere.py")


def test_every_name_has_its_function():
    assert all(callable(loss_of(name)) for name in OBJECTIVES)
    with pytest.raises(InputError, match="--objective spim: give one of spin, space.*a .py file, did you mean 'spin'"):
        RoundSettings(objective="spim")
