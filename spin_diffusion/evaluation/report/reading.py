"""What the page is made of: results.json, checked against its schema, and the two tables beside it.

Nothing in these files is trusted: text may be anything that JSON can hold, and pictures' paths may point anywhere.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spin_diffusion.evaluation.modalities import modality_of
from spin_diffusion.evaluation.report.editions import edition_of
from spin_diffusion.evaluation.report.rows import SampleRow
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.opening import open_regular, read_bytes

SCHEMA_VERSION = 1
_FLOATS = {
    "guidance_scale", "guidance_scales", "mean", "low", "high", "sd", "difference", "win_rate", "win_rate_low",
    "win_rate_high", "p", "p_holm", "value",
    "threshold", "r_real", "r_generated", "loss",
}  # fmt: skip
_MAX_BYTES = 1 << 30  # of results.json
_MAX_MESSAGE = 200  # characters of a schema error; a value that does not fit may be a megabyte


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An evaluation as it was read."""

    directory: Path
    results: dict[str, Any]
    """results.json, valid by its schema."""
    samples: list[SampleRow]
    """At the headline's guidance scale."""
    scores: dict[tuple[str, str, str, int], float]
    """(model, scorer, id, k) -> score, at the headline's guidance scale; finite ones only."""


def read_evaluation(directory: Path) -> Evaluation:
    """What `directory` holds: results.json, scores.parquet and images.parquet or answers.parquet.

    Raises:
        InputError: one of them is missing, damaged, or not what the schema says; one line names the place.
    """
    results = read_results(directory / "results.json")
    scale = results["headline"]["guidance_scale"]
    kind = edition_of(results).row
    columns = [field.name for field in fields(kind)]
    table = directory / f"{modality_of(results['protocol']).plural}.parquet"
    samples = [_row_of(kind, values) for values in _rows(table, columns, scale)]
    scores = {
        (row["model"], row["scorer"], str(row["id"]), int(row["k"])): float(row["score"])
        for row in _rows(directory / "scores.parquet", ["model", "scorer", "id", "k", "score"], scale)
        if row["score"] is not None and math.isfinite(row["score"])
    }
    return Evaluation(directory, results, samples, scores)


def _row_of(kind: type, values: dict[str, Any]) -> Any:
    """The row as a `kind`; what is missing is empty or 0, where the field cannot be None."""
    return kind(**{field.name: _filled(values[field.name], field.type) for field in fields(kind)})


def _filled(value: Any, kind: Any) -> Any:
    if kind not in (str, int):
        return value
    return kind() if value is None else kind(value)


def read_results(path: Path) -> dict[str, Any]:
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
        results = _as_floats(json.loads(text, parse_constant=_refuse_constant, parse_float=_finite))
    except (ValueError, OverflowError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise InputError(f"{path} is not JSON ({_one_line(str(error))})") from None
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"{path} has schema_version {_one_line(json.dumps(version))}, this program reads {SCHEMA_VERSION}: "
            "evaluate again, or use the version of the program that wrote it"
        )
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(_schema()).iter_errors(results))
    if error is not None:
        raise InputError(f"{path} does not follow its schema at {error.json_path}: {_one_line(error.message)}")
    _check_names(path, results)
    return results


def _schema() -> dict[str, Any]:
    return json.loads(resources.files("spin_diffusion.evaluation").joinpath("results.schema.json").read_text("utf-8"))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _as_floats(content: Any) -> Any:
    """The same with floats wherever the schema has numbers: JSON does not tell 3 from 3.0."""
    if isinstance(content, list):
        return [_as_floats(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {key: _as_float(value) if key in _FLOATS else _as_floats(value) for key, value in content.items()}


def _as_float(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_float(item) for item in value]
    return float(value) if type(value) is int else value


def _check_names(path: Path, results: dict[str, Any]) -> None:
    """What the schema cannot say: names are there once, and the baseline and the headline are among the models."""
    models = [model["name"] for model in results["models"]]
    for kind, names in (("model", models), ("scorer", [scorer["name"] for scorer in results["scorers"]])):
        if repeated := _first_repeated(names):
            raise InputError(f"{path} has the {kind} {_one_line(repr(repeated))} twice")
    for role, name in (("baseline", results["baseline"]), ("headline", results["headline"]["model"])):
        if name is not None and name not in models:
            raise InputError(f"{path}: the {role} {_one_line(repr(name))} is not among the models")


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _rows(path: Path, columns: list[str], scale: float | None) -> list[dict[str, Any]]:
    """The rows of a parquet file at one guidance scale; None stands for pictures that were given, not drawn."""
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: results.json needs it beside itself")
    open_regular(path).close()
    try:
        names = pq.read_schema(path).names
        if missing := [name for name in [*columns, "guidance_scale"] if name not in names]:
            raise InputError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}")
        table = pq.read_table(path, columns=[*columns, "guidance_scale"], page_checksum_verification=True)
        scales = table["guidance_scale"].cast(pa.float64())
        at_scale = pc.is_null(scales) if scale is None else pc.fill_null(pc.equal(scales, float(scale)), False)
        return table.select(columns).filter(at_scale).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({_one_line(str(error))})") from None


def _one_line(text: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * _MAX_MESSAGE]).split())
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."
