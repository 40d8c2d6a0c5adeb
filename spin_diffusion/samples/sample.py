"""One stored sample, and a batch of pairs of them as training sees it."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Row = dict[str, Any]
"""One stored sample: always with `id` and `prompt`, the rest is the game's."""

CHOICES, ENCODED = "choices", "encoded"
"""Folders beside one of samples: which of several candidates make the pairs, and the tensors that scoring needs."""

CONDITION = "condition_"
"""Before the names of encoded tensors that say under what a sample is scored, or was drawn, beside its prompt: size and
crop of an image, say. They are the pair's, never a side's."""

KIND = "kind"
"""Name of a tensor of the condition that a game may write, (rows,) of whole numbers: pairs of one kind are scored in
one pass, those of several kinds in several."""

SECTION = "section"
"""Name of the condition's tensor that says, (rows, 2) in [0, 1], from where to where of the game's levels a pair's may
be drawn, so that those of an optimizer step cover them all."""


@dataclass(frozen=True)
class Batch:
    """Pairs as the training loop hands them to `Game.scores`.

    A pair has one prompt, one condition and one seed: its sides differ in their samples alone.

    Attributes:
        ids: prompt ids, for messages.
        prompts: the prompts.
        real, generated: tensors of both sides by name, first axis = row; `generated` is empty for an objective that has
            no generated side. With several generated samples per real one it has that many rows for each real row, in
            order. Where the opponent's scores are kept, both have them as `opponent_score`.
        seeds: one per real row. All randomness of a pair's scores (noise, level, dropout) comes from it, so that it
            does not depend on the process that happens to compute the pair.
        condition: tensors by name, one row per real row. It is taken out of the sides, where its names begin with
            CONDITION; a generated side that says another than the real one was drawn for other pairs.
    """

    ids: list[str]
    prompts: list[str]
    real: dict[str, Tensor]
    generated: dict[str, Tensor]
    seeds: list[int]
    condition: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = dict(self.condition)
        for name in ("real", "generated"):
            side = getattr(self, name)
            said = {key.removeprefix(CONDITION): side[key] for key in side if key.startswith(CONDITION)}
            for key, tensor in said.items():
                known = found.setdefault(key, tensor)
                copies = len(tensor) // max(len(known), 1)
                assert torch.equal(tensor, known.repeat_interleave(copies, dim=0)), (
                    f"the {name} samples are not of their pairs' {key} ({', '.join(self.ids[:4])}, ...)"
                )
            object.__setattr__(self, name, {key: side[key] for key in side if not key.startswith(CONDITION)})
        object.__setattr__(self, "condition", found)

    @property
    def sides(self) -> list[dict[str, Tensor]]:
        """The sides that there are, the real one first."""
        return [self.real, self.generated] if self.generated else [self.real]

    def with_sides(self, real: dict[str, Tensor], generated: dict[str, Tensor], copies: int = 1) -> "Batch":
        """The same pairs, each of them `copies` times in a row, with these sides."""
        condition = {name: tensor.repeat_interleave(copies, dim=0) for name, tensor in self.condition.items()}
        return Batch(
            [id_ for id_ in self.ids for _ in range(copies)],
            [prompt for prompt in self.prompts for _ in range(copies)],
            real,
            generated,
            [seed for seed in self.seeds for _ in range(copies)],
            condition,
        )


def of_side(tensors: dict[str, T], prefix: str) -> dict[str, T]:
    """The tensors of one side by their names without the prefix."""
    if prefix:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in tensors.items() if not name.startswith("loser_")}
