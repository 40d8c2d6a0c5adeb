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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spin_diffusion.store.folder import MARKER, make_folder
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.machine import PART, writing
from spin_diffusion.store.opening import open_regular, read_bytes
from spin_diffusion.store.progress import tell
from spin_diffusion.store.text import printable
from spin_diffusion.store.typed import fit

OLD = ".spin-old"
"""End of the name of a folder that is being replaced. No user has such names."""


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
            make_folder(kept.parent)
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
    make_folder(path.parent)
    with writing(path):
        write(part_of(path))
        commit(path)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Write a folder through `write(part path)`, which is there and empty, and commit it."""
    make_folder(part_of(path))
    with writing(path):
        write(part_of(path))
        commit(path)


SEAL = "content_sha256"
"""Key of a JSON object's own hash."""


def write_json(path: Path, content: Any, sealed: bool = False) -> None:
    """Write `content` as JSON, atomically. Halves of a surrogate pair are escaped, as JSON can.

    Args:
        sealed: add the object's hash, by which `read_json` knows a number that was changed on the disk.
    """
    if sealed:
        content = content | {SEAL: _seal_of(content)}
    data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    write_file(path, lambda part: part.write_bytes(data))


def _seal_of(content: dict[str, Any]) -> str:
    as_read = json.loads(json.dumps(content))  # tuples are lists then, and whole numbers as keys are texts
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


ELSEWHERE = "restore it, or start in another --output_dir"
AGAIN = "run the same command again, which makes it anew"


class Damaged(InputError):
    """A file of ours is missing or is not what was written. Who can make it anew does so; else the message says what
    can be done."""

    def __init__(self, path: Path, problem: object, remedy: str) -> None:
        problem = " ".join(printable(problem).split())[:200]
        state = f"is damaged ({problem})" if os.path.lexists(path) else "is missing"
        super().__init__(f"{printable(path)} {state}: {remedy}")
        self.path = path


def read_json(path: Path, type_: Any = dict[str, Any], remedy: str = ELSEWHERE) -> Any:
    """The content of a JSON file of ours, which is of the type that is expected of it.

    Args:
        type_: as `store.typed.fit` knows it; a TypedDict names the keys.
        remedy: what can be done when it is damaged, in the imperative.

    Raises:
        Damaged: it is missing, is not a file, is not JSON, is JSON of another type, or was sealed with other content.
    """
    try:
        content = json.loads(_own_bytes(path, remedy))
        seal = content.pop(SEAL, None) if isinstance(content, dict) else None
        fitting = fit(content, type_)
        if seal is not None and seal != _seal_of(content):
            raise ValueError("its content is not what was written")
        return fitting
    except (ValueError, RecursionError) as error:  # JSON's, Unicode's and Misfit are ValueErrors
        if isinstance(error, InputError):
            raise
        raise Damaged(path, error, remedy) from None


def read_if_whole(path: Path, type_: Any = dict[str, Any]) -> Any | None:
    """The content of a JSON file that is made anew where it is not there; None then, and when it is damaged, which is
    said."""
    try:
        return read_json(path, type_, AGAIN) if path.is_file() else None
    except Damaged as error:
        tell_remade(error)
        return None


def read_json_lines(path: Path, type_: Any = dict[str, Any], remedy: str = ELSEWHERE) -> list[Any]:
    """The rows of a file of ours with a JSON value on each line, as `read_json`."""
    try:
        # Not splitlines: a text may hold other line separators of Unicode
        lines = _own_bytes(path, remedy).decode("utf-8").split("\n")
        if lines.pop():
            raise ValueError("its last line is cut")
        return [fit(json.loads(line), type_, f"line {number}") for number, line in enumerate(lines, 1)]
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise Damaged(path, error, remedy) from None


