"""Work shared out among processes and threads: everything once, and nobody waits for a slow one."""

import json
import re
import socket
import threading

import pytest
from accelerate import Accelerator

from spin_diffusion.store import sharing
from spin_diffusion.store.sharing import done_ahead, shared_out
from tests.ranks import run_ranks

PROGRAM = """
import json, sys, time
from accelerate import Accelerator
from spin_diffusion.store.sharing import shared_out

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
taken = []
for things in (list(range(20)), list("ab")):  # a second call starts anew
    taken.append([])
    for thing in shared_out(things, accelerator):
        taken[-1].append(thing)
        time.sleep(0.5 if accelerator.process_index == 0 else 0.01)
    accelerator.wait_for_everyone()
open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w").write(json.dumps(taken))
"""


def test_a_process_alone_takes_everything_in_order():
    assert list(shared_out("abc", Accelerator(cpu=True))) == ["a", "b", "c"]


def test_everything_is_taken_once_and_the_quick_one_takes_more(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run_ranks(tmp_path / "program.py", [str(tmp_path)], 2, timeout_s=120)
    slow, quick = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert sorted(slow[0] + quick[0]) == list(range(20)) and sorted(slow[1] + quick[1]) == ["a", "b"]
    assert len(quick[0]) > len(slow[0])


HASHING = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from spin_diffusion.store.hashes import file_hashes, find_damage
from tests.ranks import count_bytes_hashed

read = count_bytes_hashed()
accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
hashes = file_hashes([folder / "files"], folder, accelerator)
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    (folder / "files" / "3").write_text("another")
    (folder / "files" / "5").unlink()
accelerator.wait_for_everyone()
damage = find_damage(hashes, folder, accelerator)
said = json.dumps({"hashes": hashes, "damage": damage, "read": read})
(folder / f"said-{accelerator.num_processes}-{accelerator.process_index}.json").write_text(said)
"""


def test_eight_processes_hash_each_byte_once_and_all_know_every_hash(tmp_path):
    said = {}
    for processes in (1, 8):
        (tmp_path / "files").mkdir(exist_ok=True)
        for number in range(20):
            (tmp_path / "files" / str(number)).write_bytes(bytes([number]) * 1000 * number)
        (tmp_path / "program.py").write_text(HASHING)
        run_ranks(tmp_path / "program.py", [str(tmp_path)], processes, timeout_s=120)
        ranks = range(processes)
        said[processes] = [json.loads((tmp_path / f"said-{processes}-{rank}.json").read_text()) for rank in ranks]
    (alone,) = said[1]
    recorded = alone["hashes"]["files/3"][:12]
    assert alone["damage"] == {
        "files/3": f"its SHA-256 is not the recorded {recorded}...",
        "files/5": "it is missing",
    }
    for rank in said[8]:
        assert rank["hashes"] == alone["hashes"] and rank["damage"] == alone["damage"]
        assert list(rank["hashes"]) == list(alone["hashes"])
    # All that there is; then all but the file that is gone, and another in the place of one
    assert sum(sum(rank["read"]) for rank in said[8]) == sum(alone["read"]) == 2 * 190_000 - 5000 - 3000 + 7


WAITING = """
import time
import torch
from spin_diffusion.runs.start import make_accelerator
from spin_diffusion.store import sharing

sharing.QUIET_S = 0.4
accelerator = make_accelerator("no")
group = torch.distributed.distributed_c10d._get_default_group()
assert group._get_backend(torch.device("cpu")).options._timeout == sharing.TIME_OUT

def work(thing):
    time.sleep(3 if accelerator.process_index == late else 1)  # long enough for each to have taken one
    return thing

for late in (1, 0):
    accelerator.wait_for_everyone()
    things = [f"{name} for {late}" for name in ("one", "two")]
    assert sharing.done_together(work, things, accelerator) == things
"""


def test_one_of_those_that_wait_says_which_process_is_late_and_at_what(tmp_path):
    (tmp_path / "program.py").write_text(WAITING)
    said = run_ranks(tmp_path / "program.py", [], 2, timeout_s=120)
    for late in (1, 0):
        line = (
            rf"Waiting for process {late} of 2 on {re.escape(socket.gethostname())}: for \d s at (one|two) for {late}"
        )
        assert len(found := re.findall(line, said)) >= 2 and len(set(found)) == 1, said
    assert said.count("Waiting for") <= 12  # one of two says it, and not before it has waited


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(sharing, "_cores", lambda: 4)


def test_threads_work_at_once_and_results_come_in_order(four_cores):
    together = threading.Barrier(4, timeout=30)  # nobody gets past it alone

    def do(number: int) -> int:
        together.wait()
        return 10 * number

    assert list(done_ahead(do, range(12))) == list(range(0, 120, 10))


def test_no_more_is_taken_ahead_than_twice_the_threads(four_cores):
    taken: list[int] = []
    results = done_ahead(str, (taken.append(number) or number for number in range(100)))
    for number in range(5):
        assert next(results) == str(number) and len(taken) == number + 8
    results.close()
    assert len(taken) == 12


@pytest.mark.parametrize("where", ["taking", "doing"])
def test_what_one_raises_comes_in_its_turn(where, four_cores):
    def things():
        yield from (1, 2, 3)
        if where == "taking":
            raise ValueError("3")
        yield 0
        yield from (4, 5)

    results = done_ahead(lambda number: 6 // number, things())
    assert [next(results) for _ in range(3)] == [6, 3, 2]
    with pytest.raises(ValueError if where == "taking" else ZeroDivisionError):
        next(results)
