"""Work shared out among the processes of a run, or the threads of one: each piece is done once, by whoever is free.

What comes of it must not depend on who does what: a piece is done whole by one process, and results are in the order of
the pieces.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

T = TypeVar("T")
Result = TypeVar("Result")

_calls = itertools.count()


def shared_out(things: Sequence[T], accelerator: Accelerator) -> Iterator[T]:
    """The things that fall to this process: whoever is free takes the next one, so that none waits for a slow one.

    All processes must call it with the same things, and in the same order as other calls of it.
    """
    name = f"spin_diffusion/shared_out/{next(_calls)}"
    if accelerator.num_processes == 1:
        yield from things
        return
    # torch has no public name for the store through which its processes found each other
    store = torch.distributed.distributed_c10d._get_default_store()
    while (place := store.add(name, 1) - 1) < len(things):
        yield things[place]


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
    mine = [(place, do(things[place])) for place in shared_out(range(len(things)), accelerator)]
    done: list[Any] = [result for _, result in sorted(gather_object(mine), key=lambda pair: pair[0])]
    assert len(done) == len(things), f"{len(done)} of {len(things)}: the processes were given different things"
    return done


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
