"""The one opener of files that somebody else may have written or replaced.

A FIFO or a device in the place of a file would be waited for, or read, for ever; a file of many gigabytes in the place
of a small one would fill the memory. Both are refused before a byte is read.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from spin_diffusion.input_error import InputError
from spin_diffusion.store.text import printable

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Raises:
        InputError: it is missing, may not be read, or is a folder, a named pipe, a device or a socket.
    """
    try:
        # Without O_NONBLOCK the opening of a named pipe waits for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{printable(path)} cannot be opened ({reason})") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((word for is_kind, word in _KINDS.items() if is_kind(mode)), "something else")
        raise InputError(f"{printable(path)} is {kind}, not a file: give a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path | str, at_most: int | None = None) -> bytes:
    """The bytes of a regular file; InputError where `open_regular` raises it, or when there are more than `at_most`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if at_most is not None and size > at_most:
            raise InputError(
                f"{printable(path)} has {size:,} bytes, at most {at_most:,} are read: is it the right file?"
            )
        return file.read()
