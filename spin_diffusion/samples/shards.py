"""Shards: a folder of samples in parts, each drawn, encoded, judged or scored whole by one of the processes.

Shard i of a round's samples answers shard i of the real ones row by row, so a pair is a (shard, row).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator
from torch import Tensor

from spin_diffusion.samples.sample import Row
from spin_diffusion.store.files import Made, Piece, build_together, read_rows, rows_metadata
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.run_dir import AGAIN, file_hash


@runtime_checkable
class Encoder(Protocol):
    """Whoever turns stored samples into the tensors that scoring needs."""

    def encode(self, rows: list[Row]) -> dict[str, Tensor]:
        """Stored samples -> tensors by name, first axis = row."""
        ...

    def encoder_hash(self) -> str:
        """Hash of all that decides what `encode` makes of stored samples: weights of its own, and settings."""
        ...


def shards(directory: Path, suffix: str) -> list[Path]:
    """The shards in a folder, in order; InputError when some are missing."""
    found = sorted(directory.glob(f"*-of-*{suffix}"))
    if not found or len(found) != int(found[0].stem.split("-of-")[1]):
        raise InputError(f"{directory} is incomplete (it has {len(found)} of its shards): {AGAIN}")
    return found


def rows_in(path: Path) -> int:
    """The number of rows of a parquet shard."""
    return int(rows_metadata(path)["rows"])


def count_rows(directory: Path) -> int:
    """The number of rows of all parquet shards in a folder."""
    return sum(rows_in(path) for path in shards(directory, ".parquet"))


@dataclass(frozen=True)
class Part:
    """The real rows that a round plays with: of each shard the rows at `index`, `index + of`, ...; by default all."""

    index: int = 0
    of: int = 1

    @property
    def places(self) -> slice:
        """The places of its rows in a shard, or in a tensor."""
        return slice(self.index, None, self.of)

    def count(self, data: Path) -> int:
        """The number of its rows in prepared data."""
        return sum(len(range(rows_in(path))[self.places]) for path in shards(data / "samples", ".parquet"))


def draw_shards(
    source: Path,
    target: Path,
    ask: Callable[[int, list[Row]], list[Row]],
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
        ask: from a shard's number and its real rows, with `columns`, to the rows that are to be drawn.
        metadata: all that decides the samples, beside the shard's own rows.
    """
    made = 0

    def piece_of(shard: tuple[int, Path]) -> Piece:
        number, path = shard
        asked = ask(number, read_rows(path, columns=list(columns)))
        key = key_of(asked=[[row["place"], row["k"]] for row in asked], **metadata)

        def make(tell: Callable[[int], None]) -> Made:
            nonlocal made
            drawn = draw(asked, tell)
            made += len(drawn)
            return Made(drawn, metadata)

        return Piece(target / path.name, key, len(asked), make)

    build_together(list(enumerate(shards(source / "samples", ".parquet"))), piece_of, accelerator, progress)
    return made


def merge_shards(
    sources: list[Path], target: Path, key: Callable[[Row], Any], metadata: dict[str, str], accelerator: Accelerator
) -> None:
    """Shards of the same names in several folders as one folder, each shard's rows in the order of `key`."""

    def piece_of(path: Path) -> Piece:
        parts = [source / path.name for source in sources]

        def make(tell: Callable[[int], None]) -> Made:
            return Made(sorted((row for part in parts for row in read_rows(part)), key=key), metadata)

        return Piece(target / path.name, key_of(parts=[file_hash(part) for part in parts], **metadata), 0, make)

    build_together(shards(sources[0], ".parquet"), piece_of, accelerator, lambda done, text: None)


def encode_shards(
    source: Path,
    target: Path,
    game: Encoder,
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


def some_pairs(data: Path, drawn: Path, part: Part, most: int) -> tuple[list[Row], list[Row]]:
    """At most so many of the real rows that something was drawn for, evenly from all of them, and the first row that
    was drawn for each."""
    paths = shards(data / "samples", ".parquet")
    places = [_places_drawn(drawn / path.name) for path in paths]
    total = sum(map(len, places))
    wanted = {i * total // min(most, total) for i in range(min(most, total))}
    real: list[Row] = []
    generated: list[Row] = []
    before = 0
    for path, of_shard in zip(paths, places, strict=True):
        chosen = [place for number, place in enumerate(of_shard, before) if number in wanted]
        before += len(of_shard)
        if chosen:
            rows = read_rows(path)[part.places]
            first = {row["place"]: row for row in read_rows(drawn / path.name) if row["k"] == 0}
            real += [rows[place] for place in chosen]
            generated += [first[place] for place in chosen]
    return real, generated


def _places_drawn(path: Path) -> list[int]:
    """The places of the real rows that a shard of samples answers."""
    if not rows_in(path):
        return []
    return [row["place"] for row in read_rows(path, columns=["place", "k"]) if row["k"] == 0]
