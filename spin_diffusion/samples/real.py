"""The real samples: written once for a run as shards, with their encodings and a manifest of all of them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from accelerate import Accelerator

from spin_diffusion.samples.sample import ENCODED, Row
from spin_diffusion.samples.shards import Encoder, encode_shards, rows_in, shards
from spin_diffusion.store.files import read_json, write_json, write_rows
from spin_diffusion.store.hashes import file_hashes, verify_hashes
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress
from spin_diffusion.store.run_dir import commit, is_shard, make_folder, part_of, remove_files, seed_from, shard_name


class DataManifest(TypedDict):
    """What `prepare` wrote about the real samples."""

    rows: int
    hash: str
    settings: dict[str, object]
    left_out: dict[str, Any]
    files: dict[str, str]


def prepare(
    directory: Path,
    rows: Callable[[], Iterator[Row]],
    settings: dict[str, object],
    rows_per_shard: int,
    game: Encoder,
    accelerator: Accelerator,
    progress: Progress | None = None,
    report: Callable[[], dict[str, object]] = dict,
) -> DataManifest:
    """Write the real samples as shards with their encodings and return their manifest; what is there and whole stays.

    Args:
        rows: reads the source from the beginning; only the main process calls it.
        settings: what decides the content; prepared data with other settings is refused.
        report: what was left out of the source and why, asked once `rows` is exhausted.
    """
    progress = progress or Progress()
    settings = settings | {"encoder": game.encoder_hash()}
    begun = data_manifest(directory) if (directory / "manifest.json").is_file() else None
    if begun is not None:
        if begun["settings"] != settings:
            raise InputError(_differs(directory, begun["settings"], settings))
        samples = {name: digest for name, digest in begun["files"].items() if _is_sample(name)}
        verify_hashes(samples, directory, _prepare_anew(directory), accelerator)
    elif accelerator.is_main_process and not (
        (directory / "left_out.json").is_file() and (directory / "samples").is_dir()
    ):
        part = part_of(directory / "samples")
        shutil.rmtree(part, ignore_errors=True)
        remove_files(directory, is_shard)  # of a command with other settings
        left_out = _write_real(part, rows(), rows_per_shard, report, progress)
        write_json(directory / "left_out.json", left_out)
        commit(directory / "samples")
    accelerator.wait_for_everyone()
    names = shards(directory / "samples", ".parquet")
    total = sum(rows_in(path) for path in names)
    encode_shards(
        directory / "samples", directory / ENCODED, game, accelerator, progress.phase("encode the real samples", total)
    )
    accelerator.wait_for_everyone()
    found = file_hashes([directory / "samples", directory / ENCODED], directory, accelerator)
    if accelerator.is_main_process:
        files = {name: digest for name, digest in found.items() if is_shard(name)}
        if begun is None or files != begun["files"]:  # encodings that were damaged are made anew
            drawn = sorted(digest for name, digest in files.items() if _is_sample(name))
            if begun is None:
                left_out = read_json(directory / "left_out.json", remedy=_prepare_anew(directory))
            else:
                left_out = begun["left_out"]
            manifest = DataManifest(
                rows=total,
                hash=f"{seed_from(*drawn):016x}",
                settings=settings,
                left_out=left_out,
                files=files,
            )
            write_json(directory / "manifest.json", manifest, sealed=True)
    accelerator.wait_for_everyone()
    return data_manifest(directory)


def forget_prepared(directory: Path) -> None:
    """Let `prepare` write the real samples of a folder anew."""
    for name in ("manifest.json", "left_out.json"):
        (directory / name).unlink(missing_ok=True)


def _is_sample(name: str) -> bool:
    """Whether a file of the manifest holds samples, not their encodings."""
    return name.startswith("samples/")


def _differs(directory: Path, old: dict[str, object], new: dict[str, object]) -> str:
    changed = [key for key in new if old.get(key) != new[key]]
    if changed == ["encoder"]:
        return (
            f"{directory} was encoded by other weights or settings (of a VAE, say) than this command has: restore "
            "them, or start in another --output_dir"
        )
    return (
        f"{directory} was prepared with other settings ({', '.join(changed)}): restore them, or start in another "
        "--output_dir"
    )


def _prepare_anew(directory: Path) -> str:
    return f"delete {directory} and run the same command again, which prepares it anew from the data set"


def _write_real(
    directory: Path,
    rows: Iterator[Row],
    rows_per_shard: int,
    report: Callable[[], dict[str, object]],
    progress: Progress,
) -> dict[str, object]:
    make_folder(directory)
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


def data_manifest(directory: Path) -> DataManifest:
    """What `prepare` wrote about the real samples: rows, hash, settings, left_out, files."""
    return read_json(directory / "manifest.json", DataManifest, _prepare_anew(directory))
