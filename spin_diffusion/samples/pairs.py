"""The pairs of a round: read from the disk by (shard, row) through memory maps, as an endless stream whose order and
randomness do not depend on the processes."""

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spin_diffusion.samples.sample import CONDITION, ENCODED, KIND, SECTION, Batch, of_side
from spin_diffusion.samples.shards import Part, rows_in, shards
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import seed_from

TOGETHER = 8
"""Pairs of one kind that lie side by side in the stream: twice as many samples make a batch that is as fast as larger
ones."""
IN_MEMORY = 64
"""Shards of a kind that are read, or mapped, at a time while pairs are taken at random."""


@dataclass
class Pairs:
    """All pairs of a round, read on demand: tensors by `fetch`."""

    ids: Sequence[str]
    prompts: Sequence[str]
    fetch: Callable[[list[int]], tuple[dict[str, Tensor], dict[str, Tensor]]]
    """Places of pairs -> tensors of both sides."""
    draws: int = 0
    """0: each visit of a pair has its own randomness. K: visit v has that of draw v mod K, at which the opponent's
    scores are kept as (rows, K)."""
    per_step: int = 1
    """Pairs of an optimizer step, each of which has a section of the levels of its own."""
    kinds: Tensor | None = None
    """The kind of each pair, (pairs,): those of one kind are scored together, so each batch should have few kinds."""
    visited: int | None = None
    """The first places of the stream, whose pairs have a generated side; None = all have."""
    epochs: dict[int, Tensor] = field(default_factory=dict)

    def batch(self, positions: list[int], seed: int, round_: int) -> Batch:
        """The pairs at these positions of the round's endless stream: one permutation of all pairs after another."""
        indices = [self._index(position, seed, round_) for position in positions]
        if self.draws:
            visits = [position // len(self.ids) for position in positions]
            return self.at_draws(indices, [visit % self.draws for visit in visits], seed, round_)
        seeds = [seed_from(seed, "pair", round_, position) for position in positions]
        sections = [position % self.per_step for position in positions]
        return self._batch(indices, self.fetch(indices), seeds, sections, self.per_step)

    def at_draws(self, indices: list[int], draws: list[int], seed: int, round_: int) -> Batch:
        """These pairs, each at one of its own draws, which share the sections of the levels out among them."""
        real, generated = self.fetch(indices)
        for side in (real, generated):
            if "opponent_score" in side:
                kept = side["opponent_score"]
                places = torch.tensor(draws).repeat_interleave(len(kept) // len(draws))
                side["opponent_score"] = kept.gather(1, places[:, None]).squeeze(1)
        seeds = [seed_from(seed, "draw", round_, self.ids[i], k) for i, k in zip(indices, draws, strict=True)]
        # Each pair begins at a section of its own: all are at draw k in the same epoch
        first = [seed_from(seed, "section", round_, self.ids[i]) for i in indices]
        sections = [(start + k) % self.draws for start, k in zip(first, draws, strict=True)]
        return self._batch(indices, (real, generated), seeds, sections, self.draws)

    def _batch(
        self,
        indices: list[int],
        sides: tuple[dict[str, Tensor], dict[str, Tensor]],
        seeds: list[int],
        sections: list[int],
        num_sections: int,
    ) -> Batch:
        """These pairs, with their sections by number."""
        of = torch.tensor(sections, dtype=torch.float64)
        condition = {SECTION: torch.stack([of, of + 1], dim=1) / num_sections}
        return Batch([self.ids[i] for i in indices], [self.prompts[i] for i in indices], *sides, seeds, condition)

    def ids_at(self, positions: list[int], seed: int, round_: int) -> list[str]:
        """The ids of the pairs at these positions."""
        return [self.ids[self._index(position, seed, round_)] for position in positions]

    def _index(self, position: int, seed: int, round_: int) -> int:
        epoch, place = divmod(position, len(self.ids))
        if epoch not in self.epochs:
            # Two epochs are enough for a batch that lies across them
            self.epochs = {known: order for known, order in self.epochs.items() if abs(known - epoch) == 1}
            self.epochs[epoch] = epoch_order(len(self.ids), self.kinds, seed, round_, epoch)
        return int(self.epochs[epoch][place])


class ReadAhead:
    """Pairs of which the next batch of the stream is read while the last one is worked on."""

    def __init__(self, pairs: Pairs, stride: int, end: int) -> None:
        """
        Args:
            stride: places in the stream from one batch of a process to its next one.
            end: the place after the last one that is asked for.
        """
        self.pairs, self.stride, self.end = pairs, stride, end
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
        if following[-1] < self.end:
            self._next = following, self._reader.submit(self.pairs.batch, following, seed, round_)
        return batch

    def close(self) -> None:
        """Read no more."""
        self._reader.shutdown(cancel_futures=True)


def epoch_order(pairs: int, kinds: Tensor | None, seed: int, round_: int, epoch: int) -> Tensor:
    """The order in which an epoch of a round's stream visits so many pairs, (pairs,): a random one, in which those of
    one kind lie side by side where they have kinds."""
    generator = torch.Generator().manual_seed(seed_from(seed, "order", round_, epoch))
    order = torch.randperm(pairs, generator=generator)
    return order if kinds is None else side_by_side(order, kinds, -epoch * pairs % TOGETHER, generator)


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


# Pairs on the disk


@dataclass(frozen=True)
class Side:
    """Where one side of the pairs lies.

    Attributes:
        tensors: folder of its encodings.
        scores: folder of the opponent's scores of it, if they are kept.
        prefix: of the tensors' names, for a data set that has its own worse samples.
    """

    tensors: Path
    scores: Path | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Visited:
    """The real samples that a round visits: those at the first places of its stream.

    Attributes:
        places: of each shard their places among the rows of the part there, in order.
    """

    places: list[list[int]]

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(map(len, self.places))

    def row(self, shard: int, place: int) -> int:
        """How many of the shard's come before the one at this place."""
        row = bisect.bisect_left(self.places[shard], place)
        assert self.places[shard][row : row + 1] == [place], f"nothing was drawn for row {place} of shard {shard}"
        return row


def find_visited(data: Path, part: Part, visits: int, seed: int, round_: int) -> Visited:
    """The real samples of a part at the first `visits` places of a round's stream."""
    ids = Column(data, "id", part)
    order = epoch_order(len(ids), kinds_of(data / ENCODED, part), seed, round_, 0)[:visits]
    places: list[list[int]] = [[] for _ in ids.starts[1:]]
    for index in order.sort().values.tolist():
        shard, place = ids.place_of(index)
        places[shard].append(place)
    return Visited(places)


def open_pairs(
    data: Path,
    real: Side,
    generated: Side | None,
    part: Part,
    copies: int,
    choices: Path | None = None,
    draws: int = 0,
    visited: Visited | None = None,
) -> Pairs:
    """The pairs of real samples and generated ones, their tensors memory-mapped.

    Args:
        generated: None = there is no such side.
        copies: generated samples per real one.
        visited: the real samples that have generated ones; None = all.
        choices: folder that says, where the opponent drew candidates, which of them make a pair; `generated` then
            holds these alone.
        draws: fixed draws of each pair.
    """
    if choices is not None:
        assert generated is not None and copies == 1
        return _open_chosen(data, real, generated, part, choices)
    ids, prompts = Column(data, "id", part), Column(data, "prompt", part)
    sides = [_Tensors(side) for side in (real, generated) if side is not None]
    has_copies = generated is not None and not generated.prefix  # a data set's own worse samples lie in its own rows

    def fetch(indices: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kept = [ids.place_of(index) for index in indices]
        in_data = [(number, part.index + place * part.of) for number, place in kept]
        rows = [(number, visited.row(number, place) if visited else place) for number, place in kept]
        drawn = [(number, row * copies + k) for number, row in rows for k in range(copies)]
        found = [sides[0].rows(in_data, kept)]
        if len(sides) == 2:
            found.append(sides[1].rows(drawn, drawn) if has_copies else sides[1].rows(in_data, kept))
        return found[0], found[1] if len(sides) == 2 else {}

    kinds = kinds_of(real.tensors, part) if CONDITION + KIND in sides[0].names else None
    return Pairs(ids, prompts, fetch, draws, kinds=kinds, visited=visited.number if visited else None)


def kinds_of(encoded: Path, part: Part) -> Tensor | None:
    """The kind of each sample of a part, where its game says that samples of one kind are better scored together."""
    found = []
    for path in shards(encoded, ".safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if CONDITION + KIND in names:
                found.append(file.get_tensor(CONDITION + KIND)[part.places])
            elif names:  # a shard may have no rows
                return None
    return torch.cat(found) if found else None


def _open_chosen(data: Path, real: Side, generated: Side, part: Part, choices: Path) -> Pairs:
    """The pairs of candidates, and those of real samples and generated ones beside them."""
    ids, prompts, places = [], [], []
    in_data, drawn = _Tensors(real), _Tensors(generated)
    folders = zip(shards(data / "samples", ".parquet"), shards(choices, ".parquet"), strict=True)
    for number, (samples, chosen) in enumerate(folders):
        rows = read_rows(samples, columns=["id", "prompt"])[part.places]
        next_drawn = 0
        for row, choice in zip(rows, read_rows(chosen), strict=True):
            assert row["id"] == choice["id"], f"{chosen} does not answer {samples}"
            if choice["generated"] is None:
                continue
            ids.append(row["id"])
            prompts.append(row["prompt"])
            # Of a prompt's samples the chosen ones lie there in the order of k
            both = [k for k in (choice["real"], choice["generated"]) if k is not None]
            lies = {k: (number, next_drawn + place) for place, k in enumerate(sorted(both))}
            next_drawn += len(both)
            places.append(((number, choice["place"]), lies.get(choice["real"]), lies[choice["generated"]]))

    def fetch(indices: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = []
        for index in indices:
            (number, place), best, _ = places[index]
            of_data = [(number, part.index + place * part.of)]
            if best is None:
                found.append(in_data.rows(of_data, [(number, place)]))
            else:  # a candidate in the place of the real sample, whose condition stays the pair's
                found.append(drawn.rows([best], [best]) | in_data.condition(of_data))
        others = [places[index][2] for index in indices]
        together = {name: _stacked([tensors[name][0] for tensors in found]) for name in found[0]}
        return together, drawn.rows(others, others)

    kinds = kinds_of(real.tensors, part) if CONDITION + KIND in in_data.names else None
    if kinds is not None:
        starts = Column(data, "id", part).starts
        kinds = kinds[torch.tensor([starts[number] + place for (number, place), _, _ in places])]
    return Pairs(ids, prompts, fetch, kinds=kinds)


class Column(Sequence[str]):
    """A text of all real rows of a part, read from the shards when it is asked for; a few shards are in memory."""

    def __init__(self, data: Path, name: str, part: Part | None = None, beside: Path | None = None) -> None:
        """Args: beside: other prepared data, whose rows follow."""
        part = part or Part()
        folders = [data] if beside is None else [data, beside]
        paths = [path for folder in folders for path in shards(folder / "samples", ".parquet")]
        counts = [len(range(rows_in(path))[part.places]) for path in paths]
        self.starts = [0, *itertools.accumulate(counts)]

        @functools.lru_cache(maxsize=IN_MEMORY)
        def texts(shard: int) -> list[str]:
            return [row[name] for row in read_rows(paths[shard], columns=[name])[part.places]]

        self.texts = texts

    def __len__(self) -> int:
        return self.starts[-1]

    def place_of(self, index: int) -> tuple[int, int]:
        """Its shard, and its place among the rows of the part there."""
        shard = bisect.bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, place = self.place_of(index)
        return self.texts(shard)[place]


def _opened(folder: Path) -> tuple[Callable[[int], Any], int]:
    """From the number of a tensor shard in a folder to its memory map, some of which are kept; how many there are."""
    paths = shards(folder, ".safetensors")
    return functools.lru_cache(maxsize=IN_MEMORY)(lambda shard: safe_open(paths[shard], framework="pt")), len(paths)


class _Tensors:
    """Rows of tensors in a folder of safetensors shards, read through memory maps."""

    def __init__(self, side: Side) -> None:
        self.prefix = side.prefix
        self.file, count = _opened(side.tensors)
        self.score = _opened(side.scores)[0] if side.scores is not None else None
        found = (list(self.file(shard).keys()) for shard in range(count))
        names = next((keys for keys in found if keys), [])  # a shard may have no rows
        self.names = sorted(of_side({name: name for name in names}, side.prefix).values())
        if not self.names:
            raise InputError(
                f"{side.tensors} has no worse samples, which --objective dpo needs: give a data set with pairs"
            )

    def condition(self, places: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The condition of the pairs at (shard, place), without their samples."""
        names = [name for name in self.names if name.startswith(CONDITION)]
        return {name: _stacked([self.file(s).get_slice(name)[p] for s, p in places]) for name in names}

    def rows(self, places: list[tuple[int, int]], scored: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The rows at (shard, place), by name without the prefix, with the scores at the places `scored`.

        Rows of unequal length are filled up with 0 at their end.
        """
        found = {
            name.removeprefix(self.prefix): _stacked([self.file(s).get_slice(name)[p] for s, p in places])
            for name in self.names
        }
        if self.score is not None:
            found["opponent_score"] = torch.stack([self.score(s).get_slice("opponent_score")[p] for s, p in scored])
        return found


def _stacked(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)
