"""Strings that come from a disk: file names need not be UTF-8, and JSON can hold half a character."""

import difflib
from collections.abc import Sequence


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
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(sorted(known))})"
