"""Strings that come from a disk: file names need not be UTF-8, and JSON can hold half a character."""


def printable(text: object) -> str:
    """`str(text)` as UTF-8 can encode it: bytes that are not UTF-8 in a file name, and halves of a surrogate pair,
    become escapes such as \\udce9, and control characters (which move a terminal's cursor) become escapes too."""
    encodable = str(text).encode("utf-8", errors="backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in encodable)


def broken_character(text: str) -> int | None:
    """The place of the first character, from 1, that is half of one or stands for a byte that is not UTF-8; None = the
    text is whole. No tokenizer, parquet file or page takes such a text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start + 1
    return None
