"""The pairs of a round as an endless stream, whose order and randomness do not depend on the processes."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spin_diffusion.samples.sample import Batch
from spin_diffusion.store.run_dir import seed_from

TOGETHER = 8
"""Pairs of one kind that lie side by side in the stream: twice as many samples make a batch that is as fast as larger
ones."""


@dataclass
class Pairs:
    """All pairs of a round, read on demand: tensors by `fetch`."""

    ids: Sequence[str]
    prompts: Sequence[str]
    fetch: Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]
    """Places of pairs -> tensors of both sides; with `kept_part` also what it says of each pair's seed."""
    draws: int = 0
    """0: each visit of a pair has its own randomness. K: visit v has that of draw v mod K, at which the opponent's
    scores are kept as (rows, K)."""
    kinds: Tensor | None = None
    """The kind of each pair, (pairs,): those of one kind are scored together, so each batch should have few kinds."""
    kept_part: Callable[[int], slice] | None = None
    """`Game.kept_part`, where something was kept of the generated samples."""
    epochs: dict[int, Tensor] = field(default_factory=dict)

    def batch(self, positions: list[int], seed: int, round_: int) -> Batch:
        """The pairs at these positions of the round's endless stream: one permutation of all pairs after another."""
        indices = [self._index(position, seed, round_) for position in positions]
        if self.draws:
            visits = [position // len(self.ids) for position in positions]
            return self.at_draws(indices, [visit % self.draws for visit in visits], seed, round_)
        seeds = [seed_from(seed, "pair", round_, position) for position in positions]
        parts = () if self.kept_part is None else ([self.kept_part(one) for one in seeds],)
        real, generated = self.fetch(indices, *parts)
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

    def ids_at(self, positions: list[int], seed: int, round_: int) -> list[str]:
        """The ids of the pairs at these positions."""
        return [self.ids[self._index(position, seed, round_)] for position in positions]

    def _index(self, position: int, seed: int, round_: int) -> int:
        epoch, place = divmod(position, len(self.ids))
        if epoch not in self.epochs:
            # Two epochs are enough for a batch that lies across them
            self.epochs = {known: order for known, order in self.epochs.items() if abs(known - epoch) == 1}
            generator = torch.Generator().manual_seed(seed_from(seed, "order", round_, epoch))
            order = torch.randperm(len(self.ids), generator=generator)
            if self.kinds is not None:
                order = side_by_side(order, self.kinds, -epoch * len(self.ids) % TOGETHER, generator)
            self.epochs[epoch] = order
        return int(self.epochs[epoch][place])


class ReadAhead:
    """Pairs of which the next batch of the stream is read while the last one is worked on."""

    def __init__(self, pairs: Pairs, stride: int) -> None:
        """
        Args:
            stride: places in the stream from one batch of a process to its next one.
        """
        self.pairs, self.stride = pairs, stride
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[list[int], Future[Batch]] | None = None

    def batch(self, positions: list[int], seed: int, round_: int) -> Batch:
        """As `Pairs.batch`."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == positions:
            batch = ahead[1].result()
        else:
            batch = self.pairs.batch(positions, seed, round_)
        following = [position + self.stride for position in positions]
        self._next = following, self._reader.submit(self.pairs.batch, following, seed, round_)
        return batch

    def close(self) -> None:
        """Read no more."""
        self._reader.shutdown(cancel_futures=True)


def side_by_side(order: Tensor, kinds: Tensor, before: int, generator: torch.Generator) -> Tensor:
    """The same pairs in another order: `TOGETHER` of one kind at a time, in random turns.

    What is left over of each kind comes at the end, but for `before` of it, which comes first: with it a batch that was
    begun by the epoch before is full, and the next ones are of one kind.

    Args:
        order: a random permutation of all pairs.
        kinds: of each pair.
    """
    runs: list[Tensor] = []
    rest: list[Tensor] = []
    for kind in kinds.unique():
        mine = order[kinds[order] == kind]
        full = len(mine) // TOGETHER * TOGETHER
        runs += mine[:full].split(TOGETHER) if full else ()
        rest.append(mine[full:])
    turns = torch.randperm(len(runs), generator=generator).tolist()
    left_over = torch.cat([rest[kind] for kind in torch.randperm(len(rest), generator=generator).tolist()])
    return torch.cat([left_over[:before], *(runs[turn] for turn in turns), left_over[before:]])
