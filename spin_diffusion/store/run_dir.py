"""The run folder: names, seeds, hashes, and the one way in which a file or a folder appears, whole.

Everything is written under a name that ends in `.spin-part` and takes its real name by one atomic rename after its
bytes are on the disk. A name without it is therefore always complete, whenever the process was killed. What is removed
is named file by file: whatever else lies in a folder is its user's, and stays. What the machine has against that (a
full disk, a limit, a folder that is gone) libraries word in their own ways, or not at all; here it becomes the system's
number again, and one line with what can be done.
"""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spin_diffusion.store.input_error import InputError, printable
from spin_diffusion.store.progress import tell

PART, OLD = ".spin-part", ".spin-old"
"""Ends of the names of what is not complete yet, and of a folder that is being replaced. No user has such names."""
MARKER = ".spin-diffusion.json"
"""The file by which a folder is known as this program's (`store.folder`)."""
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK
"""Mode of every file, as open() makes it: safetensors makes files that only their owner can read."""
held: dict[Path, int] = {}
"""Folders that are this process's until it ends, and the open markers by whose locks they are."""


def seed_from(*parts: str | int | float) -> int:
    """A seed in [0, 2**63): the SHA-256 of the parts. The same parts give the same seed on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def shard_name(index: int, count: int) -> str:
    """The name of shard `index` of `count`, without a suffix: 00000-of-00008."""
    return f"{index:05d}-of-{count:05d}"


def is_shard(name: str) -> bool:
    """Whether a path ends in the name of a shard's rows or tensors."""
    return re.fullmatch(r"(.*/)?\d{5}-of-\d{5}\.(parquet|safetensors|jsonl)", name) is not None


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
            with suppress(PermissionError):  # of file systems without modes
                file.chmod(_MODE)
            sync(file)
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
    sync(path.parent)


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


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, where something is to be written.

    Raises:
        InputError: it lies in a folder that this process has taken (`take_folder`) and that is not there any more:
            made anew under the old name it would have no marker, and be a folder that no command goes on in.
    """
    for taken, descriptor in held.items():
        if taken in path.absolute().parents and not is_file_at(descriptor, taken / MARKER):
            raise InputError(
                f"{printable(taken)} was moved or deleted while this command worked in it: put it back, or move "
                "elsewhere what is there now, then run the same command again"
            )
    path.mkdir(parents=True, exist_ok=True)


def is_file_at(descriptor: int, path: Path) -> bool:
    """Whether what is open there lies at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file through `write(part path)` and commit it."""
    make_folder(path.parent)
    with writing(path):
        write(part_of(path))
        commit(path)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Write a folder through `write(part path)`, which is there and empty, and commit it."""
    if part_of(path).is_dir():
        shutil.rmtree(part_of(path))  # of a command that was killed
    make_folder(part_of(path))
    with writing(path):
        write(part_of(path))
        commit(path)


# Hashes


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


def tell_remade(error: Damaged) -> None:
    """Say that a damaged file is made anew."""
    tell(f"{str(error).rpartition(': ')[0]}: it is made anew")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path: Path, digest: str) -> bool:
    """Whether a file is there with this SHA-256."""
    return path.is_file() and file_hash(path) == digest


# What the machine has against it

_ROOM = "make room, or write to another place"
_ALLOW = "allow it, or write to another place"
_BACK = "put back what was moved or removed"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write where larger files can be",
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EROFS: _ALLOW,
    errno.EIO: "the disk, or the way to it, fails: mend it, or write to another place",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "let other programs close files",
    errno.ENOENT: _BACK,
    errno.ENOTDIR: _BACK,
    errno.ESTALE: _BACK,
    errno.ENOTCONN: _BACK,
    errno.ENODEV: _BACK,
    errno.EISDIR: "a file belongs there: move that folder away",
    errno.EEXIST: "it stands in the way: move it away",
    errno.ELOOP: "a link leads round in a circle: mend it",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOMEM: "let it have more memory",
}
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE)
_LARGEST_OF_FAT32 = 2**32 - 1
_MARGIN = 1 << 20
"""What a library may not have written yet of a file that met a limit, and what is tried to be written, bytes."""


def trouble_of(error: BaseException | None) -> int | None:
    """The system's number (`errno.ENOSPC`) of what the machine has against a command; None = it is something else."""
    number, seen = None, set()
    while error is not None and number is None and id(error) not in seen:
        seen.add(id(error))
        number = _number(error)
        # What was raised while another error was dealt with may be a defect, unless a write failed
        of_writing = _number(error.__context__) if error.__context__ is not None else None
        error = error.__cause__ or (error.__context__ if of_writing in _OF_WRITING else None)
    return number


def _number(error: BaseException) -> int | None:
    if isinstance(error, InputError):
        return None
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _REMEDIES else None
    number = re.search(r"(?:os error|errno) (\d+)", str(error), re.IGNORECASE)
    if number and int(number[1]) in _REMEDIES:
        return int(number[1])
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    return next(
        (number for number in (*_OF_WRITING, errno.EACCES, errno.ENOMEM) if os.strerror(number) in str(error)), None
    )


def in_words(number: int, error: BaseException) -> str:
    """One line: what the machine said, where, and what can be done."""
    # filename2: what a rename was to make
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = f" ({printable(path)})" if path else ""
    return f"{os.strerror(number)}{where}: {_REMEDIES[number]}, then run the same command again"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of the part of a file or folder. When that fails, what was written so far is removed, so that
    it takes no room, and what the machine has against it is raised as an OSError that names `path`."""
    part = part_of(path)
    try:
        yield
    except Exception as error:
        number = trouble_of(error) or (None if isinstance(error, InputError) else _tried(part))
        shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)
        if number is None or isinstance(error, OSError) and error.errno == number and error.filename:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _tried(part: Path) -> int | None:
    """Why nothing can be written there, by trying it; torch says only that its writer failed."""
    files = [file for file in (part.rglob("*") if part.is_dir() else [part]) if file.is_file()]
    largest = max((file.stat().st_size for file in files), default=0)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = (_LARGEST_OF_FAT32, *([limit] if limit != resource.RLIM_INFINITY else []))
    trial = part.with_name(f"{uuid.uuid4().hex}{PART}")
    try:
        with open(trial, "wb") as file:
            file.write(bytes(min(_MARGIN, *limits)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return _number(error)
    finally:
        trial.unlink(missing_ok=True)
    return errno.EFBIG if any(limit - _MARGIN <= largest <= limit for limit in limits) else None


def sync(path: Path) -> None:
    """Return when the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
