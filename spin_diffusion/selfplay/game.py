"""The contract between the rounds and a modality.

A game holds two models of one shape, the player and the opponent, and knows how to draw samples with the opponent, how
to turn stored rows into tensors, and how to score pairs under both models: four scores for each pair, which is all that
an objective sees. Rounds, training loop and run folder see nothing else of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from spin_diffusion.samples.sample import Batch, Row


@dataclass(frozen=True)
class PairScores:
    """Scores of a batch of pairs, fp32, larger = more likely. Only the player's two carry a gradient."""

    player_real: Float[Tensor, " batch"]
    player_generated: Float[Tensor, " batch"]
    opponent_real: Float[Tensor, " batch"]
    opponent_generated: Float[Tensor, " batch"]

    @classmethod
    def of_real(cls, player: Float[Tensor, " batch"], opponent: Float[Tensor, " batch"]) -> "PairScores":
        """Scores of real samples alone, for an objective without a generated side."""
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


@dataclass(frozen=True)
class ScoredBatch:
    """Scores of a batch, and for each pair where on the game's scale of difficulty it was taken.

    A real row with several generated ones makes as many pairs, each with the real row's scores.

    Attributes:
        level: in [0, 1): the noise level of a denoising score, say, or the length of a sample that has one.
    """

    scores: PairScores
    level: Float[Tensor, " batch"]


@runtime_checkable
class Game(Protocol):
    """Two models and what can be done with them. Implementations: `DiffusionGame`, `LanguageGame`."""

    @property
    def accelerator(self) -> Accelerator:
        """Where and in which precision both models compute."""
        ...

    @property
    def player(self) -> nn.Module:
        """What is trained; its parameters stay the same objects for as long as the game lives."""
        ...

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """Columns of a stored real row that `generate` needs of it."""
        ...

    @property
    def sampler_settings(self) -> str:
        """How `generate` draws, as JSON: samples that were drawn otherwise are drawn again."""
        ...

    @property
    def level_name(self) -> str:
        """What `ScoredBatch.level` is a share of, for messages."""
        ...

    @property
    def remedies(self) -> dict[str, str]:
        """What else helps when a rule of health speaks: the end of its sentence, by the rule's name."""
        ...

    @property
    def start_tolerance(self) -> dict[str, float]:
        """Largest |r| at step 0 that is rounding, relative to max(1, |score|), by mixed precision."""
        ...

    def generate(self, rows: list[Row], seeds: list[int], done: Callable[[int], None] = ...) -> list[Row]:
        """Draw one sample with the opponent for each row's prompt.

        One call is one fixed batch: the same rows and seeds give the same bytes, wherever and whenever it is made.

        Args:
            done: told the number of samples drawn so far, now and then.
        """
        ...

    def encode(self, rows: list[Row]) -> dict[str, Tensor]:
        """Stored samples -> the tensors that `scores` needs of them, first axis = row."""
        ...

    def encoder_hash(self) -> str:
        """Hash of all that decides what `encode` makes of stored samples: weights of its own, and settings."""
        ...

    def distance(self, weights: Iterable[Tensor] | None = None) -> float | None:
        """Length of the way from the opponent's trained weights to the player's, relative to the opponent's length;
        None where no opponent is in memory.

        Args:
            weights: the player's weights as they are now, in the order of its parameters; None = they are its own.
        """
        ...

    def opponent_hash(self) -> str:
        """Hash of the opponent's weights, from the weights as they are now wherever the game still has them."""
        ...

    def player_hash(self) -> str:
        """Hash of the player's weights as they are now."""
        ...

    def scores(self, player: Callable[..., Any], batch: Batch) -> ScoredBatch:
        """Score both sides under both models.

        Args:
            player: `self.player` as prepared for training (wrapped for several processes, say).
        """
        ...

    def promote(self) -> None:
        """The player's present weights become the opponent's.

        In a game that `KeepsScores` they need to stand only until the player is trained or restored; otherwise they
        are an independent, frozen copy.
        """
        ...

    def save(self, directory: Path, *, prove: bool = True) -> list[Path]:
        """Write the player below `directory` as users load it and return the paths written.

        Called on every process; the main one writes. With `prove` the files are loaded afresh, the way a user would,
        and must predict what the player predicts.
        """
        ...

    def restore(self, directory: Path | None) -> None:
        """Put the weights that `save` wrote below `directory` into the player; None = the base checkpoint."""
        ...


@runtime_checkable
class FixedDraws(Protocol):
    """A game whose pairs may have draws of their own, at which the opponent's scores are computed once per round;
    `scores` finds them as `opponent_score` afterwards."""

    @property
    def fixed_draws(self) -> int:
        """0, or how many draws of its own each pair has."""
        ...

    def scores_at_draws(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The opponent's scores at the draws of the batch's seeds: of the real rows, of the generated ones, fp32."""
        ...

    def release_opponent(self) -> None:
        """Nobody asks for the opponent until the next `promote`."""
        ...
