"""From answers and scores to what is concluded: results.json (results.schema.json says what is in it), scores.parquet,
answers.parquet. Everything is computed anew from what `answering` left, so it can be done at any time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import pyarrow as pa

from spin_diffusion.evaluation.alarms import Alarm
from spin_diffusion.evaluation.answer_alarms import check_answer_alarms
from spin_diffusion.evaluation.comparison import Comparison
from spin_diffusion.evaluation.concluding import belonging, conclude_samples, first_not_run, write_results
from spin_diffusion.evaluation.judges import Answer
from spin_diffusion.evaluation.judging import of_row, read_answer_scores, read_judge
from spin_diffusion.evaluation.records import OfTraining, Results
from spin_diffusion.evaluation.samples import BySample, EvaluatedModel, Samples, Watched
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.samples.answers import answer_files, read_answers
from spin_diffusion.store.files import rows_metadata
from spin_diffusion.store.input_error import InputError

__all__ = ["EvaluatedModel", "conclude_answers"]

_PACKAGES = ("torch", "transformers", "accelerate", "numpy", "scipy", "spin-diffusion")


def conclude_answers(
    root: Path,
    models: Sequence[EvaluatedModel],
    protocol: dict[str, Any],
    specs: Sequence[str],
    *,
    title: str,
    training_prompts: Sequence[str] | None = None,
    **training: Unpack[OfTraining],
) -> tuple[Results, list[Comparison]]:
    """Write results.json, scores.parquet and answers.parquet below `root`; return the results and their comparisons.

    A prompt counts when every model has all of its answers, each with every score.

    Args:
        models: the baseline first; the `folder` of each is the one that its answers were drawn into.
        protocol: from `answer_protocol`.
        specs: NAME[=PATH] of the judges.
        training_prompts: to find evaluation prompts that were trained on, and answers learnt by heart.
        training: for the page of a whole run.

    Raises:
        InputError: answers that are missing or of another protocol, or fewer than 2 prompts that count.
    """
    names = {parse_spec(spec)[0]: spec for spec in specs}
    samples: BySample = {(model.name, None): _read_answers(model.answer_folder, protocol, names) for model in models}
    said = {name: first_not_run([read_judge(model.answer_folder, name) for model in models]) for name in names}

    def check(watched: Watched) -> list[Alarm]:
        return check_answer_alarms(
            _answers(watched.baseline, watched.ids),
            _answers(watched.candidate, watched.ids),
            baseline_scores=watched.baseline_scores,
            candidate_scores=watched.candidate_scores,
            roles=watched.roles,
            previous=watched.previous_scores,
            training_prompts=training_prompts,
        )

    results, comparisons = conclude_samples(
        models,
        samples,
        protocol,
        said,
        title=title,
        headline_scale=None,
        check=check,
        packages=_PACKAGES,
        **training,
    )
    write_results(root, results, models, samples, "answers", _TABLES)
    return results, comparisons


def _read_answers(folder: Path, protocol: Mapping[str, Any], names: Mapping[str, str]) -> Samples:
    rows = {}
    for path in answer_files(folder):
        if rows_metadata(path).get("protocol") != protocol["id"]:
            raise InputError(f"{path} holds answers of another protocol: run the same command again")
        for row in read_answers(path):
            state = "ok" if row["text"].strip() else "empty answer"
            rows[row["id"], row["k"]] = row | {"state": state, "there": True}
    scores = {name: belonging(rows, read_answer_scores(folder, spec)) for name, spec in names.items()}
    return Samples(rows, scores)


def _answers(of_model: Samples, ids: Sequence[str]) -> list[list[Answer]]:
    """(prompts, answers)."""
    return [[of_row(of_model.rows[id_, k]) for k in range(of_model.per_prompt)] for id_ in ids]


_OF_ANSWER = [
    ("model", pa.string()),
    ("guidance_scale", pa.float64()),
    ("id", pa.string()),
    ("k", pa.int64()),
    ("prompt", pa.string()),
    ("category", pa.string()),
    ("seed", pa.int64()),
    ("sha256", pa.string()),
]
_TABLES = {
    "answers": pa.schema(
        [
            *_OF_ANSWER,
            ("state", pa.string()),
            ("text", pa.string()),
            ("reference", pa.string()),
            ("finish", pa.string()),
            ("num_tokens", pa.int64()),
        ]
    ),
    "scores": pa.schema([*_OF_ANSWER, ("scorer", pa.string()), ("score", pa.float64()), ("truncated", pa.bool_())]),
}
