"""Work shared out among processes: everything once, and nobody waits for a slow one."""

import json

from accelerate import Accelerator

from spin_diffusion.store.files import shared_out
from tests.ranks import run_ranks

PROGRAM = """
import json, sys, time
from accelerate import Accelerator
from spin_diffusion.store.files import shared_out

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
