"""Scores of all cells -> comparison.json and cells.parquet: means with intervals, differences, curves, costs."""

from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.comparing import cells
from spin_diffusion.comparing.cells import View, read_view
from spin_diffusion.comparing.choosing import best_guidance
from spin_diffusion.comparing.contest import Contest, Entry
from spin_diffusion.comparing.intervals import crossed_interval
from spin_diffusion.comparing.plan import Cell, run_flops
from spin_diffusion.comparing.settings import MODES
from spin_diffusion.evaluation.scorers import about
from spin_diffusion.store.files import read_rows, write_json
from spin_diffusion.store.run_dir import write_file

Values = dict[int, np.ndarray]
"""Seed -> (prompts,) score, the mean over the images of a prompt."""


@dataclass
class DifferenceFamily:
    """The differences in which a reader of one table may look for a winner."""

    members: list[tuple[dict[str, Any], np.ndarray]] = field(default_factory=list)
    """What is said of each, and its (seeds, prompts)."""

    def difference(self, a: Values, b: Values) -> dict[str, Any] | None:
        """a - b, paired over the seeds that both have and over prompts; None = they have no seed in common."""
        both = sorted(a.keys() & b.keys())
        if not both:
            return None
        stacked = np.stack([a[seed] - b[seed] for seed in both])
        of_seeds = {str(seed): float(values.mean()) for seed, values in zip(both, stacked, strict=True)}
        said = asdict(crossed_interval(stacked)) | {"seeds": of_seeds}
        self.members.append((said, stacked))
        return said

    def adjust(self) -> int:
        """Add to each its `adjusted` interval, which all have together at 95 % (Bonferroni); how many they are.

        None = a difference of a single seed, where others have more: it says nothing of how training varies.
        """
        most = max((len(stacked) for _, stacked in self.members), default=0)
        for said, stacked in self.members:
            interval = crossed_interval(stacked, 1 - 0.05 / len(self.members))
            said["adjusted"] = None if len(stacked) == 1 < most else [interval.low, interval.high]
        return len(self.members)


def conclude(contest: Contest) -> dict[str, Any]:
    """The results, written into comparison.json, and all scores in cells.parquet."""
    settings, plan = contest.settings, contest.plan
    worlds = [
        {"name": world, "about": plan.about("worlds", world), **_world(contest, world)} for world in plan.worlds()
    ]
    results = {
        "settings": settings.flat(),
        "scorer": contest.scorers[0],
        "scorers": {
            name: about(spec).title for name, spec in zip(contest.scorers, settings.scorers or [], strict=True)
        },
        "seeds": settings.all_seeds,
        "prompts": {name: {"num": len(found.rows), "sha256": found.sha256} for name, found in contest.sets.items()},
        "worlds": worlds,
        "took": contest.took(),
    }
    write_json(contest.output_dir / "comparison.json", results)
    table = pa.Table.from_pylist(_all_rows(contest))
    write_file(contest.output_dir / "cells.parquet", lambda part: pq.write_table(table, part))
    return results


def _world(contest: Contest, world: str) -> dict[str, Any]:
    base_cells = [contest.plan.base(world, seed) for seed in contest.settings.all_seeds]
    of_base = contest.means(base_cells[0])
    base_scale = best_guidance(of_base) if of_base else None
    base = _scores(contest, base_cells, 0, base_scale)
    budgets = []
    for budget in contest.settings.budgets:
        entries = [entry for entry in contest.entries if (entry.world, entry.budget) == (world, budget)]
        scores = {entry.method: _entry_scores(contest, entry) for entry in entries}
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
    return {
        "usual_guidance": contest.plan.usual_guidance(world),
        "guidance_scales": contest.scales(world),
        "base": {
            "best_guidance": base_scale,
            "failures": _said_of(contest, base_cells),
            **_summary(contest, base_cells, 0, base_scale, base),
        },
        "budgets": budgets,
    }


def _entry_scores(contest: Contest, entry: Entry) -> dict[str, Values]:
    rounds = entry.cells[0].rounds if entry.cells else 0
    return _scores(contest, entry.cells, rounds, entry.choice.guidance_scale if entry.choice else None)


