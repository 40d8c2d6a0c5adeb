"""How far a phase of a round is, with the time it will still take."""

import re
import shutil
import sys
import textwrap
import weakref
from collections.abc import Callable
from typing import Protocol, TextIO

from tqdm.auto import tqdm


class Progress:
    """Says how far a phase is. This one says nothing."""

    def phase(self, name: str, total: int) -> Callable[[int, str], None]:
        """A function (done, text) for a phase of `total` steps."""

        def ignore(done: int, text: str = "") -> None:
            pass

        return ignore


class Bars(Progress):
    """One bar per phase on a terminal; a line every 15 s where the output is a file."""

    def __init__(self) -> None:
        self._last: Callable[[], None] = lambda: None

    def phase(self, name: str, total: int) -> Callable[[int, str], None]:
        """A bar of `total` steps (0 = unknown), closed when its last step is done, or the next phase begins."""
        self._last()
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=total or None,
            desc=name,
            unit="",
            mininterval=0.1 if terminal else 15.0,
            ascii=not terminal,
            dynamic_ncols=terminal,
            leave=True,
        )
        _open.add(bar)

        def update(done: int, text: str = "") -> None:
            if text and total:  # a bar and a rate beside it would not fit in 80 columns
                bar.bar_format = "{desc} {n_fmt}/{total_fmt} <{remaining} " + text
            if not total or done < total:
                bar.update(done - bar.n)
            elif not bar.disable:
                bar.n = total  # closing it shows that, once, with the mean rate
                bar.close()

        # Of work that several processes share, the one with the bar only guesses how much the others have done
        self._last = lambda: None if bar.disable else update(total or bar.n)
        return update


_open: weakref.WeakSet[tqdm] = weakref.WeakSet()


def in_bar(value: float) -> str:
    """A number with its sign, in seven characters as a rule."""
    if value == 0 or abs(value) >= 0.1:
        return f"{value:+.2f}"
    digits, power = f"{value:+.1e}".split("e")
    return f"{digits}e{int(power)}"


def span(seconds: float) -> str:
    """A time for people, to two or three digits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _Process(Protocol):
    @property
    def is_main_process(self) -> bool: ...


def tell(text: str, by: _Process | None = None) -> None:
    """Print lines of their own while bars are open, which stay; on a terminal no line is wider than it.

    Args:
        by: whose main process alone prints; None = whoever calls.
    """
    if by is not None and not by.is_main_process:
        return
    tqdm.write(fitted(text, sys.stdout), file=sys.stdout)
    sys.stdout.flush()


def fitted(text: str, to: TextIO) -> str:
    """The text in lines that are no wider than the terminal, if it goes `to` one."""
    if not to.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(_wrapped(line, width) for line in text.splitlines())


def _wrapped(line: str, width: int) -> str:
    """A line in several, those after the first indented: to where its text begins behind a name or spaces."""
    begins = re.match(r"\S+ {2,}| +", line)
    indent = " " * (begins.end() if begins else 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def end_bars() -> None:
    """End the lines of the bars that are open, so that what is said next has its own."""
    for bar in list(_open):
        bar.close()
    _open.clear()
