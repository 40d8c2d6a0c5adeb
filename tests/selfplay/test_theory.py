"""What the objectives are proved to do, on a world where every round can be solved exactly.

Sixteen answers, a full softmax over them, and losses as expectations over data and opponent instead of samples. The
statements are those of SPACE (arXiv 2512.07175) and SPIN (arXiv 2401.01335) and what follows from them on paper.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spin_diffusion.samples.scores import mixture_score
from spin_diffusion.selfplay.game import PairScores
from spin_diffusion.selfplay.objectives import bind, ddo, nca, space, spin

ANSWERS = 16
Loss = Callable[[PairScores], Tensor]


def distribution(seed: int, spread: float = 0.5) -> Tensor:
    """log p of a random distribution, fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(spread * torch.randn(ANSWERS, dtype=torch.float64, generator=generator), 0)


DATA, BASE = distribution(0), distribution(1)


def kl(p: Tensor, q: Tensor) -> float:
    return (p.exp() * (p - q)).sum().item()


def expected(loss: Loss, player: Tensor, opponent: Tensor, data: Tensor = DATA, drawn: Tensor | None = None) -> Tensor:
    """The loss over all pairs of a real and a generated answer, each with its probability.

    Args:
        drawn: log p of what the generated answers are drawn from, if that is not the opponent that scores them.
    """
    drawn = opponent if drawn is None else drawn
    y, other = (grid.flatten() for grid in torch.meshgrid(*[torch.arange(ANSWERS)] * 2, indexing="ij"))
    weights = (data[y] + drawn[other]).exp()
    return (weights * loss(PairScores(player[y], player[other], opponent[y], opponent[other]))).sum()


def solved(loss: Loss, opponent: Tensor, data: Tensor = DATA, drawn: Tensor | None = None) -> Tensor:
    """log p of the player that minimises the expected loss: one round, solved exactly."""
    logits = opponent.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=3000, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = expected(loss, torch.log_softmax(logits, 0), opponent, data, drawn)
        value.backward()
        return value

    for _ in range(3):  # its line search stops early now and then
        optimizer.step(closure)
    return torch.log_softmax(logits.detach(), 0)


def rounds(loss: Loss, count: int, start: Tensor = BASE) -> Tensor:
    player = start
    for _ in range(count):
        player = solved(loss, player)
    return player


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0, 7.0])
def test_one_exact_round_of_space_ends_at_the_data(mu):
    assert torch.allclose(solved(bind("space", mu=mu, beta=1.0), BASE).exp(), DATA.exp(), atol=1e-8)


@pytest.mark.parametrize("beta", [0.6, 1.0, 2.0, 5.0])
def test_one_exact_round_of_spin_ends_where_its_theorem_says(beta):
    closed = torch.log_softmax(BASE + (DATA - BASE) / beta, 0)  # p_t (p_data / p_t)^(1 / lambda)
    assert torch.allclose(solved(bind("spin", beta=beta), BASE).exp(), closed.exp(), atol=1e-8)


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0, 7.0])
def test_the_loss_at_the_start_of_a_round_and_in_the_papers_form(mu):
    zero = torch.zeros(1, dtype=torch.float64)
    at_start = math.log(1 + mu) + mu * math.log(1 + 1 / mu)
    assert space(PairScores(zero, zero, zero, zero), mu=mu).item() == pytest.approx(at_start, abs=1e-12)
    r, other = (torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (3, 4))

    def sigma(z: Tensor, weight: float) -> Tensor:
        return 1 / (1 + weight * torch.exp(-z))

    paper = -(torch.log(sigma(r, mu)) + mu * torch.log(sigma(-other, 1 / mu)))
    assert torch.allclose(space(PairScores(r, other, 0 * r, 0 * r), mu=mu), paper, atol=1e-12)


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0, 7.0])
def test_the_first_gradient_of_space_is_a_share_of_fine_tunings(mu):
    gradients = []
    for of_player in (
        lambda player: expected(bind("space", mu=mu, beta=1.0), player, BASE),
        lambda player: -(DATA.exp() * player).sum(),
    ):
        logits = BASE.clone().requires_grad_()
        of_player(torch.log_softmax(logits, 0)).backward()
        gradients.append(logits.grad)
    assert torch.allclose(gradients[0], mu / (1 + mu) * gradients[1], atol=1e-14)


def test_space_with_one_generated_answer_is_ddo_at_alpha_1():
    scores = PairScores(*torch.randn(4, 100, generator=torch.Generator().manual_seed(5)))
    assert torch.allclose(space(scores, mu=1.0, beta=0.7), ddo(scores, beta=0.7))


