"""From samples and scores to what is concluded: results.json, scores.parquet, and images.parquet or answers.parquet.

Everything is computed anew from what drawing and scoring left, so it can be done at any time. `records` says what is in
results.json.
"""

import math
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.evaluation.alarms import check_alarms
from spin_diffusion.evaluation.comparison import breakdowns, compare, compare_others
from spin_diffusion.evaluation.evaluated import (
    EvaluatedModel,
    Samples,
    answer_of,
    first_not_run,
    read_samples,
    scorer_record,
)
from spin_diffusion.evaluation.features import Comparison, distances, missed
from spin_diffusion.evaluation.judges import Answer
from spin_diffusion.evaluation.picture_alarms import Pictures
from spin_diffusion.evaluation.records import (
    ANSWERS,
    SCHEMA_VERSION,
    Aggregate,
    AggregateEntry,
    AlarmEntry,
    ComparisonEntry,
    CountEntry,
    DistributionEntry,
    FailureEntry,
    Headline,
    Modality,
    ModelEntry,
    OfTraining,
    Protocol,
    RankingEntry,
    Results,
    Role,
    Scale,
    ScorerEntry,
    ScorerRecord,
    SweepEntry,
    TrainingEntries,
    VerdictEntry,
    guidance_scales,
    modality_of,
    samples_per_prompt,
)
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.evaluation.statistics import best_by_average, best_of_k, mean_interval
from spin_diffusion.evaluation.verdicts import overall_verdict, rank
from spin_diffusion.samples.drawn import folder_of
from spin_diffusion.samples.photometry import MEASURES
from spin_diffusion.store.files import write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import write_file

MAX_CURVE_POINTS = 300
"""Points of a training curve that are kept of each model and round; more are averaged over equal windows of steps."""
_PACKAGES = {
    True: ("torch", "transformers", "accelerate", "numpy", "scipy", "spin-diffusion"),
    False: ("torch", "diffusers", "transformers", "accelerate", "pillow", "numpy", "scipy", "spin-diffusion"),
}
"""Whether answers are evaluated -> whose versions are part of the results."""


def conclude(
    root: Path,
    models: Sequence[EvaluatedModel],
    protocol: Protocol,
    specs: Sequence[str],
    *,
    title: str,
    headline_scale: Scale = None,
    training_prompts: Sequence[str] | None = None,
    in_domain: Collection[str] = (),
    real: Comparison | None = None,
    sweep: Sequence[SweepEntry] = (),
    **training: Unpack[OfTraining],
) -> Results:
    """Write results.json and the tables of samples and scores below `root`; the results.

    A prompt counts at a guidance scale when every model has all of its samples there, each with every score.

    Args:
        models: the baseline first.
        specs: NAME[=PATH] of the scorers or judges.
        headline_scale: guidance scale of the verdict at the top of the page.
        training_prompts: to find evaluation prompts that were trained on, and answers learnt by heart.
        in_domain: scorers that chose what was trained on. A held-out one is in-domain here: its gain alone says
            that the choice was learnt.
        real: the real pictures that the models' are compared with, in features that are kept already.
        sweep: what free settings of the sampler gain.
        training: for the page of a whole run.

    Raises:
        InputError: samples that are missing or of another protocol, or fewer than 2 prompts that count.
    """
    scales, names = guidance_scales(protocol), [parse_spec(spec)[0] for spec in specs]
    samples = {
        (model.name, scale): read_samples(model.folder, scale, names, protocol, root)
        for model in models
        for scale in scales
    }
    about = {name: first_not_run([scorer_record(model.folder, name) for model in models]) for name in names}
    for name in about.keys() & set(in_domain):
        if about[name]["role"] == "held-out":
            about[name] = {**about[name], "role": "in-domain"}
    compared = _compared(models, samples, protocol, about)
    against_real = None
    if real is not None:
        against_real = distances(real, models, compared.complete, samples_per_prompt(protocol))
    results = _results(compared, title, headline_scale, training_prompts, against_real, training_entries(training))
    if sweep:
        results["sweep"] = list(sweep)
    _write(root, results, compared)
    return results


