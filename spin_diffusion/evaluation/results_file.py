"""The one reader of results.json, which trusts nothing in it, and what its schema says of a content."""

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonschema

from spin_diffusion.evaluation.records import Results
from spin_diffusion.store.input_error import InputError, one_line, read_bytes

SCHEMA_VERSION = 1
_FLOATS = frozenset(
    "guidance_scale guidance_scales mean low high sd difference win_rate win_rate_low win_rate_high p p_holm value "
    "threshold r_real r_generated loss".split()
)
_MAX_BYTES = 1 << 30


def read_results(path: Path) -> Results:
    """The content of results.json.

    Raises:
        InputError: no such file, not JSON, another schema version, not valid by the schema, or a name that it does not
            explain itself.
    """
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: give the folder of a finished evaluation")
    data = read_bytes(path, _MAX_BYTES)
    try:
        # utf-8-sig: an editor may have put a byte order mark in front
        text = data.decode("utf-8-sig")
        results = _with_floats(json.loads(text, parse_constant=_refuse_constant, parse_float=_finite))
    except (ValueError, OverflowError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise InputError(f"{path} is not JSON ({one_line(error)})") from None
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"{path} has schema_version {one_line(json.dumps(version))}, this program reads {SCHEMA_VERSION}: "
            "evaluate again, or use the version of the program that wrote it"
        )
    if problem := schema_problem(results):
        raise InputError(f"{path} does not follow its schema at {problem}")
    _check_names(path, results)
    return results


def schema_problem(results: Any) -> str | None:
    """Where and how a content departs from the schema, in one line; None = it does not."""
    error = jsonschema.exceptions.best_match(_validator().iter_errors(results))
    return None if error is None else f"{error.json_path}: {one_line(error.message)}"


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = Path(__file__).with_name("results.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(schema))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _with_floats(content: Any, is_float: bool = False) -> Any:
    """The same with floats wherever the schema has numbers: JSON does not tell 3 from 3.0."""
    if isinstance(content, list):
        return [_with_floats(item, is_float) for item in content]
    if isinstance(content, dict):
        return {key: _with_floats(value, key in _FLOATS) for key, value in content.items()}
    return float(content) if is_float and type(content) is int else content


def _check_names(path: Path, results: Results) -> None:
    """What the schema cannot say: names are there once, and the baseline and the headline are among the models."""
    models = [model["name"] for model in results["models"]]
    for kind, names in (("model", models), ("scorer", [scorer["name"] for scorer in results["scorers"]])):
        if repeated := _first_repeated(names):
            raise InputError(f"{path} has the {kind} {one_line(repr(repeated))} twice")
    for role, name in (("baseline", results["baseline"]), ("headline", results["headline"]["model"])):
        if name is not None and name not in models:
            raise InputError(f"{path}: the {role} {one_line(repr(name))} is not among the models")


def _first_repeated(names: Sequence[str]) -> str | None:
    return next((name for place, name in enumerate(names) if name in names[:place]), None)
