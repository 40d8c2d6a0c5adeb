"""The one opener of files that somebody else may have written or replaced.

A FIFO or a device in the place of a file would be waited for, or read, for ever; a file of many gigabytes in the place
of a small one would fill the memory. Both are refused before a byte is read.
"""

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.text import printable

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}
MAX_LINE_BYTES = 256 << 20
"""A longer line is not one of a text file."""
MAX_PICTURE_BYTES = 256 << 20
"""A larger file is no picture to learn from, or would not fit into memory beside others."""


def open_regular(path: Path | str, at_most: int | None = None) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading bytes.

    Raises:
        InputError: it is missing, may not be read, is a folder, a named pipe, a device or a socket, or has more than
            `at_most` bytes.
    """
    try:
        # Without O_NONBLOCK the opening of a named pipe waits for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{printable(path)} cannot be opened ({reason})") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = next((word for is_kind, word in _KINDS.items() if is_kind(status.st_mode)), "something else")
        raise InputError(f"{printable(path)} is {kind}, not a file: give a file")
    if at_most is not None and status.st_size > at_most:
        os.close(descriptor)
        raise InputError(
            f"{printable(path)} has {status.st_size:,} bytes, at most {at_most:,} are read: is it the right file?"
        )
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path | str, at_most: int | None = None) -> bytes:
    """The bytes of a regular file; InputError as `open_regular`."""
    with open_regular(path, at_most) as file:
        return file.read(-1 if at_most is None else at_most)


def open_text(path: Path | str, at_most: int | None = None) -> io.TextIOWrapper:
    """Open a regular file of UTF-8 text, with its ends of lines as they are; InputError as `open_regular`.

    A byte that is not UTF-8 comes back as half a character, of which `broken_character` tells.
    """
    return io.TextIOWrapper(open_regular(path, at_most), encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_lines(file: io.BufferedIOBase, path: Path | str) -> Iterator[bytes]:
    """The lines of an open file, each with its end; InputError for one of more than MAX_LINE_BYTES."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{printable(path)} has a line of more than {MAX_LINE_BYTES:,} bytes: is it a text file?")
        yield line
