"""What is concluded of pictures and of answers alike: aggregates, comparisons, verdicts, alarms, breakdowns, failures.

A sample is a picture or an answer. results.py and answer_results.py read theirs, say which alarms there are, and write
their table; the rest is here. results.schema.json says what is in results.json.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.evaluation.alarms import Alarm
from spin_diffusion.evaluation.breakdowns import breakdowns
from spin_diffusion.evaluation.comparison import Comparison, Row, compare, compare_others
from spin_diffusion.evaluation.curves import finite, thinned
from spin_diffusion.evaluation.modalities import Modality, guidance_scales, modality_of, samples_per_prompt
from spin_diffusion.evaluation.ranking import rank
from spin_diffusion.evaluation.records import SCHEMA_VERSION, schema_problem
from spin_diffusion.evaluation.samples import Arrays, BySample, EvaluatedModel, Key, Samples, Scores, Watched
from spin_diffusion.evaluation.statistics import (
    Interval,
    best_by_average,
    best_of_k,
    mean_interval,
    overall_verdict,
    verdict,
    win_rate,
)
from spin_diffusion.samples.pictures import folder_of
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY
from spin_diffusion.store.run_dir import write_file, write_json


def conclude_samples(
    models: Sequence[EvaluatedModel],
    samples: BySample,
    protocol: dict[str, Any],
    said: dict[str, dict[str, Any]],
    *,
    title: str,
    headline_scale: float | None,
    check: Callable[[Watched], list[Alarm]],
    packages: Sequence[str],
    curves: Sequence[Mapping[str, Any]] | None,
    measures: Sequence[Mapping[str, Any]] | None,
    events: Sequence[Mapping[str, Any]] | None = None,
    ledger: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], list[Comparison]]:
    """The content of results.json, valid by its schema, and its comparisons.

    A prompt counts at a guidance scale when every model has all of its samples there, each with every score.

    Args:
        models: the baseline first.
        said: scorer -> what is known of it.
        check: all alarms of one model.
        packages: whose versions are part of the results.
        curves: rows of the training curves.
        measures: what else was measured of the models.
        events: what the rules of health said of training.
        ledger: what each phase of each round took.

    Raises:
        InputError: fewer than 2 prompts that count.
    """
    baseline, scales, modality = models[0].name, guidance_scales(protocol), modality_of(protocol)
    scorers = [entry | {"truncated_prompts": _truncated_prompts(samples, name)} for name, entry in said.items()]
    ran = [scorer["name"] for scorer in scorers if scorer["state"] == "run"]
    roles = {scorer["name"]: scorer["role"] for scorer in scorers}
    per_prompt = samples_per_prompt(protocol)
    lost = {
        (model.name, scale): _lost(samples[baseline, scale], samples[model.name, scale], per_prompt, ran)
        for model in models
        for scale in scales
    }
    complete = {
        scale: _complete(samples[baseline, scale], {m.name: lost[m.name, scale] for m in models}, modality, scale)
        for scale in scales
    }
    prompts = {
        scale: [(row["prompt"], row["category"]) for row in (samples[baseline, scale].rows[id_, 0] for id_ in ids)]
        for scale, ids in complete.items()
    }
    arrays = {
        (model.name, scale, name): _array(samples[model.name, scale], name, complete[scale])
        for model in models
        for scale in scales
        for name in ran
    }
    rows = [
        Row(model, scale, name, scores, roles[name], modality, lost[model, scale])
        for (model, scale, name), scores in arrays.items()
    ]
    comparisons = compare(rows, baseline)
    entries = [_comparison_entry(comparison) for comparison in comparisons if comparison.p is not None]
    others = [_comparison_entry(comparison) for comparison in compare_others(rows, baseline)]
    alarms = _all_alarms(models, samples, arrays, complete, roles, ran, check)
    counts = [
        _counts(model.name, scale, samples[model.name, scale], lost[model.name, scale], ran)
        for model in models
        for scale in scales
    ]
    verdicts = [
        _verdict_entry(count, entries, roles, alarms, modality)
        for count in counts
        if ran and count["model"] != baseline
    ]
    results = {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "protocol": protocol,
        "baseline": baseline,
        "headline": {
            "model": _headline_model(models),
            "guidance_scale": headline_scale if headline_scale in scales else scales[-1],
        },
        "models": [_model_entry(model) for model in models],
        "samples": counts,
        "scorers": scorers,
        "results": _aggregates(arrays, comparisons, ran, roles),
        "comparisons": entries,
        "verdicts": verdicts,
        "alarms": alarms,
        "breakdowns": breakdowns([model.name for model in models], prompts, arrays, ran),
        "failures": _failures(models, scales, samples, ran),
        "environment": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }
    of_training = {
        "training_curves": thinned(curves or []),
        "measures": [finite(measure) for measure in measures or []],
        "training_events": [dict(event) for event in events or []],
        "ledger": [dict(entry) for entry in ledger or []],
    }
    results |= {name: rows for name, rows in of_training.items() if rows}
    if others:
        names = [model.name for model in models]
        places = [rank(names, scale, [*entries, *others], scorers, verdicts) for scale in scales]
        results |= {"between_others": others, "ranking": [place for place in places if place is not None]}
    problem = schema_problem(results)
    assert problem is None, f"results.json would not follow its schema at {problem}"
    return results, comparisons


def first_not_run(said: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is known of a scorer, of what each model's folder says of it: run only if it was run for all, and was the
    same scorer each time."""
    apart = {s.get(KEY) for s in said if s["state"] == "run"}
    if len(apart) > 1:
        return said[0] | {"state": "not run", "reason": "not every model was scored by the same version of it"}
    return next((s for s in said if s["state"] == "not run"), said[0])


