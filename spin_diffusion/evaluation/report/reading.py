"""What the page is made of: results.json, checked by its types, and the two tables beside it; and how the page
calls the models and scorers in them.

Nothing in these files is trusted: text may be anything that JSON can hold, and pictures' paths may point anywhere.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spin_diffusion.evaluation.records import (
    AggregateEntry,
    ComparisonEntry,
    PlaceEntry,
    Results,
    Scale,
    guidance_scales,
    modality_of,
    read_results,
)
from spin_diffusion.evaluation.report import wording
from spin_diffusion.evaluation.report.editions import SampleRow, edition_of
from spin_diffusion.evaluation.tables import score_decimals
from spin_diffusion.store.input_error import InputError, one_line, open_regular

Pair = tuple[str, int]
"""(id of the prompt, number of the image or answer): the same seed for every model."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An evaluation as it was read."""

    directory: Path
    results: Results
    """results.json, of its types."""
    samples: list[SampleRow]
    """At the headline's guidance scale."""
    scores: dict[tuple[str, str, str, int], float]
    """(model, scorer, id, k) -> score, at the headline's guidance scale; finite ones only."""


def read_evaluation(directory: Path) -> Evaluation:
    """What `directory` holds: results.json, scores.parquet and images.parquet or answers.parquet.

    Raises:
        InputError: one of them is missing, damaged, or not what an evaluation writes; one line names the place.
    """
    results = read_results(directory / "results.json")
    scale = results["headline"]["guidance_scale"]
    kind = edition_of(results).row
    columns, table = [field.name for field in fields(kind)], f"{modality_of(results['protocol']).plural}.parquet"
    samples = [
        kind(**{field.name: _filled(values[field.name], field.type) for field in fields(kind)})
        for values in _rows(directory / table, columns, scale)
    ]
    scores = {
        (row["model"], row["scorer"], str(row["id"]), int(row["k"])): float(row["score"])
        for row in _rows(directory / "scores.parquet", ["model", "scorer", "id", "k", "score"], scale)
        if row["score"] is not None and math.isfinite(row["score"])
    }
    return Evaluation(directory, results, samples, scores)


def differences(
    scores: dict[tuple[str, str, str, int], float], scorer: str, baseline: str, candidate: str
) -> dict[Pair, float]:
    """Candidate minus baseline by one scorer, for each prompt and seed that both have, in order."""
    return {
        (id, k): score - base
        for (model, name, id, k), score in sorted(scores.items())
        if model == candidate and name == scorer and (base := scores.get((baseline, scorer, id, k))) is not None
    }


def _filled(value: Any, type_: Any) -> Any:
    """The value of a field; what is missing is empty or 0, where the field cannot be None."""
    if type_ not in (str, int):
        return value
    return type_() if value is None else type_(value)


def _rows(path: Path, columns: list[str], scale: float | None) -> Sequence[Mapping[str, Any]]:
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
        raise InputError(f"{path} is damaged ({one_line(error)})") from None


class Labels:
    """Short names, no two alike, and numbers with the decimals of their scorer."""

    def __init__(self, results: Results) -> None:
        self.models = wording.labels(model["name"] for model in results["models"])
        self.decimals = score_decimals(results)
        self.ran = [scorer for scorer in results["scorers"] if scorer["state"] == "run"]
        """The scorers that gave scores."""
        of_rows = (row["guidance_scale"] for row in results["results"])
        self.scales = wording.distinct([*guidance_scales(results["protocol"]), *of_rows])
        self._protocol, self._edition = results["protocol"], edition_of(results)
        self._titles = {scorer["name"]: scorer["title"] for scorer in results["scorers"]}

    def model(self, name: str) -> str:
        """The label of a model; of one that is not among the models, its shortened name."""
        return self.models.get(name, wording.shortened(name, wording.NAME_CHARACTERS).short)

    def model_text(self, name: str) -> wording.Text:
        """The label of a model, and its whole name behind it where that is longer."""
        whole = wording.shortened(name, wording.NAME_CHARACTERS)
        return wording.Text(self.models[name], whole.full, whole.note)

    def joined(self, names: list[str]) -> str:
        """Labels in one line; a dash for none."""
        return ", ".join(self.models[name] for name in names) or "\u2013"

    def level_with(self, place: PlaceEntry) -> list[str]:
        """The models that one of a ranking is not told apart from."""
        decided = {place["model"], *place["better_than"], *place["worse_than"]}
        return [name for name in self.models if name not in decided]

    def scale(self, scale: Scale) -> str:
        """How samples were drawn, in words."""
        return self._edition.label(self._protocol, scale)

    def title(self, scorer: str, length: int = 60) -> str:
        """The title of a scorer, or its name where it has none."""
        return wording.shortened(self._titles[scorer] or scorer, length).short

    def mean(self, row: AggregateEntry | None) -> wording.Number | None:
        """A mean with its interval."""
        if row is None:
            return None
        return wording.number(row["mean"], row["low"], row["high"], self.decimals[row["scorer"]])

    def difference(self, row: ComparisonEntry | None) -> wording.Number | None:
        """A paired difference with its interval."""
        return None if row is None else wording.difference_number(row, self.decimals[row["scorer"]])
