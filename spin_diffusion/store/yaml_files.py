"""YAML as version 1.2 reads it, strictly: what two readers could read differently is refused, not guessed.

`no`, `yes`, `on` and `off` are words, `1e-6` is a number, `1_000`, `12:30` and dates are text. A number with a leading
zero (8 or 10?), a name that stands twice, aliases and merge keys (a few lines of them unfold to gigabytes), tags (which
may name code) and several documents in one file are errors that name the line.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from spin_diffusion.store.input_error import InputError, printable, read_bytes

LARGEST = 1 << 20
"""Bytes of a settings file, at most."""
DEEPEST = 32
"""Lists and mappings in each other, at most."""
_WORDS = {"": None, "~": None} | {
    form: value
    for word, value in {"null": None, "true": True, "false": False}.items()
    for form in (word, word.capitalize(), word.upper())
}
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_INTEGERS = {re.compile(r"[-+]?[0-9]+"): 10, re.compile(r"0o[0-7]+"): 8, re.compile(r"0x[0-9a-fA-F]+"): 16}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of at most 1 MB.

    Raises:
        InputError: it is not a file, too large, not UTF-8 or not YAML, or holds what is refused (see above).
    """
    try:
        text = read_bytes(path, at_most=LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(path)} is not UTF-8 (at byte {error.start}): save it as UTF-8") from error
    return parse_yaml(text, printable(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document; None for an empty one.

    Args:
        where: for messages: the file's name, or the flag.

    Raises:
        InputError: it is not YAML, or holds what is refused.
    """

    def at(mark: yaml.Mark | None) -> str:
        return where if mark is None or "\n" not in text.strip() else f"{where} line {mark.line + 1}"

    events = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        roots = [_value(next(events), events, at, 0) for event in events if isinstance(event, yaml.DocumentStartEvent)]
    except yaml.YAMLError as error:
        line = at(getattr(error, "problem_mark", None))
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(f"{line} is not YAML: {' '.join(printable(problem).split())}") from error
    except UnicodeEncodeError as error:  # half a character
        raise InputError(f"{where} is not UTF-8") from error
    if len(roots) > 1:
        raise InputError(f"{where} holds {len(roots)} documents: give one")
    return roots[0] if roots else None


def dump_yaml(content: Any) -> str:
    """`content` (null, numbers, texts, lists, mappings) as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _value(event: yaml.Event, events: Iterator[yaml.Event], at: Callable[[yaml.Mark], str], depth: int) -> Any:
    line = at(event.start_mark)
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        _refuse(line, f"anchors and aliases ({event.anchor}) are not read: write the value out")
    if event.tag is not None:
        _refuse(line, f"tags ({event.tag}) are not read: leave it out, or put a text into quotes")
    if isinstance(event, yaml.ScalarEvent):
        return _plain(event.value, line) if event.implicit[0] else event.value
    if depth == DEEPEST:
        _refuse(line, f"more than {DEEPEST} lists and mappings in each other")
    if isinstance(event, yaml.SequenceStartEvent):
        entries = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            entries.append(_value(event, events, at, depth + 1))
        return entries
    mapping: dict[str, object] = {}
    lines: dict[str, str] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        name, line = _value(event, events, at, depth + 1), at(event.start_mark)
        if name == "<<" and event.implicit[0]:
            _refuse(line, "merge keys (<<) are not read: write the settings out")
        if not isinstance(name, str):
            _refuse(line, f"a name must be a text, not {name!r}: put it into quotes")
        if name in lines:
            _refuse(line, f"{name} stands there twice (first at {lines[name]}): leave one of them out")
        lines[name] = line
        mapping[name] = _value(next(events), events, at, depth + 1)
    return mapping


def _plain(word: str, line: str) -> Any:
    """What a word without quotes means."""
    if word in _WORDS:
        return _WORDS[word]
    if _LEADING_ZERO.fullmatch(word):
        _refuse(
            line,
            f"{word} is read as octal by some programs and as decimal by others: write the number without "
            "its leading 0, or put a text into quotes",
        )
    for form, base in _INTEGERS.items():
        if form.fullmatch(word):
            if len(word) > 1000:
                _refuse(line, f"a number of {len(word)} digits")
            return int(word, base)
    if _FLOAT.fullmatch(word) or _NOT_FINITE.fullmatch(word):
        return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return word


def _refuse(line: str, problem: str) -> NoReturn:
    raise InputError(f"{line}: {printable(problem)}")


def _is_text(word: str) -> bool:
    """Whether a word without quotes is a text for this reader."""
    try:
        return isinstance(_plain(word, ""), str) and word != "<<"
    except InputError:
        return False


class _Dumper(yaml.SafeDumper):
    """PyYAML's reads YAML 1.1: it quotes what that takes for something else, and would leave 1e-6 bare."""

    def ignore_aliases(self, data: Any) -> bool:
        """A list that stands in two places is written twice."""
        return True


def _quoted_where_needed(dumper: _Dumper, text: str) -> yaml.Node:
    style = '"' if not text.isprintable() else None if _is_text(text) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted_where_needed)