@pytest.mark.parametrize(
    "loss, gain",
    [(bind("spin", beta=1.0), 1.0), (bind("spin", beta=2.0), 0.5), (bind("spin", beta=0.6), 1 / 0.6),
     (bind("space", mu=1.0, beta=1.0), 1.0), (bind("space", mu=1.0, beta=2.0), 0.5), (nca, 0.5)],
)  # fmt: skip
def test_near_the_data_a_round_multiplies_the_error_by_one_minus_its_gain(loss, gain):
    near = torch.log_softmax(DATA + 1e-3 * distribution(6), 0)
    error, left = near - DATA, solved(loss, near) - DATA
    error, left = error - (DATA.exp() * error).sum(), left - (DATA.exp() * left).sum()
    assert (left @ error / (error @ error)).item() == pytest.approx(1 - gain, abs=0.01)


def test_a_wrong_temperature_makes_spin_leave_and_space_only_oscillate():
    start = distribution(1, spread=0.8)
    assert kl(DATA, rounds(bind("spin", beta=0.3), 3, start)) > 5
    assert kl(DATA, rounds(bind("space", mu=1.0, beta=0.3), 3, start)) < 1


def test_answers_that_the_opponent_never_draws_hurt_spin_far_more_than_space():
    """Samples cut to the twelve likeliest answers, while the score is that of all sixteen (top-k sampling)."""
    after = {}
    for name in ("space", "spin"):
        player = BASE
        for _ in range(3):
            kept = player.topk(12).indices
            drawn = torch.full_like(player, -torch.inf)
            drawn[kept] = torch.log_softmax(player[kept], 0)
            player = solved(bind(name, mu=1.0, beta=1.0), player, drawn=drawn)
        after[name] = kl(DATA, player)
    assert after["space"] < 0.2 and after["spin"] > 1


def test_an_answer_equal_to_the_real_one_teaches_spin_nothing_and_holds_space_back():
    player = torch.tensor([0.3, 0.0, -1.2], requires_grad=True)
    same = PairScores(player, player, torch.zeros(3), torch.zeros(3))
    (gradient,) = torch.autograd.grad(spin(same).sum(), player)
    assert torch.equal(gradient, torch.zeros(3))
    (gradient,) = torch.autograd.grad(space(same).sum(), player)
    assert gradient[1] == 0 and gradient[0] > 0 > gradient[2]  # back to r = 0 from both sides


def test_order_does_not_matter_and_copies_of_one_answer_weigh_as_mu():
    generator = torch.Generator().manual_seed(8)
    real, generated = torch.randn(4, generator=generator), torch.randn(4, 3, generator=generator)
    pairs = PairScores(real.repeat_interleave(3), generated.flatten(), torch.zeros(12), torch.zeros(12))
    order = torch.randperm(12, generator=generator)
    shuffled = PairScores(pairs.player_real[order], pairs.player_generated[order], torch.zeros(12), torch.zeros(12))
    assert torch.allclose(space(pairs, mu=3.0).mean(), space(shuffled, mu=3.0).mean(), atol=1e-6)
    # Three generated answers as three pairs: the real term once, each generated one with weight 1
    log_mu = math.log(3)
    by_hand = (
        torch.nn.functional.softplus(log_mu - real) + torch.nn.functional.softplus(generated - log_mu).sum(dim=1)
    ).mean()
    assert torch.allclose(space(pairs, mu=3.0).mean(), by_hand, atol=1e-6)
    copies = PairScores(pairs.player_real, generated[:, :1].repeat(1, 3).flatten(), torch.zeros(12), torch.zeros(12))
    single = PairScores(real, generated[:, 0], torch.zeros(4), torch.zeros(4))
    assert torch.allclose(space(copies, mu=3.0).mean(), space(single, mu=3.0).mean(), atol=1e-6)


def test_a_mixture_of_opponents_keeps_the_fixed_point_if_its_own_density_scores():
    older, newer = BASE, distribution(2)
    mixture = mixture_score(torch.stack([older, newer]).float(), torch.tensor([0.5, 0.5])).double()
    mixture = torch.log_softmax(mixture, 0)
    loss = bind("space", mu=1.0, beta=1.0)
    assert torch.allclose(solved(loss, mixture).exp(), DATA.exp(), atol=1e-6)
    # Naive replay scores the same samples by the newest alone
    assert kl(DATA, solved(loss, newer, drawn=mixture)) > 1e-3


def test_the_gap_of_space_is_twice_the_jensen_shannon_divergence_at_its_optimum():
    loss = bind("space", mu=1.0, beta=1.0)
    gap = expected(loss, BASE, BASE) - expected(loss, DATA, BASE)
    middle = torch.logsumexp(torch.stack([DATA, BASE]), 0) - math.log(2)
    assert gap.item() == pytest.approx(kl(DATA, middle) + kl(BASE, middle), abs=1e-12)
