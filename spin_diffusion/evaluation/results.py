"""From pictures and scores to what is concluded: results.json (results.schema.json says what is in it), scores.parquet,
images.parquet. Everything is computed anew from what drawing and scoring left, so it can be done at any time."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.evaluation.alarms import Alarm, check_alarms
from spin_diffusion.evaluation.comparison import Comparison, Row, compare
from spin_diffusion.evaluation.drawing import folder_of, index_files, read_index
from spin_diffusion.evaluation.scorers import parse_spec
from spin_diffusion.evaluation.scoring import ScoredFolder, read_scorer, read_scores
from spin_diffusion.evaluation.statistics import (
    Interval,
    best_by_average,
    best_of_k,
    mean_interval,
    overall_verdict,
    paired_difference,
    verdict,
    win_rate,
)
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.run_dir import write_file, write_json

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).with_name("results.schema.json")
MIN_PROMPTS = 20
"""A part of the prompts with fewer than these gets no interval of its own."""
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "pillow", "numpy", "scipy", "spin-diffusion")
_PHOTOMETRY = ("saturation", "clipped", "sharpness")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model whose pictures were drawn and scored."""

    name: str
    role: Literal["baseline", "round", "rival", "candidate"]
    folder: ScoredFolder
    round_: int | None = None
    """0 for the base of a run."""
    source: str = ""
    kind: Literal["pipeline", "round", "images"] = "pipeline"
    base: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class _Pictures:
    """The pictures of one model at one guidance scale, by (prompt id, number of the image)."""

    rows: dict[tuple[str, int], dict[str, Any]]
    scores: dict[str, dict[tuple[str, int], dict[str, Any]]]


def conclude(
    root: Path,
    models: Sequence[EvaluatedModel],
    protocol: dict[str, Any],
    specs: Sequence[str],
    *,
    title: str,
    headline_scale: float | None,
    training_captions: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[Comparison]]:
    """Write results.json, scores.parquet and images.parquet below `root`; return the results and their comparisons.

    A prompt counts at a guidance scale when every model has all of its images there, each with every score.

    Args:
        models: the baseline first.
        headline_scale: guidance scale of the verdict at the top of the page.
        training_captions: to find evaluation prompts that were trained on.

    Raises:
        InputError: pictures that are missing, or fewer than 2 prompts that count.
    """
    baseline, scales = models[0].name, protocol["guidance_scales"]
    pictures = {(model.name, scale): _read_pictures(model.folder, scale, specs) for model in models for scale in scales}
    scorers = [_scorer_entry(models, pictures, spec) for spec in specs]
    ran = [scorer["name"] for scorer in scorers if scorer["state"] == "run"]
    roles = {scorer["name"]: scorer["role"] for scorer in scorers}
    complete = {scale: _complete(pictures, models, scale, protocol["images_per_prompt"], ran) for scale in scales}
    arrays = {
        (model.name, scale, name): _array(pictures[model.name, scale], name, complete[scale])
        for model in models
        for scale in scales
        for name in ran
    }
    comparisons = compare(
        [Row(model, scale, name, scores, roles[name]) for (model, scale, name), scores in arrays.items()], baseline
    )
    entries = [_comparison_entry(comparison, baseline) for comparison in comparisons if comparison.p is not None]
    alarms = _all_alarms(models, pictures, arrays, complete, roles, ran, training_captions)
    candidates = [model for model in models[1:] if model.role != "rival"] or list(models[1:])
    results = {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "protocol": protocol,
        "baseline": baseline,
        "headline": {
            "model": candidates[-1].name if candidates else None,
            "guidance_scale": headline_scale if headline_scale in scales else scales[-1],
        },
        "models": [
            {"name": m.name, "role": m.role, "round": m.round_, "source": m.source, "kind": m.kind, "base": m.base,
             "weights_sha256": m.weights_sha256}
            for m in models
        ],
        "scorers": scorers,
        "results": _aggregates(arrays, comparisons, ran, roles),
        "comparisons": entries,
        "verdicts": [
            _verdict_entry(model.name, scale, entries, roles, alarms) for model in models[1:] for scale in scales
        ] if ran else [],
        "alarms": alarms,
        "breakdowns": _breakdowns(models, scales, pictures, arrays, complete, ran),
        "failures": _failures(models, scales, pictures, ran),
        "environment": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }  # fmt: skip
    _check_schema(results)
    _write_tables(root, models, scales, pictures)
    write_json(root / "results.json", results)
    return results, comparisons


