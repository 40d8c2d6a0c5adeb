"""The seam between a game and its objective: four scores for each pair."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PairScores:
    """Scores of a batch of pairs, fp32, larger = more likely. Only the player's two carry a gradient."""

    player_real: Float[Tensor, " batch"]
    player_generated: Float[Tensor, " batch"]
    opponent_real: Float[Tensor, " batch"]
    opponent_generated: Float[Tensor, " batch"]

    @classmethod
    def of_real(cls, player: Float[Tensor, " batch"], opponent: Float[Tensor, " batch"]) -> "PairScores":
        """Of real samples alone, for an objective without a generated side."""
        nothing = torch.zeros_like(opponent)
        return cls(player, nothing, opponent, nothing)

    @property
    def r_real(self) -> Float[Tensor, " batch"]:
        """How much more likely the real sample is to the player than to the opponent."""
        return self.player_real - self.opponent_real

    @property
    def r_generated(self) -> Float[Tensor, " batch"]:
        """How much more likely the generated sample is to the player than to the opponent."""
        return self.player_generated - self.opponent_generated

    @property
    def margin(self) -> Float[Tensor, " batch"]:
        """r_real - r_generated: positive when the player has learnt to tell the real sample from the opponent's."""
        return self.r_real - self.r_generated