@dataclass(frozen=True, eq=False)
class _Compared:
    """The samples of all models, and the scores of those prompts that count."""

    models: Sequence[EvaluatedModel]
    samples: dict[tuple[str, Scale], Samples]
    protocol: Protocol
    scorers: list[ScorerEntry]
    roles: dict[str, Role]
    """Scorer that was run -> its role."""
    lost: dict[tuple[str, Scale], frozenset[str]]
    """(model, guidance scale) -> ids of the baseline's prompts of which the model lacks a sample, or its score."""
    complete: dict[Scale, list[str]]
    """Guidance scale -> ids of the prompts that count, in the baseline's order."""
    arrays: dict[tuple[str, Scale, str], np.ndarray]
    """(model, guidance scale, scorer) -> (prompts, samples) scores, of the prompts that count."""

    @property
    def modality(self) -> Modality:
        """What the models make."""
        return modality_of(self.protocol)

    def each(self) -> Iterator[tuple[EvaluatedModel, Scale, Samples]]:
        """Every model at every guidance scale, with its samples."""
        return ((model, scale, self.samples[model.name, scale]) for model in self.models for scale in self.complete)

    def prompts(self) -> dict[Scale, list[tuple[str, str]]]:
        """Guidance scale -> (text, category) of the prompts that count."""
        baseline = {scale: self.samples[self.models[0].name, scale].rows for scale in self.complete}
        return {
            scale: [(baseline[scale][id_, 0]["prompt"], baseline[scale][id_, 0]["category"]) for id_ in ids]
            for scale, ids in self.complete.items()
        }


def _compared(
    models: Sequence[EvaluatedModel],
    samples: dict[tuple[str, Scale], Samples],
    protocol: Protocol,
    about: Mapping[str, ScorerRecord],
) -> _Compared:
    """The scores of the prompts that count; InputError when there are fewer than 2."""
    scales, baseline, per_prompt = guidance_scales(protocol), models[0].name, samples_per_prompt(protocol)
    scorers = [
        ScorerEntry(**entry, truncated_prompts=_truncated_prompts(samples.values(), name))
        for name, entry in about.items()
    ]
    roles = {scorer["name"]: scorer["role"] for scorer in scorers if scorer["state"] == "run"}
    lost = {
        (model, scale): _lost(samples[baseline, scale], of_model, per_prompt, list(roles))
        for (model, scale), of_model in samples.items()
    }
    complete = {
        scale: _complete(samples[baseline, scale], {m.name: lost[m.name, scale] for m in models}, protocol, scale)
        for scale in scales
    }
    arrays = {
        (model, scale, name): _scores(of_model, name, complete[scale])
        for (model, scale), of_model in samples.items()
        for name in roles
    }
    return _Compared(models, samples, protocol, scorers, roles, lost, complete, arrays)


def _truncated_prompts(samples: Collection[Samples], name: str) -> int:
    scored = ((of_model, key, row) for of_model in samples for key, row in of_model.scores[name].items())
    return len({of_model.rows[key]["prompt"] for of_model, key, row in scored if row["truncated"]})


def _lost(baseline: Samples, of_model: Samples, per_prompt: int, ran: Sequence[str]) -> frozenset[str]:
    return frozenset(
        id_
        for id_ in {id_ for id_, _ in baseline.rows}
        for key in [(id_, k) for k in range(per_prompt)]
        if key not in of_model.rows
        or not of_model.rows[key]["there"]
        or any(key not in of_model.scores[name] for name in ran)
    )


