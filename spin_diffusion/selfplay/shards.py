"""Shards: a folder of samples in parts, each drawn, encoded, judged or scored whole by one of the processes.

Shard i of a round's samples answers shard i of the real ones row by row, so a pair is a (shard, row).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from spin_diffusion.selfplay.game import KEPT, Game, Row
from spin_diffusion.selfplay.opponents import mixture_score
from spin_diffusion.selfplay.pairs import Pairs
from spin_diffusion.store.build import Made, Piece, build_together
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.run_dir import (
    AGAIN,
    file_hash,
    is_built,
    read_rows,
    read_tensors,
    rows_metadata,
    write_tensors,
)

T = TypeVar("T")
ENCODED = "encoded"
"""Folder of the tensors that scoring needs of the samples beside it."""


def shards(directory: Path, suffix: str) -> list[Path]:
    """The shards in a folder, in order; InputError when some are missing."""
    found = sorted(directory.glob(f"*-of-*{suffix}"))
    if not found or len(found) != int(found[0].stem.split("-of-")[1]):
        raise InputError(f"{directory} is incomplete (it has {len(found)} of its shards): {AGAIN}")
    return found


def rows_in(path: Path) -> int:
    """The number of rows of a parquet shard."""
    return int(rows_metadata(path)["rows"])


@dataclass(frozen=True)
class Part:
    """The real rows that a round plays with: of each shard the rows at `index`, `index + of`, ...; by default all."""

    index: int = 0
    of: int = 1

    @property
    def places(self) -> slice:
        """Of its rows in a shard, or in a tensor."""
        return slice(self.index, None, self.of)

    def count(self, data: Path) -> int:
        """How many there are in prepared data."""
        return sum(len(range(rows_in(path))[self.places]) for path in shards(data / "samples", ".parquet"))


def draw_shards(
    source: Path,
    target: Path,
    ask: Callable[[list[Row]], list[Row]],
    draw: Callable[[list[Row], Callable[[int], None]], list[Row]],
    metadata: dict[str, str],
    columns: tuple[str, ...],
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
) -> int:
    """For each shard of prompts in `source`/samples let one process draw one shard of samples; finished ones stay.

    A shard is drawn whole by one process, in the order of its rows, so its bytes do not depend on how many processes
    there are or which were restarted. Returns how many samples this process drew.

    Args:
        ask: from a shard's real rows, with `columns`, to the rows that are to be drawn.
        draw: what it keeps of a sample for training (`game.KEPT`) goes into a folder beside `target`.
        metadata: all that decides the samples, beside the shard's own rows.
    """
    key = key_of(**metadata)
    made = 0

    def piece_of(path: Path) -> Piece:
        out, kept = target / path.name, target.parent / KEPT / f"{path.stem}.safetensors"
        asked = ask(read_rows(path, columns=list(columns)))

        def make(tell: Callable[[int], None]) -> Made:
            nonlocal made
            drawn = draw(asked, tell)
            made += len(drawn)
            of_samples = [row.pop(KEPT) for row in drawn if KEPT in row]
            if not of_samples:
                return Made(drawn, metadata)
            tensors = {name: torch.stack([each[name] for each in of_samples]) for name in of_samples[0]}
            write_tensors(kept, tensors, {KEY: key})  # before the rows, whose file says that the shard is complete
            return Made(drawn, metadata | {KEPT: "yes"})

        return Piece(out, key, len(asked), make, lambda: KEPT not in rows_metadata(out) or is_built(kept, key))

    build_together(shards(source / "samples", ".parquet"), piece_of, accelerator, progress)
    return made


def merge_shards(
    sources: list[Path], target: Path, key: Callable[[Row], Any], metadata: dict[str, str], accelerator: Accelerator
) -> None:
    """Shards of the same names in several folders as one folder, each shard's rows in the order of `key`."""
    built = key_of(**metadata)

    def piece_of(path: Path) -> Piece:
        def make(tell: Callable[[int], None]) -> Made:
            return Made(sorted((row for source in sources for row in read_rows(source / path.name)), key=key), metadata)

        return Piece(target / path.name, built, 0, make)

    build_together(shards(sources[0], ".parquet"), piece_of, accelerator, lambda done, text: None)


def encode_shards(
    source: Path,
    target: Path,
    game: Game,
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
    rows_of: Callable[[Path], list[Row]] = read_rows,
    beside: Path | None = None,
) -> int:
    """For each shard of samples in `source` let one process write the tensors that scoring needs; how many this one
    encoded. What other samples or another encoder left is written anew.

    Args:
        rows_of: the rows of a shard that are wanted.
        beside: folder of files by the shards' names, from which `rows_of` takes which are wanted.
    """
    encoder = game.encoder_hash()
    made = 0

    def piece_of(path: Path) -> Piece:
        chosen = file_hash(beside / path.name) if beside is not None else None

        def make(tell: Callable[[int], None]) -> Made:
            nonlocal made
            rows = rows_of(path)
            made += len(rows)
            return Made(game.encode(rows) if rows else {})

        key = key_of(encoder=encoder, samples=file_hash(path), chosen=chosen)
        return Piece(target / f"{path.stem}.safetensors", key, rows_in(path), make)

    build_together(shards(source, ".parquet"), piece_of, accelerator, progress)
    return made


