"""Work shared out among the processes of a run, or the threads of one: each piece is done once, by whoever is free.

What comes of it must not depend on who does what: a piece is done whole by one process, and results are in the order of
the pieces.
"""

import itertools
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from spin_diffusion.store.progress import span, tell

T = TypeVar("T")
Result = TypeVar("Result")
TIME_OUT = timedelta(hours=24)
"""How long a process waits for another one: the main one may read a large data set while the others wait. Of one that
died the launcher knows at once, and ends the others."""
QUIET_S = 600.0
"""How long it waits without a word."""

_calls = itertools.count()


def shared_out(things: Sequence[T], accelerator: Accelerator) -> Iterator[T]:
    """The things that fall to this process: whoever is free takes the next one, so that none waits for a slow one.

    All processes must call it with the same things, and in the same order as other calls of it.
    """
    name = f"spin_diffusion/shared_out/{next(_calls)}"
    if accelerator.num_processes == 1:
        yield from things
        return
    while (place := _store().add(name, 1) - 1) < len(things):
        yield things[place]


def _store() -> Any:
    # torch has no public name for the store through which its processes found each other
    return torch.distributed.distributed_c10d._get_default_store()


def done_together(
    do: Callable[[T], Result], things: Sequence[T], accelerator: Accelerator | None = None
) -> list[Result]:
    """`do` of each thing, in their order, on every process.

    Args:
        do: what it returns can be sent to the other processes.
        things: the same on all processes.
        accelerator: whose processes share the things out, each of which one of them does; None = this process alone.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return [do(thing) for thing in things]
    mine = []
    for place in shared_out(range(len(things)), accelerator):
        works_on(str(things[place]), accelerator)
        mine.append((place, do(things[place])))
    with waiting(accelerator):
        gathered = gather_object(mine)
    done: list[Any] = [result for _, result in sorted(gathered, key=lambda pair: pair[0])]
    assert len(done) == len(things), f"{len(done)} of {len(things)}: the processes were given different things"
    return done


# Whom the others wait for


def works_on(what: str, accelerator: Accelerator) -> None:
    """Let the other processes know what this one works on, should they have to wait for it."""
    if accelerator.num_processes > 1 and torch.distributed.is_initialized():
        at = {"host": socket.gethostname(), "what": what, "since": time.time()}
        _store().set(_at(accelerator.process_index), json.dumps(at))


def _at(process: int) -> str:
    return f"spin_diffusion/at/{process}"


@contextmanager
def waiting(accelerator: Accelerator) -> Iterator[None]:
    """Around a wait for the other processes. Where it takes long, one of those that wait says who is late, and at what:
    that one may be slow, or hang."""
    if accelerator.num_processes == 1 or not torch.distributed.is_initialized():
        yield
        return
    works_on("", accelerator)
    began, over = time.perf_counter(), threading.Event()

    def watch() -> None:
        while not over.wait(QUIET_S):
            _tell_who_is_late(accelerator)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _Waited.seconds += time.perf_counter() - began


class _Waited:
    seconds = 0.0


def waited_s() -> float:
    """Seconds that this process has waited for others so far."""
    return _Waited.seconds


def _tell_who_is_late(accelerator: Accelerator) -> None:
    store, number = _store(), accelerator.num_processes
    known = [process for process in range(number) if store.check([_at(process)])]
    at = {process: json.loads(store.get(_at(process))) for process in known}
    late = {process: said for process, said in at.items() if said["what"]}
    if accelerator.process_index == min(set(range(number)) - set(late), default=None):
        for process, said in late.items():
            took = span(time.time() - said["since"])
            tell(f"Waiting for process {process} of {number} on {said['host']}: for {took} at {said['what']}")


# Threads


MOST_THREADS = 32


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def done_ahead(do: Callable[[T], Result], things: Iterable[T]) -> Iterator[Result]:
    """`do` of each thing, in their order, while threads on all cores that this process may use work on the next ones.

    Args:
        do: of which most is done outside of Python, as what reads, resizes and writes pictures.
        things: taken by the calling thread, twice as many ahead as there are threads. What taking or doing one raises
            is raised in its turn.
    """
    threads = min(_cores(), MOST_THREADS)
    pool, waiting, failed = ThreadPoolExecutor(threads), deque[Future[Result]](), None
    taking = iter(things)
    try:
        while failed is None or waiting:
            while failed is None and len(waiting) < 2 * threads:
                try:
                    waiting.append(pool.submit(do, next(taking)))
                except Exception as error:  # StopIteration among them
                    failed = error
            if waiting:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if not isinstance(failed, StopIteration):
        raise failed