def _complete(baseline: Samples, lost: Mapping[str, frozenset[str]], protocol: Protocol, scale: Scale) -> list[str]:
    left_out = frozenset().union(*lost.values())
    complete = [id_ for id_ in dict.fromkeys(id_ for id_, _ in baseline.rows) if id_ not in left_out]
    if len(complete) < 2:
        modality = modality_of(protocol)
        what, at = modality.plural, modality.at.format(folder_of(scale))
        failed = ", ".join(f"{model} {len(ids)}" for model, ids in lost.items() if ids) or "none by any"
        raise InputError(
            f"only {len(complete)} prompts have all {what} by every model{at}, and their scores (lost: {failed}): too "
            f"few to compare; look for what failed in the files of the {what} and of the scores"
        )
    return complete


def _scores(of_model: Samples, name: str, ids: Sequence[str]) -> np.ndarray:
    """(prompts, samples)."""
    return np.array([[of_model.scores[name][id_, k]["score"] for k in range(of_model.per_prompt)] for id_ in ids])


# Entries of results.json


def _results(
    compared: _Compared,
    title: str,
    headline_scale: Scale,
    training_prompts: Sequence[str] | None,
    against_real: DistributionEntry | None,
    training: TrainingEntries,
) -> Results:
    """The content of results.json."""
    baseline, *others = names = [model.name for model in compared.models]
    scales, roles, modality = list(compared.complete), compared.roles, compared.modality
    entries = compare(compared.arrays, baseline, roles, compared.lost)
    between = compare_others(compared.arrays, baseline, roles, compared.lost)
    alarms, counts = _alarms(compared, training_prompts), _counts(compared)
    if against_real is not None:
        alarms += missed(against_real)
    verdicts = [
        _verdict_entry(count, entries, roles, alarms, modality)
        for count in counts
        if roles and count["model"] in others
    ]
    ranking = [
        ranked
        for scale in scales
        if between and (ranked := rank(names, scale, [*entries, *between], compared.scorers, verdicts)) is not None
    ]
    versions = {name: version(name) for name in _PACKAGES[modality is ANSWERS]}
    results = Results(
        schema_version=SCHEMA_VERSION,
        title=title,
        protocol=compared.protocol,
        baseline=baseline,
        headline=_headline(compared.models, headline_scale if headline_scale in scales else scales[-1], ranking),
        models=[_model_entry(model) for model in compared.models],
        samples=counts,
        scorers=compared.scorers,
        results=_aggregates(compared),
        comparisons=entries,
        verdicts=verdicts,
        alarms=alarms,
        breakdowns=breakdowns(names, compared.prompts(), compared.arrays, list(roles)),
        failures=list(_failures(compared)),
        environment=versions | {"python": platform.python_version()},
        **training,
    )
    if against_real is not None:
        results["distribution"] = against_real
    if between:
        results["between_others"] = between
        results["ranking"] = ranking
    return results


def _counts(compared: _Compared) -> list[CountEntry]:
    entries: list[CountEntry] = []
    for model, scale, of_model in compared.each():
        there = {key: row for key, row in of_model.rows.items() if row["there"]}
        entries.append(
            CountEntry(
                model=model.name,
                guidance_scale=scale,
                asked=len(of_model.rows),
                missing=len(of_model.rows) - len(there),
                unscored=sum(any(key not in of_model.scores[name] for name in compared.roles) for key in there),
                broken=sum(row["state"] != "ok" for row in there.values()),
                prompts_lost=len(compared.lost[model.name, scale]),
            )
        )
    return entries


def _headline(models: Sequence[EvaluatedModel], scale: Scale, ranking: Sequence[RankingEntry]) -> Headline:
    """The last round of a run; of other models the one with the best place, the last of those that share it."""
    candidates = [model for model in models[1:] if model.role != "rival"] or list(models[1:])
    if not any(model.role == "round" for model in candidates):
        at_scale = [place for ranked in ranking if ranked["guidance_scale"] == scale for place in ranked["places"]]
        places = {place["model"]: place["place"] for place in at_scale}
        candidates.sort(key=lambda model: -places.get(model.name, 0))
    return {"model": candidates[-1].name if candidates else None, "guidance_scale": scale}