def score_shards(
    source: Path,
    target: Path,
    game: Game,
    part: Part,
    prefix: str,
    opponent: str,
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
) -> None:
    """For each shard of tensors in `source` let one process write the opponent's scores of the rows of `part`.

    Args:
        opponent: its hash, which is stored beside them; scores by another are computed again.
    """

    def piece_of(path: Path) -> Piece:
        tensors = {name: tensor[part.places] for name, tensor in of_side(read_tensors(path), prefix).items()}
        rows = len(next(iter(tensors.values()))) if tensors else 0

        def make(tell: Callable[[int], None]) -> Made:
            scores = game.opponent_scores(tensors) if rows else torch.zeros(0)
            assert scores.shape == (rows,) and scores.dtype == torch.float32
            return Made(_finite_scores(scores.cpu(), path), {"opponent": opponent})

        key = key_of(opponent=opponent, tensors=file_hash(path), prefix=prefix, part=[part.index, part.of])
        return Piece(target / path.name, key, rows, make)

    build_together(shards(source, ".safetensors"), piece_of, accelerator, progress)


def score_draws(
    source: Path,
    target: Path,
    pairs: Pairs,
    part: Part,
    game: Game,
    seed: int,
    round_: int,
    batch_size: int,
    opponent: str,
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
) -> None:
    """For each shard of the real samples in `source` let one process write the opponent's scores of its pairs at all
    their fixed draws, (rows, draws), into `target`/real and `target`/generated.

    Args:
        batch_size: pairs per forward pass; with the training's, both models' scores are rounded alike.
        opponent: its hash, which is stored beside them; scores by another are computed again.
    """
    sizes = [(path, len(range(rows_in(path))[part.places])) for path in shards(source, ".parquet")]
    first = itertools.accumulate((rows for _, rows in sizes), initial=0)

    def piece_of(shard: tuple[tuple[Path, int], int]) -> Piece:
        (path, rows), start_of_shard = shard
        real, generated = (target / side / f"{path.stem}.safetensors" for side in ("real", "generated"))
        key = key_of(
            opponent=opponent, samples=file_hash(path), part=[part.index, part.of], draws=pairs.draws, seed=seed,
            round=round_, batch=batch_size,
        )  # fmt: skip

        def scores_at(draw: int, start: int, tell: Callable[[int], None]) -> tuple[Tensor, Tensor]:
            tell((draw * rows + start) // pairs.draws)
            indices = range(start_of_shard + start, start_of_shard + min(start + batch_size, rows))
            return game.scores_at_draws(pairs.at_draws(list(indices), [draw] * len(indices), seed, round_))

        def make(tell: Callable[[int], None]) -> Made:
            starts = range(0, rows, batch_size)
            by_draw = [[scores_at(draw, start, tell) for start in starts] for draw in range(pairs.draws)]
            by_side = []
            for side, path_of_side in enumerate((real, generated)):
                columns = [[torch.zeros(0), *(both[side].cpu() for both in batches)] for batches in by_draw]
                stacked = torch.stack([torch.cat(column) for column in columns], dim=1)
                by_side.append(_finite_scores(stacked, path_of_side))
            write_tensors(real, by_side[0], {"opponent": opponent, KEY: key})
            return Made(by_side[1], {"opponent": opponent})

        return Piece(generated, key, rows, make, lambda: is_built(real, key))

    build_together(list(zip(sizes, first, strict=False)), piece_of, accelerator, progress)


def _finite_scores(scores: Tensor, path: Path) -> dict[str, Tensor]:
    """The opponent's scores as they are stored; FloatingPointError, with the path, when one is not finite."""
    if not scores.isfinite().all():
        raise FloatingPointError(f"{path}: the opponent's score of a sample is not finite; look at the samples")
    return {"opponent_score": scores}


def mix_scores(sources: dict[Path, float], target: Path, opponent: str, accelerator: Accelerator) -> None:
    """The scores of the mixture of this hash, from the folders of its members' scores and their weights."""
    weights = torch.tensor(list(sources.values()))

    def piece_of(path: Path) -> Piece:
        members = [folder / path.name for folder in sources]

        def make(tell: Callable[[int], None]) -> Made:
            scores = torch.stack([read_tensors(member)["opponent_score"] for member in members])
            return Made({"opponent_score": mixture_score(scores, weights)}, {"opponent": opponent})

        key = key_of(opponent=opponent, members=[file_hash(member) for member in members])
        return Piece(target / path.name, key, 0, make)

    build_together(shards(next(iter(sources)), ".safetensors"), piece_of, accelerator, lambda done, text: None)


def some_pairs(data: Path, drawn: Path, part: Part, most: int) -> tuple[list[Row], list[Row]]:
    """At most so many real rows, evenly from all of the part, and the first row that was drawn for each."""
    total = part.count(data)
    wanted = {i * total // min(most, total) for i in range(min(most, total))}
    real: list[Row] = []
    generated: list[Row] = []
    before = 0
    for path in shards(data / "samples", ".parquet"):
        count = len(range(rows_in(path))[part.places])
        places = [place for place in range(count) if before + place in wanted]
        before += count
        if places:
            rows = read_rows(path)[part.places]
            first = {row["place"]: row for row in read_rows(drawn / path.name) if row["k"] == 0}
            real += [rows[place] for place in places]
            generated += [first[place] for place in places]
    return real, generated


def of_side(tensors: dict[str, T], prefix: str) -> dict[str, T]:
    """The tensors of one side by their names without the prefix."""
    if prefix:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in tensors.items() if not name.startswith("loser_")}
