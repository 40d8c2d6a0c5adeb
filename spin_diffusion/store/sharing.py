"""Work that all processes share out among them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator

T = TypeVar("T")
_CALLS = itertools.count()


def shared_out(things: Sequence[T], accelerator: Accelerator) -> Iterator[T]:
    """The things that fall to this process: whoever is free takes the next one, so that none waits for a slow one.

    All processes must call it with the same things, and in the same order as other calls of it.
    """
    name = f"spin_diffusion/shared_out/{next(_CALLS)}"
    if accelerator.num_processes == 1:
        yield from things
        return
    # torch has no public name for the store through which its processes found each other
    store = torch.distributed.distributed_c10d._get_default_store()
    while (place := store.add(name, 1) - 1) < len(things):
        yield things[place]
