"""Models whose samples were drawn and scored, and what is read of them: pictures or answers, each with its scores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from spin_diffusion.evaluation.judges import Answer
from spin_diffusion.evaluation.records import ModelKind, ModelRole, Scale, ScorerRecord
from spin_diffusion.samples.drawn import Sample, folder_of, read_index, sample_files
from spin_diffusion.store.files import read_json, read_rows, rows_metadata
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.run_dir import AGAIN

SCORER = "scorer"
"""In the metadata of a file of scores: the key of the scorer alone."""
Key = tuple[str, int]
"""(id of the prompt, number of the sample)."""


class WasRun(TypedDict):
    """What a `ScorerRecord` must say to be read."""

    name: str
    state: Literal["run", "not run"]
    reason: str


class Score(TypedDict):
    """One sample's score."""

    id: str
    k: int
    sha256: str
    score: float
    truncated: bool
    features: NotRequired[list[float] | None]
    """A picture's embedding, where the scorer is the one that keeps them."""


@dataclass(frozen=True)
class SampleFolder:
    """Where one model's samples are, and where their scores go."""

    samples: Path
    scores: Path
    of_answers: bool = False

    def files(self, scale: float | None) -> list[Path]:
        """The shards of its samples at a guidance scale; InputError when some are missing."""
        return sample_files(self.samples if self.of_answers else self.samples / folder_of(scale))

    def scored(self, file: Path, name: str) -> Path:
        """The file of the scores by the scorer of this name of a shard of samples."""
        return self.scores / name / file.relative_to(self.samples).with_suffix(".parquet")

    def record(self, name: str) -> Path:
        """The file that says what is known of the scorer of this name."""
        return self.scores / (f"{name}.json" if self.of_answers else f"{name}/scorer.json")


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
    strength: float | None = None
    """How far a round is gone from its base to its player."""


class EvaluatedSample(Sample):
    """A sample as it is stored, with a state for an answer too."""

    there: bool
    """Whether there is a sample at all."""


@dataclass(frozen=True)
class Samples:
    """The samples of one model at one guidance scale."""

    rows: dict[Key, EvaluatedSample]
    scores: dict[str, dict[Key, Score]]
    """Scorer -> rows with score and truncated; only those that belong to the samples."""

    @property
    def per_prompt(self) -> int:
        """Samples of each prompt."""
        return 1 + max(k for _, k in self.rows)


def answer_key(answers: Path, judge: str) -> str:
    """What the scores of a file of answers depend on: some judges read the model itself, and the real answers."""
    written = rows_metadata(answers)
    return key_of(judge=judge, answers=written.get(KEY), texts=written.get("texts"))


def answer_of(row: Mapping[str, Any]) -> Answer:
    """The answer of a row."""
    names = ("id", "k", "prompt", "text", "reference", "finish", "num_tokens")
    return Answer(**{name: row[name] for name in names})


def read_scores(folder: SampleFolder, name: str, scale: float | None) -> list[Score]:
    """The rows of one scorer at one guidance scale, as far as the scorer of the record gave them: id, k, sha256, score,
    truncated, of pictures also features."""
    key = scorer_record(folder, name).get(KEY)
    files = [(file, folder.scored(file, name)) for file in folder.files(scale)] if key is not None else []

    def belongs(file: Path, scored: Path) -> bool:
        written = rows_metadata(scored)
        return written.get(KEY) == answer_key(file, str(key)) if folder.of_answers else written.get(SCORER) == key

    there = [scored for file, scored in files if scored.is_file() and belongs(file, scored)]
    return [cast(Score, row) for scored in there for row in read_rows(scored)]


def scorer_record(folder: SampleFolder, name: str) -> ScorerRecord:
    """What is known of a scorer that was asked for: state, reason, source, checkpoint and all of its ABOUT."""
    return read_json(folder.record(name), WasRun, AGAIN)


def read_samples(
    folder: SampleFolder, scale: Scale, scorers: Sequence[str], protocol: Mapping[str, Any], root: Path
) -> Samples:
    """The samples of a model with their scores; a picture's file is named relative to `root`.

    Raises:
        InputError: samples that are missing, or answers of another protocol.
    """
    rows: dict[Key, EvaluatedSample] = {}
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
            rows[row["id"], row["k"]] = cast(EvaluatedSample, row | {"state": state, "there": True})
    return Samples(rows, {name: belonging(rows, read_scores(folder, name, scale)) for name in scorers})


def belonging(rows: Mapping[Key, Mapping[str, Any]], scores: Sequence[Score]) -> dict[Key, Score]:
    """The scores that were given for these very samples."""
    by_key = {(row["id"], row["k"]): row for row in scores}
    return {key: row for key, row in by_key.items() if rows.get(key, {}).get("sha256") == row["sha256"]}


def first_not_run(records: Sequence[ScorerRecord]) -> ScorerRecord:
    """What is known of a scorer, of what each model's folder says of it: run only if it was run for all, and was the
    same scorer each time."""
    if len({record.get(KEY) for record in records if record["state"] == "run"}) > 1:
        reason = "not every model was scored by the same version of it"
        return {**records[0], "state": "not run", "reason": reason}
    return next((record for record in records if record["state"] == "not run"), records[0])
