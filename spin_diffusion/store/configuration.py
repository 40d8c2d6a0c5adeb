"""Configurations as their files have them, or not at all.

diffusers and transformers take their own default for a key that a configuration lacks, and leave out one that they do
not know; either way another model is run than the one that was given. So of every configuration the keys that change
what is computed must be there, and each key must be one that is known. What is known of a kind of configuration is
data, a `Keys`; `check_keys` is the one checker.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from spin_diffusion.store.input_error import InputError, one_line, printable, read_bytes

Configuration = dict[str, Any]
QUANTISED = ("quantization_config", "compression_config")
"""Keys by which weights are stored in other numbers than they are computed with: `check_stored` refuses them."""
_LONGEST = 2**24
"""Bytes."""


def read_configuration(path: Path, where: str) -> Configuration:
    """The JSON object in a file that somebody else wrote.

    Args:
        where: what the user gave, and the part of it; it begins the message.

    Raises:
        InputError: it is missing, too long, or not a JSON object.
    """
    if not path.exists():
        raise InputError(f"{where}: {path.name} is missing: get the whole checkpoint")
    try:
        content = json.loads(read_bytes(path, _LONGEST))
    except InputError as error:
        raise InputError(f"{where}: {path.name} cannot be read ({error}): get it again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {path.name} is no JSON ({one_line(error)}): get it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: {path.name} is no JSON object: get it again")
    return content


@dataclass(frozen=True)
class Choice:
    """The values of a key that are supported."""

    values: tuple[object, ...]
    """The first is what a missing key means."""
    needs: str = ""
    """What the denoiser would need to be told at another value."""


@dataclass(frozen=True)
class Keys:
    """What is known of a kind of configuration."""

    needed: tuple[str, ...]
    """Keys that decide what is computed and that no tensor's shape shows."""
    known: frozenset[str]
    """Keys that change nothing, or that whoever reads the configuration knows."""
    choices: Mapping[str, Choice] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    """The defaults of the class that reads it."""
    foreign: str = "the installed version does not know: if it changes nothing remove it, else update diffusers"
    """What a key that is not known means, and what to do about it."""


def check_keys(config: Mapping[str, Any], keys: Keys, where: str) -> None:
    """Refuse a configuration that lacks a needed key, has a foreign one, or one with a value that is not supported.

    Args:
        where: what the user gave, and the file; it begins the message.

    Raises:
        InputError: as said; also for a text where the class has a number or a switch by default, or the reverse, which
            diffusers does not check, and a text is true.
    """
    refuse_missing([key for key in keys.needed if key not in config], where)
    foreign = sorted(key for key in config if key not in (*keys.known, *QUANTISED) and not key.startswith("_"))
    if foreign:
        raise InputError(f"{where} has {', '.join(map(printable, foreign[:5]))}, which {keys.foreign}")
    for key, default in keys.defaults.items():
        value = config.get(key)
        if isinstance(value, bool | int | float | str) and isinstance(default, bool | int | float | str):
            if isinstance(value, str) != isinstance(default, str):
                raise InputError(
                    f"{where}: {key} is {printable(repr(value))}, where the class has {default!r} by default: get the "
                    "checkpoint's own file"
                )
    for key, choice in keys.choices.items():
        if config.get(key, choice.values[0]) not in choice.values:
            supported = ", ".join(map(str, choice.values))
            raise InputError(
                f"{where}: {key} is {printable(repr(config[key]))}{choice.needs and f' (it needs {choice.needs})'}, "
                f"which is not supported (supported: {supported})"
            )


def refuse_missing(missing: list[str], where: str, example: str = "") -> None:
    """Raise InputError if keys are missing.

    Args:
        example: values of a well-known checkpoint, in brackets.
    """
    if missing:
        raise InputError(
            f"{where}: {', '.join(missing[:5])} {'is' if len(missing) == 1 else 'are'} missing, and the library's "
            f"default may be another: get the checkpoint's own file{example}"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a configuration is a finite number, which a switch is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value of a configuration is a whole number, which a switch is not."""
    return isinstance(value, int) and not isinstance(value, bool)
