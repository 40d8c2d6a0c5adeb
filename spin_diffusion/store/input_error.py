"""What comes from outside and cannot be used: the error that says so in one line, and how strings, names and files that
somebody else wrote are taken.

File names need not be UTF-8, and JSON can hold half a character. A name may lead out of its folder. A FIFO or a device
in the place of a file would be waited for, or read, for ever; a file of many gigabytes in the place of a small one
would fill the memory. All are refused before a byte is read.
"""

import difflib
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where, and what would be right, in one line."""


# Strings


def printable(text: object) -> str:
    """`str(text)` as UTF-8 can encode it: bytes that are not UTF-8 in a file name, and halves of a surrogate pair,
    become escapes such as \\udce9, and control characters (which move a terminal's cursor) become escapes too."""
    encodable = str(text).encode("utf-8", errors="backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in encodable)


def one_line(error: object) -> str:
    """The message of another library's error on one line, at most 300 characters; its type, if it has none."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def broken_character(text: str) -> int | None:
    """The place of the first character, from 1, that is half of one or stands for a byte that is not UTF-8; None = the
    text is whole. No tokenizer, parquet file or page takes such a text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start + 1
    return None


def nearest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean ...?", or all that are known."""
    return did_you_mean(name, known) or f" (known: {', '.join(sorted(known))})"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """ ", did you mean ...?", or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else ""


# Names that become files or folders

_SEPARATORS = '/\\:*?"<>|'
_LONGEST = 200
"""Bytes; most file systems take 255, and endings are added."""


def is_local(name: str) -> bool:
    """Whether a name is of something on this disk: it is there, or cannot be a hub id (NAME or OWNER/NAME)."""
    return Path(name).exists() or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None


def leads_out(name: str) -> bool:
    """Whether a relative path leads out of the folder that it is relative to, on any system; by the name alone."""
    as_windows = PureWindowsPath(name)  # splits at both kinds of slash
    return bool(as_windows.anchor) or ".." in as_windows.parts or "\0" in name


def file_name(name: str, what: str) -> str:
    """`name`, which is that of one file or folder on every system.

    Args:
        what: for the message: "--models base", with the flag that the name was given by.

    Raises:
        InputError: an empty or a hidden name, one with a separator or a control character, or one that is too long.
    """
    if (
        not name
        or name != name.strip()
        or name.startswith(".")
        or name != printable(name)
        or any(character in _SEPARATORS for character in name)
        or len(name.encode()) > _LONGEST
    ):
        shown = printable(name) if len(name) <= 80 else f"{printable(name)[:77]}..."
        raise InputError(f"{what} {shown!r}: the name becomes a file's, use letters, digits, - and _")
    return name


# Files

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