def _model_entry(model: EvaluatedModel) -> ModelEntry:
    return ModelEntry(
        name=model.name,
        role=model.role,
        round=model.round_,
        source=model.source,
        kind=model.kind,
        base=model.base,
        weights_sha256=model.weights_sha256,
        strength=model.strength,
    )


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


def _aggregates(compared: _Compared) -> list[AggregateEntry]:
    arrays, roles = compared.arrays, compared.roles

    def entry(model: str, scale: Scale, scorer: str, aggregate: Aggregate, per_prompt: np.ndarray) -> AggregateEntry:
        interval = mean_interval(per_prompt)
        return AggregateEntry(
            model=model,
            scorer=scorer,
            guidance_scale=scale,
            aggregate=aggregate,
            num_prompts=len(per_prompt),
            mean=interval.mean,
            low=interval.low,
            high=interval.high,
            sd=float(per_prompt.std(ddof=1)),
        )

    entries = [entry(*at, "mean", scores.mean(axis=1)) for at, scores in arrays.items()]
    for model, scale, of_model in compared.each():
        if not roles or of_model.per_prompt == 1:
            continue  # the best of one is that one
        scores = {name: arrays[model.name, scale, name] for name in roles}
        entries += [entry(model.name, scale, name, "best_of_k", best_of_k(each)) for name, each in scores.items()]
        judged = {name: each for name, each in scores.items() if roles[name] != "drift"}
        best = best_by_average(judged) if judged else {}
        entries += [entry(model.name, scale, name, "best_by_average", each) for name, each in best.items()]
    return entries


def _alarms(compared: _Compared, training_prompts: Sequence[str] | None) -> list[AlarmEntry]:
    entries: list[AlarmEntry] = []
    baseline, *others = compared.models
    rounds = [model for model in compared.models if model.round_ is not None and model.role != "rival"]

    def scores(model: EvaluatedModel, scale: Scale) -> dict[str, np.ndarray]:
        return {scorer: compared.arrays[model.name, scale, scorer] for scorer in compared.roles}

    for model in others:
        previous = rounds[rounds.index(model) - 1] if model in rounds[1:] else None
        for scale, ids in compared.complete.items():
            base, ours = compared.samples[baseline.name, scale], compared.samples[model.name, scale]
            alarms = check_alarms(
                _evidence(base, ids, compared.modality),
                _evidence(ours, ids, compared.modality),
                baseline_scores=scores(baseline, scale),
                candidate_scores=scores(model, scale),
                roles=compared.roles,
                previous=scores(previous, scale) if previous is not None and previous.round_ else None,
                training_prompts=training_prompts,
            )
            entries += [
                cast(AlarmEntry, {"id": alarm.id, "model": model.name, "guidance_scale": scale} | vars(alarm))
                for alarm in alarms
            ]
    return entries


def _evidence(of_model: Samples, ids: Sequence[str], modality: Modality) -> Pictures | list[list[Answer]]:
    """What the alarms look at, of the prompts that count."""
    rows = [[of_model.rows[id_, k] for k in range(of_model.per_prompt)] for id_ in ids]
    if modality is ANSWERS:
        return [[answer_of(row) for row in of_prompt] for of_prompt in rows]
    features = None
    for scored in of_model.scores.values():  # of the scorer that kept them
        if scored and next(iter(scored.values())).get("features") is not None:
            each = [[scored[id_, k].get("features") for k in range(of_model.per_prompt)] for id_ in ids]
            features = np.array(each, dtype=np.float32)
            break
    return Pictures(
        list(dict.fromkeys(row["prompt"] for row in of_model.rows.values())),
        features,
        {name: np.array([[row.get(name) for row in each] for each in rows], dtype=np.float64) for name in MEASURES},
        (sum(row["state"] != "ok" for row in of_model.rows.values()), len(of_model.rows)),
    )