def _row(
    contest: Contest,
    entry: Entry,
    scores: dict[str, Values],
    base: dict[str, Values],
    reference: dict[str, Values],
    family: DifferenceFamily,
) -> dict[str, Any]:
    failures = _failures(contest, entry)
    finished = sorted(scores["usual"])
    state = "ok" if len(finished) == len(contest.settings.all_seeds) else "partly" if finished else "failed"
    if entry.steps_per_round == 0:
        failures.append("the images that it draws cost more than the whole budget, or the reference's run has no end")
    row: dict[str, Any] = {
        "method": entry.method,
        "about": contest.plan.about("methods", entry.method),
        "state": state,
        "seeds": finished,
        "failures": failures,
        "rounds": entry.cells[0].rounds if entry.cells else None,
        "steps_per_round": entry.steps_per_round,
        "choice": asdict(entry.choice) if entry.choice else None,
        "rates": {
            f"{cell.training['learning_rate']:g}": contest.means(cell)
            for cell in contest.tuning(entry)
            if entry.steps_per_round
        },
    }
    if not finished:
        return row
    assert entry.choice is not None
    last = entry.cells[0].rounds
    row |= _summary(contest, entry.cells, last, entry.choice.guidance_scale, scores)
    row["to_base"] = {mode: family.difference(scores[mode], base[mode]) for mode in MODES}
    if entry.method != contest.settings.reference:
        row["to_reference"] = {mode: family.difference(scores[mode], reference[mode]) for mode in MODES}
    row |= _cost(contest, entry)
    if contest.settings.every_round:
        row |= _over_rounds(contest, entry, last, reference, family)
    return row


def _over_rounds(
    contest: Contest, entry: Entry, last: int, reference: dict[str, Values], family: DifferenceFamily
) -> dict[str, Any]:
    """The curve on validation prompts; where it is highest; how much of it is lost in the end; that round's test."""
    assert entry.choice is not None
    curve = contest.curve(entry)
    means = {k: float(np.mean(found)) for k, found in curve.items() if found}
    best = entry.best_round
    at_best = _scores(contest, entry.cells, best, entry.choice.guidance_scale)
    said: dict[str, Any] = {
        "curve": [{"round": k, "mean": means[k], "seeds": curve[k]} for k in sorted(means)],
        "best_round": best,
        "drift": means[last] - means[best] if last in means and best in means else None,
    }
    if best and at_best["best"]:
        said["at_best_round"] = {mode: _described(at_best[mode]) for mode in MODES}
        if entry.method != contest.settings.reference:
            said["best_round_to_reference"] = {
                mode: family.difference(at_best[mode], reference[mode]) for mode in MODES
            }
    return said


def _rounds_of(contest: Contest, entry: Entry) -> dict[int, tuple[float, dict[str, Values]]]:
    """Round -> its best guidance scale on validation prompts, with the first seed, and its scores on test prompts."""
    found = {}
    for k in range(1, (entry.cells[0].rounds if entry.cells else 0) + 1):
        means = contest.means(entry.cells[0], k)
        if means:
            scale = best_guidance(means)
            found[k] = (scale, _scores(contest, entry.cells, k, scale))
    return found


def _by_round(
    contest: Contest,
    entry: Entry,
    base: dict[str, Values],
    of_reference: dict[int, tuple[float, dict[str, Values]]],
    family: DifferenceFamily,
) -> list[dict[str, Any]]:
    """Every round on test prompts, against the base and against the reference: after as many rounds if it has as
    many, else after its last one."""
    rows, mine = [], _rounds_of(contest, entry)
    as_many = mine.keys() == of_reference.keys()
    for k, (scale, scores) in mine.items():
        row = {
            "round": k,
            "best_guidance": scale,
            "scores": {mode: _described(scores[mode]) for mode in MODES},
            "to_base": {mode: family.difference(scores[mode], base[mode]) for mode in MODES},
        }
        if entry.method != contest.settings.reference and of_reference:
            of_k = of_reference[k if as_many else max(of_reference)][1]
            row["to_reference"] = {mode: family.difference(scores[mode], of_k[mode]) for mode in MODES}
        rows.append(row)
    return rows


def _failures(contest: Contest, entry: Entry) -> list[str]:
    return _said_of(contest, [*contest.tuning(entry), *entry.cells] if entry.steps_per_round else [])


def _said_of(contest: Contest, of_cells: list[Cell]) -> list[str]:
    """Why these cells have no end, each once."""
    said = {}
    for cell in of_cells:
        found = cells.last_failure(contest.folder(cell))
        if found is not None:
            rate = f"rate {cell.training['learning_rate']:g}, " if cell.rounds else ""
            said[cell.key] = f"{rate}seed {cell.seed} {found['kind']}: {found['message']}"
    return list(said.values())


