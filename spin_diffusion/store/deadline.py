"""A limit of time and memory on Python code that somebody else wrote, such as a chat template.

A signal reaches the main thread alone, and a thread cannot be ended from outside. So the code is traced: it looks at
the clock of its thread itself, in any thread of any process. What it cannot leave is one call into C that never
returns; in a template that would be a power, which is refused.
"""

import functools
import resource
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import jinja2

from spin_diffusion.store.input_error import InputError

T = TypeVar("T")
TEMPLATE_SECONDS, TEMPLATE_GIB = 10.0, 2.0
"""What one conversation may take to be written."""
_REMEDY = "give another (--chat_template, or in the tokenizer)"
_KIB = 1 if sys.platform != "darwin" else 1 / 1024
"""KiB in the unit in which the system tells the memory of a process."""
_SOON = 0.02
"""Seconds."""


class Unending(Exception):
    """It took more time or memory than it may; the message says which."""


def run_within(seconds: float, gib: float, inside: str, run: Callable[[], T]) -> T:
    """What `run()` returns.

    Args:
        seconds: how long it may compute; what it waits while a machine is busy with other things counts nothing.
        gib: how much more memory than before the process may need meanwhile.
        inside: code of files of this name is looked at line by line, all other at its calls.

    Raises:
        Unending: it took more. What `run` raises passes.
    """
    began, most = time.thread_time(), _peak_gib() + gib

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        took = time.thread_time() - began
        if took > seconds:
            raise Unending(f"it takes more than {seconds:g} s")
        # Not much is filled before, and most is done by then
        if took > _SOON and _peak_gib() > most:
            raise Unending(f"it takes more than {gib:g} GiB of memory")
        return look if frame.f_code.co_filename == inside else None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        return run()
    finally:
        sys.settrace(before)


def fill_template(template: str, fill: Callable[[], str]) -> str:
    """What `fill()` returns, which fills this chat template once.

    Raises:
        InputError: it does not end. What the template raises passes.
    """
    if _has_powers(template):
        raise InputError(f"the chat template takes a number to a power (**), which may not end: {_REMEDY}")
    try:
        return run_within(TEMPLATE_SECONDS, TEMPLATE_GIB, "<template>", fill)
    except Unending as error:
        raise InputError(f"the chat template does not end ({error}): {_REMEDY}") from error


@functools.lru_cache(maxsize=16)
def _has_powers(template: str) -> bool:
    """Whether a template has the one operator of Jinja that can compute for hours within a single call into C: `**`."""
    try:
        return any(kind == "operator" and word == "**" for _, kind, word in jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:  # whoever fills it says where
        return False


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / 2**20