def _failures(compared: _Compared) -> Iterator[FailureEntry]:
    for model, scale, of_model in compared.each():
        for key, row in of_model.rows.items():
            what = "" if row["state"] == "ok" else row["state"]
            if not row["there"]:
                what += "; its prompt is left out for every model"
            elif lacking := [name for name in compared.roles if key not in of_model.scores[name]]:
                what = f"no score by {', '.join(lacking)}; its prompt is left out for every model"
            if what:
                yield FailureEntry(
                    model=model.name, guidance_scale=scale, id=row["id"], prompt=row["prompt"], what=what
                )


# What is told of training


def training_entries(training: OfTraining) -> TrainingEntries:
    """Curves, measures, events, judgements, previews and ledger as results.json has them; nothing of what is empty."""
    entries = {
        "training_curves": _thinned(training.get("curves") or []),
        "measures": [_finite(measure) for measure in training.get("measures") or []],
        "training_events": [dict(event) for event in training.get("events") or []],
        "selection": [dict(entry) for entry in training.get("selection") or []],
        "previews": [dict(entry) for entry in training.get("previews") or []],
        "ledger": [dict(entry) for entry in training.get("ledger") or []],
    }
    return cast(TrainingEntries, {name: rows for name, rows in entries.items() if rows})


def _finite(row: Mapping[str, Any]) -> dict[str, object]:
    """The row, None where a number is not finite: JSON has no others."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _thinned(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """At most MAX_CURVE_POINTS of each model and round: means over windows, each at the step where it ends."""
    by_curve: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in curves:
        by_curve.setdefault((row["model"], row["round"]), []).append(row)
    points = []
    for rows in by_curve.values():
        rows = sorted(rows, key=lambda row: row["step"])
        for part in np.array_split(np.arange(len(rows)), min(len(rows), MAX_CURVE_POINTS)):
            window = [_finite(rows[place]) for place in part]
            points.append(window[-1] if len(window) == 1 else _mean_row(window))
    return points


def _mean_row(window: list[dict[str, object]]) -> dict[str, object]:
    mean = dict(window[-1])
    for name in mean.keys() - {"model", "round", "step"}:
        values = [cast(float, row[name]) for row in window if row.get(name) is not None]
        mean[name] = float(np.mean(values)) if values else None
    return mean


# Files


def _write(root: Path, results: Results, compared: _Compared) -> None:
    """Write the table of samples, scores.parquet and, last of all, results.json below `root`."""
    shared, own = (_OF_ANSWER, _ANSWER) if compared.modality is ANSWERS else (_OF_IMAGE, _IMAGE)
    samples: list[dict[str, object]] = []
    scores: list[dict[str, object]] = []
    for model, scale, of_model in compared.each():
        for key, row in of_model.rows.items():
            samples.append({**row, "model": model.name, "guidance_scale": scale})
            scores += [
                samples[-1] | {"scorer": scorer, "score": scored[key]["score"], "truncated": scored[key]["truncated"]}
                for scorer, scored in of_model.scores.items()
                if key in scored
            ]
    for name, rows, columns in ((compared.modality.plural, samples, own), ("scores", scores, _SCORE)):
        table = pa.Table.from_pylist(rows, schema=pa.schema(shared | columns))
        write_file(root / f"{name}.parquet", partial(pq.write_table, table))
    write_json(root / "results.json", results)


_TEXT, _NUMBER, _FLOAT = pa.string(), pa.int64(), pa.float64()
_PLACE = {"model": _TEXT, "guidance_scale": _FLOAT, "id": _TEXT, "k": _NUMBER, "prompt": _TEXT, "category": _TEXT}
_OF_IMAGE = _PLACE | {"seed": _NUMBER, "file": _TEXT, "sha256": _TEXT}
_OF_ANSWER = _PLACE | {"seed": _NUMBER, "sha256": _TEXT}
_IMAGE = {"state": _TEXT} | dict.fromkeys(MEASURES, _FLOAT)
_ANSWER = {"state": _TEXT, "text": _TEXT, "reference": _TEXT, "finish": _TEXT, "num_tokens": _NUMBER}
_SCORE = {"scorer": _TEXT, "score": _FLOAT, "truncated": pa.bool_()}