def _check_schema(results: dict[str, Any]) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(results))
    assert error is None, f"results.json would not follow its schema at {error.json_path}: {error.message[:200]}"


# Reading


def _read_pictures(folder: ScoredFolder, scale: float | None, specs: Sequence[str]) -> _Pictures:
    rows = {
        (row["id"], row["k"]): row | {"path": index.parent / row["file"] if row["file"] else None}
        for index in index_files(folder.pictures, scale)
        for row in read_index(index)
    }
    scores: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for spec in specs:
        name = parse_spec(spec)[0]
        scores[name] = {
            (row["id"], row["k"]): row
            for row in read_scores(folder.scores, name, scale)
            # A score belongs to the picture that it was given for
            if rows.get((row["id"], row["k"]), {}).get("sha256") == row["sha256"]
        }
    return _Pictures(rows, scores)


def _scorer_entry(
    models: Sequence[EvaluatedModel], pictures: dict[tuple[str, float | None], _Pictures], spec: str
) -> dict[str, Any]:
    name = parse_spec(spec)[0]
    said = [read_scorer(model.folder.scores, name) for model in models]
    entry = next((s for s in said if s["state"] == "not run"), said[0])
    prompts = {
        of_model.rows[key]["prompt"]
        for of_model in pictures.values()
        for key, row in of_model.scores[name].items()
        if row["truncated"]
    }
    return entry | {"truncated_prompts": len(prompts)}


def _complete(
    pictures: dict[tuple[str, float | None], _Pictures],
    models: Sequence[EvaluatedModel],
    scale: float | None,
    images: int,
    ran: Sequence[str],
) -> list[str]:
    """Ids of the prompts that count, in the baseline's order."""
    of_scale = [pictures[model.name, scale] for model in models]
    ids = list(dict.fromkeys(id_ for id_, _ in of_scale[0].rows))
    keys = {id_: [(id_, k) for k in range(images)] for id_ in ids}
    kept = [
        id_
        for id_ in ids
        if all(of_model.rows.get(key, {}).get("path") for of_model in of_scale for key in keys[id_])
        and all(key in of_model.scores[name] for of_model in of_scale for name in ran for key in keys[id_])
    ]
    if len(kept) < 2:
        raise InputError(
            f"only {len(kept)} prompts have a picture by every model at {folder_of(scale)}: too few to compare; "
            "look for what failed in the index files beside the pictures"
        )
    return kept


def _images(of_model: _Pictures) -> int:
    return 1 + max(k for _, k in of_model.rows)


def _array(of_model: _Pictures, name: str, ids: Sequence[str]) -> np.ndarray:
    """(prompts, images) scores."""
    images = _images(of_model)
    return np.array([[of_model.scores[name][id_, k]["score"] for k in range(images)] for id_ in ids])


# Concluding


def _comparison_entry(c: Comparison, baseline: str) -> dict[str, Any]:
    return {
        "model": c.model, "baseline": baseline, "scorer": c.scorer, "guidance_scale": c.guidance_scale,
        "num_prompts": c.num_prompts, "difference": c.difference.mean, "low": c.difference.low,
        "high": c.difference.high, "wins": c.wins, "ties": c.ties, "losses": c.losses,
        "win_rate": win_rate(c.wins, c.ties, c.losses), "p": c.p, "p_holm": c.p_holm,
        "verdict": verdict(c.difference, c.p_holm, c.role == "drift"),
    }  # fmt: skip


def _verdict_entry(
    model: str, scale: float | None, entries: list[dict[str, Any]], roles: dict[str, Any], alarms: list[dict[str, Any]]
) -> dict[str, Any]:
    verdicts = {e["scorer"]: e["verdict"] for e in entries if e["model"] == model and e["guidance_scale"] == scale}
    states = {a["id"]: a["state"] for a in alarms if a["model"] == model and a["guidance_scale"] == scale}
    said, reason = overall_verdict(verdicts, roles, states)
    return {"model": model, "guidance_scale": scale, "verdict": said, "reason": reason}


