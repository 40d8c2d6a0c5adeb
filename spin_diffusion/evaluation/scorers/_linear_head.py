"""The head of LAION's aesthetics and of ImageReward: five linear layers without activations, 768 numbers to one."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spin_diffusion.evaluation.scorers._checkpoints import fill

WIDTH = 768


class LinearHead(nn.Module):
    """768 -> 1024 -> 128 -> 64 -> 16 -> 1; the dropouts between them count in the names, and do nothing here."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, " batch"]:
        """One number per row."""
        return self.layers(features)[:, 0]


def build_head(tensors: dict[str, Tensor], where: str, prefix: str = "") -> LinearHead:
    """A head of exactly these tensors, `layers.0.weight` to `layers.7.bias`.

    Args:
        where: the file, for the error.
        prefix: what stands before the keys in the file, for the error.

    Raises:
        InputError: a key is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        head = LinearHead()
    fill(head, tensors, where, in_file=lambda name: prefix + name)
    return head
