"""Samples on the disk: the real ones, prepared once for a run, and the opponent's, shard by shard beside them.

Shard i of a round's samples answers shard i of the real ones row by row, so a pair is a (shard, row).
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor

from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.game import Game, Row
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
    verify_hashes,
    write_json,
    write_rows,
    write_tensors,
)
from spin_diffusion.selfplay.train import Pairs


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
    total = sum(int(rows_metadata(path)["rows"]) for path in names)
    encode_shards(directory / "samples", directory / "latents", game, accelerator,
                  progress.phase("encode the real samples", total))  # fmt: skip
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = file_hashes([directory / "samples", directory / "latents"], directory)
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


def draw_shards(
    source: Path,
    target: Path,
    draw: Callable[[list[Row], Callable[[int], None]], list[Row]],
    metadata: dict[str, str],
    accelerator: Accelerator,
    progress: Callable[[int, str], None],
    columns: tuple[str, ...] = ("id", "prompt"),
) -> None:
    """For each shard of prompts in `source`/samples let one process draw one shard of samples; finished ones stay.

    A shard is drawn whole by one process, in the order of its rows, so its bytes do not depend on how many processes
    there are or which were restarted.
    """
    done = 0
    for path in _mine(shards(source / "samples", ".parquet"), accelerator):
        out = target / path.name
        if not (out.is_file() and metadata.items() <= rows_metadata(out).items()):
            rows = read_rows(path, columns=list(columns))
            here = done
            drawn = draw(rows, lambda samples, here=here: progress((here + samples) * accelerator.num_processes, ""))
            write_rows(out, drawn, metadata)
        done += int(rows_metadata(out)["rows"])
        progress(done * accelerator.num_processes, "")
    accelerator.wait_for_everyone()


def encode_shards(
    source: Path, target: Path, game: Game, accelerator: Accelerator, progress: Callable[[int, str], None]
) -> None:
    """For each shard of samples in `source` let one process write the tensors that scoring needs."""
    done = 0
    for path in _mine(shards(source, ".parquet"), accelerator):
        out = target / f"{path.stem}.safetensors"
        if not out.is_file():
            write_tensors(out, game.encode(read_rows(path)), {})
        done += int(rows_metadata(path)["rows"])
        progress(done * accelerator.num_processes, "")
    accelerator.wait_for_everyone()


def _mine(paths: list[Path], accelerator: Accelerator) -> list[Path]:
    return paths[accelerator.process_index :: accelerator.num_processes]


def open_pairs(data: Path, generated: Path | None, prefix: str = "") -> Pairs:
    """The pairs of real samples and generated ones, their tensors memory-mapped.

    Args:
        generated: folder of the generated side's tensors, shard by shard beside the real ones; None = no such side.
        prefix: of the tensors' names in `generated`, for a data set that has its own worse samples.
    """
    ids, prompts, places = [], [], []
    for number, path in enumerate(shards(data / "samples", ".parquet")):
        for place, row in enumerate(read_rows(path, columns=["id", "prompt"])):
            ids.append(row["id"])
            prompts.append(row["prompt"])
            places.append((number, place))
    real = _Tensors(data / "latents", "")
    other = _Tensors(generated, prefix) if generated is not None else None

    def fetch(indices: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wanted = [places[index] for index in indices]
        return real.rows(wanted), other.rows(wanted) if other is not None else {}

    return Pairs(ids, prompts, fetch)


class _Tensors:
    """Rows of tensors in a folder of safetensors shards, read through memory maps."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self.prefix = prefix
        self.files = [safe_open(path, framework="pt") for path in shards(directory, ".safetensors")]
        names = self.files[0].keys()
        losers = {name for name in names if name.startswith("loser_")}
        self.names = sorted(losers if self.prefix else set(names) - losers)
        if not self.names:
            raise InputError(
                f"{directory} has no worse images, which --objective dpo needs: give a data set with pairs"
            )

    def rows(self, places: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The rows at (shard, place), stacked, by name without the prefix."""
        return {
            name.removeprefix(self.prefix): torch.stack([self.files[s].get_slice(name)[p] for s, p in places])
            for name in self.names
        }
