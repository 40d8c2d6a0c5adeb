"""What is concluded of pictures and of answers alike: aggregates, comparisons, verdicts, alarms, breakdowns, failures.

A sample is a picture or an answer. results.py and answer_results.py read theirs, say which alarms there are, and write
their table; the rest is here. results.schema.json says what is in results.json, `records` names its types.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.evaluation.alarms import Alarm
from spin_diffusion.evaluation.breakdowns import breakdowns
from spin_diffusion.evaluation.comparison import Comparison, Row, compare, compare_others
from spin_diffusion.evaluation.curves import finite, thinned
from spin_diffusion.evaluation.modalities import Modality, guidance_scales, modality_of, samples_per_prompt
from spin_diffusion.evaluation.ranking import rank
from spin_diffusion.evaluation.records import (
    Aggregate,
    AggregateEntry,
    AlarmEntry,
    ComparisonEntry,
    CountEntry,
    FailureEntry,
    Headline,
    ModelEntry,
    OfTraining,
    Protocol,
    Results,
    Role,
    Scale,
    ScorerEntry,
    TrainingEntries,
    VerdictEntry,
)
from spin_diffusion.evaluation.results_file import SCHEMA_VERSION, schema_problem
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
from spin_diffusion.store.files import write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY
from spin_diffusion.store.run_dir import write_file


def conclude_samples(
    models: Sequence[EvaluatedModel],
    samples: BySample,
    protocol: Mapping[str, Any],
    about: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    headline_scale: Scale,
    check: Callable[[Watched], list[Alarm]],
    packages: Sequence[str],
    **training: Unpack[OfTraining],
) -> tuple[Results, list[Comparison]]:
    """The content of results.json, valid by its schema, and its comparisons.

    A prompt counts at a guidance scale when every model has all of its samples there, each with every score.

    Args:
        models: the baseline first.
        about: scorer -> what is known of it.
        check: all alarms of one model.
        packages: whose versions are part of the results.
        training: for the page of a whole run.

    Raises:
        InputError: fewer than 2 prompts that count.
    """
    asked = cast(Protocol, protocol)  # like all that is read from files: the schema has the last word
    compared = _compared(models, samples, asked, about)
    scales, names = compared.scales, [model.name for model in models]
    rows = compared.rows()
    comparisons = compare(rows, names[0])
    entries = [_comparison_entry(comparison) for comparison in comparisons if comparison.p is not None]
    others = [_comparison_entry(comparison) for comparison in compare_others(rows, names[0])]
    alarms, counts = _alarms(compared, check), _counts(compared)
    verdicts = [
        _verdict_entry(count, entries, compared.roles, alarms, compared.modality)
        for count in counts
        if compared.roles and count["model"] != names[0]
    ]
    results: Results = {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "protocol": asked,
        "baseline": names[0],
        "headline": _headline(models, headline_scale if headline_scale in scales else scales[-1]),
        "models": [_model_entry(model) for model in models],
        "samples": counts,
        "scorers": compared.scorers,
        "results": _aggregates(compared.arrays, comparisons, compared.roles),
        "comparisons": entries,
        "verdicts": verdicts,
        "alarms": alarms,
        "breakdowns": breakdowns(names, compared.prompts(), compared.arrays, list(compared.roles)),
        "failures": list(_failures(compared)),
        "environment": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }
    results |= _training(training)
    if others:
        places = [rank(names, scale, [*entries, *others], compared.scorers, verdicts) for scale in scales]
        results["between_others"] = others
        results["ranking"] = [place for place in places if place is not None]
    problem = schema_problem(results)
    assert problem is None, f"results.json would not follow its schema at {problem}"
    return results, comparisons


def _training(training: OfTraining) -> TrainingEntries:
    """Curves, measures, events and ledger as results.json has them; nothing of what is empty."""
    entries = {
        "training_curves": thinned(list(training.get("curves") or [])),
        "measures": [finite(measure) for measure in training.get("measures") or []],
        "training_events": [dict(event) for event in training.get("events") or []],
        "ledger": [dict(entry) for entry in training.get("ledger") or []],
    }
    return cast(TrainingEntries, {name: rows for name, rows in entries.items() if rows})


@dataclass(frozen=True, eq=False)
class _Compared:
    """The samples of all models, and the scores of those prompts that count."""

    models: Sequence[EvaluatedModel]
    samples: BySample
    scales: list[Scale]
    modality: Modality
    scorers: list[ScorerEntry]
    roles: dict[str, Role]
    """Scorer that was run -> its role."""
    lost: dict[tuple[str, Scale], frozenset[str]]
    """(model, guidance scale) -> ids of the baseline's prompts of which the model lacks a sample, or its score."""
    complete: dict[Scale, list[str]]
    """Guidance scale -> ids of the prompts that count, in the baseline's order."""
    arrays: Arrays

    def each(self) -> Iterator[tuple[EvaluatedModel, Scale, Samples]]:
        """Every model at every guidance scale, with its samples."""
        return ((model, scale, self.samples[model.name, scale]) for model in self.models for scale in self.scales)

    def rows(self) -> list[Row]:
        """The scores, as they are compared."""
        return [
            Row(model, scale, scorer, scores, self.roles[scorer], self.modality, self.lost[model, scale])
            for (model, scale, scorer), scores in self.arrays.items()
        ]

    def prompts(self) -> dict[Scale, list[tuple[str, str]]]:
        """Guidance scale -> (text, category) of the prompts that count."""
        baseline = {scale: self.samples[self.models[0].name, scale].rows for scale in self.scales}
        return {
            scale: [(baseline[scale][id_, 0]["prompt"], baseline[scale][id_, 0]["category"]) for id_ in ids]
            for scale, ids in self.complete.items()
        }


