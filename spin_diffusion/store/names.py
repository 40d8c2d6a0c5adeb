"""Names that a user or a file gives and that become files or folders: none may lead elsewhere."""

from pathlib import PureWindowsPath

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.text import printable

_SEPARATORS = '/\\:*?"<>|'
_LONGEST = 200
"""Bytes; most file systems take 255, and endings are added."""


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


def folder_inside(name: str, what: str) -> str:
    """`name`, which is a relative path that stays in its folder; InputError when it leads out of it."""
    if not name or name != printable(name) or leads_out(name):
        raise InputError(f"{what} {printable(name)!r} leads out of the folder: give a name, such as logs")
    return name
