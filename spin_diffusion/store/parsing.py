"""Flat flags and YAML into frozen dataclasses, with errors of one line that name the nearest setting.

The flags are flat (`--learning_rate`), a YAML file given by `--config` holds the same names, and the command line wins.
A word on the command line is read as the same word in the file, so nothing has two meanings.
"""

import os
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from spin_diffusion.store.input_error import InputError, did_you_mean, nearest, printable
from spin_diffusion.store.replaced import REPLACED
from spin_diffusion.store.settings import help_texts, rules_of
from spin_diffusion.store.shipped import PRESETS, shipped, shipped_names, with_shipped
from spin_diffusion.store.typed import Misfit, container_of, fit, shown
from spin_diffusion.store.yaml_files import dump_yaml, parse_yaml, read_yaml

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str] | None, listed: Sequence[str] = ()) -> T:
    """Settings from the command line over `--config` over the defaults.

    Args:
        kind: a dataclass of settings, or of sections of settings.
        listed: settings that also take words one after the other (`--models a=x b=y`) or joined by commas.

    Raises:
        InputError: an unknown key (with the nearest one), a wrong type, a value out of range.
    """
    sections, known = sections_of(kind), types_of(kind)
    given: dict[str, Any] = {}
    files, flags = _split(list(sys.argv[1:] if argv is None else argv), known, listed)
    alternatives = {name: rule.instead_of for section in sections.values() for name, rule in rules_of(section).items()}

    def put_aside(names: Collection[str]) -> None:
        for other in {alternatives.get(name) for name in names}.difference(names):
            given.pop(other or "", None)

    for path in files:
        of_file = settings_of(path, known)
        put_aside(of_file)
        for name, value in of_file.items():
            given[name] = _over(given.get(name), value, known[name])
    put_aside(dict(flags))
    for name, values in flags:
        if name in listed and not (len(values) == 1 and values[0].startswith("[")):
            given[name] = [part for value in values for part in value.split(",") if part]
        elif name in known:
            given[name] = _over(given.get(name), _read(values[0], name, known[name]), known[name])
    if "help" in dict(flags):
        _print_and_end("\n".join(_help_lines(sections.values())))
    built = _build_sections(kind, given)
    if "print_config" in dict(flags):
        flat = {name: value for section in built.values() for name, value in asdict(section).items()}
        _print_and_end(dump_yaml(flat).rstrip())
    return built[""] if "" in built else kind(**built)


def _over(before: Any, value: Any, type_: Any) -> Any:
    """What a setting is when it is given again: its new value; of one with keys, those given before stay."""
    is_keyed = is_dataclass(type_) and isinstance(value, dict) and isinstance(before, dict)
    return before | value if is_keyed else value


def build(kind: type[T], given: Mapping[str, Any]) -> T:
    """Settings from their flat names over the defaults.

    Raises:
        InputError: an unknown key (with the nearest one), a wrong type, a value out of range.
    """
    built = _build_sections(kind, given)
    return built[""] if "" in built else kind(**built)