def write_json_lines(path: Path, rows: list[dict[str, Any]], key: str) -> None:
    """Write rows as JSON, one on each line, atomically; each says by a key of its own that it is as it was written and
    made of what `key` stands for."""
    text = "".join(json.dumps(row | {KEY: _line_key(row, key)}, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def _line_key(row: dict[str, Any], key: str) -> str:
    return key_of(made_of=key, row={name: value for name, value in row.items() if name != KEY})


def _own_bytes(path: Path, remedy: str) -> bytes:
    try:
        return read_bytes(path)
    except InputError as error:
        raise Damaged(path, str(error).removeprefix(printable(path)).strip(), remedy) from None


def write_rows(path: Path, rows: list[dict[str, Any]], metadata: dict[str, str]) -> None:
    """Write rows as one parquet shard with page checksums, `metadata` in its schema, atomically."""
    table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    write_file(path, lambda part: pq.write_table(table, part, write_page_checksum=True))


def read_rows(path: Path, columns: list[str] | None = None, remedy: str = AGAIN) -> list[dict[str, Any]]:
    """The rows of a parquet shard, its checksums verified; Damaged when it is not what was written, or lacks one of the
    columns."""
    with _reading(path, remedy):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if missing := set(columns or []) - set(file.schema_arrow.names):
            raise pa.ArrowInvalid(f"it has no column {min(missing)}")
        return file.read(columns=columns).to_pylist()


def rows_metadata(path: Path, remedy: str = AGAIN) -> dict[str, str]:
    """The metadata that `write_rows` put beside the rows, and "rows": their number."""
    with _reading(path, remedy):
        file = pq.ParquetFile(path)
        metadata = file.schema_arrow.metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()} | {"rows": str(file.metadata.num_rows)}


def has_rows(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a parquet shard is there, whole, with this metadata; one that is damaged is said, and is to be written
    again."""
    if not path.is_file():
        return False
    try:
        if not metadata.items() <= rows_metadata(path).items():
            return False
        read_rows(path)
        return True
    except Damaged as error:
        tell_remade(error)
        return False


def tell_remade(error: Damaged) -> None:
    """Say that a damaged file is made anew."""
    tell(f"{str(error).rpartition(': ')[0]}: it is made anew")


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    """What pyarrow and safetensors say of a file that is not what was written."""
    try:
        open_regular(path).close()  # they would wait for a named pipe
        yield
    except InputError as error:
        raise Damaged(path, str(error).removeprefix(printable(path)).strip(), remedy) from None
    except Exception as error:  # damaged bytes make the readers raise almost anything
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:  # the machine's
            raise
        raise Damaged(path, (str(error).splitlines() or [type(error).__name__])[0], remedy) from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as one safetensors file, atomically, with the hash of all that is in it."""
    write_file(path, lambda part: _save_tensors(part, tensors, metadata))


def write_shared_tensors(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Write a file into a folder where other programs may be writing the same one."""
    make_folder(path.parent)
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with writing(own):
        _save_tensors(part_of(own), tensors, {KEY: key})
        _sync(part_of(own))
        os.replace(part_of(own), path)


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # In one entry: several would be written in an order of their own, and the same tensors have the same bytes
    said = json.dumps(metadata | {_CONTENT: _content_hash(tensors, metadata)}, sort_keys=True)
    save_file(tensors, path, metadata={_ABOUT: said})


_ABOUT, _CONTENT = "about", "content"


def _content_hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([metadata, tensors_hash(tensors)], sort_keys=True).encode()).hexdigest()


def tensors_metadata(path: Path, remedy: str = AGAIN) -> dict[str, str]:
    """The metadata that `write_tensors` put beside the tensors; Damaged when the file's head or length is not right."""
    with _reading(path, remedy), safe_open(path, framework="pt") as file:
        said = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
        return {key: value for key, value in said.items() if key != _CONTENT}


def read_tensors(path: Path, remedy: str = AGAIN) -> dict[str, Tensor]:
    """The tensors of a file that `write_tensors` wrote, their hash verified; Damaged when it is not the recorded."""
    with _reading(path, remedy), safe_open(path, framework="pt") as file:
        said = json.loads((file.metadata() or {})[_ABOUT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if said.pop(_CONTENT) != _content_hash(tensors, said):
            raise ValueError("its content is not what was written")
        return tensors


def has_tensors(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a file of tensors is there, whole, with this metadata; one that is damaged is said, and is to be written
    again."""
    if not path.is_file():
        return False
    try:
        return metadata.items() <= tensors_metadata(path).items() and read_tensors(path) is not None
    except Damaged as error:
        tell_remade(error)
        return False


def is_built(path: Path, key: str) -> bool:
    """Whether a file of rows, tensors or JSON lines, or a JSON object, is there, whole and with this key.

    That one is damaged is said in a line; it counts as missing, and is made anew.
    """
    if path.suffix == ".parquet":
        return has_rows(path, {KEY: key})
    if path.suffix == ".safetensors":
        return has_tensors(path, {KEY: key})
    if path.suffix == ".json":
        return (read_if_whole(path) or {}).get(KEY) == key
    try:
        rows = read_json_lines(path, remedy=AGAIN) if path.is_file() else []
        built = bool(rows) and all(row.get(KEY) == _line_key(row, key) for row in rows)
        if rows and not built:
            tell(f"{printable(path)} belongs to something else than is asked for now, or is damaged: it is made anew")
        return built
    except Damaged as error:
        tell_remade(error)
        return False


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


def find_damage(hashes: Mapping[str, str], below: Path) -> dict[str, str]:
    """The files that are missing, or whose SHA-256 is not the recorded one: name -> what is wrong with it."""
    found = {}
    for name, expected in hashes.items():
        if not (below / name).is_file():
            found[name] = "it is missing"
        elif file_hash(below / name) != expected:
            found[name] = f"its SHA-256 is not the recorded {expected[:12]}..."
    return found


def verify_hashes(hashes: Mapping[str, str], below: Path, remedy: str = ELSEWHERE) -> None:
    """Check every file against its recorded hash; Damaged names the first that is missing or another."""
    for name, problem in find_damage(hashes, below).items():
        raise Damaged(below / name, problem, remedy)


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
