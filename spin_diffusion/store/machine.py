"""What the machine has against a command: a full disk, a limit, a folder that is gone. Libraries word it in their own
ways, or not at all; here it becomes the system's number again, and one line with what can be done."""

import errno
import os
import re
import resource
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.text import printable

PART = ".spin-part"
"""End of the name of what is not complete yet. No user has such names."""

_ROOM = "make room or give another --output_dir"
_ALLOW = "allow it, or give another --output_dir"
_BACK = "put back what was moved or removed"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or give an --output_dir where larger files can be",
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EROFS: _ALLOW,
    errno.EIO: "the disk, or the way to it, fails: mend it or give another --output_dir",
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
    path = getattr(error, "filename2", None) or getattr(
        error, "filename", None
    )  # the former: what a rename was to make
    where = f" ({printable(path)})" if path else ""
    return f"{os.strerror(number)}{where}: {_REMEDIES[number]}, then run the same command again"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of the part of a file or folder. When that fails, what was written so far is removed, so that
    it takes no room, and what the machine has against it is raised as an OSError that names `path`."""
    part = path.with_name(path.name + PART)
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
