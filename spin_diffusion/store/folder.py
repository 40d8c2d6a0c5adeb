"""Whose a folder is: a marker file names the program that writes there, and its lock keeps a second command out.

A folder without the marker is somebody else's, and nothing in it is ever written, replaced or removed. The marker is
written first, into a folder that is absent or empty, and it is never removed: whoever deletes it takes the folder back.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spin_diffusion.store.input_error import InputError, broken_character, printable, read_bytes
from spin_diffusion.store.run_dir import MARKER, held, is_file_at

Marker = dict[str, object]
"""`program`, what writes into the folder, and `format`."""
FORMAT = 1
"""Version of what the marker says and of the files beside it; a folder of another one is refused."""

_OF_NOBODY = {".DS_Store", ".gitignore", ".gitkeep", ".keep", "Thumbs.db", "desktop.ini", "lost+found"}
"""Names that systems leave in an empty folder; they are not touched."""
_unlocked: set[Path] = set()
"""Folders of which was said that they cannot be locked."""


def check_folder(folder: Path, program: str, flag: str = "--output_dir", inside: bool = False) -> bool:
    """Refuse a folder that is not this program's; nothing is written.

    Args:
        program: what writes into it, in words: "image training".
        flag: that the folder was given with.
        inside: whether a new one may lie in a folder of this program at which this process does not work.

    Returns:
        Whether it is this program's already; otherwise it is absent, or there is nothing in it but a marker.

    Raises:
        InputError: it holds something else, is another program's, is no folder, has a name that is not UTF-8, or would
            be new in a folder whose files another command replaces and removes.
    """
    where = f"{flag} {printable(folder)}"
    if broken_character(str(folder.absolute())) is not None:
        raise InputError(f"{where} is not UTF-8, and no weights can be written there: give another name")
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        if folder.is_symlink():
            raise InputError(f"{where} is a link to nowhere: give another") from None
        names = set()
    except NotADirectoryError:
        raise InputError(f"{where} is a file, or below one, and cannot be made: give a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unusable(folder, flag, error) from None
    strangers = {name for name in names - _OF_NOBODY - {MARKER} if not name.startswith(".nfs")}
    if MARKER in names:
        try:
            marker = _read(folder / MARKER)
        except InputError as error:
            raise InputError(f"{where} cannot be known as this program's folder ({error}): give another") from None
        if not strangers and marker != _marker_of(program):
            return False  # emptied by its user; or a command was killed before it had written its marker
        _check_marker(marker, program, where)
        return True
    if strangers:
        raise InputError(
            f"{where} is not empty and has no {MARKER}: it is somebody else's, or of an earlier version, or was copied "
            "without that file: give another"
        )
    above = next((above for above in folder.resolve().parents if (above / MARKER).exists()), None)
    if above is not None and not inside and not _holds(above):
        raise InputError(
            f"{where} lies in {printable(above)}, a folder of this program, and would go when something there is "
            "deleted to be made anew: give one outside of it"
        )
    return False


def _marker_of(program: str) -> Marker:
    return {"program": program, "format": FORMAT}


def _read(path: Path) -> Marker:
    """What a marker says; nothing, if it is damaged."""
    text = read_bytes(path, at_most=10_000)
    try:
        marker = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _check_marker(marker: Marker, program: str, where: str) -> None:
    owner, version = marker.get("program"), marker.get("format")
    if owner != program:
        raise InputError(
            f"{where} is not this program's folder ({MARKER} says {printable(owner)}, not {program}): give another"
        )
    if version != FORMAT:
        raise InputError(
            f"{where} is of another version of this program (format {printable(version)}, this one has {FORMAT}): "
            "go on with that version, or give another"
        )


def take_folder(
    folder: Path, program: str, flag: str = "--output_dir", wait: bool = False, inside: bool = False
) -> None:
    """Make a folder this program's, and keep other commands out of it until this process ends or `release`s it.

    Args:
        wait: for the end of another command that works there, instead of refusing.
        inside: as `check_folder`.

    Raises:
        InputError: as `check_folder`; another command works there; it cannot be written.
    """
    check_folder(folder, program, flag, inside)
    if _holds(folder):
        return
    with _marker(folder, flag) as descriptor:
        locked = _lock(folder, descriptor, flag, wait)
        if not check_folder(folder, program, flag, inside):  # again: only now it is this command's alone
            _write(descriptor, program)
        if locked:
            held[folder.resolve()] = os.dup(descriptor)


def take_marked(folder: Path, flag: str) -> None:
    """Keep other commands out of a folder of this program, whichever of its programs wrote it.

    Args:
        flag: that names another place to write to.

    Raises:
        InputError: as `take_folder`; it has no marker.
    """
    if not (folder / MARKER).is_file():
        raise InputError(
            f"{printable(folder)} is not a folder of this program (it has no {MARKER}), and nothing is written into "
            f"it: give {flag}"
        )
    take_folder(folder, str(_read(folder / MARKER).get("program")), flag)


def release(folder: Path) -> None:
    """Let other commands into a folder again."""
    descriptor = held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _holds(folder: Path) -> bool:
    """Whether this process has the folder, and not one that was deleted and made anew."""
    descriptor = held.get(folder.resolve())
    if descriptor is None:
        return False
    if is_file_at(descriptor, folder / MARKER):
        return True
    release(folder)
    return False


@contextmanager
def _marker(folder: Path, flag: str) -> Iterator[int]:
    """The marker, opened for writing; made if the folder, or it, is not there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / MARKER, flags, 0o666)
    except (OSError, ValueError) as error:
        raise _unusable(folder, flag, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{flag} {printable(folder)}: its {MARKER} is not a file: give another")
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int, flag: str, wait: bool) -> bool:
    """Whether the file system has locks; InputError when another process has this one."""
    busy = InputError(f"another command works in {printable(folder)}: wait for its end, or give another {flag}")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise busy from None
    except OSError as error:
        if folder.resolve() not in _unlocked:
            warning = f"this file system has no locks ({error.strerror}): do not start the command twice"
            print(f"{printable(folder)}: {warning}", flush=True)
        _unlocked.add(folder.resolve())
        return False
    if not is_file_at(descriptor, folder / MARKER):  # deleted since it was opened
        raise busy
    return True


def _write(descriptor: int, program: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(_marker_of(program)) + "\n").encode(), 0)
    os.fsync(descriptor)


def _unusable(folder: Path, flag: str, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return InputError(f"{flag} {printable(folder)} cannot be made or written ({reason}): give another")
