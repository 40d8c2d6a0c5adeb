"""The forked processes of a job: what each is told, and that one that fails ends the job and is heard."""

import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks

PROGRAM = """
import os, sys, time
import torch
rank = int(os.environ.get("RANK", "-1"))
if sys.argv[1] == "meets":
    torch.distributed.init_process_group("gloo")
    found = torch.tensor(10 ** rank)
    torch.distributed.all_reduce(found)
    print(f"rank {rank} of {torch.distributed.get_world_size()} found {found.item()}")
elif sys.argv[1] == "alone":
    print(rank, "WORLD_SIZE" in os.environ)
elif sys.argv[1] == "fails" and rank != 0:
    sys.exit(f"rank {rank} has had enough")
else:
    time.sleep(200)
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_each_knows_its_place_and_they_meet(program):
    said = run_ranks(program, ["meets"], 2)
    assert said.splitlines() == [f"rank {rank} of 2 found 11" for rank in range(2)]


def test_a_process_alone_is_told_of_no_others(program):
    assert run_ranks(program, ["alone"]) == "-1 False\n"


@pytest.mark.parametrize(("processes", "rank"), [(1, -1), (2, 1)])
def test_one_that_fails_ends_the_job_with_its_words(processes, rank, program):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=f"rank {rank} has had enough"):
        run_ranks(program, ["fails"], processes)
    assert time.monotonic() - began < 150


def test_what_takes_too_long_is_ended(program):
    with pytest.raises(AssertionError):
        run_ranks(program, ["sleeps"], 2, timeout_s=1)
