"""Scores of all cells -> comparison.json and cells.parquet: means with intervals, differences, curves, costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.comparing import cells
from spin_diffusion.comparing.cells import VIEW, View, read_view, scores_path
from spin_diffusion.comparing.contest import Contest, Entry, run_flops
from spin_diffusion.comparing.distances import distances_of
from spin_diffusion.comparing.plan import Cell, about, parsed
from spin_diffusion.comparing.results import (
    BudgetResult,
    Comparison,
    Difference,
    Differences,
    Distances,
    First,
    Mean,
    Means,
    Measured,
    MethodResult,
    RoundResult,
    WorldResult,
)
from spin_diffusion.comparing.settings import MODES, Mode
from spin_diffusion.evaluation.protocols import free_settings
from spin_diffusion.evaluation.scorers import about as about_scorer
from spin_diffusion.evaluation.statistics import Interval, half_width, mean_interval
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.files import read_rows, write_json
from spin_diffusion.store.run_dir import write_file

Values = dict[int, np.ndarray]
"""Seed -> (prompts,) score, the mean over the images of a prompt."""
Scores = dict[Mode, Values]


# Intervals


def crossed_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean over training seeds and prompts with an interval for other seeds and other prompts.

    Seeds and prompts both move the mean, so its half width is the root of the summed squares of two: Student's over the
    means of the seeds and Student's over the means of the prompts (Banerjee 1960). With normal effects of seeds and
    prompts, whatever their sizes, it holds the true mean at least as often as it says, at any confidence and from two
    seeds on. It pays with its width: t is 12.7 for two seeds, 4.3 for three and 2.8 for five, and 99.95 % asks for 45
    of three seeds and 10 of five. A 95 % interval of 3 seeds and 80 prompts holds the true mean in 99 % of
    simulations where seeds do not matter, and in 95 % where they decide (of 5 seeds: 98 and 95 %); if the effects of
    the seeds are exponential and decide, in 88 %.

    Args:
        values: (seeds, prompts), the same prompts in the same order for every seed. The interval of one seed alone is
            over its prompts: it speaks of that seed only.

    Raises:
        ValueError: another shape, fewer than 2 prompts, or values that are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1:
        raise ValueError(f"values must have shape (seeds, prompts), got {values.shape}")
    over_prompts = mean_interval(values.mean(axis=0), confidence)
    if len(values) == 1:
        return over_prompts
    mean = over_prompts.mean
    of_seeds = half_width(values.mean(axis=1), confidence)
    low, high = (float(np.hypot(of_seeds, end - mean)) for end in (over_prompts.low, over_prompts.high))
    return Interval(mean, mean - low, mean + high)


@dataclass
class DifferenceFamily:
    """The differences in which a reader of one table may look for a winner."""

    members: list[tuple[Difference, np.ndarray]] = field(default_factory=list)
    """Each, and its (seeds, prompts)."""

    def difference(self, a: Values, b: Values) -> Difference | None:
        """a - b, paired over the seeds that both have and over prompts; None = they have no seed in common."""
        apart = {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}
        mean = _mean(apart)
        if mean is None:
            return None
        found: Difference = {**mean}
        self.members.append((found, np.stack(list(apart.values()))))
        return found

    def differences(self, a: Scores, b: Scores) -> Differences:
        """a - b, drawn in each way."""
        return {mode: self.difference(a[mode], b[mode]) for mode in MODES}

    def adjust(self) -> int:
        """Add to each its `adjusted` interval, which all have together at 95 % (Bonferroni); how many they are.

        None = a difference of a single seed, where others have more: it says nothing of how training varies.
        """
        most = max((len(stacked) for _, stacked in self.members), default=0)
        for found, stacked in self.members:
            interval = crossed_interval(stacked, 1 - 0.05 / len(self.members))
            found["adjusted"] = None if len(stacked) == 1 < most else [interval.low, interval.high]
        return len(self.members)


def _mean(values: Values) -> Mean | None:
    if not values:
        return None
    seeds = sorted(values)
    interval = crossed_interval(np.stack([values[seed] for seed in seeds]))
    of_seeds = {str(seed): float(values[seed].mean()) for seed in seeds}
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "seeds": of_seeds}


def _means(scores: Scores) -> Means:
    return {mode: _mean(values) for mode, values in scores.items()}


# Conclusions


def conclude(contest: Contest) -> Comparison:
    """The results, written into comparison.json, and all scores in cells.parquet."""
    settings = contest.settings
    results: Comparison = {
        "settings": asdict(settings),
        "scorer": contest.scorers[0],
        "scorers": {
            name: about_scorer(spec).title for name, spec in zip(contest.scorers, settings.scorers or [], strict=True)
        },
        "seeds": settings.all_seeds,
        "prompts": {name: {"num": len(found.rows), "sha256": found.sha256} for name, found in contest.sets.items()},
        "worlds": [_world(contest, world) for world in contest.plan.worlds()],
        "took": contest.took(),
    }
    write_json(contest.output_dir / "comparison.json", results)
    table = pa.Table.from_pylist(_all_rows(contest))
    write_file(contest.output_dir / "cells.parquet", lambda part: pq.write_table(table, part))
    return results


def _world(contest: Contest, world: str) -> WorldResult:
    base_cells = [contest.plan.base(world, seed) for seed in contest.settings.all_seeds]
    base_best = contest.best_of_base(world)
    base = _scores(contest, base_cells, 0, base_best)
    of_base = DifferenceFamily()
    free_gain: Differences = {mode: of_base.difference(base["best"], base[mode]) for mode in MODES if mode != "best"}
    of_base.adjust()
    budgets: list[BudgetResult] = []
    for budget in contest.settings.budgets:
        entries = [entry for entry in contest.entries if (entry.world, entry.budget) == (world, budget)]
        scores = {e.method: _scores(contest, e.cells, e.rounds, e.best) for e in entries}
        reference = scores[contest.settings.reference]
        family = DifferenceFamily()
        rows = [_row(contest, entry, scores[entry.method], base, reference, family) for entry in entries]
        if contest.settings.test_rounds:
            of_reference = _rounds_of(contest, next(e for e in entries if e.method == contest.settings.reference))
            for entry, row in zip(entries, rows, strict=True):
                row["by_round"] = _by_round(contest, entry, base, of_reference, family)
        budgets.append(
            {
                "budget": budget,
                "total_steps": contest.plan.total_steps(world),
                "rows": rows,
                "differences": family.adjust(),
                "first": _first(scores),
            }
        )
        if (found := against_real(contest, world, entries)) is not None:
            budgets[-1]["distances"] = found
    return {
        "name": world,
        "about": about(contest.settings.world(world)),
        "usual": free_settings(contest.plan.usual(world)),
        "num_free": len(contest.plan.free(world)),
        "base": {
            "best": free_settings(base_best) if base_best else None,
            "free_gain": free_gain,
            "failures": _failures(contest, base_cells),
            **_measured(contest, base_cells, 0, base_best, base),
        },
        "budgets": budgets,
    }


def against_real(contest: Contest, world: str, entries: Sequence[Entry]) -> Distances | None:
    """How far the test pictures of the base, and of every method after its last round, are from real ones; None where
    it was not asked for, or while no run is finished."""
    settings, plan, compared = contest.settings, contest.plan, contest.real(world)
    if compared is None:
        return None

    def drawn(of_cells: Sequence[Cell], round_: int, best: Sampling | None) -> dict[Mode, dict[int, Path]]:
        ways = zip(MODES, (plan.unguided(world), plan.usual(world), best), strict=True)
        return {
            mode: {cell.seed: scores_path(contest.folder(cell), View("test", round_, how)) for cell in of_cells}
            for mode, how in ways
            if how is not None
        }

    base_cells = [plan.base(world, seed) for seed in settings.all_seeds]
    by_method = {"base": drawn(base_cells, 0, contest.best_of_base(world))}
    by_method |= {entry.method: drawn(entry.cells, entry.rounds, entry.best) for entry in entries}
    return distances_of(by_method, compared, settings.images_per_prompt, settings.num_test_prompts)


def _rate(contest: Contest, cell: Cell) -> dict[str, float] | None:
    means = contest.means(cell, contest.plan.guided(cell.world))
    return None if means is None else {how.in_words: mean for how, mean in means.items()}


def _row(
    contest: Contest, entry: Entry, scores: Scores, base: Scores, reference: Scores, family: DifferenceFamily
) -> MethodResult:
    tuned = contest.tuning(entry)
    failures = _failures(contest, [*tuned, *entry.cells])
    finished = sorted(scores["usual"])
    if entry.steps_per_round == 0:
        failures.append("the images that it draws cost more than the whole budget, or the reference's run has no end")
    row: MethodResult = {
        "method": entry.method,
        "about": about(contest.settings.method(entry.method)),
        "state": "ok" if len(finished) == len(contest.settings.all_seeds) else "partly" if finished else "failed",
        "seeds": finished,
        "failures": failures,
        "rounds": entry.rounds or None,
        "steps_per_round": entry.steps_per_round,
        "choice": asdict(entry.choice) if entry.choice else None,
        "best": free_settings(entry.best) if entry.best else None,
        "rates": {f"{cell.training['learning_rate']:g}": _rate(contest, cell) for cell in tuned},
    }
    if not finished:
        return row
    row.update(_measured(contest, entry.cells, entry.rounds, entry.best, scores))
    row["to_base"] = family.differences(scores, base)
    if entry.method != contest.settings.reference:
        row["to_reference"] = family.differences(scores, reference)
    row["gflops"], row["seconds"], row["steps"] = _cost(contest, entry)
    if contest.settings.every_round:
        _add_rounds(contest, entry, row, reference, family)
    return row


def _add_rounds(contest: Contest, entry: Entry, row: MethodResult, reference: Scores, family: DifferenceFamily) -> None:
    """The curve on validation prompts; where it is highest; how much of it is lost in the end; that round's test."""
    curve, best = contest.curve(entry), entry.best_round
    means = {k: float(np.mean(found)) for k, found in curve.items() if found}
    row["curve"] = [{"round": k, "mean": means[k], "seeds": curve[k]} for k in sorted(means)]
    row["best_round"] = best
    row["drift"] = means[entry.rounds] - means[best] if entry.rounds in means and best in means else None
    at_best = _scores(contest, entry.cells, best, entry.best)
    if best and at_best["best"]:
        row["at_best_round"] = _means(at_best)
        if entry.method != contest.settings.reference:
            row["best_round_to_reference"] = family.differences(at_best, reference)


