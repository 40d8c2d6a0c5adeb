"""Files of ours, and `build`, the one way to keep a result.

A file stays if it says itself that it was made with the key of all that decides its content (`store.keys`); otherwise
it is made anew, under another name first, and renamed when it is whole. Its name says its format: JSON, JSON on each
line, parquet rows or safetensors. Each knows by a hash or by checksums whether it is what was written.

What processes build together is shared out piece by piece. A piece is made whole by one process, so its bytes do not
depend on how many there are or which of them were restarted.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spin_diffusion.store.input_error import InputError, open_regular, printable, read_bytes
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import (
    AGAIN,
    ELSEWHERE,
    Damaged,
    tell_remade,
    write_file,
)
from spin_diffusion.store.sharing import shared_out, waiting, works_on
from spin_diffusion.store.typed import fit

T = TypeVar("T")
Tell = Callable[[int, str], None]
"""(steps done by all processes, text), from `store.progress.Progress.phase`."""
JsonObject = Mapping[str, object]
OBJECT: Any = dict[str, Any]
"""As `store.typed.fit` knows it: a JSON object of any content."""
SEAL = "content_sha256"
"""Key of a JSON object's own hash."""
_ABOUT, _CONTENT = "about", "content"


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    """What the readers of a file say where it is not what was written, as Damaged."""
    try:
        open_regular(path).close()  # pyarrow and safetensors would wait for a named pipe
        yield
    except InputError as error:
        raise Damaged(path, str(error).removeprefix(printable(path)).strip(), remedy) from None
    except Exception as error:  # damaged bytes make the readers raise almost anything
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:  # the machine's
            raise
        raise Damaged(path, (str(error).splitlines() or [type(error).__name__])[0], remedy) from None


# JSON


def write_json(path: Path, content: Any, sealed: bool = False) -> None:
    """Write `content` as JSON, atomically. Halves of a surrogate pair are escaped, as JSON can.

    Args:
        sealed: add the object's hash, by which `read_json` knows a number that was changed on the disk.
    """
    if sealed:
        content = content | {SEAL: _seal_of(content)}
    data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    write_file(path, lambda part: part.write_bytes(data))


def _seal_of(content: JsonObject) -> str:
    as_read = json.loads(json.dumps(content))  # tuples are lists then, and whole numbers as keys are texts
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, type_: Any = OBJECT, remedy: str = ELSEWHERE) -> Any:
    """The content of a JSON file of ours, which is of the type that is expected of it.

    Args:
        type_: as `store.typed.fit` knows it; a TypedDict names the keys.
        remedy: what can be done when it is damaged, in the imperative.

    Raises:
        Damaged: it is missing, is not a file, is not JSON, is JSON of another type, or was sealed with other content.
    """
    with _reading(path, remedy):
        content = json.loads(read_bytes(path))
        seal = content.pop(SEAL, None) if isinstance(content, dict) else None
        fitting = fit(content, type_)
        if seal is not None and seal != _seal_of(content):
            raise ValueError("its content is not what was written")
        return fitting


def read_if_whole(path: Path, type_: Any = OBJECT) -> Any | None:
    """The content of a JSON file that is made anew where it is not there; None then, and when it is damaged, which is
    said."""
    try:
        return read_json(path, type_, AGAIN) if path.is_file() else None
    except Damaged as error:
        tell_remade(error)
        return None


def read_json_lines(path: Path, type_: Any = OBJECT, remedy: str = ELSEWHERE) -> list[Any]:
    """The rows of a file of ours with a JSON value on each line, as `read_json`."""
    with _reading(path, remedy):
        # Not splitlines: a text may hold other line separators of Unicode
        lines = read_bytes(path).decode("utf-8").split("\n")
        if lines.pop():
            raise ValueError("its last line is cut")
        return [fit(json.loads(line), type_, f"line {number}") for number, line in enumerate(lines, 1)]


def write_json_lines(path: Path, rows: Sequence[JsonObject], key: str) -> None:
    """Write rows as JSON, one on each line, atomically; each says by a key of its own that it is as it was written and
    made of what `key` stands for."""
    text = "".join(json.dumps({**row, KEY: _line_key(row, key)}, ensure_ascii=False) + "\n" for row in rows)
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def _line_key(row: JsonObject, key: str) -> str:
    return key_of(made_of=key, row={name: value for name, value in row.items() if name != KEY})


# Rows


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


def rows_metadata(path: Path) -> dict[str, str]:
    """The metadata that `write_rows` put beside the rows, and "rows": their number."""
    with _reading(path, AGAIN):
        file = pq.ParquetFile(path)
        metadata = file.schema_arrow.metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()} | {"rows": str(file.metadata.num_rows)}


# Tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as one safetensors file, atomically, with the hash of all that is in it."""
    write_file(path, lambda part: _save_tensors(part, tensors, metadata))


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # In one entry: several would be written in an order of their own, and the same tensors have the same bytes
    about = json.dumps(metadata | {_CONTENT: _content_hash(tensors, metadata)}, sort_keys=True)
    save_file(tensors, path, metadata={_ABOUT: about})


