"""Real samples that many processes prepare: the same bytes as by one, none of which two of them read."""

import json

from tests.ranks import run_ranks

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from spin_diffusion.samples.real import prepare
from tests.ranks import count_bytes_hashed

class Encoder:
    def encode(self, rows):
        return {"length": torch.tensor([len(row["image"]) for row in rows])}

    def encoder_hash(self):
        return "an encoder"

read = count_bytes_hashed()
accelerator, folder = Accelerator(cpu=True), Path(sys.argv[1])
rows = [{"id": str(i), "prompt": f"fox {i}", "image": bytes([i]) * 50 * i} for i in range(40)]
for again in (False, True):
    manifest = prepare(folder, lambda: iter(rows), {}, 4, Encoder(), accelerator)
accelerator.wait_for_everyone()
Path(f"{sys.argv[1]}-{accelerator.process_index}.json").write_text(json.dumps({"read": read, "of": manifest}))
"""


def test_eight_processes_leave_what_one_does_and_read_no_byte_more(tmp_path):
    program, said = tmp_path / "program.py", {}
    program.write_text(PROGRAM)
    for processes in (1, 8):
        run_ranks(program, [str(tmp_path / str(processes))], processes, timeout_s=120)
        ranks = range(processes)
        said[processes] = [json.loads((tmp_path / f"{processes}-{rank}.json").read_text()) for rank in ranks]
    (alone,) = said[1]
    assert all(rank["of"] == alone["of"] for rank in said[8]) and len(alone["of"]["files"]) == 20
    read = [sum(rank["read"]) for rank in said[8]]
    assert sum(read) == sum(alone["read"]) > 0 and max(read) < sum(read)
