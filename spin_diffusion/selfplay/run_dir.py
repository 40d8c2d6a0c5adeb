"""The run folder: names, seeds, hashes, and the one way in which a file or a folder appears, whole.

Everything is written under a name that ends in `.spin-part` and takes its real name by one atomic rename after its
bytes are on the disk. A name without it is therefore always complete, whenever the process was killed. What is removed
is named file by file: whatever else lies in a folder is its user's, and stays.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spin_diffusion.input_error import InputError
from spin_diffusion.store.folder import MARKER
from spin_diffusion.store.keys import KEY

PART, OLD = ".spin-part", ".spin-old"
"""Ends of the names of what is not complete yet, and of a folder that is being replaced. No user has such names."""


def seed_from(*parts: str | int | float) -> int:
    """A seed in [0, 2**63): the SHA-256 of the parts. The same parts give the same seed on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def shard_name(index: int, count: int) -> str:
    """The name of shard `index` of `count`, without a suffix: 00000-of-00008."""
    return f"{index:05d}-of-{count:05d}"


def is_shard(name: str) -> bool:
    """Whether a path ends in the name of a shard's rows or tensors."""
    return re.fullmatch(r"(.*/)?\d{5}-of-\d{5}\.(parquet|safetensors)", name) is not None


def part_of(path: Path) -> Path:
    """The name under which `path` is written before it is complete."""
    return path.with_name(path.name + PART)


def commit(path: Path) -> None:
    """Give the finished part of `path` its real name. A folder that stands there already is replaced: files that have
    no successor in the new one go over into it.

    Raises:
        InputError: a folder stands where a file is to be, or the other way round.
    """
    part = part_of(path)
    for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
        if file.is_file():
            _sync(file)
    if os.path.lexists(path) and path.is_dir() != part.is_dir():
        kinds = "a folder, and a file" if path.is_dir() else "a file, and a folder"
        raise InputError(f"{path} is {kinds} is to be written there: move it away, then run the same command again")
    if path.is_dir():
        # A folder cannot be replaced in one step: the old one steps aside first, and `settle` puts things right after
        # a kill between the two renames.
        aside = path.with_name(path.name + OLD)
        _retire(aside, path)
        os.replace(path, aside)
        os.replace(part, path)
        _retire(aside, path)
    else:
        os.replace(part, path)
    _sync(path.parent)


def settle(folder: Path) -> None:
    """Put right what a killed process left half-done below a folder of this program: parts are removed, a replaced
    folder gets its old state back. No link is followed, and a folder with a marker of its own is left alone."""
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:
        return  # a system's own, such as lost+found
    for path in paths:
        is_folder = path.is_dir() and not path.is_symlink()
        if path.name.endswith(PART):
            shutil.rmtree(path) if is_folder else path.unlink()
        elif path.name.endswith(OLD):
            whole = path.with_name(path.name.removesuffix(OLD))
            if os.path.lexists(whole):
                _retire(path, whole)
            else:
                os.replace(path, whole)
        elif is_folder and not (path / MARKER).exists():
            settle(path)


def _retire(aside: Path, whole: Path) -> None:
    """Remove a folder, or a link to one, that `whole` has replaced; files that have no successor there go over."""
    if aside.is_symlink():
        aside.unlink()
    if not aside.is_dir():
        return
    for path in sorted(aside.rglob("*")):
        kept = whole / path.relative_to(aside)
        if (path.is_symlink() or not path.is_dir()) and not os.path.lexists(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept)
    shutil.rmtree(aside)