def _rounds_of(contest: Contest, entry: Entry) -> dict[int, Scores]:
    """Round -> its scores on test prompts, where it has some."""
    found = {k: _scores(contest, entry.cells, k, entry.best) for k in range(1, entry.rounds + 1)}
    return {k: scores for k, scores in found.items() if scores["usual"]}


def _by_round(
    contest: Contest,
    entry: Entry,
    base: Scores,
    of_reference: dict[int, Scores],
    family: DifferenceFamily,
) -> list[RoundResult]:
    """The rounds that were scored on test prompts, against the base and against the reference: after as many rounds if
    it has the same ones, else after its last one."""
    rows, mine = [], _rounds_of(contest, entry)
    as_many = mine.keys() == of_reference.keys()
    for k, scores in mine.items():
        row: RoundResult = {
            "round": k,
            "scores": _means(scores),
            "to_base": family.differences(scores, base),
        }
        if entry.method != contest.settings.reference and of_reference:
            of_k = of_reference[k if as_many else max(of_reference)]
            row["to_reference"] = family.differences(scores, of_k)
        rows.append(row)
    return rows


def _failures(contest: Contest, of_cells: Sequence[Cell]) -> list[str]:
    """Why these cells have no end, each once."""
    reasons = {}
    for cell in of_cells:
        found = cells.last_failure(contest.folder(cell))
        if found is not None:
            rate = f"rate {cell.training['learning_rate']:g}, " if cell.rounds else ""
            reasons[cell.key] = f"{rate}seed {cell.seed} {found['kind']}: {found['message']}"
    return list(reasons.values())


