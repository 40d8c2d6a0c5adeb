"""What a step says of its pairs: one row of numbers each, their means, and the names that trackers know them by."""

from typing import Any

import torch
from torch import Tensor

from spin_diffusion.selfplay import health
from spin_diffusion.selfplay.pair_scores import PairScores

COLUMNS = (
    "loss", "r_real", "r_generated", "margin", "implicit_accuracy", "saturation", "score_real", "score_generated",
    "level",
)  # fmt: skip
"""Of a pair; the last is where on the game's scale of difficulty it was scored."""
LEVEL = len(COLUMNS) - 1


def record(scores: PairScores, losses: Tensor, level: Tensor, beta: float) -> Tensor:
    """(pairs, columns) fp32, on the device: what is logged of each pair."""
    margin = scores.margin.detach()
    # A margin of exactly 0 is half right: at step 0 the accuracy is 0.5, not 0
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    return torch.stack(
        [
            losses.detach(), scores.r_real.detach(), scores.r_generated.detach(), margin, accuracy,
            health.saturated(margin, beta), scores.player_real.detach(), scores.player_generated.detach(), level,
        ],
        dim=1,
    )  # fmt: skip


def summary(metrics: Tensor) -> dict[str, Any]:
    """Means over all pairs of `record`'s rows, and over those of each quarter of the levels."""
    entry: dict[str, Any] = {name: metrics[:, column].mean().item() for column, name in enumerate(COLUMNS[:LEVEL])}
    for column, name in enumerate(COLUMNS[:LEVEL]):
        if name != "loss":
            entry[f"{name}_by_quarter"] = health.by_quarter(metrics[:, column], metrics[:, LEVEL])
    return entry


def tracked(entry: dict[str, Any], prefix: str) -> dict[str, float]:
    """Tracker names: TRL's for what it has a name for, one scalar for each quarter of the levels."""
    names = {"r_real": "rewards/real", "r_generated": "rewards/generated", "margin": "rewards/margins",
             "implicit_accuracy": "rewards/accuracies", "loss": "train_loss", "score_real": "scores/real",
             "score_generated": "scores/generated"}  # fmt: skip
    flat: dict[str, float] = {}
    for key, value in entry.items():
        if key.endswith("_by_quarter"):
            name = key.removesuffix("_by_quarter")
            flat |= {
                f"{prefix}/{names.get(name, name)}/quarter_{q + 1}": mean
                for q, mean in enumerate(value)
                if mean is not None
            }
        else:
            flat[f"{prefix}/{names.get(key, key)}"] = value
    return flat