def remove_files(folder: Path, ours: Callable[[str], bool]) -> None:
    """Remove the files below a folder whose paths in it are `ours`, and the folders that are empty then. No link is
    followed."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder comes before it
        if path.is_dir() and not path.is_symlink():
            _remove_empty(path)
        elif ours(path.relative_to(folder).as_posix()):
            path.unlink()
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file through `write(part path)` and commit it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(part_of(path))
    commit(path)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically."""
    write_file(path, lambda part: part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n"))


def read_json(path: Path) -> Any:
    """The content of a JSON file; InputError when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or start in another --output_dir") from None


def write_rows(path: Path, rows: list[dict[str, Any]], metadata: dict[str, str]) -> None:
    """Write rows as one parquet shard with page checksums, `metadata` in its schema, atomically."""
    table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    write_file(path, lambda part: pq.write_table(table, part, write_page_checksum=True))


def read_rows(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a parquet shard, its checksums verified; InputError when it is damaged."""
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): delete it and run again") from None


def rows_metadata(path: Path) -> dict[str, str]:
    """The metadata that `write_rows` put beside the rows, and "rows": their number."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): delete it and run again") from None
    metadata = file.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()} | {"rows": str(file.metadata.num_rows)}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as one safetensors file, atomically, with the hash of all that is in it."""
    write_file(path, lambda part: _save_tensors(part, tensors, metadata))


def write_shared_tensors(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Write a file into a folder where other programs may be writing the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path.with_name(f"{path.name}.{uuid.uuid4().hex}"))
    _save_tensors(part, tensors, {KEY: key})
    _sync(part)
    os.replace(part, path)


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # In one entry: several would be written in an order of their own, and the same tensors have the same bytes
    said = json.dumps(metadata | {_CONTENT: _content_hash(tensors, metadata)}, sort_keys=True)
    save_file(tensors, path, metadata={_ABOUT: said})


_ABOUT, _CONTENT = "about", "content"


def _content_hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([metadata, tensors_hash(tensors)], sort_keys=True).encode()).hexdigest()


def tensors_metadata(path: Path) -> dict[str, str]:
    """The metadata that `write_tensors` put beside the tensors; InputError when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            return {key: value for key, value in said.items() if key != _CONTENT}
    except Exception as error:  # damaged bytes make the reader raise almost anything
        raise _damaged(path, error) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_tensors` wrote, their hash verified; InputError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})[_ABOUT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if said.pop(_CONTENT) != _content_hash(tensors, said):
                raise ValueError("its content is not what was written")
    except Exception as error:  # damaged bytes make the reader raise almost anything
        raise _damaged(path, error) from None
    return tensors


def is_built(path: Path, key: str) -> bool:
    """Whether a file of `write_rows` or `write_tensors`, or a JSON object, is there, whole and with this key.

    That one is damaged is said in a line; it counts as missing, and is made anew.
    """
    if not path.is_file():
        return False
    try:
        if path.suffix == ".parquet":
            return rows_metadata(path).get(KEY) == key and read_rows(path) is not None
        if path.suffix == ".json":
            return read_json(path).get(KEY) == key
        found = tensors_metadata(path).get(KEY)
        read_tensors(path)
    except Exception:  # damaged bytes make the readers raise almost anything
        print(f"{path} is damaged: it is made anew")
        return False
    return found == key


def _damaged(path: Path, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{path} is damaged ({reason}): delete it and run again")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path: Path, digest: str) -> bool:
    """Whether a file is there with this SHA-256."""
    return path.is_file() and file_hash(path) == digest


def file_hashes(paths: Iterable[Path], below: Path) -> dict[str, str]:
    """SHA-256 of every file, and of every file in every folder, by its path relative to `below`."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {file.relative_to(below).as_posix(): file_hash(file) for file in files if file.is_file()}


def verify_hashes(hashes: dict[str, str], below: Path) -> None:
    """Check every file against its recorded hash; InputError names the first that is missing or damaged."""
    for name, expected in hashes.items():
        path = below / name
        if not path.is_file():
            raise InputError(f"{path} is missing though its round is recorded as finished: restore it, or start in "
                             "another --output_dir")  # fmt: skip
        if file_hash(path) != expected:
            raise InputError(f"{path} is damaged (its SHA-256 is not the recorded {expected[:12]}...): restore it, or "
                             "start in another --output_dir")  # fmt: skip


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, hexadecimal."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, hexadecimal, in whatever order they come."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
