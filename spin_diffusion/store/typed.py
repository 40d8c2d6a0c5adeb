"""Whether a value that was read (from YAML, JSON or the command line) is of the type that is expected of it.

Types are Python's: bool, int, float, str, None, Any, Literal, list, dict, unions of them, TypedDict for mappings whose
keys are known, and frozen dataclasses for mappings whose keys may be left out. Nothing is coerced, but a whole number
is a float too.
"""

import functools
import math
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from spin_diffusion.store.input_error import nearest, printable

_WORDS = {
    bool: "true or false",
    int: "a whole number (int)",
    float: "a number (float)",
    str: "a text",
    NoneType: "null",
    Any: "any",
    object: "any",
}


class Misfit(ValueError):
    """A value of another type than expected; the message says what would be right, and what is where inside it."""


def fit(value: Any, type_: Any, at: str = "") -> Any:
    """`value` as `type_` has it: the same, with whole numbers made floats where floats are expected.

    Args:
        at: where the value stands, for the message: "files", "seeds[2]".

    Raises:
        Misfit: another type, a key that is missing, a number that is not finite, or a text with a NUL in it.
    """
    if type_ in (Any, object):
        return value
    kind, parts = get_origin(type_), get_args(type_)
    if kind in (Union, UnionType):
        for part in parts:
            if container_of(part) is type(value):  # its message says what is wrong inside
                return fit(value, part, at)
        for part in parts:
            try:
                return fit(value, part, at)
            except Misfit:
                continue
    elif kind is Literal:
        if any(type(value) is type(word) and value == word for word in parts):
            return value
    elif is_typeddict(type_):
        if isinstance(value, dict):
            for key in sorted(type_.__required_keys__ - value.keys()):
                raise Misfit(f"{_below(at, key)} is missing")
            known = _hints(type_)
            return {key: fit(entry, known.get(key, Any), _below(at, key)) for key, entry in value.items()}
    elif isinstance(type_, type) and is_dataclass(type_):
        if isinstance(value, dict):
            types = {field.name: field.type for field in fields(type_)}
            for key in value:
                if key not in types:
                    raise Misfit(f"unknown key {_below(at, key)!r}{nearest(key, list(types))}")
            return type_(**{key: fit(entry, types[key], _below(at, key)) for key, entry in value.items()})
    elif list in (kind, type_):
        if type(value) is list:
            return [fit(entry, parts[0] if parts else Any, f"{at}[{n}]") for n, entry in enumerate(value)]
    elif dict in (kind, type_):
        if isinstance(value, dict):
            of_key, of_value = parts or (Any, Any)
            return {fit(key, of_key, at): fit(entry, of_value, _below(at, key)) for key, entry in value.items()}
    elif type_ is float and type(value) in (int, float):
        if _is_finite(value):
            return float(value)
    elif type(value) is type_ and not (type_ is str and "\0" in value):
        return value
    raise Misfit(f"{at}: expected {in_words(type_)}, not {shown(value)}" if at else f"expected {in_words(type_)}")


_hints = functools.cache(get_type_hints)


def in_words(type_: Any) -> str:
    """What a value of the type is, for messages: "a number, or a list of numbers"."""
    kind, parts = get_origin(type_), get_args(type_)
    if kind in (Union, UnionType):
        return " or ".join(in_words(part) for part in parts)
    if kind is Literal:
        return "one of " + ", ".join(str(word) for word in parts)
    if list in (kind, type_):
        return f"a list (each {in_words(parts[0])})" if parts and parts[0] is not Any else "a list"
    if dict in (kind, type_) or is_typeddict(type_) or is_dataclass(type_):
        return "names with values"
    return _WORDS.get(type_, str(type_))


def shown(value: Any) -> str:
    """A value as a message shows it: short, on one line, as YAML has it."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def container_of(type_: Any) -> type | None:
    """list or dict, when values of the type are lists or mappings."""
    if is_typeddict(type_) or is_dataclass(type_):
        return dict
    return next((kind for kind in (list, dict) if kind in (get_origin(type_), type_)), None)


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond what a float can be
        return False


def _below(at: str, key: Any) -> str:
    return f"{at}.{printable(key)}".removeprefix(".")
