"""From pictures and scores to what is concluded: results.json (results.schema.json says what is in it), scores.parquet,
images.parquet. Everything is computed anew from what drawing and scoring left, so it can be done at any time."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pyarrow as pa

from spin_diffusion.evaluation.alarms import Alarm, check_alarms
from spin_diffusion.evaluation.comparison import Comparison
from spin_diffusion.evaluation.concluding import belonging, conclude_samples, first_not_run, write_results
from spin_diffusion.evaluation.records import OfTraining, Results
from spin_diffusion.evaluation.samples import EvaluatedModel, Samples, Watched
from spin_diffusion.evaluation.scorers import parse_spec
from spin_diffusion.evaluation.scoring import ScoredFolder, read_scorer, read_scores
from spin_diffusion.samples.pictures import index_files, read_index

__all__ = ["EvaluatedModel", "conclude"]

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "pillow", "numpy", "scipy", "spin-diffusion")
_PHOTOMETRY = ("saturation", "clipped", "sharpness")


def conclude(
    root: Path,
    models: Sequence[EvaluatedModel],
    protocol: dict[str, Any],
    specs: Sequence[str],
    *,
    title: str,
    headline_scale: float | None,
    training_captions: Sequence[str] | None = None,
    in_domain: Collection[str] = (),
    **training: Unpack[OfTraining],
) -> tuple[Results, list[Comparison]]:
    """Write results.json, scores.parquet and images.parquet below `root`; return the results and their comparisons.

    A prompt counts at a guidance scale when every model has all of its images there, each with every score.

    Args:
        models: the baseline first.
        headline_scale: guidance scale of the verdict at the top of the page.
        training_captions: to find evaluation prompts that were trained on.
        in_domain: scorers that chose what was trained on. A held-out one is in-domain here: its gain alone says
            that the choice was learnt.
        training: for the page of a whole run.

    Raises:
        InputError: pictures that are missing, or fewer than 2 prompts that count.
    """
    names = {parse_spec(spec)[0]: spec for spec in specs}
    samples = {
        (model.name, scale): _read_pictures(root, model.picture_folder, scale, list(names))
        for model in models
        for scale in protocol["guidance_scales"]
    }
    said = {name: first_not_run([read_scorer(model.picture_folder.scores, name) for model in models]) for name in names}
    for name in said.keys() & set(in_domain):
        if said[name]["role"] == "held-out":
            said[name] = said[name] | {"role": "in-domain"}

    def check(watched: Watched) -> list[Alarm]:
        return _check(watched, training_captions)

    results, comparisons = conclude_samples(
        models,
        samples,
        protocol,
        said,
        title=title,
        headline_scale=headline_scale,
        check=check,
        packages=_PACKAGES,
        **training,
    )
    write_results(root, results, models, samples, "images", _TABLES)
    return results, comparisons


def _read_pictures(root: Path, folder: ScoredFolder, scale: float | None, names: Sequence[str]) -> Samples:
    rows = {}
    for index in index_files(folder.pictures, scale):
        for row in read_index(index):
            path = index.parent / row["file"] if row["file"] else None
            file = Path(os.path.relpath(path, root)).as_posix() if path else None
            rows[row["id"], row["k"]] = row | {"file": file, "there": path is not None}
    return Samples(rows, {name: belonging(rows, read_scores(folder.scores, name, scale)) for name in names})


# Alarms


def _check(watched: Watched, training_captions: Sequence[str] | None) -> list[Alarm]:
    return check_alarms(
        watched.baseline_scores,
        watched.candidate_scores,
        roles=watched.roles,
        baseline_features=_features(watched.baseline, watched.ids),
        candidate_features=_features(watched.candidate, watched.ids),
        baseline_photometry=_photometry(watched.baseline, watched.ids),
        candidate_photometry=_photometry(watched.candidate, watched.ids),
        baseline_broken=_broken(watched.baseline),
        candidate_broken=_broken(watched.candidate),
        previous=watched.previous_scores,
        prompts=list(dict.fromkeys(row["prompt"] for row in watched.baseline.rows.values())),
        training_captions=training_captions,
    )


def _features(of_model: Samples, ids: Sequence[str]) -> np.ndarray | None:
    """(prompts, images, width) of the scorer that kept them; None when none did."""
    for rows in of_model.scores.values():
        if rows and next(iter(rows.values()))["features"] is not None:
            return np.array(
                [[rows[id_, k]["features"] for k in range(of_model.per_prompt)] for id_ in ids], dtype=np.float32
            )
    return None


def _photometry(of_model: Samples, ids: Sequence[str]) -> dict[str, np.ndarray]:
    return {
        name: np.array(
            [[of_model.rows[id_, k][name] for k in range(of_model.per_prompt)] for id_ in ids], dtype=np.float64
        )
        for name in _PHOTOMETRY
    }


def _broken(of_model: Samples) -> tuple[int, int]:
    return sum(row["state"] != "ok" for row in of_model.rows.values()), len(of_model.rows)


_OF_IMAGE = [
    ("model", pa.string()),
    ("guidance_scale", pa.float64()),
    ("id", pa.string()),
    ("k", pa.int64()),
    ("prompt", pa.string()),
    ("category", pa.string()),
    ("seed", pa.int64()),
    ("file", pa.string()),
    ("sha256", pa.string()),
]
_TABLES = {
    "images": pa.schema([*_OF_IMAGE, ("state", pa.string()), *((name, pa.float64()) for name in _PHOTOMETRY)]),
    "scores": pa.schema([*_OF_IMAGE, ("scorer", pa.string()), ("score", pa.float64()), ("truncated", pa.bool_())]),
}
