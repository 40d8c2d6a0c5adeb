"""YAML as version 1.2 reads it, strictly: what two readers could read differently is refused, not guessed.

`no`, `yes`, `on` and `off` are words, `1e-6` is a number, `1_000`, `12:30` and dates are text. A number with a leading
zero (8 or 10?), a name that stands twice, aliases (a few lines of them unfold to gigabytes), tags (which may name code)
and several documents in one file are errors that name the line.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from spin_diffusion.store.input_error import InputError, one_line, printable, read_bytes

LARGEST = 1 << 20
"""Bytes of a settings file, at most."""
_TAG = "tag:yaml.org,2002:"
_LEADING_ZERO = "!leading_zero"
_WORDS = {
    f"{_TAG}null": r"~|null|Null|NULL|",
    f"{_TAG}bool": r"true|True|TRUE|false|False|FALSE",
    _LEADING_ZERO: r"[-+]?0[0-9]+",
    f"{_TAG}int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    f"{_TAG}float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""What a word without quotes is that is no text; the first that fits."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}
    """Instead of PyYAML's, which are those of YAML 1.1."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, problem = self.peek_event(), None
        if event.anchor is not None:
            problem = f"anchors and aliases ({event.anchor}) are not read: write the value out"
        elif event.tag is not None:
            problem = f"tags ({event.tag}) are not read: leave it out, or put a text into quotes"
        if problem is not None:
            raise ConstructorError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            problem = None
            if not isinstance(name, str):
                problem = f"a name must be a text, not {name!r}: put it into quotes"
            elif name in lines:
                problem = f"{name} stands there twice (first in line {lines[name]}): leave one of them out"
            if problem is not None:
                raise ConstructorError(None, None, problem, key.start_mark)
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def refuse_leading_zero(self, node: yaml.ScalarNode) -> None:
        problem = (
            f"{node.value} is read as octal by some programs and as decimal by others: write the number without its "
            "leading 0, or put a text into quotes"
        )
        raise ConstructorError(None, None, problem, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """It quotes what YAML 1.1 or 1.2 takes for something else than a text."""

    def ignore_aliases(self, data: Any) -> bool:
        """A list that stands in two places is written twice."""
        return True


for _kind in (_Loader, _Dumper):
    for _tag, _words in _WORDS.items():
        _kind.add_implicit_resolver(_tag, re.compile(rf"(?:{_words})\Z"), None)
_Loader.add_constructor(_LEADING_ZERO, _Loader.refuse_leading_zero)
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(node.value, base=0))
_Loader.add_constructor(
    f"{_TAG}float", lambda loader, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"'),
)


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
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = where if mark is None or "\n" not in text.strip() else f"{where} line {mark.line + 1}"
        said = [getattr(error, part, None) for part in ("context", "problem", "reason")]
        problem = one_line(" ".join(filter(None, said)) or error)
        kind = "" if isinstance(error, ConstructorError) else " is not YAML"
        raise InputError(f"{line}{kind}: {problem}") from error
    except RecursionError as error:
        raise InputError(f"{where} has too many lists and mappings in each other") from error
    except ValueError as error:  # half a character, or a number of thousands of digits
        raise InputError(f"{where} cannot be read: {one_line(error)}") from error


def dump_yaml(content: Any) -> str:
    """`content` (null, numbers, texts, lists, mappings) as YAML that `parse_yaml` reads back equal."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
