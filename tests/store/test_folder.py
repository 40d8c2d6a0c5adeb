"""Whose a folder is, and who works in it."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import spin_diffusion
from spin_diffusion.store.folder import check_folder, release, take_folder, take_marked
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import MARKER, write_file, write_folder

PROGRAM = "evaluation"


def left_alone(folder: Path, words: str, program: str = PROGRAM) -> None:
    """The folder is refused in a line, and every byte of it stays."""

    def state() -> dict[Path, object]:
        return {
            path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.parent.rglob("*")
        }

    before = state()
    for refuse in (check_folder, take_folder):
        with pytest.raises(InputError, match=words) as raised:
            refuse(folder, program)
        assert "\n" not in str(raised.value)
    assert state() == before


@pytest.mark.parametrize("there", [[], [".DS_Store", ".gitkeep", "lost+found", ".nfs0001"]])
def test_an_absent_or_empty_folder_is_taken_and_is_this_programs_from_then_on(tmp_path, there):
    folder = tmp_path / "deep" / "out"
    if there:
        folder.mkdir(parents=True)
        for name in there:
            (folder / name).touch()
    assert not check_folder(folder, PROGRAM) and folder.exists() == bool(there)
    take_folder(folder, PROGRAM)
    assert json.loads((folder / MARKER).read_text()) == {"program": PROGRAM, "format": 1}
    assert sorted(path.name for path in folder.iterdir()) == sorted([*there, MARKER])
    (folder / "mine").touch()
    assert check_folder(folder, PROGRAM)
    take_folder(folder, PROGRAM)


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "data/x", "base/x", "plan.json", ".git/HEAD", ".env"])
def test_somebodys_folder_is_left_alone(tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    left_alone(tmp_path / "out", "out is not empty and has no .spin-diffusion.json: it is somebody")


def test_a_new_folder_inside_one_of_ours_is_refused_unless_this_process_works_there(tmp_path):
    take_folder(tmp_path / "run", "image training")
    take_folder(tmp_path / "run" / "cell", PROGRAM)
    release(tmp_path / "run")
    (tmp_path / "run" / "round-1").mkdir()
    left_alone(tmp_path / "run" / "round-1" / "mine", r"mine lies in .*/run, .*: give one outside of it")
    left_alone(tmp_path / "run" / "round-1", r"round-1 lies in .*/run,")
    assert check_folder(tmp_path / "run" / "cell", PROGRAM)  # it was made before
    take_folder(tmp_path / "run" / "other", PROGRAM, inside=True)
    release(tmp_path / "run" / "cell")
    release(tmp_path / "run" / "other")


def test_a_folder_of_another_program_or_format_is_left_alone(tmp_path):
    take_folder(tmp_path / "out", "comparison")
    (tmp_path / "out" / "results.json").touch()
    left_alone(tmp_path / "out", f"out is not this program's folder .{MARKER} says comparison, not evaluation.")
    (tmp_path / "out" / MARKER).write_text(json.dumps({"program": PROGRAM, "format": 2}))
    left_alone(tmp_path / "out", "is of another version of this program .format 2, this one has 1.")


@pytest.mark.parametrize("said", ["", "{", "[]", "null", "{}", '{"program": ["evaluation"]}', "\0\1", "{" * 5000])
def test_a_damaged_marker_makes_no_folder_of_ours(tmp_path, said):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text(said)
    (tmp_path / "out" / "mine").write_text("mine")
    left_alone(tmp_path / "out", "out is not this program's folder")


def test_a_folder_that_its_user_emptied_is_any_programs_again(tmp_path):
    take_folder(tmp_path / "out", "comparison")
    release(tmp_path / "out")
    assert not check_folder(tmp_path / "out", PROGRAM)
    take_folder(tmp_path / "out", PROGRAM)
    assert json.loads((tmp_path / "out" / MARKER).read_text())["program"] == PROGRAM


@pytest.mark.parametrize("said", ["", '{"prog'])
def test_a_command_killed_while_it_took_a_folder_takes_it_again(tmp_path, said):
    (tmp_path / MARKER).write_text(said)
    take_folder(tmp_path, PROGRAM)
    assert check_folder(tmp_path, PROGRAM)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe", "link to nowhere"])
def test_a_marker_that_is_no_file_is_refused_without_waiting(tmp_path, kind):
    marker = tmp_path / "out" / MARKER
    marker.parent.mkdir()
    if kind == "folder":
        marker.mkdir()
    elif kind == "pipe":
        os.mkfifo(marker)
    else:
        os.mkfifo(tmp_path / "pipe")
        marker.symlink_to(tmp_path / ("pipe" if kind == "link to a pipe" else "nowhere"))
    with pytest.raises(InputError, match=MARKER):
        take_folder(marker.parent, PROGRAM)


def test_what_cannot_be_a_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "link", tmp_path / ("x" * 300),
                 tmp_path / "a\0b", tmp_path / "\udce9" / ("x" * 300)):  # fmt: skip
        with pytest.raises(InputError, match="--here .*: give") as raised:
            take_folder(path, PROGRAM, "--here")
        str(raised.value).encode()


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO])
def test_a_folder_that_may_not_be_written_is_said(tmp_path, monkeypatch, reason):
    def denied(*args, **kwargs):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InputError, match=f"cannot be made or written .{os.strerror(reason)}.: give another"):
        take_folder(tmp_path / "out", PROGRAM)


# One command at a time


def take_elsewhere(folder: Path, wait: bool = False, program: str = PROGRAM) -> subprocess.Popen:
    """Another process that takes the folder, says so, and holds it until its input ends."""
    command = (
        "import sys; from pathlib import Path; from spin_diffusion.store.folder import take_folder\n"
        f"take_folder(Path({str(folder)!r}), {program!r}, wait={wait})\n"
        "print('taken', flush=True); sys.stdin.read()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_command_is_refused_or_waits_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "out"
    take_folder(folder, PROGRAM)
    take_folder(tmp_path / "out" / ".." / "out", PROGRAM)  # it is this process's own
    refused = take_elsewhere(folder)
    assert "another command works in" in refused.communicate()[1] and refused.returncode == 1
    waiting = take_elsewhere(folder, wait=True)
    release(folder)
    assert waiting.stdout.readline() == "taken\n"
    with pytest.raises(InputError, match="another command works in .*out: wait for its end, or give another --output"):
        take_folder(folder, PROGRAM)
    waiting.kill()
    waiting.wait()
    take_folder(folder, PROGRAM)


def test_a_folder_whose_marker_was_deleted_is_nobodys(tmp_path):
    folder = tmp_path / "out"
    take_folder(folder, PROGRAM)
    (folder / "results.json").write_text("")
    (folder / MARKER).unlink()
    left_alone(folder, "is not empty")
    shutil.rmtree(folder)
    take_folder(folder, PROGRAM)  # the lock that this process has is of the folder that is gone
    refused = take_elsewhere(folder)
    assert "another command works in" in refused.communicate()[1]


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL])
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys, reason):
    def lockless(descriptor, operation):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", lockless)
    take_folder(tmp_path / "out", PROGRAM)
    take_folder(tmp_path / "out", PROGRAM)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].endswith("do not start the command twice") and "has no locks" in said[0]
    assert check_folder(tmp_path / "out", PROGRAM)


def test_a_folder_of_any_program_can_be_taken_by_its_marker(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine is not a folder of this program .*: give --output"):
        take_marked(tmp_path / "mine", "--output")
    take_folder(tmp_path / "out", PROGRAM)
    release(tmp_path / "out")
    take_marked(tmp_path / "out", "--output")
    assert "another command works in" in take_elsewhere(tmp_path / "out").communicate()[1]


def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path):
    """pyarrow, safetensors and the libraries' configurations take no such name."""
    with pytest.raises(InputError, match=r"--output_dir .*caf\\udce9 is not UTF-8") as caught:
        check_folder(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), "image training")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("deleted", [False, True])
