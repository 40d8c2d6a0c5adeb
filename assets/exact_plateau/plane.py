"""A world in the plane whose density is known: two classes of points along the branches of a tree.

Each class is a mixture of narrow Gaussians, four to a branch, and a branch ends in two shorter and thinner ones. So
what a model of it gets wrong can be computed, not estimated: which of its samples lie where there are no data, and
which of the data it does not reach.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 2
LEVELS = 3  # a trunk, its two branches and their four
GAUSSIANS_PER_BRANCH = 4


@dataclass(frozen=True)
class Branch:
    """One straight piece of a tree: where it starts, where it points (radians), and how long and thick it is."""

    start: Tensor
    angle: float
    length: float
    thickness: float
    weight: float

    @property
    def direction(self) -> Tensor:
        """Its unit vector."""
        return torch.tensor([math.cos(self.angle), math.sin(self.angle)], dtype=torch.float64)


def _branches(trunk: Branch, levels: int, generator: torch.Generator) -> list[Branch]:
    """`trunk` and all that grows out of it; each of two children carries half of its parent's weight."""
    if levels == 1:
        return [trunk]
    grown = [trunk]
    for side in (-1, 1):
        bend, shrink = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        child = Branch(
            start=trunk.start + trunk.length * trunk.direction,
            angle=trunk.angle + side * (0.35 + 0.45 * bend),
            length=trunk.length * (0.6 + 0.2 * shrink),
            thickness=trunk.thickness * 0.72,
            weight=trunk.weight / 2,
        )
        grown += _branches(child, levels - 1, generator)
    return grown


class World:
    """The mixture of each class; all coordinates are scaled so that the data have mean 0 and variance 1 per axis.

    Attributes:
        weights: (classes, gaussians), each row sums to 1.
        means: (classes, gaussians, 2).
        factors: (classes, gaussians, 2, 2), L of each covariance L L^T.
    """

    def __init__(self, seed: int = 0) -> None:
        weights, means, factors = [], [], []
        for label in range(CLASSES):
            generator = torch.Generator().manual_seed(1_000 * seed + label)
            trunk = Branch(torch.zeros(2, dtype=torch.float64), math.pi * (0.25 + label), 0.9, 0.09, 1.0)
            for branch in _branches(trunk, LEVELS, generator):
                step = branch.length / GAUSSIANS_PER_BRANCH
                across = torch.stack([-branch.direction[1], branch.direction[0]])
                for place in range(GAUSSIANS_PER_BRANCH):
                    weights.append(branch.weight / GAUSSIANS_PER_BRANCH)
                    means.append(branch.start + branch.direction * step * (place + 0.5))
                    factors.append(torch.stack([branch.direction * step * 0.45, across * branch.thickness], dim=1))
        self.weights = torch.tensor(weights, dtype=torch.float64).view(CLASSES, -1)
        self.weights /= self.weights.sum(dim=1, keepdim=True)
        self.means = torch.stack(means).view(CLASSES, -1, 2)
        self.factors = torch.stack(factors).view(CLASSES, -1, 2, 2)
        share = self.weights[..., None] / CLASSES
        centre = (share * self.means).sum(dim=(0, 1))
        spread = (share * ((self.means - centre).square() + self.factors.square().sum(dim=-1))).sum(dim=(0, 1))
        scale = spread.mean().sqrt()
        self.means, self.factors = (self.means - centre) / scale, self.factors / scale

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One point for each label, float32 (..., 2)."""
        uniform = torch.rand(labels.shape, generator=generator, dtype=torch.float64)
        which = (uniform[..., None] > self.weights.cumsum(dim=1)[labels][..., :-1]).sum(dim=-1)
        noise = torch.randn(*labels.shape, 1, 2, generator=generator, dtype=torch.float64)
        return (self.means[labels, which] + (self.factors[labels, which] * noise).sum(dim=-1)).float()

    def log_density(self, points: Tensor, label: int) -> Tensor:
        """Natural logarithm of the density of class `label` at points (n, 2), float64 (n,)."""
        inverse = torch.linalg.inv(self.factors[label])
        whitened = torch.einsum("gij,ngj->ngi", inverse, points.double()[:, None] - self.means[label])
        log_det = torch.linalg.slogdet(self.factors[label])[1]
        exponent = -0.5 * whitened.square().sum(dim=-1)
        return torch.logsumexp(exponent + self.weights[label].log() - log_det - math.log(2 * math.pi), dim=1)