def _build_sections(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    known = types_of(kind)
    checked = {name: _checked(value, name, known, "--") for name, value in given.items()}
    return {
        name: section(**{field.name: checked[field.name] for field in fields(section) if field.name in checked})
        for name, section in sections_of(kind).items()
    }


def sections_of(kind: type) -> dict[str, type]:
    """The sections of a dataclass of settings by name; one without sections is its own, without a name."""
    found: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    return found if all(is_dataclass(type_) for type_ in found.values()) else {"": kind}


def types_of(kind: type) -> dict[str, Any]:
    """The type of each setting by its flat name."""
    return {field.name: field.type for section in sections_of(kind).values() for field in fields(section)}


def settings_of(path: str | Path, known: Mapping[str, Any]) -> dict[str, object]:
    """The settings in a YAML file, their names and types checked.

    Args:
        known: the type of each setting by its name.
    """
    place = Path(shipped(str(path), PRESETS)).expanduser()
    if not os.path.exists(place) and "/" not in str(path):
        names = shipped_names(PRESETS)
        near = nearest(str(path), names)
        raise InputError(f"{printable(path)} cannot be opened: no such file, and no preset of that name{near}")
    content = read_yaml(place)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{printable(path)} must hold settings by name, as in `seed: 0`")
    checked = {name: _checked(value, name, known, f"{printable(path)}: ") for name, value in content.items()}
    return {name: content[name] if is_dataclass(value) else value for name, value in checked.items()}


def saved_settings(path: Path) -> dict[str, object]:
    """The settings that a command wrote into its folder; InputError when they cannot be read any more."""
    try:
        content = fit(read_yaml(path), dict[str, object])
    except Misfit as error:
        raise InputError(f"{printable(path)} is damaged ({error}): {_START_ELSEWHERE}") from None
    except InputError as error:
        raise InputError(f"{error}: {_START_ELSEWHERE}") from None
    return content


_START_ELSEWHERE = "restore it, or start in another --output_dir"
_ABOUT = ("help", "print_config")
"""Flags that print and end the command."""


def _print_and_end(text: str) -> NoReturn:
    print(text)
    raise SystemExit(0)


def _help_lines(sections: Collection[type]) -> Iterator[str]:
    """What can be set: what people need first, then the sections, each under the first sentence of its docstring."""
    yield f"usage: {Path(sys.argv[0]).name} --config CONFIG.yaml [--SETTING VALUE ...]"
    yield ""
    yield "  --config FILE"
    yield "      YAML file with any of the settings below, or the name of a shipped one; the command line wins."
    yield "  --print_config"
    yield "      Print all settings as they are, as a file for --config, and end."
    first = [
        line
        for section in sections
        for name, rules in rules_of(section).items()
        if rules.first
        for line in _setting_lines(section, name)
    ]
    if first:
        yield from ("", "Needed first:", *first)
    for section in sections:
        yield ""
        yield " ".join((section.__doc__ or "").split()).removesuffix(".") + ":"
        for name, rules in rules_of(section).items():
            if not rules.first:
                yield from _setting_lines(section, name)


def _setting_lines(section: type, name: str) -> list[str]:
    one = section.__dataclass_fields__[name]  # type: ignore[attr-defined] # a dataclass
    default = "" if one.default is None or is_dataclass(one.default) else f" (default: {as_word(one.default)})"
    text = help_texts(section).get(name, "") + default
    rules = rules_of(section)[name]
    words = "|".join(rules.choices) + ("|FILE.py" if rules.or_file else "")
    return [f"  --{name} {words or placeholder(one.type)}", *(f"      {line}" for line in textwrap.wrap(text, 100))]


def as_word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def placeholder(type_: Any) -> str:
    """What stands for a setting's value in its line of help: NUMBER, WORD|WORD, LIST."""
    kind, parts = get_origin(type_), [part for part in get_args(type_) if part is not NoneType]
    if kind in (Union, UnionType):
        return "|".join(dict.fromkeys(placeholder(part) for part in parts))
    if kind is Literal:
        return "|".join(str(word) for word in parts)
    if container_of(type_) is list:
        return "LIST"
    if container_of(type_) is dict:
        return "MAPPING"
    return {bool: "true|false", int: "INT", float: "NUMBER"}.get(type_, "TEXT")


def _split(
    argv: list[str], known: Mapping[str, Any], listed: Sequence[str]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The files of settings, and each flag with its words."""
    files: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    place = 0
    while place < len(argv):
        flag, equals, value = argv[place].partition("=")
        name = "help" if flag == "-h" else flag.removeprefix("--")
        if not flag.startswith("--") and flag != "-h":
            raise InputError(f"{printable(argv[place])!r} belongs to no setting: give --SETTING VALUE")
        if name not in (*known, *_ABOUT, "config"):
            raise InputError(_unknown(name, [*known, "config"]))
        place += 1
        words = [value] if equals else []
        most = 1 if name not in listed else len(argv)
        while not equals and name not in _ABOUT and len(words) < most and place < len(argv):
            if argv[place].startswith("--"):
                break
            words.append(argv[place])
            place += 1
        if not words and known.get(name) is bool:
            words = ["true"]  # `--use_ema` alone, as in diffusers' scripts
        if not words and name not in (*_ABOUT, *listed):
            raise InputError(f"--{name} has no value: give --{name} VALUE")
        if name == "config":
            files += words
        else:
            flags.append((name, words))
    return files, flags


def _read(word: str, name: str, type_: Any) -> Any:
    """The value of a word on the command line: text where the setting takes any text, else what YAML reads."""
    parts = get_args(type_) if get_origin(type_) is not Literal else ()
    parts = parts if parts and get_origin(type_) not in (list, dict) else (type_,)
    if str in parts and not (word == "null" and NoneType in parts):
        if not (word[:1] in ("[", "{") and any(container_of(part) for part in parts)):
            return word
    return parse_yaml(word, f"--{name}") if word else word


def _checked(value: Any, name: str, known: Mapping[str, Any], before: str) -> Any:
    """A setting's value as its type has it; InputError names the setting, what was given and what would be right."""
    if name not in known:
        raise InputError(before.removesuffix("--") + _unknown(name, list(known)))
    value = with_shipped(value)
    try:
        return fit(value, known[name])
    except Misfit as error:
        given = printable(value) if value and isinstance(value, str) else shown(value)
        if isinstance(value, str) and (choices := _choices(known[name])):
            hint = did_you_mean(value, choices)
            raise InputError(f"{before}{name} {given}: give one of {', '.join(choices)}{hint}") from None
        raise InputError(f"{before}{name} {given}: {error}") from None


def _choices(type_: Any) -> list[str]:
    """The words that a setting of a closed set of them can have, one or a list; of other settings none."""
    if get_origin(type_) is Literal:
        return [str(word) for word in get_args(type_)]
    parts = [_choices(part) for part in get_args(type_) if part is not type(None)]
    return list(dict.fromkeys(word for part in parts for word in part)) if all(parts) else []


def _unknown(name: str, known: Sequence[str]) -> str:
    """What to use instead of a setting that there is not (any more)."""
    if (instead := REPLACED.get(name)) is not None:
        return f"unknown setting {name!r}: {instead}"
    return f"unknown setting {printable(name)!r}{nearest(name, known)}"
