"""Samples on the disk: the real ones, prepared once for a run, and the opponent's, shard by shard beside them.

Shard i of a round's samples answers shard i of the real ones row by row, so a pair is a (shard, row).
"""

import bisect
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.game import KEPT, KIND, Game, Row
from spin_diffusion.selfplay.opponents import mixture_score
from spin_diffusion.selfplay.pairs import Pairs
from spin_diffusion.selfplay.progress import Progress
from spin_diffusion.selfplay.run_dir import (
    commit,
    file_hashes,
    part_of,
    read_json,
    read_rows,
    rows_metadata,
    seed_from,
    shard_name,
    tensors_metadata,
    verify_hashes,
    write_json,
    write_rows,
    write_tensors,
)
from spin_diffusion.selfplay.sharing import shared_out

T = TypeVar("T")
ENCODED = "encoded"
"""Folder of the tensors that scoring needs of the samples beside it."""
IN_MEMORY = 64
"""Shards of a kind that are read, or mapped, at a time while pairs are taken at random."""


def prepare(
    directory: Path,
    rows: Callable[[], Iterator[Row]],
    settings: dict[str, Any],
    rows_per_shard: int,
    game: Game,
    accelerator: Accelerator,
    progress: Progress | None = None,
    report: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Write the real samples as shards with their encodings and return their manifest.

    Args:
        rows: reads the source from the beginning; only the main process calls it.
        settings: what decides the content; prepared data with other settings is refused.
        report: what was left out of the source and why, asked once `rows` is exhausted.
    """
    progress = progress or Progress()
    manifest_path = directory / "manifest.json"
    if manifest_path.is_file():
        manifest = data_manifest(directory)
        if manifest["settings"] != settings:
            changed = [key for key in settings if manifest["settings"].get(key) != settings[key]]
            raise InputError(
                f"{directory} was prepared with other settings ({', '.join(changed)}): start in another --output_dir"
            )
        if accelerator.is_main_process:
            verify_hashes(manifest["files"], directory)
        accelerator.wait_for_everyone()
        return manifest
    part = part_of(directory / "samples")
    if accelerator.is_main_process:
        if not (directory / "samples").is_dir():
            shutil.rmtree(part, ignore_errors=True)
            left_out = _write_real(part, rows(), rows_per_shard, report, progress)
            write_json(directory / "left_out.json", left_out)
            commit(directory / "samples")
    accelerator.wait_for_everyone()
    names = shards(directory / "samples", ".parquet")
    total = sum(rows_in(path) for path in names)
    encode_shards(directory / "samples", directory / ENCODED, game, accelerator,
                  progress.phase("encode the real samples", total))  # fmt: skip
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = file_hashes([directory / "samples", directory / ENCODED], directory)
        drawn = {name: digest for name, digest in files.items() if name.startswith("samples/")}
        write_json(
            manifest_path,
            {
                "rows": total,
                "hash": f"{seed_from(*sorted(drawn.values())):016x}",
                "settings": settings,
                "left_out": read_json(directory / "left_out.json"),
                "files": files,
            },
        )
    accelerator.wait_for_everyone()
    return data_manifest(directory)


def _write_real(
    directory: Path,
    rows: Iterator[Row],
    rows_per_shard: int,
    report: Callable[[], dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    directory.mkdir(parents=True)
    bar = progress.phase("read the real samples", 0)
    shard: list[Row] = []
    written = 0
    for row in rows:
        shard.append(row)
        if len(shard) == rows_per_shard:
            write_rows(directory / f"{written:05d}.parquet", shard, {})
            written, shard = written + 1, []
        bar(written * rows_per_shard + len(shard), "")
    if shard:
        write_rows(directory / f"{written:05d}.parquet", shard, {})
        written += 1
    for index in range(written):  # only now is it known how many there are
        (directory / f"{index:05d}.parquet").rename(directory / f"{shard_name(index, written)}.parquet")
    return report()


def data_manifest(directory: Path) -> dict[str, Any]:
    """What `prepare` wrote about the real samples: rows, hash, settings, left_out, files."""
    return read_json(directory / "manifest.json")


def shards(directory: Path, suffix: str) -> list[Path]:
    """The shards in a folder, in order; InputError when some are missing."""
    found = sorted(directory.glob(f"*-of-*{suffix}"))
    if not found or len(found) != int(found[0].stem.split("-of-")[1]):
        raise InputError(f"{directory} is incomplete: it has {len(found)} of its shards; delete it and run again")
    return found


# What all processes share out among them, shard by shard


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


def rows_in(path: Path) -> int:
    """The number of rows of a parquet shard."""
    return int(rows_metadata(path)["rows"])


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
    """
    done = made = 0

    def write(out: Path, drawn: list[Row]) -> None:
        kept = [row.pop(KEPT) for row in drawn if KEPT in row]
        if kept:  # before the rows, whose file says that the shard is complete
            tensors = {name: torch.stack([tensors[name] for tensors in kept]) for name in kept[0]}
            write_tensors(target.parent / KEPT / f"{out.stem}.safetensors", tensors, {})
        write_rows(out, drawn, metadata)

    # A shard is written while the next one is drawn: two are in memory at most
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        for path in shared_out(shards(source / "samples", ".parquet"), accelerator):
            out = target / path.name
            if out.is_file() and metadata.items() <= rows_metadata(out).items():
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
        if not (out.is_file() and metadata.items() <= rows_metadata(out).items()):
            write_rows(
                out, sorted((row for source in sources for row in read_rows(source / path.name)), key=key), metadata
            )
    accelerator.wait_for_everyone()


def encode_shards(
    source: Path,
    target: Path,
    game: Game,
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
    rows_of: Callable[[Path], list[Row]] = read_rows,
) -> int:
    """For each shard of samples in `source` let one process write the tensors that scoring needs; how many this one
    encoded.

    Args:
        rows_of: the rows of a shard that are wanted.
    """
    done = made = 0
    for path in shared_out(shards(source, ".parquet"), accelerator):
        out = target / f"{path.stem}.safetensors"
        if not out.is_file():
            rows = rows_of(path)
            made += len(rows)
            write_tensors(out, game.encode(rows) if rows else {}, {})
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
    done, metadata = 0, {"opponent": opponent}
    for path in shared_out(shards(source, ".safetensors"), accelerator):
        out = target / path.name
        tensors = {name: tensor[part.places] for name, tensor in _of_side(load_file(path), prefix).items()}
        rows = len(next(iter(tensors.values()))) if tensors else 0
        if not (out.is_file() and tensors_metadata(out) == metadata):
            scores = game.opponent_scores(tensors) if rows else torch.zeros(0)
            assert scores.shape == (rows,) and scores.dtype == torch.float32
            if not scores.isfinite().all():
                raise FloatingPointError(f"{path}: the opponent's score of a sample is not finite; look at the samples")
            write_tensors(out, {"opponent_score": scores.cpu()}, metadata)
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
    metadata, done = {"opponent": opponent}, 0
    sizes = [(path, len(range(rows_in(path))[part.places])) for path in shards(source, ".parquet")]
    first = itertools.accumulate((rows for _, rows in sizes), initial=0)
    for (path, rows), start_of_shard in shared_out(list(zip(sizes, first, strict=False)), accelerator):
        here = list(range(start_of_shard, start_of_shard + rows))
        outs = [target / side / f"{path.stem}.safetensors" for side in ("real", "generated")]
        if not all(out.is_file() and tensors_metadata(out) == metadata for out in outs):
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
                write_tensors(out, {"opponent_score": kept}, metadata)
        done += rows
        progress(done * accelerator.num_processes, "")
    accelerator.wait_for_everyone()


def _sides(found: list[Any]) -> list[list[Tensor]]:
    return [[each[side] for each in found] for side in (0, 1)]


def mix_scores(sources: dict[Path, float], target: Path, opponent: str, accelerator: Accelerator) -> None:
    """The scores of the mixture of this hash, from the folders of its members' scores and their weights."""
    weights = torch.tensor(list(sources.values()))
    for path in shared_out(shards(next(iter(sources)), ".safetensors"), accelerator):
        scores = torch.stack([load_file(folder / path.name)["opponent_score"] for folder in sources])
        write_tensors(target / path.name, {"opponent_score": mixture_score(scores, weights)}, {"opponent": opponent})
    accelerator.wait_for_everyone()


# Pairs


@dataclass(frozen=True)
class Side:
    """Where one side of the pairs lies.

    Attributes:
        tensors: folder of its encodings.
        scores: folder of the opponent's scores of it, if they are kept.
        prefix: of the tensors' names, for a data set that has its own worse samples.
        kept: folder of further tensors, which were kept when the samples were drawn.
    """

    tensors: Path
    scores: Path | None = None
    prefix: str = ""
    kept: Path | None = None


def open_pairs(
    data: Path, real: Side, generated: Side | None, part: Part, copies: int, choices: Path | None = None,
    draws: int = 0, kept_part: Callable[[int], slice] | None = None,
) -> Pairs:  # fmt: skip
    """The pairs of real samples and generated ones, their tensors memory-mapped.

    Args:
        generated: None = there is no such side.
        copies: generated samples per real one.
        choices: folder that says, where the opponent drew candidates, which of them make a pair; `generated` then
            holds these alone.
        draws: fixed draws of each pair.
        kept_part: `Game.kept_part`.
    """
    kept_part = kept_part if generated is not None and generated.kept is not None else None
    if choices is not None:
        assert generated is not None and copies == 1
        return _open_chosen(data, real, generated, part, choices, kept_part)
    ids, prompts = Column(data, "id", part), Column(data, "prompt", part)
    sides = [_Tensors(side) for side in (real, generated) if side is not None]
    has_copies = generated is not None and not generated.prefix  # a data set's own worse samples lie in its own rows

    def fetch(indices: list[int], parts: list[slice] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kept = [ids.place_of(index) for index in indices]
        in_data = [(number, part.index + place * part.of) for number, place in kept]
        drawn = [(number, place * copies + k) for number, place in kept for k in range(copies)]
        found = [sides[0].rows(in_data, kept)]
        if len(sides) == 2:
            of_drawn = parts and [one for one in parts for _ in range(copies)]
            found.append(sides[1].rows(drawn, drawn, of_drawn) if has_copies else sides[1].rows(in_data, kept))
        return found[0], found[1] if len(sides) == 2 else {}

    kinds = kinds_of(real.tensors, part) if KIND in sides[0].names else None
    return Pairs(ids, prompts, fetch, draws, kinds, kept_part)


def kinds_of(encoded: Path, part: Part) -> Tensor | None:
    """The kind of each sample of a part, where its game says that samples of one kind are better scored together."""
    found = []
    for path in shards(encoded, ".safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if KIND in names:
                found.append(file.get_tensor(KIND)[part.places])
            elif names:  # a shard may have no rows
                return None
    return torch.cat(found) if found else None


def _open_chosen(
    data: Path, real: Side, generated: Side, part: Part, choices: Path, kept_part: Callable[[int], slice] | None
) -> Pairs:
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

    def fetch(indices: list[int], parts: list[slice] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = []
        for index in indices:
            (number, place), best, _ = places[index]
            if best is None:
                found.append(in_data.rows([(number, part.index + place * part.of)], [(number, place)]))
            else:
                found.append(drawn.rows([best], [best]))
        others = [places[index][2] for index in indices]
        together = {name: _stacked([tensors[name][0] for tensors in found]) for name in found[0]}
        return together, drawn.rows(others, others, parts)

    kinds = kinds_of(real.tensors, part) if KIND in in_data.names else None
    if kinds is not None:
        starts = Column(data, "id", part).starts
        kinds = kinds[torch.tensor([starts[number] + place for (number, place), _, _ in places])]
    return Pairs(ids, prompts, fetch, kinds=kinds, kept_part=kept_part)


class Column(Sequence[str]):
    """A text of all real rows of a part, read from the shards when it is asked for; a few shards are in memory."""

    def __init__(self, data: Path, name: str, part: Part | None = None) -> None:
        part = part or Part()
        paths = shards(data / "samples", ".parquet")
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
        self.kept = _opened(side.kept)[0] if side.kept is not None else None
        self.score = _opened(side.scores)[0] if side.scores is not None else None
        found = (list(self.file(shard).keys()) for shard in range(count))
        names = next((keys for keys in found if keys), [])  # a shard may have no rows
        self.names = sorted(_of_side({name: name for name in names}, side.prefix).values())
        if not self.names:
            raise InputError(
                f"{side.tensors} has no worse samples, which --objective dpo needs: give a data set with pairs"
            )

    def rows(
        self, places: list[tuple[int, int]], scored: list[tuple[int, int]], parts: list[slice] | None = None
    ) -> dict[str, Tensor]:
        """The rows at (shard, place), by name without the prefix, with the scores at the places `scored`.

        Rows of unequal length are filled up with 0 at their end.

        Args:
            parts: of each row's kept tensors what is read along their first axis; None = all.
        """
        found = {
            name.removeprefix(self.prefix): _stacked([self.file(s).get_slice(name)[p] for s, p in places])
            for name in self.names
        }
        if self.kept is not None:
            wanted = parts or [slice(None)] * len(places)
            for name in self.kept(places[0][0]).keys():
                found[name] = torch.stack(
                    [self.kept(s).get_slice(name)[p, part] for (s, p), part in zip(places, wanted, strict=True)]
                )
        if self.score is not None:
            found["opponent_score"] = torch.stack([self.score(s).get_slice("opponent_score")[p] for s, p in scored])
        return found


def _of_side(tensors: dict[str, T], prefix: str) -> dict[str, T]:
    """The tensors of one side by their names without the prefix."""
    if prefix:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in tensors.items() if not name.startswith("loser_")}


def _stacked(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)
