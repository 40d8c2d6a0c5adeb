"""How the page words things: names, numbers with their signs and intervals, verdicts, roles, texts of any length."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from spin_diffusion.evaluation.records import ComparisonEntry, Metric, PartEntry

MAX_LISTED = 400
"""Rows of a table that are shown."""
NAME_CHARACTERS = 48
PROMPT_CHARACTERS = 180
_PASSAGE_CHARACTERS, _PASSAGE_LINES = 900, 24
_FULL_CHARACTERS = 20_000
_T = TypeVar("_T")


@dataclass(frozen=True)
class Text:
    """Text of any length: what is shown at once, and the rest behind it."""

    short: str
    full: str | None
    """None = `short` is all there is."""
    note: str
    """How much there is, where `full` is not None."""


@dataclass(frozen=True)
class State:
    """A verdict or a state in a symbol, a word and a colour: never in the colour alone."""

    word: str
    symbol: str
    tone: str
    """CSS class: good, bad, quiet, warn, drift."""


@dataclass(frozen=True)
class Number:
    """A number and its interval, formatted."""

    value: str
    interval: str


STATES = {
    "improved": State("improved", "\u25b2", "good"),
    "regressed": State("regressed", "\u25bc", "bad"),
    "inconclusive": State("inconclusive", "\u25cb", "quiet"),
    "drift": State("drift", "\u25c6", "drift"),
    "suspect": State("suspect", "!", "warn"),
    "ok": State("ok", "\u2713", "quiet"),
    "warn": State("warning", "!", "warn"),
    "alarm": State("alarm", "!!", "bad"),
    "not run": State("not run", "\u2013", "quiet"),
}


BETTER, WORSE = State("better", "\u25b2", "good"), State("worse", "\u25bc", "bad")
"""The word for a metric whose difference has an interval that excludes 0."""
METRICS: dict[Metric, tuple[str, str]] = {
    "fd": ("FD", "Fr\u00e9chet distance; its bias is taken off, so it may be below 0"),
    "kid": ("KID", "kernel distance, unbiased: about 0 or below where there is none"),
    "precision": ("Precision", "share of the pictures that lie among real ones"),
    "recall": ("Recall", "share of the real ones that lie among the pictures"),
    "density": ("Density", "how thickly the pictures lie where real ones do"),
    "coverage": ("Coverage", "share of the real ones that have a picture near them"),
}
"""Title and meaning."""


def clean(text: str) -> str:
    """Text that HTML, SVG and JSON can hold: control characters become visible, what is no character a U+FFFD."""
    return _UNPRINTABLE.sub(_visible, text)


# Controls but tab and line feed, halves of surrogate pairs, and the two code points at the end of each plane
_PLANE_ENDS = "".join(chr(plane << 16 | end) for plane in range(17) for end in (0xFFFE, 0xFFFF))


_UNPRINTABLE = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_PLANE_ENDS}]")


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


def shortened(text: str, length: int = PROMPT_CHARACTERS) -> Text:
    """`text` with no more than `length` characters shown at once, and no more than 20,000 in all."""
    lines = " ".join(text.split())
    if len(lines) <= length:
        return Text(lines, None, "")
    return Text(lines[: length - 1].rstrip() + "\u2026", text[:_FULL_CHARACTERS], _length(text))


def passage(text: str) -> Text:
    """An answer with its line breaks: its beginning at once, and no more than 20,000 characters in all."""
    text = text.replace("\r\n", "\n").strip()
    lines = text.split("\n")
    if len(text) <= _PASSAGE_CHARACTERS and len(lines) <= _PASSAGE_LINES:
        return Text(text, None, "")
    short = "\n".join(lines[:_PASSAGE_LINES])[: _PASSAGE_CHARACTERS - 1].rstrip() + "\u2026"
    return Text(short, text[:_FULL_CHARACTERS], _length(text))


def _length(text: str) -> str:
    if len(text) > _FULL_CHARACTERS:
        return f"the first {_FULL_CHARACTERS:,} of {len(text):,} characters"
    return f"all {len(text):,} characters"


def labels(names: Iterable[str]) -> dict[str, str]:
    """A short label for every name, no two alike."""
    found: dict[str, str] = {}
    for name in names:
        label = " ".join(name.split()) or "(no name)"
        if len(label) > NAME_CHARACTERS:
            label = label[: NAME_CHARACTERS - 16] + "\u2026" + label[-15:]
        number = 1
        while (unique := label if number == 1 else f"{label} ({number})") in found.values():
            number += 1
        found[name] = unique
    return found


def direction(role: str) -> str:
    """Which way a score of this role is better."""
    return "neither way is better" if role == "drift" else "higher is better"


def signed(value: float, decimals: int) -> str:
    """A difference with its sign, never -0."""
    return _minus(f"{round(value, decimals) + 0.0:+.{decimals}f}")


def plain(value: float, decimals: int) -> str:
    """A number without a plus sign, never -0."""
    return _minus(f"{round(value, decimals) + 0.0:.{decimals}f}")


def significant(value: float | None) -> str:
    """A number of unknown size in four digits; a dash for None."""
    return "\u2013" if value is None else _minus(f"{value:.4g}")


def size(num_bytes: int) -> str:
    """Bytes as GB, or as MB where they are less than a tenth of one."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def p_value(p: float) -> str:
    """A p-value as papers print it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def number(
    value: float, low: float | None, high: float | None, digits: int, word: Callable[[float, int], str] = plain
) -> Number:
    """A number with its interval, if it has one, each as `word` (`signed` or `plain`) sets it."""
    interval = "" if low is None or high is None else f"[{word(low, digits)}, {word(high, digits)}]"
    return Number(word(value, digits), interval)


def difference_number(row: ComparisonEntry | PartEntry, digits: int) -> Number:
    """A difference with its interval."""
    return number(row["difference"], row["low"], row["high"], digits, signed)


def known(value: float | int | None, pattern: str = "{:,.1f}", unit: float = 1.0) -> str:
    """A number in a unit, as a format pattern sets it; a dash for None."""
    return "\u2013" if value is None else pattern.format(value / unit)


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def distinct(values: Sequence[_T]) -> list[_T]:
    """Each once, in the order of their first appearance."""
    return list(dict.fromkeys(values))
