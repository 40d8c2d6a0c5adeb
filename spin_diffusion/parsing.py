"""Flat flags and YAML into frozen dataclasses, by jsonargparse, with errors of one line that name the nearest setting.

The flags are flat (`--learning_rate`), a YAML file given by `--config` holds the same names, and the command line wins.
"""

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import jsonargparse
from jsonargparse import ArgumentParser

from spin_diffusion.input_error import InputError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse_sections(
    sections: Mapping[str, type], argv: Sequence[str] | None, listed: Sequence[str] = ()
) -> dict[str, Any]:
    """One instance of each section's dataclass, from the command line over `--config` over the defaults.

    Args:
        listed: settings that also take words one after the other (`--models a=x b=y`) or joined by commas.

    Raises:
        InputError: an unknown key (with the nearest one), a wrong type, a value out of range.
    """
    parser = ArgumentParser(exit_on_error=False, usage="%(prog)s --config CONFIG.yaml [--SETTING VALUE ...]")
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    for section in sections.values():
        parser.add_class_arguments(section, as_group=True)
    known = {field.name: field.type for section in sections.values() for field in fields(section)}
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parsed = parser.parse_args(_joined_lists(_bare_flags(words, known), listed))
    except InputError:
        raise
    except jsonargparse.ArgumentError as error:
        raise InputError(_one_line(str(error), known)) from error
    return {
        name: section(**{field.name: parsed[field.name] for field in fields(section)})
        for name, section in sections.items()
    }


def _bare_flags(argv: list[str], known: dict[str, Any]) -> list[str]:
    """`--use_ema` alone means `--use_ema true`, as in diffusers' scripts."""
    switches = {f"--{name}" for name, type_ in known.items() if type_ is bool}
    full = []
    for place, word in enumerate(argv):
        full.append(word)
        if word in switches and (place + 1 == len(argv) or argv[place + 1].startswith("--")):
            full.append("true")
    return full


def _joined_lists(argv: list[str], listed: Sequence[str]) -> list[str]:
    """`--models a=x b=y` and `--scorers a,b=y` as the one JSON list that jsonargparse reads."""
    flags, full, place = {f"--{name}" for name in listed}, [], 0
    while place < len(argv):
        flag, equals, value = argv[place].partition("=")
        place += 1
        if flag not in flags:
            full.append(argv[place - 1])
            continue
        values = [value] if equals else []
        while not equals and place < len(argv) and not argv[place].startswith("--"):
            values.append(argv[place])
            place += 1
        if len(values) == 1 and values[0].startswith("["):
            full += [flag, values[0]]
        else:
            full += [flag, json.dumps([part for value in values for part in value.split(",") if part])]
    return full


def _one_line(message: str, known: dict[str, Any]) -> str:
    """jsonargparse's message in one line: the nearest flag for one that does not exist, the type for a wrong value."""
    unknown = re.search(r"nrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted", message)
    if unknown:
        name = unknown.group(1) or unknown.group(2)
        return f"unknown setting {name!r}{nearest(name, [*known, 'config'])}"
    key = re.search(r"[Kk]ey ['\"]([\w.]+)['\"]", message)
    value = re.search(r"(?:[Gg]iven|Got) value: (.*)", message)
    if key and key.group(1) in known:
        if choices := _choices(known[key.group(1)]):
            given = value.group(1).strip("\"'") if value else ""
            close = difflib.get_close_matches(given, choices, n=1, cutoff=0.4)
            hint = f", did you mean {close[0]!r}?" if close else ""
            return f"--{key.group(1)} {given or repr('')}: give one of {', '.join(choices)}{hint}"
        expected = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(known[key.group(1)]))
        return f"--{key.group(1)} {value.group(1) if value else ''}: expected {expected}"
    return re.sub(r"\s+", " ", message).strip()


def _choices(type_: Any) -> list[str]:
    """The words that a setting of a closed set of them can have, one or a list; of other settings none."""
    if get_origin(type_) is Literal:
        return [str(word) for word in get_args(type_)]
    parts = [_choices(part) for part in get_args(type_) if part is not type(None)]
    return list(dict.fromkeys(word for part in parts for word in part)) if all(parts) else []


def nearest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean ...?", or all that are known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(sorted(known))})"
