"""The one way to keep a result. A file stays if it says itself that it was made with the key of all that decides its
content (`store.keys`); otherwise it is made anew, under another name first, and renamed when it is whole.

What processes build together is shared out piece by piece. A piece is made whole by one process, so its bytes do not
depend on how many there are or which of them were restarted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate import Accelerator

from spin_diffusion.store.keys import KEY
from spin_diffusion.store.run_dir import (
    is_built,
    write_json,
    write_json_lines,
    write_rows,
    write_shared_tensors,
    write_tensors,
)
from spin_diffusion.store.sharing import shared_out

T = TypeVar("T")
Tell = Callable[[int, str], None]
"""(steps done by all processes, text), from `store.progress.Progress.phase`."""


class Made(NamedTuple):
    """What goes into a file.

    Attributes:
        content: rows of a `.parquet` or a `.jsonl`, tensors by name of a `.safetensors`, or the object of a `.json`.
        metadata: what else a `.parquet` or a `.safetensors` says of itself, beside its key.
    """

    content: Any
    metadata: Mapping[str, str] = {}


def _nothing_beside() -> bool:
    return True


@dataclass(frozen=True)
class Piece:
    """One file of many that are built together.

    Attributes:
        path, key: as of `build`.
        size: steps that it counts in the progress.
        make: (told how many of its steps are done) -> its content.
        beside: whether the other files that `make` writes are whole; asked only where the file itself has the key.
        shared: whether other programs may be writing the same file.
    """

    path: Path
    key: str
    size: int
    make: Callable[[Callable[[int], None]], Made]
    beside: Callable[[], bool] = _nothing_beside
    shared: bool = False

    @property
    def is_built(self) -> bool:
        """Whether it is there, whole, and made of what the key stands for."""
        return is_built(self.path, self.key) and self.beside()


def build(path: Path, key: str, make: Callable[[], Made], *, shared: bool = False) -> bool:
    """Make the file at `path` unless it is there, whole and with this key; whether it was made.

    Args:
        key: from `store.keys.key_of`, of all that decides the content.
        shared: whether other programs may be writing the same file.
    """
    missing = not is_built(path, key)
    if missing:
        _write(path, key, make(), shared)
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
                writing = writer.submit(_write, piece.path, piece.key, content, piece.shared)
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
    pieces = (piece_of(thing) for thing in shared_out(things, accelerator))
    made = build_pieces(pieces, progress, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return made


def _write(path: Path, key: str, made: Made, shared: bool) -> None:
    if shared:
        write_shared_tensors(path, made.content, key)
    elif path.suffix == ".parquet":
        write_rows(path, made.content, {**made.metadata, KEY: key})
    elif path.suffix == ".safetensors":
        write_tensors(path, made.content, {**made.metadata, KEY: key})
    elif path.suffix == ".jsonl":
        write_json_lines(path, made.content, key)
    else:
        assert path.suffix == ".json", path
        write_json(path, {KEY: key} | made.content)
