"""The processes of one job, forked from a process that has imported everything once.

To import torch, diffusers and transformers takes ten times longer than what a test then does with them, and `torchrun`
imports torch for itself as well. What else a launcher does (one hash seed for each process, telling the others when one
has died) the tests need that start a real one: `tests/test_processes.py` has `start` for it.
"""

import hashlib
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path

from torch.distributed import TCPStore

from tests import quick

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    # `command` first: it says how loud transformers is, which that reads when it is imported
    ["spin_diffusion.cli.command", "spin_diffusion.runs.image_run", "spin_diffusion.runs.language_run"]
)


def run_ranks(
    script: Path,
    argv: Sequence[str],
    processes: int = 1,
    timeout_s: float = 300,
    alone: bool | None = None,
) -> str:
    """Run `script` as `__main__` in so many processes at once, and return what they printed.

    Args:
        processes: 1 = by itself, without any launcher, unless `alone` is False.

    Raises:
        AssertionError: a process failed or took too long, with what was complained of.
    """
    alone = processes == 1 if alone is None else alone
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    # Lives here until all are done, as torchrun's does, so that none of them has to wait for the others at the end
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if not alone:
        environment |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as written:
        ranks, waiting = [], []
        try:
            for rank in range(processes):
                own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if not alone else {})
                arguments = (str(script), list(argv), own, str(Path(written) / str(rank)))
                ranks.append(FORKING.Process(target=_rank, args=arguments))
                ranks[-1].start()
            until = time.monotonic() + timeout_s
            waiting = list(ranks)
            while waiting and not any(rank.exitcode for rank in ranks) and time.monotonic() < until:
                connection.wait([rank.sentinel for rank in waiting], timeout=max(0, until - time.monotonic()))
                waiting = [rank for rank in waiting if rank.exitcode is None]
        finally:  # also where the test itself is ended
            for rank in ranks:
                rank.kill()
                rank.join()
        said, complained = (
            "".join(path.read_text() for path in sorted(Path(written).glob(f"*.{stream}"))) for stream in ("out", "err")
        )
    assert not waiting and not any(rank.exitcode for rank in ranks), complained[-6000:]
    return said


def _rank(script: str, argv: list[str], environment: dict[str, str], written: str) -> None:
    quick.leave_out()
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        with open(f"{written}.{name}", "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


def count_bytes_hashed() -> list[int]:
    """Asked for by a script: the sizes of the files that its process hashes from now on."""
    plain, read = hashlib.file_digest, []

    def counting(file, name):
        read.append(Path(file.name).stat().st_size)
        return plain(file, name)

    hashlib.file_digest = counting
    return read
