"""The pairs of a round as an endless stream, whose order and randomness do not depend on the processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spin_diffusion.selfplay.game import Batch
from spin_diffusion.selfplay.run_dir import seed_from


@dataclass
class Pairs:
    """All pairs of a round, read on demand: tensors by `fetch`."""

    ids: Sequence[str]
    prompts: Sequence[str]
    fetch: Callable[[list[int]], tuple[dict[str, Tensor], dict[str, Tensor]]]
    draws: int = 0
    """0: each visit of a pair has its own randomness. K: visit v has that of draw v mod K, at which the opponent's
    scores are kept as (rows, K)."""
    epochs: dict[int, Tensor] = field(default_factory=dict)

    def batch(self, positions: list[int], seed: int, round_: int) -> Batch:
        """The pairs at these positions of the round's endless stream: one permutation of all pairs after another."""
        indices = [self._index(position, seed, round_) for position in positions]
        if self.draws:
            visits = [position // len(self.ids) for position in positions]
            return self.at_draws(indices, [visit % self.draws for visit in visits], seed, round_)
        real, generated = self.fetch(indices)
        seeds = [seed_from(seed, "pair", round_, position) for position in positions]
        return Batch([self.ids[i] for i in indices], [self.prompts[i] for i in indices], real, generated, seeds)

    def at_draws(self, indices: list[int], draws: list[int], seed: int, round_: int) -> Batch:
        """These pairs, each at one of its own draws."""
        real, generated = self.fetch(indices)
        for side in (real, generated):
            if "opponent_score" in side:
                kept = side["opponent_score"]
                places = torch.tensor(draws).repeat_interleave(len(kept) // len(draws))
                side["opponent_score"] = kept.gather(1, places[:, None]).squeeze(1)
        seeds = [seed_from(seed, "draw", round_, self.ids[i], k) for i, k in zip(indices, draws, strict=True)]
        return Batch([self.ids[i] for i in indices], [self.prompts[i] for i in indices], real, generated, seeds)

    def _index(self, position: int, seed: int, round_: int) -> int:
        epoch, place = divmod(position, len(self.ids))
        if epoch not in self.epochs:
            # Two epochs are enough for a batch that lies across them
            self.epochs = {known: order for known, order in self.epochs.items() if abs(known - epoch) == 1}
            generator = torch.Generator().manual_seed(seed_from(seed, "order", round_, epoch))
            self.epochs[epoch] = torch.randperm(len(self.ids), generator=generator)
        return int(self.epochs[epoch][place])
