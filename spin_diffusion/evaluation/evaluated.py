"""Models whose samples were drawn and scored, and what is read of them: pictures or answers, each with its scores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_diffusion.evaluation.records import ModelKind, ModelRole, Scale
from spin_diffusion.evaluation.scoring import SampleFolder, Score, read_scores
from spin_diffusion.samples.drawn import read_index
from spin_diffusion.store.files import read_rows, rows_metadata
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY

Key = tuple[str, int]
"""(id of the prompt, number of the sample)."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model whose samples were drawn and scored."""

    name: str
    role: ModelRole
    folder: SampleFolder
    round_: int | None = None
    """0 for the base of a run."""
    source: str = ""
    kind: ModelKind = "pipeline"
    base: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class Samples:
    """The samples of one model at one guidance scale."""

    rows: dict[Key, dict[str, Any]]
    """Each as it is stored (`samples.drawn.Sample`), with its `state` ("ok" or what is wrong with it) and `there`:
    whether there is a sample at all."""
    scores: dict[str, dict[Key, Score]]
    """Scorer -> rows with score and truncated; only those that belong to the samples."""

    @property
    def per_prompt(self) -> int:
        """Samples of each prompt."""
        return 1 + max(k for _, k in self.rows)


def read_samples(
    folder: SampleFolder, scale: Scale, scorers: Sequence[str], protocol: Mapping[str, Any], root: Path
) -> Samples:
    """The samples of a model with their scores; a picture's file is named relative to `root`.

    Raises:
        InputError: samples that are missing, or answers of another protocol.
    """
    rows: dict[Key, dict[str, Any]] = {}
    for path in folder.files(scale):
        if not folder.of_answers:
            for row in read_index(path):
                file = Path(os.path.relpath(path.parent / row["file"], root)).as_posix() if row["file"] else None
                rows[row["id"], row["k"]] = row | {"file": file, "there": file is not None}
            continue
        if rows_metadata(path).get("protocol") != protocol["id"]:
            raise InputError(f"{path} holds answers of another protocol: run the same command again")
        for row in read_rows(path):
            state = "ok" if row["text"].strip() else "empty answer"
            rows[row["id"], row["k"]] = row | {"state": state, "there": True}
    return Samples(rows, {name: belonging(rows, read_scores(folder, name, scale)) for name in scorers})


def belonging(rows: Mapping[Key, Mapping[str, Any]], scores: Sequence[Score]) -> dict[Key, Score]:
    """The scores that were given for these very samples."""
    by_key = {(row["id"], row["k"]): row for row in scores}
    return {key: row for key, row in by_key.items() if rows.get(key, {}).get("sha256") == row["sha256"]}


def first_not_run(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is known of a scorer, of what each model's folder says of it: run only if it was run for all, and was the
    same scorer each time."""
    if len({record.get(KEY) for record in records if record["state"] == "run"}) > 1:
        return records[0] | {"state": "not run", "reason": "not every model was scored by the same version of it"}
    return next((record for record in records if record["state"] == "not run"), records[0])