def _scores(
    contest: Contest, of_cells: list[Cell], round_: int, best_scale: float | None, scorer: str | None = None
) -> dict[str, Values]:
    """Mode -> seed -> (prompts,); seeds without an end are left out."""
    name = scorer or contest.scorers[0]
    found: dict[str, Values] = {mode: {} for mode in MODES}
    for cell in of_cells:
        scales = {"guidance 1": 1.0, "usual": contest.plan.usual_guidance(cell.world), "best": best_scale}
        for mode, scale in scales.items():
            rows = None if scale is None else read_view(contest.folder(cell), View("test", round_, scale))
            if rows is not None:
                found[mode][cell.seed] = by_prompt(rows, name)
    return found


def by_prompt(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """(prompts,) mean over the images of each prompt, in the order of their ids."""
    of_id: dict[str, list[float]] = {}
    for row in rows:
        of_id.setdefault(row["id"], []).append(row[name])
    return np.array([np.mean(of_id[id_]) for id_ in sorted(of_id)])


def _summary(
    contest: Contest, of_cells: list[Cell], round_: int, best_scale: float | None, scores: dict[str, Values]
) -> dict[str, Any]:
    """Scores of all scorers, and diversity."""
    others = {
        scorer: {
            mode: _described(values) for mode, values in _scores(contest, of_cells, round_, best_scale, scorer).items()
        }
        for scorer in contest.scorers[1:]
    }
    usual = contest.plan.usual_guidance(of_cells[0].world)
    distances = {}
    for cell in of_cells:
        rows = read_view(contest.folder(cell), View("test", round_, usual))
        if rows is not None and rows[0]["distance"] is not None:
            distances[cell.seed] = by_prompt(rows, "distance")
    return {
        "scores": {mode: _described(values) for mode, values in scores.items()},
        "other_scores": others,
        "diversity": _described(distances),
    }


def _described(values: Values) -> dict[str, Any] | None:
    """Mean, interval and the mean of each seed."""
    if not values:
        return None
    stacked = np.stack([values[seed] for seed in sorted(values)])
    return asdict(crossed_interval(stacked)) | {"seeds": {str(s): float(values[s].mean()) for s in sorted(values)}}


def _first(scores: dict[str, dict[str, Values]]) -> dict[str, dict[str, Any] | None]:
    """Mode -> the method with the highest mean after its last round, and which others are not told apart from it.

    The differences between all methods are a family of their own at each guidance scale, since any may be first.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for mode in MODES:
        of_method = {method: scores[method][mode] for method in scores if scores[method][mode]}
        means = {m: float(np.mean([of_seed.mean() for of_seed in values.values()])) for m, values in of_method.items()}
        family, between = DifferenceFamily(), {}
        for pair in combinations(of_method, 2):
            between[frozenset(pair)] = family.difference(of_method[pair[0]], of_method[pair[1]])
        family.adjust()
        best = max(means, key=lambda method: means[method], default="")
        level = [other for other in means if other != best and not _apart(between[frozenset((best, other))])]
        found[mode] = {"method": best, "not_told_apart": level} if best else None
    return found


def _apart(said: dict[str, Any] | None) -> bool:
    return said is not None and said["adjusted"] is not None and not said["adjusted"][0] <= 0 <= said["adjusted"][1]


def _cost(contest: Contest, entry: Entry) -> dict[str, Any]:
    """Mean over the finished seeds of what a run took: GFLOPs, seconds, and the steps that it made."""
    flops, seconds, steps = [], [], []
    for cell in entry.cells:
        folder = contest.folder(cell)
        records = cells.rounds_of(folder, cell.rounds)
        if len(records) < cell.rounds:
            continue
        made = [record["training"]["steps"] for record in records]
        unit, zeros = contest.costs(cell)
        flops.append(run_flops(contest.plan.config(cell), unit, cells.rows_of(folder), made, zeros))
        seconds.append(sum(sum(record["seconds"].values()) for record in records))
        steps.append(sum(made))
    return {"gflops": float(np.mean(flops)) / 1e9, "seconds": float(np.mean(seconds)), "steps": float(np.mean(steps))}


def _all_rows(contest: Contest) -> list[dict[str, Any]]:
    """One row for every scored image of every cell that the report rests on."""
    rows = []
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
            name, _, place = path.stem.partition("-round-")
            round_, _, scale = place.partition("-guidance-")
            view = {"prompts": name, "round": int(round_), "guidance_scale": float(scale)}
            rows += [about_cell | view | row for row in read_rows(path)]
    return rows