def _aggregates(
    arrays: dict[tuple[str, float | None, str], np.ndarray],
    comparisons: Sequence[Comparison],
    ran: Sequence[str],
    roles: dict[str, Any],
) -> list[dict[str, Any]]:
    def entry(model: str, scale: float | None, name: str, kind: str, per_prompt: np.ndarray, interval: Interval):
        return {
            "model": model, "scorer": name, "guidance_scale": scale, "aggregate": kind, "num_prompts": len(per_prompt),
            "mean": interval.mean, "low": interval.low, "high": interval.high, "sd": float(per_prompt.std(ddof=1)),
        }  # fmt: skip

    found = []
    for c in comparisons:
        found.append(entry(c.model, c.guidance_scale, c.scorer, "mean",
                           arrays[c.model, c.guidance_scale, c.scorer].mean(axis=1), c.mean))  # fmt: skip
    for model, scale in dict.fromkeys((model, scale) for model, scale, _ in arrays):
        of_model = {name: arrays[model, scale, name] for name in ran}
        if next(iter(of_model.values())).shape[1] == 1:
            continue  # the best of one is that one
        for name, scores in of_model.items():
            best = best_of_k(scores)
            found.append(entry(model, scale, name, "best_of_k", best, mean_interval(best)))
        judged = {name: scores for name, scores in of_model.items() if roles[name] != "drift"}
        for name, best in best_by_average(judged).items() if judged else ():
            found.append(entry(model, scale, name, "best_by_average", best, mean_interval(best)))
    return found


def _all_alarms(
    models: Sequence[EvaluatedModel],
    pictures: dict[tuple[str, float | None], _Pictures],
    arrays: dict[tuple[str, float | None, str], np.ndarray],
    complete: dict[float | None, list[str]],
    roles: dict[str, Any],
    ran: Sequence[str],
    training_captions: Sequence[str] | None,
) -> list[dict[str, Any]]:
    found = []
    rounds = [model for model in models if model.round_ is not None and model.role != "rival"]
    for model in models[1:]:
        previous = rounds[rounds.index(model) - 1] if model in rounds and rounds.index(model) > 0 else None
        for scale, ids in complete.items():
            base, candidate = pictures[models[0].name, scale], pictures[model.name, scale]

            def scores(name: str, scale: float | None = scale) -> dict[str, np.ndarray]:
                return {scorer: arrays[name, scale, scorer] for scorer in ran}

            alarms: list[Alarm] = check_alarms(
                scores(models[0].name),
                scores(model.name),
                roles=roles,
                baseline_features=_features(base, ids),
                candidate_features=_features(candidate, ids),
                baseline_photometry=_photometry(base, ids),
                candidate_photometry=_photometry(candidate, ids),
                baseline_broken=_broken(base),
                candidate_broken=_broken(candidate),
                previous=scores(previous.name) if previous is not None and previous.round_ else None,
                prompts=list(dict.fromkeys(row["prompt"] for row in base.rows.values())),
                training_captions=training_captions,
            )
            found += [
                {"id": alarm.id, "model": model.name, "guidance_scale": scale, "state": alarm.state,
                 "value": alarm.value, "threshold": alarm.threshold, "explanation": alarm.explanation}
                for alarm in alarms
            ]  # fmt: skip
    return found


def _features(of_model: _Pictures, ids: Sequence[str]) -> np.ndarray | None:
    """(prompts, images, width) of the scorer that kept them; None when none did."""
    for rows in of_model.scores.values():
        if rows and next(iter(rows.values()))["features"] is not None:
            images = _images(of_model)
            return np.array([[rows[id_, k]["features"] for k in range(images)] for id_ in ids], dtype=np.float32)
    return None


def _photometry(of_model: _Pictures, ids: Sequence[str]) -> dict[str, np.ndarray]:
    images = _images(of_model)
    return {
        name: np.array([[of_model.rows[id_, k][name] for k in range(images)] for id_ in ids], dtype=np.float64)
        for name in _PHOTOMETRY
    }


def _broken(of_model: _Pictures) -> tuple[int, int]:
    return sum(row["state"] != "ok" for row in of_model.rows.values()), len(of_model.rows)


