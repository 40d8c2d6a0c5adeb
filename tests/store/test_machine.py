"""A full disk and other limits, as each library words them, become the system's number and one line."""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from spin_diffusion.cli.command import run_command
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import in_words, trouble_of, writing


def chained(cause: Exception, by_cause: bool) -> Exception:
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("the writer failed") from (error if by_cause else None)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC), (OSError(errno.EDQUOT, "quota"), errno.EDQUOT),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (pa.ArrowException("[Errno 27] Error writing bytes to file. Detail: [errno 27] File too large"), errno.EFBIG),
        (RuntimeError("write failed: Read-only file system"), errno.EROFS), (MemoryError(), errno.ENOMEM),
        (RuntimeError("unable to open file: Too many open files (os error 24)"), errno.EMFILE),
        (RuntimeError("can't allocate memory: Error code 12 (Cannot allocate memory)"), errno.ENOMEM),
        (FileNotFoundError("No such file or directory: a.safetensors"), errno.ENOENT),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), errno.EISDIR),
        (chained(OSError(errno.ENOSPC, "full"), True), errno.ENOSPC),
        (chained(OSError(errno.EIO, "broken"), False), errno.EIO),
        # What is handled while nothing is written is not the reason of a defect
        (chained(FileNotFoundError(errno.ENOENT, "none"), False), None), (chained(KeyError("a"), True), None),
        (ValueError("error 28"), None), (AssertionError(), None), (InputError("No space left on device"), None),
        (OSError(errno.EAGAIN, "later"), None),
    ],
)  # fmt: skip
def test_the_number_behind_an_error_is_found(error, number):
    assert trouble_of(error) == number
    if number is not None:
        said = in_words(number, error)
        assert os.strerror(number) in said and said.endswith("then run the same command again") and "\n" not in said


def test_an_error_that_is_its_own_cause_is_no_endless_walk():
    error = RuntimeError("a")
    error.__cause__ = RuntimeError("b")
    error.__cause__.__cause__ = error
    assert trouble_of(error) is None


def test_what_a_failed_write_left_is_removed_and_the_path_is_named(tmp_path):
    part = tmp_path / "folder.spin-part"
    with pytest.raises(OSError, match="No space left") as caught, writing(tmp_path / "folder"):
        part.mkdir()
        (part / "a").write_bytes(bytes(100))
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_defect_stays_what_it_is(tmp_path):
    for error in (KeyError("a"), InputError("no")):
        with pytest.raises(type(error)), writing(tmp_path / "a"):
            (tmp_path / "a.spin-part").write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []


WRITERS = {
    "torch": "torch.save({'a': torch.zeros(10**6)}, folder / 'a.spin-part')",
    "safetensors": "save_file({'a': torch.zeros(10**6)}, folder / 'a.spin-part')",
    "pyarrow": "pq.write_table(pa.table({'a': torch.rand(10**6).numpy()}), folder / 'a.spin-part')",
    "text": "(folder / 'a.spin-part').write_text('a' * 10**7)",
}


def write_by(library: str, folder: Path) -> int:
    """The exit code of a command that writes four megabytes and more."""
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import save_file

    def command(argv):
        with writing(folder / "a"):
            exec(WRITERS[library], {"torch": torch, "pq": pq, "pa": pa, "save_file": save_file, "folder": folder})

    return run_command(command, [])


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may hold more than 200 KiB; Python ignores the signal, and a write fails."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 * 1024, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("library", WRITERS)
def test_a_file_that_is_too_large_is_one_line_whoever_writes_it(library, small_files, tmp_path, capsys):
    assert write_by(library, tmp_path) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("error: File too large (") and "ulimit -f" in said and str(tmp_path / "a") in said
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_one_line_whoever_writes_and_leaves_its_room(library, small_disk, capsys):
    assert write_by(library, small_disk) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("error: No space left on device (") and "make room" in said
    assert list(small_disk.iterdir()) == []