def _compared(
    models: Sequence[EvaluatedModel], samples: BySample, protocol: Protocol, about: Mapping[str, Mapping[str, Any]]
) -> _Compared:
    """The scores of the prompts that count; InputError when there are fewer than 2."""
    scales, modality, baseline = guidance_scales(protocol), modality_of(protocol), models[0].name
    scorers = [
        cast(ScorerEntry, dict(entry) | {"truncated_prompts": _truncated_prompts(samples, name)})
        for name, entry in about.items()
    ]
    roles = {scorer["name"]: scorer["role"] for scorer in scorers if scorer["state"] == "run"}
    per_prompt = samples_per_prompt(protocol)
    lost = {
        (model.name, scale): _lost(samples[baseline, scale], samples[model.name, scale], per_prompt, list(roles))
        for model in models
        for scale in scales
    }
    complete = {
        scale: _complete(samples[baseline, scale], {m.name: lost[m.name, scale] for m in models}, modality, scale)
        for scale in scales
    }
    arrays = {
        (model.name, scale, name): _array(samples[model.name, scale], name, complete[scale])
        for model in models
        for scale in scales
        for name in roles
    }
    return _Compared(models, samples, scales, modality, scorers, roles, lost, complete, arrays)


def first_not_run(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is known of a scorer, of what each model's folder says of it: run only if it was run for all, and was the
    same scorer each time."""
    if len({record.get(KEY) for record in records if record["state"] == "run"}) > 1:
        return records[0] | {"state": "not run", "reason": "not every model was scored by the same version of it"}
    return next((record for record in records if record["state"] == "not run"), records[0])


def belonging(rows: Mapping[Key, dict[str, Any]], scores: Sequence[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """The scores that were given for these very samples."""
    by_key = {(row["id"], row["k"]): row for row in scores}
    return {key: row for key, row in by_key.items() if rows.get(key, {}).get("sha256") == row["sha256"]}


def _truncated_prompts(samples: BySample, name: str) -> int:
    prompts = {
        of_model.rows[key]["prompt"]
        for of_model in samples.values()
        for key, row in of_model.scores[name].items()
        if row["truncated"]
    }
    return len(prompts)


def _lost(baseline: Samples, of_model: Samples, per_prompt: int, ran: Sequence[str]) -> frozenset[str]:
    return frozenset(
        id_
        for id_ in {id_ for id_, _ in baseline.rows}
        for key in [(id_, k) for k in range(per_prompt)]
        if not of_model.rows.get(key, {}).get("there") or any(key not in of_model.scores[name] for name in ran)
    )


def _complete(baseline: Samples, lost: Mapping[str, frozenset[str]], modality: Modality, scale: Scale) -> list[str]:
    left_out = frozenset().union(*lost.values())
    complete = [id_ for id_ in dict.fromkeys(id_ for id_, _ in baseline.rows) if id_ not in left_out]
    if len(complete) < 2:
        what, at = modality.plural, modality.at.format(folder_of(scale))
        failed = ", ".join(f"{model} {len(ids)}" for model, ids in lost.items() if ids) or "none by any"
        raise InputError(
            f"only {len(complete)} prompts have all {what} by every model{at}, and their scores (lost: {failed}): too "
            f"few to compare; look for what failed in the files of the {what} and of the scores"
        )
    return complete


def _array(of_model: Samples, name: str, ids: Sequence[str]) -> np.ndarray:
    """(prompts, samples) scores."""
    return np.array([[of_model.scores[name][id_, k]["score"] for k in range(of_model.per_prompt)] for id_ in ids])


# Entries of results.json


def _counts(compared: _Compared) -> list[CountEntry]:
    entries: list[CountEntry] = []
    for model, scale, of_model in compared.each():
        there = {key: row for key, row in of_model.rows.items() if row["there"]}
        unscored = sum(any(key not in of_model.scores[name] for name in compared.roles) for key in there)
        broken, lost = sum(row["state"] != "ok" for row in there.values()), len(compared.lost[model.name, scale])
        entries.append(
            {
                "model": model.name,
                "guidance_scale": scale,
                "asked": len(of_model.rows),
                "missing": len(of_model.rows) - len(there),
                "unscored": unscored,
                "broken": broken,
                "prompts_lost": lost,
            }
        )
    return entries


def _headline(models: Sequence[EvaluatedModel], scale: Scale) -> Headline:
    """The last model that is not a rival; of rivals alone the last."""
    candidates = [model for model in models[1:] if model.role != "rival"] or list(models[1:])
    return {"model": candidates[-1].name if candidates else None, "guidance_scale": scale}


def _model_entry(model: EvaluatedModel) -> ModelEntry:
    return {
        "name": model.name,
        "role": model.role,
        "round": model.round_,
        "source": model.source,
        "kind": model.kind,
        "base": model.base,
        "weights_sha256": model.weights_sha256,
    }


def _comparison_entry(c: Comparison) -> ComparisonEntry:
    assert c.difference is not None and c.p is not None and c.p_holm is not None, "the baseline is not compared"
    assert c.wins is not None and c.ties is not None and c.losses is not None, "all or none of them are counted"
    won = win_rate(c.wins, c.ties, c.losses)
    said = verdict(c.difference, c.p_holm, c.wins - c.losses, c.role == "drift")
    return {
        "model": c.model,
        "baseline": c.other,
        "scorer": c.scorer,
        "guidance_scale": c.guidance_scale,
        "num_prompts": c.num_prompts,
        "difference": c.difference.mean,
        "low": c.difference.low,
        "high": c.difference.high,
        "wins": c.wins,
        "ties": c.ties,
        "losses": c.losses,
        "win_rate": won.mean,
        "win_rate_low": won.low,
        "win_rate_high": won.high,
        "p": c.p,
        "p_holm": c.p_holm,
        "verdict": said,
    }


def _verdict_entry(
    count: CountEntry,
    entries: Sequence[ComparisonEntry],
    roles: Mapping[str, Role],
    alarms: Sequence[AlarmEntry],
    modality: Modality,
) -> VerdictEntry:
    model, scale = count["model"], count["guidance_scale"]
    ours = [e for e in entries if e["model"] == model and e["guidance_scale"] == scale]
    verdicts = {e["scorer"]: e["verdict"] for e in ours}
    moved = [e["scorer"] for e in ours if e["low"] > 0 or e["high"] < 0]
    states = {a["id"]: a["state"] for a in alarms if a["model"] == model and a["guidance_scale"] == scale}
    concluded, reason = overall_verdict(verdicts, roles, states, modality, moved)
    if count["prompts_lost"]:
        reason += f" It failed at {count['prompts_lost']} prompts, which no mean includes."
    return {"model": model, "guidance_scale": scale, "verdict": concluded, "reason": reason}


def _aggregates(arrays: Arrays, comparisons: Sequence[Comparison], roles: Mapping[str, Role]) -> list[AggregateEntry]:
    def entry(
        at: tuple[str, Scale, str], aggregate: Aggregate, per_prompt: np.ndarray, mean: Interval | None = None
    ) -> AggregateEntry:
        model, scale, scorer = at
        interval = mean or mean_interval(per_prompt)
        return {
            "model": model,
            "scorer": scorer,
            "guidance_scale": scale,
            "aggregate": aggregate,
            "num_prompts": len(per_prompt),
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "sd": float(per_prompt.std(ddof=1)),
        }

    entries = []
    for c in comparisons:
        at = (c.model, c.guidance_scale, c.scorer)
        entries.append(entry(at, "mean", arrays[at].mean(axis=1), c.mean))
    for model, scale in dict.fromkeys((model, scale) for model, scale, _ in arrays):
        of_model = {name: arrays[model, scale, name] for name in roles}
        if next(iter(of_model.values())).shape[1] == 1:
            continue  # the best of one is that one
        entries += [entry((model, scale, name), "best_of_k", best_of_k(scores)) for name, scores in of_model.items()]
        judged = {name: scores for name, scores in of_model.items() if roles[name] != "drift"}
        best = best_by_average(judged) if judged else {}
        entries += [entry((model, scale, name), "best_by_average", scores) for name, scores in best.items()]
    return entries


def _alarms(compared: _Compared, check: Callable[[Watched], list[Alarm]]) -> list[AlarmEntry]:
    entries: list[AlarmEntry] = []
    baseline = compared.models[0]
    rounds = [model for model in compared.models if model.round_ is not None and model.role != "rival"]

    def scores(model: EvaluatedModel, scale: Scale) -> Scores:
        return {scorer: compared.arrays[model.name, scale, scorer] for scorer in compared.roles}

    for model, scale, of_model in compared.each():
        if model is baseline:
            continue
        previous = rounds[rounds.index(model) - 1] if model in rounds[1:] else None
        watched = Watched(
            compared.samples[baseline.name, scale],
            of_model,
            compared.complete[scale],
            scores(baseline, scale),
            scores(model, scale),
            scores(previous, scale) if previous is not None and previous.round_ else None,
            compared.roles,
        )
        entries += [
            {
                "id": alarm.id,
                "model": model.name,
                "guidance_scale": scale,
                "state": alarm.state,
                "value": alarm.value,
                "threshold": alarm.threshold,
                "explanation": alarm.explanation,
            }
            for alarm in check(watched)
        ]
    return entries


def _failures(compared: _Compared) -> Iterator[FailureEntry]:
    for model, scale, of_model in compared.each():
        for key, row in of_model.rows.items():
            what = "" if row["state"] == "ok" else row["state"]
            if not row["there"]:
                what += "; its prompt is left out for every model"
            elif lacking := [name for name in compared.roles if key not in of_model.scores[name]]:
                what = f"no score by {', '.join(lacking)}; its prompt is left out for every model"
            if what:
                yield {
                    "model": model.name,
                    "guidance_scale": scale,
                    "id": row["id"],
                    "prompt": row["prompt"],
                    "what": what,
                }


def write_results(
    root: Path,
    results: Results,
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
        write_file(root / f"{table_name}.parquet", partial(pq.write_table, table))
    write_json(root / "results.json", results)