def _breakdowns(
    models: Sequence[EvaluatedModel],
    scales: Sequence[float | None],
    pictures: dict[tuple[str, float | None], _Pictures],
    arrays: dict[tuple[str, float | None, str], np.ndarray],
    complete: dict[float | None, list[str]],
    ran: Sequence[str],
) -> list[dict[str, Any]]:
    """Differences within categories of prompts, and within quarters by the prompts' length."""
    found = []
    for scale in scales:
        rows = {id_: row for (id_, _), row in pictures[models[0].name, scale].rows.items()}
        parts = _parts([rows[id_] for id_ in complete[scale]])
        for model in models[1:]:
            for name in ran:
                ours, theirs = arrays[model.name, scale, name], arrays[models[0].name, scale, name]
                for (by, value), places in parts.items():
                    few = len(places) < MIN_PROMPTS
                    mean = float((ours[places].mean(axis=1) - theirs[places].mean(axis=1)).mean())
                    # An interval from a handful of prompts would be too narrow
                    interval = None if few else paired_difference(ours[places], theirs[places], resamples=2_000)
                    found.append(
                        {"by": by, "value": value, "model": model.name, "scorer": name, "guidance_scale": scale,
                         "num_prompts": len(places), "difference": mean,
                         "low": interval.low if interval else None, "high": interval.high if interval else None}
                    )  # fmt: skip
    return found


def _parts(rows: list[dict[str, Any]]) -> dict[tuple[str, str], np.ndarray]:
    """The places of the prompts in each category and in each quarter by length; a part that is everything is none."""
    categories = [row["category"] for row in rows]
    parts = {
        ("category", category): np.flatnonzero(np.array(categories) == category)
        for category in sorted(set(categories))
        if category
    }
    lengths = np.array([len(row["prompt"]) for row in rows])
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1], method="nearest"))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        last = high == edges[-1]
        inside = (lengths >= low) & ((lengths <= high) if last else (lengths < high))
        parts["prompt length", f"{low} to {high if last else high - 1} characters"] = np.flatnonzero(inside)
    return {key: places for key, places in parts.items() if 0 < len(places) < len(rows)}


def _failures(
    models: Sequence[EvaluatedModel],
    scales: Sequence[float | None],
    pictures: dict[tuple[str, float | None], _Pictures],
    ran: Sequence[str],
) -> list[dict[str, Any]]:
    found = []
    for model in models:
        for scale in scales:
            of_model = pictures[model.name, scale]
            for key, row in of_model.rows.items():
                what = "" if row["state"] == "ok" else row["state"]
                if row["path"] is None:
                    what += "; its prompt is left out for every model"
                elif lacking := [name for name in ran if key not in of_model.scores[name]]:
                    what = f"no score by {', '.join(lacking)}; its prompt is left out for every model"
                if what:
                    found.append({"model": model.name, "guidance_scale": scale, "id": row["id"],
                                  "prompt": row["prompt"], "what": what})  # fmt: skip
    return found


# Tables


def _write_tables(
    root: Path,
    models: Sequence[EvaluatedModel],
    scales: Sequence[float | None],
    pictures: dict[tuple[str, float | None], _Pictures],
) -> None:
    images, scores = [], []
    for model in models:
        for scale in scales:
            of_model = pictures[model.name, scale]
            for key, row in of_model.rows.items():
                file = Path(os.path.relpath(row["path"], root)).as_posix() if row["path"] else None
                of_image = {
                    "model": model.name, "guidance_scale": scale, "id": row["id"], "k": row["k"],
                    "prompt": row["prompt"], "category": row["category"], "seed": row["seed"], "file": file,
                    "sha256": row["sha256"],
                }  # fmt: skip
                images.append(of_image | {"state": row["state"]} | {name: row[name] for name in _PHOTOMETRY})
                scores += [
                    of_image | {"scorer": name, "score": scored[key]["score"], "truncated": scored[key]["truncated"]}
                    for name, scored in of_model.scores.items()
                    if key in scored
                ]
    for name, rows in (("images", images), ("scores", scores)):
        table = pa.Table.from_pylist(rows, schema=_TABLES[name])
        write_file(root / f"{name}.parquet", lambda part, table=table: pq.write_table(table, part))


_OF_IMAGE = [
    ("model", pa.string()), ("guidance_scale", pa.float64()), ("id", pa.string()), ("k", pa.int64()),
    ("prompt", pa.string()), ("category", pa.string()), ("seed", pa.int64()), ("file", pa.string()),
    ("sha256", pa.string()),
]  # fmt: skip
_TABLES = {
    "images": pa.schema([*_OF_IMAGE, ("state", pa.string()), *((name, pa.float64()) for name in _PHOTOMETRY)]),
    "scores": pa.schema([*_OF_IMAGE, ("scorer", pa.string()), ("score", pa.float64()), ("truncated", pa.bool_())]),
}