def test_nothing_is_made_where_a_folder_was_moved_away_from(tmp_path, deleted):
    run = tmp_path / "run"
    take_folder(run, "training")
    write_file(run / "round-1" / "a.json", lambda part: part.write_text("{}"))
    os.replace(run, tmp_path / "elsewhere")
    if deleted:
        shutil.rmtree(tmp_path / "elsewhere")
    for write in (write_file, write_folder):
        with pytest.raises(InputError, match="run was moved or deleted while .* put it back"):
            write(run / "round-1" / "b", lambda part: None)
    assert not run.exists()
    release(run)


def test_a_folder_that_was_put_back_is_written_into(tmp_path):
    run = tmp_path / "run"
    take_folder(run, "training")
    os.replace(run, tmp_path / "elsewhere")
    os.replace(tmp_path / "elsewhere", run)
    write_folder(run / "unet", lambda part: (part / "config.json").write_text("{}"))
    assert (run / "unet" / "config.json").is_file()
    release(run)


def test_folders_are_made_in_the_store_alone():
    package = Path(spin_diffusion.__file__).parent
    makers = [path.relative_to(package) for path in package.rglob("*.py") if ".mkdir(" in path.read_text()]
    assert sorted(makers) == [Path("store/folder.py"), Path("store/run_dir.py")]  # with the marker; and all others


def test_a_full_disk_says_which_folder_could_not_be_written(tmp_path):
    def write(part: Path) -> None:
        (part / "config.json").write_text("{}")
        raise RuntimeError("the writer failed") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: .*unet"):
        write_folder(tmp_path / "unet", write)
    assert not list(tmp_path.iterdir())
