"""What stands at a setting's field beside its type, default and docstring: its range, and what a begun run may change.

A section of settings is a frozen dataclass that derives from `Settings`. A field whose rules are all in its type is
written as usual; `setting(default, minimum=1)` adds a rule. A subclass that gives a field another default keeps the
rules of the field that it replaces.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, Union, get_args, get_origin

from spin_diffusion.store.input_error import InputError, did_you_mean, printable

T = TypeVar("T")
PerRound = Union[T, list[T]]  # noqa: UP007 - `T | list[T]` cannot be subscripted in Python 3.10
"""The type of a setting that has one value, or a list with one for each round."""
SEEDS = 2**32
"""Seeds are below this: numpy's generators take no larger one."""


@dataclass(frozen=True)
class Rules:
    """What values a setting may have, and what they are to a begun run and to a reader of `--help`."""

    minimum: int | float | None = None
    above: int | float | None = None
    maximum: int | float | None = None
    below: int | float | None = None
    choices: tuple[str, ...] = ()
    or_file: bool = False
    harmless: bool = False
    first: bool = False
    instead_of: str = ""

    def no_choice(self, word: str) -> str | None:
        """What a word should be instead; None where it is one of the choices, or where there are none."""
        if not self.choices or word in self.choices or self.or_file and word.endswith(".py"):
            return None
        file = ", or the path of a .py file" if self.or_file else ""
        return f": give one of {', '.join(self.choices)}{file}{did_you_mean(word, self.choices)}"

    def complaint(self, value: int | float) -> str | None:
        """What a number should be instead (" must be at least 1"); None where it is in range."""
        if (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        ):
            return None
        if self.minimum is not None and self.maximum is not None:
            return f" must be between {self.minimum:g} and {self.maximum:,g}"
        bounds = {"at least": self.minimum, "above": self.above, "at most": self.maximum, "below": self.below}
        words = [
            f"{words} {bound:,g}" if abs(bound) < 1e6 else f"{words} {bound}"
            for words, bound in bounds.items()
            if bound is not None
        ]
        return f" must be {' and '.join(words)}"


def setting(
    default: T,
    *,
    minimum: int | float | None = None,
    above: int | float | None = None,
    maximum: int | float | None = None,
    below: int | float | None = None,
    choices: Iterable[str] = (),
    or_file: bool = False,
    harmless: bool = False,
    first: bool = False,
    instead_of: str = "",
) -> T:
    """A field of a section of settings.

    Args:
        minimum, above, maximum, below: the range of its number, or of each number of its list.
        choices: the words that it can be, or each of its list; where they are known at import alone, else a Literal.
        or_file: the path of a .py file may stand for one of them.
        harmless: a change does not change the result, or only continues it: a begun run allows it.
        first: `--help` shows it before all others.
        instead_of: the setting that this one stands for: given on the command line it puts aside the other of a file.
    """
    rules = Rules(minimum, above, maximum, below, tuple(choices), or_file, harmless, first, instead_of)
    return field(default=default, metadata={"rules": rules})


class Settings:
    """The base of all sections of settings: it holds every value against the rules at its field."""

    def __post_init__(self) -> None:
        check_rules(self)


def check_rules(section: object, before: str = "--") -> None:
    """InputError names the setting, its value and its range.

    Args:
        section: an instance of a dataclass of settings.
        before: what stands before a setting's name in messages.
    """
    kind: type = type(section)
    rules = rules_of(kind)
    for name, rule in rules.items():
        value = getattr(section, name)
        if is_dataclass(value):
            check_rules(value, f"{before}{name} ")
            continue
        if value == [] and name in per_round(kind):
            raise InputError(f"{before}{name} is an empty list: give one value, or one per round")
        for one in value if isinstance(value, list) else [value]:
            complaint = None
            if isinstance(one, str):
                complaint = rule.no_choice(one)
                if complaint is None and not one.strip():
                    raise InputError(f"{before}{name} is empty: give a value, or leave it away")
            elif isinstance(one, int | float) and not isinstance(one, bool):
                complaint = rule.complaint(one)
            if complaint is not None:
                raise InputError(f"{before}{name} {printable(one) or repr(one)}{complaint}")


@functools.cache
def rules_of(section: type) -> dict[str, Rules]:
    """The rules of each field of a section, which may stand in a class that it derives from."""
    stated = [getattr(kind, "__dataclass_fields__", {}) for kind in section.__mro__]
    found = {}
    for one in fields(section):
        own = [names[one.name].metadata for names in stated if one.name in names]
        found[one.name] = next((metadata["rules"] for metadata in own if "rules" in metadata), Rules())
    return found


def per_round(section: type) -> set[str]:
    """The settings of a section that have one value, or a list with one for each round."""
    return {one.name for one in fields(section) if _has_list_of_itself(one.type)}


def _has_list_of_itself(type_: Any) -> bool:
    parts = [get_origin(part) is list for part in get_args(type_) if part is not NoneType]
    return any(parts) and not all(parts)


def harmless(sections: Any) -> set[str]:
    """The settings of some sections' classes that a begun run may change."""
    return {name for section in sections for name, rule in rules_of(section).items() if rule.harmless}


def help_texts(section: type) -> dict[str, str]:
    """The docstring below each field, on one line; a class's own before those that it derives from."""
    texts: dict[str, str] = {}
    for kind in section.__mro__:
        if is_dataclass(kind):
            texts = {name: " ".join(text.split()) for name, text in _docstrings(kind)} | texts
    return texts


def _docstrings(kind: type) -> Iterator[tuple[str, str]]:
    body = next(
        node.body
        for node in _module(kind.__module__).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    for before, node in zip(body, body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield before.target.id, node.value.value


@functools.cache
def _module(name: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[name]))