def belonging(rows: Mapping[Key, dict[str, Any]], scores: Sequence[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """The scores that were given for these very samples."""
    keyed = ((row["id"], row["k"]) for row in scores)
    return {
        key: row for key, row in zip(keyed, scores, strict=True) if rows.get(key, {}).get("sha256") == row["sha256"]
    }


def _truncated_prompts(samples: BySample, name: str) -> int:
    prompts = {
        of_model.rows[key]["prompt"]
        for of_model in samples.values()
        for key, row in of_model.scores[name].items()
        if row["truncated"]
    }
    return len(prompts)


def _lost(baseline: Samples, of_model: Samples, per_prompt: int, ran: Sequence[str]) -> frozenset[str]:
    """Ids of the baseline's prompts of which a model lacks a sample, or the score of one."""
    return frozenset(
        id_
        for id_ in {id_ for id_, _ in baseline.rows}
        for key in [(id_, k) for k in range(per_prompt)]
        if not of_model.rows.get(key, {}).get("there") or any(key not in of_model.scores[name] for name in ran)
    )


def _complete(
    baseline: Samples, lost: Mapping[str, frozenset[str]], modality: Modality, scale: float | None
) -> list[str]:
    """Ids of the prompts that count, in the baseline's order."""
    left_out = frozenset().union(*lost.values())
    kept = [id_ for id_ in dict.fromkeys(id_ for id_, _ in baseline.rows) if id_ not in left_out]
    if len(kept) < 2:
        what, at = modality.plural, modality.at.format(folder_of(scale))
        failed = ", ".join(f"{model} {len(ids)}" for model, ids in lost.items() if ids) or "none by any"
        raise InputError(
            f"only {len(kept)} prompts have all {what} by every model{at}, and their scores (lost: {failed}): too few "
            f"to compare; look for what failed in the files of the {what} and of the scores"
        )
    return kept


def _counts(
    model: str, scale: float | None, of_model: Samples, lost: frozenset[str], ran: Sequence[str]
) -> dict[str, Any]:
    """How many samples a model was asked for, how many of them are missing, unscored or broken, and what that costs."""
    there = {key: row for key, row in of_model.rows.items() if row["there"]}
    return {
        "model": model, "guidance_scale": scale, "asked": len(of_model.rows),
        "missing": len(of_model.rows) - len(there),
        "unscored": sum(any(key not in of_model.scores[name] for name in ran) for key in there),
        "broken": sum(row["state"] != "ok" for row in there.values()), "prompts_lost": len(lost),
    }  # fmt: skip


def _array(of_model: Samples, name: str, ids: Sequence[str]) -> np.ndarray:
    """(prompts, samples) scores."""
    return np.array([[of_model.scores[name][id_, k]["score"] for k in range(of_model.per_prompt)] for id_ in ids])


# Concluding


def _headline_model(models: Sequence[EvaluatedModel]) -> str | None:
    """The last one that is not a rival; of rivals alone the last."""
    candidates = [model for model in models[1:] if model.role != "rival"] or list(models[1:])
    return candidates[-1].name if candidates else None


def _model_entry(m: EvaluatedModel) -> dict[str, Any]:
    return {
        "name": m.name, "role": m.role, "round": m.round_, "source": m.source, "kind": m.kind, "base": m.base,
        "weights_sha256": m.weights_sha256,
    }  # fmt: skip


def _comparison_entry(c: Comparison) -> dict[str, Any]:
    won = win_rate(c.wins, c.ties, c.losses)
    return {
        "model": c.model, "baseline": c.other, "scorer": c.scorer, "guidance_scale": c.guidance_scale,
        "num_prompts": c.num_prompts, "difference": c.difference.mean, "low": c.difference.low,
        "high": c.difference.high, "wins": c.wins, "ties": c.ties, "losses": c.losses,
        "win_rate": won.mean, "win_rate_low": won.low, "win_rate_high": won.high, "p": c.p, "p_holm": c.p_holm,
        "verdict": verdict(c.difference, c.p_holm, c.wins - c.losses, c.role == "drift"),
    }  # fmt: skip


def _verdict_entry(
    count: dict[str, Any],
    entries: list[dict[str, Any]],
    roles: dict[str, Any],
    alarms: list[dict[str, Any]],
    modality: Modality,
) -> dict[str, Any]:
    model, scale = count["model"], count["guidance_scale"]
    ours = [e for e in entries if e["model"] == model and e["guidance_scale"] == scale]
    verdicts = {e["scorer"]: e["verdict"] for e in ours}
    moved = [e["scorer"] for e in ours if e["low"] > 0 or e["high"] < 0]
    states = {a["id"]: a["state"] for a in alarms if a["model"] == model and a["guidance_scale"] == scale}
    said, reason = overall_verdict(verdicts, roles, states, modality, moved)
    if count["prompts_lost"]:
        reason += f" It failed at {count['prompts_lost']} prompts, which no mean includes."
    return {"model": model, "guidance_scale": scale, "verdict": said, "reason": reason}


def _aggregates(
    arrays: Arrays,
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
    samples: BySample,
    arrays: Arrays,
    complete: dict[float | None, list[str]],
    roles: dict[str, Any],
    ran: Sequence[str],
    check: Callable[[Watched], list[Alarm]],
) -> list[dict[str, Any]]:
    found = []
    rounds = [model for model in models if model.round_ is not None and model.role != "rival"]
    for model in models[1:]:
        previous = rounds[rounds.index(model) - 1] if model in rounds and rounds.index(model) > 0 else None
        for scale, ids in complete.items():

            def scores(name: str, scale: float | None = scale) -> Scores:
                return {scorer: arrays[name, scale, scorer] for scorer in ran}

            watched = Watched(
                samples[models[0].name, scale], samples[model.name, scale], ids, scores(models[0].name),
                scores(model.name), scores(previous.name) if previous is not None and previous.round_ else None, roles,
            )  # fmt: skip
            found += [
                {"id": alarm.id, "model": model.name, "guidance_scale": scale, "state": alarm.state,
                 "value": alarm.value, "threshold": alarm.threshold, "explanation": alarm.explanation}
                for alarm in check(watched)
            ]  # fmt: skip
    return found


def _failures(
    models: Sequence[EvaluatedModel], scales: Sequence[float | None], samples: BySample, ran: Sequence[str]
) -> list[dict[str, Any]]:
    found = []
    for model in models:
        for scale in scales:
            of_model = samples[model.name, scale]
            for key, row in of_model.rows.items():
                what = "" if row["state"] == "ok" else row["state"]
                if not row["there"]:
                    what += "; its prompt is left out for every model"
                elif lacking := [name for name in ran if key not in of_model.scores[name]]:
                    what = f"no score by {', '.join(lacking)}; its prompt is left out for every model"
                if what:
                    found.append({"model": model.name, "guidance_scale": scale, "id": row["id"],
                                  "prompt": row["prompt"], "what": what})  # fmt: skip
    return found


def write_results(
    root: Path,
    results: dict[str, Any],
    models: Sequence[EvaluatedModel],
    samples: BySample,
    name: str,
    schemas: Mapping[str, pa.Schema],
) -> None:
    """Write the table of samples, called `name`, scores.parquet and, last of all, results.json below `root`.

    Args:
        schemas: `name` and "scores" -> the columns; those of a sample that its scores have too are taken from it.
    """
    tables: dict[str, list[dict[str, Any]]] = {name: [], "scores": []}
    for model in models:
        for scale in guidance_scales(results["protocol"]):
            of_model = samples[model.name, scale]
            for key, row in of_model.rows.items():
                whole = row | {"model": model.name, "guidance_scale": scale}
                tables[name].append({column: whole[column] for column in schemas[name].names})
                columns = [column for column in schemas["scores"].names if column in whole]
                tables["scores"] += [
                    {column: whole[column] for column in columns}
                    | {"scorer": scorer, "score": scored[key]["score"], "truncated": scored[key]["truncated"]}
                    for scorer, scored in of_model.scores.items()
                    if key in scored
                ]
    for table_name, rows in tables.items():
        table = pa.Table.from_pylist(rows, schema=schemas[table_name])
        write_file(root / f"{table_name}.parquet", lambda part, table=table: pq.write_table(table, part))
    write_json(root / "results.json", results)