def _scores(
    contest: Contest, of_cells: Sequence[Cell], round_: int, best: Sampling | None, scorer: str | None = None
) -> Scores:
    """Scores on test prompts after a round, by default of the first scorer; seeds without an end are left out."""
    found: Scores = {mode: {} for mode in MODES}
    for cell in of_cells:
        drawn = (contest.plan.unguided(cell.world), contest.plan.usual(cell.world), best)
        for mode, how in zip(MODES, drawn, strict=True):
            rows = None if how is None else read_view(contest.folder(cell), View("test", round_, how))
            if rows is not None:
                found[mode][cell.seed] = by_prompt(rows, scorer or contest.scorers[0])
    return found


def by_prompt(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """(prompts,) mean over the images of each prompt, in the order of their ids."""
    of_id: dict[str, list[float]] = {}
    for row in rows:
        of_id.setdefault(row["id"], []).append(row[name])
    return np.array([np.mean(of_id[id_]) for id_ in sorted(of_id)])


def _measured(
    contest: Contest, of_cells: Sequence[Cell], round_: int, best: Sampling | None, scores: Scores
) -> Measured:
    """Scores of all scorers, and diversity."""
    usual = contest.plan.usual(of_cells[0].world)
    distances = {}
    for cell in of_cells:
        rows = read_view(contest.folder(cell), View("test", round_, usual))
        if rows is not None and rows[0]["distance"] is not None:
            distances[cell.seed] = by_prompt(rows, "distance")
    return {
        "scores": _means(scores),
        "other_scores": {
            scorer: _means(_scores(contest, of_cells, round_, best, scorer)) for scorer in contest.scorers[1:]
        },
        "diversity": _mean(distances),
    }


def _first(scores: Mapping[str, Scores]) -> dict[Mode, First | None]:
    """The method with the highest mean after its last round, and which others are not told apart from it.

    The differences between all methods are a family of their own for each way of drawing, since any may be first.
    """
    found: dict[Mode, First | None] = {}
    for mode in MODES:
        of_method = {method: scores[method][mode] for method in scores if scores[method][mode]}
        means = {m: float(np.mean([of_seed.mean() for of_seed in values.values()])) for m, values in of_method.items()}
        family = DifferenceFamily()
        between = {frozenset((a, b)): family.difference(of_method[a], of_method[b]) for a, b in combinations(means, 2)}
        family.adjust()
        best = max(means, key=lambda method: means[method], default="")
        level = [other for other in means if other != best and not _apart(between[frozenset((best, other))])]
        found[mode] = {"method": best, "not_told_apart": level} if best else None
    return found


def _apart(found: Difference | None) -> bool:
    adjusted = found["adjusted"] if found is not None else None
    return adjusted is not None and not adjusted[0] <= 0 <= adjusted[1]


def _cost(contest: Contest, entry: Entry) -> tuple[float, float, float]:
    """Mean over the finished seeds of what a run took: GFLOPs, seconds, and the steps that it made."""
    flops, seconds, steps = [], [], []
    for cell in entry.cells:
        folder = contest.folder(cell)
        records = cells.rounds_of(folder, cell.rounds)
        if len(records) == cell.rounds:
            made = [record["training"]["steps"] for record in records]
            unit, zeros = contest.costs(cell)
            flops.append(run_flops(parsed(cell.training), unit, cells.rows_of(folder), made, zeros))
            seconds.append(sum(sum(record["seconds"].values()) for record in records))
            steps.append(sum(made))
    return float(np.mean(flops)) / 1e9, float(np.mean(seconds)), float(np.mean(steps))


def _all_rows(contest: Contest) -> list[dict[str, object]]:
    """One row for every scored image of every cell that the report rests on."""
    rows: list[dict[str, object]] = []
    for folder, cell in {contest.folder(cell): cell for cell in contest.cells()}.items():
        about_cell = {
            "world": cell.world,
            "method": cell.method,
            "cell": folder.name,
            "training_seed": cell.seed,
            "learning_rate": cell.training.get("learning_rate") if cell.rounds else None,
            "rounds": cell.rounds,
            "steps_per_round": cell.training["max_train_steps"] if cell.rounds else 0,
        }
        for path in sorted((folder / "scores").glob("*.parquet")):
            if (named := VIEW.fullmatch(path.stem)) is not None:  # an older comparison named them otherwise
                view = {
                    "prompts": named["prompts"],
                    "round": int(named["round"]),
                    "guidance_scale": float(named["guidance_scale"]),
                    "num_inference_steps": int(named["num_inference_steps"]),
                    "prediction_scale": float(named["prediction_scale"]),
                }
                scored = read_rows(path)
                rows += [about_cell | view | {k: v for k, v in row.items() if k != "features"} for row in scored]
    return rows
