"""Denoisers with a limited class and an exact optimum: frozen random features under a linear read-out.

The denoising loss of such a model is a least-squares problem, so its minimum over the class, where maximum likelihood
has nothing left to gain, is one linear solve. Several models with features of their own stand side by side in one
tensor, `models` first. Scaling and preconditioning are those of EDM (arXiv 2206.00364, table 1) for data of variance 1:

    D(x, sigma) = x / (sigma^2 + 1) + sigma / sqrt(sigma^2 + 1) F(x, sigma)

where F is what the features give and its target has variance 1 at every sigma.
"""

import math
from dataclasses import dataclass, replace

import torch
from plane import CLASSES, World
from torch import Tensor

UNCONDITIONAL = CLASSES
"""The label of a point whose class is not told."""
LOG_SIGMA = (math.log(0.03), math.log(60.0))
"""Natural logarithms of the smallest and largest noise level; both training and drawing cover this range."""
RHO = 6.0
"""Exponent of the sampler's grid of noise levels (arXiv 2206.00364, eq. 5)."""


@dataclass(frozen=True)
class Question:
    """Points noised and what F should say of them; all (models, batch, ...)."""

    noisy: Tensor
    log_sigma: Tensor
    labels: Tensor
    target: Tensor


def ask(points: Tensor, labels: Tensor, log_sigma: Tensor, noise: Tensor) -> Question:
    """Noise `points` (models, batch, 2) with `noise` at `log_sigma`; the target is that of F."""
    sigma = log_sigma.exp()[..., None]
    noisy = points + sigma * noise
    variance = sigma.square() + 1
    return Question(noisy, log_sigma, labels, (points - noisy / variance) * variance.sqrt() / sigma)


@dataclass(frozen=True)
class Features:
    """The frozen part: hidden = clamp(inputs @ mix + shift, -1, 1).

    Attributes:
        mix: (models, inputs, hidden).
        shift: (models, 1, hidden).
    """

    mix: Tensor
    shift: Tensor

    @classmethod
    def random(cls, models: int, hidden: int, generator: torch.Generator) -> "Features":
        """Features whose dependence on the point is of several widths, from coarse to fine."""
        widths = torch.exp(torch.empty(models, 1, hidden).uniform_(math.log(0.7), math.log(4.0), generator=generator))
        of_point = torch.randn(models, 2, hidden, generator=generator) * widths
        of_rest = 0.3 * torch.randn(models, 8 + CLASSES + 1, hidden, generator=generator)
        return cls(torch.cat([of_point, of_rest], dim=1), torch.randn(models, 1, hidden, generator=generator))

    def __call__(self, noisy: Tensor, log_sigma: Tensor, labels: Tensor) -> Tensor:
        """(models, batch, hidden + 3): the hidden units, the scaled point itself and a constant."""
        point = noisy / (log_sigma.exp().square() + 1).sqrt()[..., None]
        phases = log_sigma[..., None] * 0.4 * torch.arange(1, 5)
        label = torch.nn.functional.one_hot(labels, CLASSES + 1).float()
        inputs = torch.cat([point, phases.sin(), phases.cos(), label], dim=-1)
        hidden = torch.baddbmm(self.shift, inputs, self.mix).clamp(-1, 1)
        return torch.cat([hidden, point, torch.ones_like(point[..., :1])], dim=-1)


@dataclass(frozen=True)
class Denoisers:
    """Models side by side.

    Attributes:
        whitening: (models, features, features), which makes the features uncorrelated and of unit variance over the
            data, so that Adam's step is of one size in all directions.
        readout: (models, features, 2), the only trained part, in the whitened features.
    """

    features: Features
    whitening: Tensor
    readout: Tensor

    def with_readout(self, readout: Tensor) -> "Denoisers":
        """The same features with another read-out."""
        return replace(self, readout=readout)

    def predict(self, question: Question) -> Tensor:
        """F, (models, batch, 2)."""
        return self.features(question.noisy, question.log_sigma, question.labels) @ (self.whitening @ self.readout)

    def denoise(self, noisy: Tensor, log_sigma: float, labels: Tensor) -> Tensor:
        """D, (models, batch, 2), at one noise level."""
        level = torch.full(labels.shape, log_sigma)
        sigma = math.exp(log_sigma)
        answer = self.features(noisy, level, labels) @ (self.whitening @ self.readout)
        return noisy / (sigma**2 + 1) + sigma / math.sqrt(sigma**2 + 1) * answer


def random_question(
    points: Tensor, labels: Tensor, drop: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of which a share `drop` is not told, noise levels uniform in ln sigma, and noise, for `points`."""
    dropped = torch.rand(labels.shape, generator=generator) < drop
    low, high = LOG_SIGMA
    log_sigma = low + (high - low) * torch.rand(labels.shape, generator=generator)
    return (
        torch.where(dropped, UNCONDITIONAL, labels),
        log_sigma,
        torch.randn(points.shape, generator=generator),
    )


def fit(features: Features, world: World, samples: int, generator: torch.Generator) -> Denoisers:
    """The exact minimum of the denoising loss over `samples` fresh draws of the data, in fp64."""
    models, width = features.mix.shape[0], features.mix.shape[2] + 3
    gram = torch.zeros(models, width, width, dtype=torch.float64)
    right = torch.zeros(models, width, 2, dtype=torch.float64)
    batch = 3_000
    for _ in range(samples // batch):
        labels = torch.randint(CLASSES, (models, batch), generator=generator)
        points = world.draw(labels, generator)
        question = ask(points, *random_question(points, labels, 0.1, generator))
        phi = features(question.noisy, question.log_sigma, question.labels)
        gram += (phi.mT @ phi).double()
        right += (phi.mT @ question.target).double()
    count = samples // batch * batch
    gram, right = gram / count, right / count
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    factor = torch.linalg.cholesky(gram + ridge[:, None, None] * torch.eye(width, dtype=torch.float64))
    whitening = torch.linalg.inv(factor).mT
    return Denoisers(features, whitening.float(), (torch.linalg.inv(factor) @ right).float())


@torch.no_grad()
def draw(
    denoisers: Denoisers,
    labels: Tensor,
    generator: torch.Generator,
    steps: int,
    prediction_scale: float = 1.0,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Samples (models, batch, 2) by Heun's method (arXiv 2206.00364, algorithm 1), 2 steps - 1 evaluations each.

    Args:
        prediction_scale: factor of the predicted noise; above 1 the sampler is colder.
        guidance_scale: of classifier-free guidance; 1 = none.
    """
    grid = torch.linspace(math.exp(LOG_SIGMA[1]) ** (1 / RHO), math.exp(LOG_SIGMA[0]) ** (1 / RHO), steps) ** RHO
    sigmas = [*grid.tolist(), 0.0]
    unconditional = torch.full_like(labels, UNCONDITIONAL)

    def slope(points: Tensor, sigma: float) -> Tensor:
        clean = denoisers.denoise(points, math.log(sigma), labels)
        if guidance_scale != 1.0:
            without = denoisers.denoise(points, math.log(sigma), unconditional)
            clean = without + guidance_scale * (clean - without)
        return prediction_scale * (points - clean) / sigma

    points = sigmas[0] * torch.randn(*labels.shape, 2, generator=generator)
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        first = slope(points, now)
        moved = points + (then - now) * first
        points = moved if then == 0 else points + (then - now) * (first + slope(moved, then)) / 2
    return points
