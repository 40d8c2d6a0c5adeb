"""Shards: a folder of samples in parts, each drawn, encoded, judged or scored whole by one of the processes.

Shard i of a round's samples answers shard i of the real ones row by row, so a pair is a (shard, row).
"""

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from spin_diffusion.selfplay.game import KEPT, Game, Row
from spin_diffusion.selfplay.opponents import mixture_score
from spin_diffusion.selfplay.pairs import Pairs
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.run_dir import (
    AGAIN,
    file_hash,
    is_built,
    read_rows,
    read_tensors,
    rows_metadata,
    write_rows,
    write_tensors,
)
from spin_diffusion.store.sharing import shared_out

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
    done = made = 0
    key = key_of(**metadata)

    def kept_of(out: Path) -> Path:
        return target.parent / KEPT / f"{out.stem}.safetensors"

    def write(out: Path, drawn: list[Row]) -> None:
        kept, with_kept = [row.pop(KEPT) for row in drawn if KEPT in row], {}
        if kept:  # before the rows, whose file says that the shard is complete
            tensors = {name: torch.stack([tensors[name] for tensors in kept]) for name in kept[0]}
            write_tensors(kept_of(out), tensors, {KEY: key})
            with_kept = {KEPT: "yes"}
        write_rows(out, drawn, metadata | with_kept | {KEY: key})

    # A shard is written while the next one is drawn: two are in memory at most
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        for path in shared_out(shards(source / "samples", ".parquet"), accelerator):
            out = target / path.name
            if is_built(out, key) and (KEPT not in rows_metadata(out) or is_built(kept_of(out), key)):
                done += rows_in(out)
            else:
                rows, here = ask(read_rows(path, columns=list(columns))), done
                drawn = draw(rows, lambda samples, h=here: progress((h + samples) * accelerator.num_processes, ""))
                if writing is not None:
                    writing.result()
                made, done = made + len(drawn), done + len(drawn)
                writing = writer.submit(write, out, drawn)
            progress(done * accelerator.num_processes, "")
        if writing is not None:
            writing.result()
    accelerator.wait_for_everyone()
    return made


def merge_shards(
    sources: list[Path], target: Path, key: Callable[[Row], Any], metadata: dict[str, str], accelerator: Accelerator
) -> None:
    """Shards of the same names in several folders as one folder, each shard's rows in the order of `key`."""
    for path in shared_out(shards(sources[0], ".parquet"), accelerator):
        out = target / path.name
        built = key_of(**metadata)
        if not is_built(out, built):
            rows = sorted((row for source in sources for row in read_rows(source / path.name)), key=key)
            write_rows(out, rows, metadata | {KEY: built})
    accelerator.wait_for_everyone()


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
    done = made = 0
    for path in shared_out(shards(source, ".parquet"), accelerator):
        out = target / f"{path.stem}.safetensors"
        chosen = file_hash(beside / path.name) if beside is not None else None
        key = key_of(encoder=encoder, samples=file_hash(path), chosen=chosen)
        if not is_built(out, key):
            rows = rows_of(path)
            made += len(rows)
            write_tensors(out, game.encode(rows) if rows else {}, {KEY: key})
        done += rows_in(path)
        progress(done * accelerator.num_processes, "")
    accelerator.wait_for_everyone()
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
    done = 0
    for path in shared_out(shards(source, ".safetensors"), accelerator):
        out = target / path.name
        tensors = {name: tensor[part.places] for name, tensor in of_side(read_tensors(path), prefix).items()}
        rows = len(next(iter(tensors.values()))) if tensors else 0
        key = key_of(opponent=opponent, tensors=file_hash(path), prefix=prefix, part=[part.index, part.of])
        if not is_built(out, key):
            scores = game.opponent_scores(tensors) if rows else torch.zeros(0)
            assert scores.shape == (rows,) and scores.dtype == torch.float32
            if not scores.isfinite().all():
                raise FloatingPointError(f"{path}: the opponent's score of a sample is not finite; look at the samples")
            write_tensors(out, {"opponent_score": scores.cpu()}, {"opponent": opponent, KEY: key})
        done += rows
        progress(done * accelerator.num_processes, "")
    accelerator.wait_for_everyone()


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
    done = 0
    sizes = [(path, len(range(rows_in(path))[part.places])) for path in shards(source, ".parquet")]
    first = itertools.accumulate((rows for _, rows in sizes), initial=0)
    for (path, rows), start_of_shard in shared_out(list(zip(sizes, first, strict=False)), accelerator):
        here = list(range(start_of_shard, start_of_shard + rows))
        outs = [target / side / f"{path.stem}.safetensors" for side in ("real", "generated")]
        key = key_of(
            opponent=opponent, samples=file_hash(path), part=[part.index, part.of], draws=pairs.draws, seed=seed,
            round=round_, batch=batch_size,
        )  # fmt: skip
        if not all(is_built(out, key) for out in outs):
            by_draw = []
            for draw in range(pairs.draws):
                found = []
                for start in range(0, rows, batch_size):
                    indices = here[start : start + batch_size]
                    batch = pairs.at_draws(indices, [draw] * len(indices), seed, round_)
                    found.append(game.scores_at_draws(batch))
                    progress((done + (draw * rows + start) // pairs.draws) * accelerator.num_processes, "")
                by_draw.append([torch.cat(each).cpu() if each else torch.zeros(0) for each in _sides(found)])
            for out, scores in zip(outs, _sides(by_draw), strict=True):
                kept = torch.stack(scores, dim=1)
                if not kept.isfinite().all():
                    raise FloatingPointError(f"{out}: the opponent's score of a sample is not finite; look at it")
                write_tensors(out, {"opponent_score": kept}, {"opponent": opponent, KEY: key})
        done += rows
        progress(done * accelerator.num_processes, "")
    accelerator.wait_for_everyone()


def _sides(found: list[Any]) -> list[list[Tensor]]:
    return [[each[side] for each in found] for side in (0, 1)]


def mix_scores(sources: dict[Path, float], target: Path, opponent: str, accelerator: Accelerator) -> None:
    """The scores of the mixture of this hash, from the folders of its members' scores and their weights."""
    weights = torch.tensor(list(sources.values()))
    for path in shared_out(shards(next(iter(sources)), ".safetensors"), accelerator):
        scores = torch.stack([read_tensors(folder / path.name)["opponent_score"] for folder in sources])
        write_tensors(target / path.name, {"opponent_score": mixture_score(scores, weights)}, {"opponent": opponent})
    accelerator.wait_for_everyone()


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
