"""Scripts under a launcher: what is last on the screen, and the exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from spin_diffusion.cli.command import run_command
from spin_diffusion.cli.launch import launch
from spin_diffusion.store.input_error import InputError

ROOT = Path(__file__).parents[2]
ONE = ["--config_file", "training/accelerate/one_cpu.yaml"]
TWO = [
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


def launched(*argv: str) -> subprocess.Popen[str]:
    """The launcher in a session of its own, as on a terminal."""
    command = [sys.executable, "-m", "spin_diffusion.cli.launch", *argv]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    heard = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True, **heard)


@pytest.mark.parametrize(
    "words",
    [
        ["--config_file", "one_cpu", "training/train_spin_sdxl.py"],
        [*TWO, "-m", "spin_diffusion.cli", "train", "sdxl"],
    ],
    ids=["one", "two"],
)
def test_under_a_launcher_the_one_line_about_an_error_is_the_last_one(words):
    program = launched(*words, "--learnign_rate", "1")
    said, _ = program.communicate(timeout=300)
    assert said.splitlines()[-1].endswith("error: unknown setting 'learnign_rate', did you mean 'learning_rate'?")
    assert program.returncode == 2 and "Traceback" not in said


def test_under_a_launcher_ctrl_c_is_answered_by_the_program_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom spin_diffusion.cli.command import run_command\n"
        f"def wait(argv):\n    open({str(tmp_path / 'waits')!r}, 'w').close()\n    time.sleep(300)\n"
        "sys.exit(run_command(wait))\n"
    )
    program = launched(*ONE, str(script))
    while not (tmp_path / "waits").exists() and program.poll() is None:
        time.sleep(0.1)
    os.killpg(program.pid, signal.SIGINT)
    said, _ = program.communicate(timeout=60)
    assert said.splitlines()[-1].startswith("told to stop (Ctrl-C).")
    assert program.returncode == 130 and "Traceback" not in said


def test_torchruns_own_report_ends_with_the_line(tmp_path, monkeypatch):
    def command(argv):
        raise InputError("there is no such file")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run_command(command, []) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "error: there is no such file"


def test_the_process_that_failed_decides_over_those_that_were_stopped_for_it(monkeypatch, tmp_path, capsys):
    """Whichever torchrun saw first: the exit code and the last line are those of the cause."""
    reply = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(reply))

    def command(argv):
        raise InputError("there is no such file")

    assert run_command(command, []) == 2
    stopped = ProcessFailure(local_rank=1, pid=2, exitcode=143, error_file="<N/A>")
    failed = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(reply))

    def launch_command(given):
        raise ChildFailedError("program", {1: stopped, 0: failed})

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C stays with the tests
    capsys.readouterr()
    assert launch([*ONE, "script.py"]) == 2
    assert capsys.readouterr().err == "error: there is no such file\n"
