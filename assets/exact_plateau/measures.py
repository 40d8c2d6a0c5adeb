"""What is wrong with samples of a world whose density is known. Lower is better in each; averaged over the classes.

- `outside`: share of the samples in the region that holds the least dense 1 % of the data.
- `js`: Jensen-Shannon divergence between the samples and the data on a grid, in nats.
- `missed`: share of the data in cells where the samples have less than a quarter of the data's density. It sees what
  the first one applauds: a model that draws only the thickest branches.
- `sliced`: sliced Wasserstein distance, the mean over 16 directions of the distance between sorted projections.
"""

from dataclasses import dataclass

import torch
from plane import CLASSES, World
from torch import Tensor

MEASURES = {
    "outside": "outside the data",
    "js": "JS divergence",
    "missed": "data missed",
    "sliced": "sliced Wasserstein",
}
_CELLS, _EDGE = 40, 3.0


def _histogram(points: Tensor) -> Tensor:
    """Share of points (n, 2) in each cell of the grid over [-3, 3]^2; what lies beyond counts in the outer cells."""
    cells = ((points + _EDGE) / (2 * _EDGE) * _CELLS).long().clamp(0, _CELLS - 1)
    counts = torch.bincount(cells[:, 0] * _CELLS + cells[:, 1], minlength=_CELLS**2).double()
    return counts / len(points)


@dataclass(frozen=True)
class Reference:
    """What the data of one class are: the log density below which 1 % lie, a histogram, and sorted projections."""

    threshold: float
    histogram: Tensor
    directions: Tensor
    quantiles: Tensor


class Measures:
    """The four numbers, against `samples` draws of the data of each class."""

    def __init__(self, world: World, samples: int = 200_000, seed: int = 99) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.world = world
        self.references = []
        directions = torch.nn.functional.normalize(torch.randn(16, 2, generator=generator), dim=1)
        for label in range(CLASSES):
            points = world.draw(torch.full((samples,), label), generator)
            threshold = world.log_density(points[:50_000], label).quantile(0.01).item()
            places = (torch.arange(2_000) + 0.5) / 2_000
            quantiles = (points @ directions.T).sort(dim=0)[0][(places * samples).long()]
            self.references.append(Reference(threshold, _histogram(points), directions, quantiles))

    def __call__(self, points: Tensor, label: int) -> dict[str, float]:
        """The four numbers of samples (n, 2) of class `label`."""
        reference = self.references[label]
        points = points.nan_to_num(nan=9.0).clamp(-9, 9)
        ours, data = _histogram(points), reference.histogram
        middle = (ours + data) / 2
        js = (torch.xlogy(ours, ours / middle) + torch.xlogy(data, data / middle)).nan_to_num().sum() / 2
        dense = data > 2e-4
        places = (torch.arange(2_000) + 0.5) / 2_000
        projections = (points @ reference.directions.T).sort(dim=0)[0][(places * len(points)).long()]
        return {
            "outside": (self.world.log_density(points, label) < reference.threshold).double().mean().item(),
            "js": js.item(),
            "missed": data[dense & (ours < data / 4)].sum().item(),
            "sliced": (projections - reference.quantiles).abs().mean().item(),
        }
