"""The exact plateau: its density, its measures, its exact optimum, and what every method costs."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "exact_plateau"
sys.path.insert(0, str(FOLDER))
import denoiser as d  # noqa: E402
import play  # noqa: E402
from measures import Measures  # noqa: E402
from plane import CLASSES, World  # noqa: E402

WORLD = World()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def small() -> d.Denoisers:
    """Two denoisers of few features at the exact optimum."""
    return d.fit(d.Features.random(2, 16, seeded(1)), WORLD, 30_000, seeded(2))


@pytest.mark.parametrize("label", range(CLASSES))
def test_the_log_density_is_scipys_of_the_mixture(label):
    points = 2 * torch.randn(50, 2, generator=seeded())
    covariances = (WORLD.factors[label] @ WORLD.factors[label].mT).numpy()
    parts = zip(WORLD.weights[label].numpy(), WORLD.means[label].numpy(), covariances, strict=True)
    expected = sum(weight * multivariate_normal(mean, cov).pdf(points.numpy()) for weight, mean, cov in parts)
    got = WORLD.log_density(points, label)
    dense = expected > 1e-200
    assert dense.sum() > 10
    assert np.allclose(got.numpy()[dense], np.log(expected[dense]), rtol=1e-9)


def test_the_density_integrates_to_one_over_the_grid():
    axis = torch.linspace(-4, 4, 401)
    grid = torch.cartesian_prod(axis, axis)
    assert WORLD.log_density(grid, 0).exp().sum().item() * 0.02**2 == pytest.approx(1, abs=1e-3)


def test_draws_follow_the_density_and_have_variance_one():
    labels = torch.arange(100_000).remainder(CLASSES)
    points = WORLD.draw(labels, seeded()).double()
    assert points.mean(dim=0).abs().max() < 0.02
    assert points.square().mean().item() == pytest.approx(1, abs=0.02)
    entropy = -WORLD.log_density(points[labels == 0], 0).mean().item()
    other = -WORLD.log_density(WORLD.draw(torch.zeros(50_000, dtype=torch.long), seeded(1)), 0).mean().item()
    assert entropy == pytest.approx(other, abs=0.02)


def test_the_measures_of_the_data_are_nearly_nothing_and_each_sees_its_own_fault():
    measures = Measures(WORLD, samples=100_000)
    good = WORLD.draw(torch.zeros(20_000, dtype=torch.long), seeded(3))
    fine = measures(good, 0)
    assert fine["outside"] == pytest.approx(0.01, abs=0.004)
    assert fine["js"] < 0.02 and fine["missed"] < 0.01 and fine["sliced"] < 0.02
    blurred = measures(good + 0.2 * torch.randn(good.shape, generator=seeded()), 0)
    assert blurred["outside"] > 0.3
    dense = WORLD.log_density(good, 0)
    collapsed = measures(good[dense > dense.quantile(0.7)], 0)
    assert collapsed["outside"] == 0 and collapsed["missed"] > 0.2 and collapsed["js"] > 0.1
    moved = measures(good + torch.tensor([0.1, 0.0]), 0)
    assert moved["sliced"] == pytest.approx(0.1 * 2 / math.pi, abs=0.02)


def test_the_fit_is_the_least_squares_solution_of_numpy():
    features = d.Features.random(1, 8, seeded(5))
    fitted = d.fit(features, WORLD, 3_000, seeded(6))
    generator = seeded(6)
    labels = torch.randint(CLASSES, (1, 3_000), generator=generator)
    points = WORLD.draw(labels, generator)
    question = d.ask(points, *d.random_question(points, labels, 0.1, generator))
    phi = features(question.noisy, question.log_sigma, question.labels)[0].double().numpy()
    expected = np.linalg.lstsq(phi, question.target[0].double().numpy(), rcond=None)[0]
    predicted = fitted.predict(question)[0].numpy()
    assert np.allclose(predicted, phi @ expected, atol=2e-3)


def test_at_the_optimum_fine_tuning_has_no_gradient_left_and_before_it_has(small):
    def mean_gradient(denoisers: d.Denoisers) -> float:
        readout = denoisers.readout.clone().requires_grad_()
        labels = torch.randint(CLASSES, (2, 30_000), generator=seeded(8))
        points = WORLD.draw(labels, seeded(9))
        question = d.ask(points, *d.random_question(points, labels, 0.1, seeded(10)))
        (-play.scores_of(denoisers.with_readout(readout), question)[0].mean()).backward()
        return readout.grad.norm().item()

    assert mean_gradient(small) < 0.1 * mean_gradient(small.with_readout(torch.zeros_like(small.readout)))


def test_the_target_is_that_of_the_preconditioning(small):
    """D with F = target gives the clean point back."""
    points, noise = torch.randn(2, 7, 2, generator=seeded()), torch.randn(2, 7, 2, generator=seeded(1))
    log_sigma = torch.linspace(*d.LOG_SIGMA, 7).expand(2, -1)
    question = d.ask(points, torch.zeros(2, 7, dtype=torch.long), log_sigma, noise)
    sigma = log_sigma.exp()[..., None]
    clean = question.noisy / (sigma**2 + 1) + sigma / (sigma**2 + 1).sqrt() * question.target
    assert torch.allclose(clean, points, atol=1e-3)
    assert torch.allclose(question.noisy, points + sigma * noise)


def test_heuns_method_with_the_exact_denoiser_of_a_gaussian_draws_that_gaussian(small):
    class Gaussian:
        def denoise(self, noisy: torch.Tensor, log_sigma: float, labels: torch.Tensor) -> torch.Tensor:
            variance = math.exp(2 * log_sigma)
            return (0.25 * noisy + variance * 1.5) / (0.25 + variance)

    drawn = d.draw(Gaussian(), torch.zeros(1, 20_000, dtype=torch.long), seeded(), steps=48)
    assert drawn.mean().item() == pytest.approx(1.5, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)
    colder = d.draw(Gaussian(), torch.zeros(1, 20_000, dtype=torch.long), seeded(), 48, prediction_scale=1.06)
    assert colder.std() < 0.95 * drawn.std()


def test_all_methods_cost_the_same_passes():
    pair = 2 * 3 + 2  # both sides forward and backward through the player, forward through the opponent
    by_hand = 8 * (80 * 128 * pair + 1_024 * 47)
    assert play.forward_passes_of_self_play() == by_hand
    assert abs(play.supervised_steps() * 3 * 128 - by_hand) <= 3 * 128


def test_a_round_of_self_play_lowers_what_lies_outside_and_fine_tuning_does_not(small, monkeypatch):
    monkeypatch.setattr(play, "supervised_steps", lambda: 100)
    measures = Measures(WORLD, samples=20_000)
    spin = next(method for method in play.METHODS if method.name == "SPIN")
    outside = [
        play.measured(model, measures, play.Free(), points=4_000)[:, 0].mean()
        for model in (small, play.play_round(small, WORLD, spin, 3), play.fine_tune(small, WORLD, 3e-4, 100, 3))
    ]
    assert outside[1] < outside[0] - 0.01
    assert abs(outside[2] - outside[0]) < 0.01


def test_the_first_step_of_a_round_has_the_losses_of_zero_r(small, monkeypatch):
    """Invariant 1 here too: player and opponent agree before the first step."""
    monkeypatch.setattr(play, "STEPS", 1)
    monkeypatch.setattr(play, "OPPONENT_SAMPLES", 64)
    losses = []

    def spied(method: play.Method) -> play.Method:
        def loss(scores):
            values = method.loss(scores)
            losses.append(values.detach().mean().item())
            return values

        return play.Method(method.name, loss, method.keep, method.rate)

    for method in play.METHODS:
        if method.loss is not None:
            play.play_round(small, WORLD, spied(method), 1)
            expected = {"SPACE": 2 * math.log(2), "DDO, alpha 4": 5 * math.log(2)}.get(method.name, math.log(2))
            assert losses[0] == pytest.approx(expected, abs=1e-5), method.name
            losses.clear()


def test_the_table_says_the_base_and_the_differences_to_it():
    plain = {"base": np.full((10, 4), 0.3), "SPIN": np.full((10, 4), 0.3) - 0.1 * np.linspace(0.9, 1.1, 10)[:, None]}
    results = {name: play.Result(values, values, np.zeros((4, 2))) for name, values in plain.items()}
    text = play.table("finished", results, play.Free(48, 1.03, 1.5))
    assert "| base | 0.300 | 0.300 | 0.300 | 0.300 |" in text
    assert "| SPIN | -0.100 [-0.1" in text
    assert "48 steps, prediction times 1.03, guidance 1.5" in text


def test_a_folder_of_somebody_else_is_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(play, "ProcessPoolExecutor", None)
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        play.main(["--output_dir", str(tmp_path)])
    assert ended.value.code == 2 and "is somebody else's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"] and (tmp_path / "table.md").read_text() == "mine"