def _content_hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([metadata, tensors_hash(tensors)], sort_keys=True).encode()).hexdigest()


def tensors_metadata(path: Path) -> dict[str, str]:
    """The metadata that `write_tensors` put beside the tensors; Damaged when the file's head or length is not right."""
    with _reading(path, AGAIN), safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
        return {key: value for key, value in about.items() if key != _CONTENT}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_tensors` wrote, their hash verified; Damaged when it is not the recorded."""
    with _reading(path, AGAIN), safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[_ABOUT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.pop(_CONTENT) != _content_hash(tensors, about):
            raise ValueError("its content is not what was written")
        return tensors


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


# Building


def is_built(path: Path, key: str) -> bool:
    """Whether a file of rows, tensors or JSON lines, or a JSON object, is there, whole and with this key.

    That one is damaged is said in a line; it counts as missing, and is made anew.
    """
    if not path.is_file():
        return False
    try:
        if path.suffix == ".parquet":
            return rows_metadata(path).get(KEY) == key and read_rows(path) is not None
        if path.suffix == ".safetensors":
            return tensors_metadata(path).get(KEY) == key and read_tensors(path) is not None
        if path.suffix == ".json":
            return read_json(path, remedy=AGAIN).get(KEY) == key
        rows = read_json_lines(path, remedy=AGAIN)
    except Damaged as error:
        tell_remade(error)
        return False
    built = bool(rows) and all(row.get(KEY) == _line_key(row, key) for row in rows)
    if rows and not built:
        tell(f"{printable(path)} belongs to something else than is asked for now, or is damaged: it is made anew")
    return built


class Made(NamedTuple):
    """What goes into a file.

    Attributes:
        content: rows of a `.parquet` or a `.jsonl`, tensors by name of a `.safetensors`, or the object of a `.json`.
        metadata: what else a `.parquet` or a `.safetensors` says of itself, beside its key.
    """

    content: Any
    metadata: Mapping[str, str] = {}


@dataclass(frozen=True)
class Piece:
    """One file of many that are built together.

    Attributes:
        path, key: as of `build`.
        size: steps that it counts in the progress.
        make: (told how many of its steps are done) -> its content.
        beside: whether the other files that `make` writes are whole; asked only where the file itself has the key.
    """

    path: Path
    key: str
    size: int
    make: Callable[[Callable[[int], None]], Made]
    beside: Callable[[], bool] = lambda: True

    @property
    def is_built(self) -> bool:
        """Whether it is there, whole, and made of what the key stands for."""
        return is_built(self.path, self.key) and self.beside()


def build(path: Path, key: str, make: Callable[[], Made]) -> bool:
    """Make the file at `path` unless it is there, whole and with this key; whether it was made.

    Args:
        key: from `store.keys.key_of`, of all that decides the content.
    """
    missing = not is_built(path, key)
    if missing:
        _write(path, key, make())
    return missing


def build_pieces(pieces: Iterable[Piece], progress: Tell, num_processes: int) -> int:
    """Make those pieces of this process that are not built; the sum of their sizes.

    A piece is written while the next one is made: two are in memory at most.

    Args:
        progress: told as if the other processes were equally far.
    """

    def told_after(before: int) -> Callable[[int], None]:
        return lambda steps: progress((before + steps) * num_processes, "")

    done = made = 0
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        for piece in pieces:
            if not piece.is_built:
                content = piece.make(told_after(done))
                if writing is not None:
                    writing.result()
                writing = writer.submit(_write, piece.path, piece.key, content)
                made += piece.size
            done += piece.size
            progress(done * num_processes, "")
        if writing is not None:
            writing.result()
    return made


def build_together(
    things: Sequence[T], piece_of: Callable[[T], Piece], accelerator: Accelerator, progress: Tell
) -> int:
    """Let all processes build the pieces of these things, and wait for each other; the sum of the sizes of those that
    this process made.

    Args:
        things: the same on all processes; each is asked for its piece by the process that it falls to.
    """

    def pieces() -> Iterator[Piece]:
        for thing in shared_out(things, accelerator):
            piece = piece_of(thing)
            works_on(str(piece.path), accelerator)
            yield piece

    made = build_pieces(pieces(), progress, accelerator.num_processes)
    with waiting(accelerator):
        accelerator.wait_for_everyone()
    return made


def _write(path: Path, key: str, made: Made) -> None:
    if path.suffix == ".parquet":
        write_rows(path, made.content, {**made.metadata, KEY: key})
    elif path.suffix == ".safetensors":
        write_tensors(path, made.content, {**made.metadata, KEY: key})
    elif path.suffix == ".jsonl":
        write_json_lines(path, made.content, key)
    else:
        assert path.suffix == ".json", path
        write_json(path, {KEY: key} | made.content)
