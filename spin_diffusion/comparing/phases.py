"""The phases of a comparison: rates on validation prompts, then all seeds on test prompts, then the report.

Every phase is a list of cells; what is done is not done again, so the same command starts, resumes and finishes it.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from spin_diffusion.comparing import cells
from spin_diffusion.comparing.cells import Drawing, Task, View, is_done, prompt_sets, read_view
from spin_diffusion.comparing.choosing import Choice, best_round, choose
from spin_diffusion.comparing.plan import Cell, make_plan, run_flops, steps_for
from spin_diffusion.comparing.settings import Budget, CompareSettings
from spin_diffusion.comparing.workers import run_all
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.run_dir import settle, write_file
from spin_diffusion.store.yaml_files import dump_yaml


@dataclass
class Entry:
    """One method in one world under one budget, as far as it has come."""

    world: str
    budget: Budget
    method: str
    steps_per_round: int
    """0 = its images alone cost more than the budget."""
    choice: Choice | None = None
    cells: list[Cell] = field(default_factory=list)
    """One per seed, at the rate that was chosen."""
    best_round: int = 0
    """By validation prompts, over the seeds; 0 = not looked for."""


class Comparison:
    """A comparison and its folder."""

    def __init__(self, settings: CompareSettings) -> None:
        self.settings, self.plan = settings, make_plan(settings)
        self.output_dir = Path(settings.output_dir)
        self.drawing = Drawing(
            str(settings.prompts), settings.num_validation_prompts, settings.num_test_prompts,
            settings.images_per_prompt, settings.scorers or [], settings.num_inference_steps,
        )  # fmt: skip
        self.sets = prompt_sets(self.drawing)
        self.scorers = [parse_spec(spec)[0] for spec in self.drawing.scorers]
        self.entries: list[Entry] = []
        self.started = time.monotonic()

    # Cells and their scores

    def task(self, cell: Cell, views: list[View]) -> Task:
        """What is asked of a cell."""
        folder = str(self.output_dir / "cells" / cell.folder)
        return Task(folder, cell.training, cell.rounds, cell.seed, views, self.drawing, self.settings.retry_failed)

    def folder(self, cell: Cell) -> Path:
        """Of a cell."""
        return self.output_dir / "cells" / cell.folder

    def scales(self, world: str) -> list[float]:
        """The sweep of a world."""
        return self.plan.guidance_scales(world)

    def mean(self, cell: Cell, view: View) -> float | None:
        """Mean of the first scorer over a view; None = it has no scores."""
        rows = read_view(self.folder(cell), view)
        return None if rows is None else float(np.mean([row[self.scorers[0]] for row in rows]))

    def means(self, cell: Cell, round_: int | None = None) -> dict[float, float] | None:
        """Guidance scale -> mean on validation prompts after a round, by default the last one; None = a run without
        an end."""
        last = cell.rounds if round_ is None else round_
        found = {s: self.mean(cell, View("validation", last, s)) for s in self.scales(cell.world)}
        return None if None in found.values() else {s: mean for s, mean in found.items() if mean is not None}

    def validation(self, cell: Cell) -> list[View]:
        """The views that choose."""
        return [View("validation", cell.rounds, scale) for scale in self.scales(cell.world)]

    def tuning(self, entry: Entry) -> list[Cell]:
        """One cell per rate of the grid, with the first seed."""
        return [
            self.plan.cell(entry.world, entry.method, rate, self.settings.all_seeds[0], entry.steps_per_round)
            for rate in self.plan.rates(entry.world, entry.method)
        ]

    # The phases

    def play(self) -> bool:
        """Run everything; False = --max_hours came first."""
        # The steps of equal compute are known only when the reference has been trained at equal steps
        bases = [(w, s) for w in self.plan.worlds() for s in self.settings.all_seeds]
        of_base = [self.plan.base(world, seed) for world, seed in bases]
        with_tests = [
            self.task(cell, self.validation(cell) + [View("test", 0, s) for s in self.scales(cell.world)])
            for cell in of_base
        ]
        for world in self.plan.worlds():
            for method in self.plan.methods(world):
                if "steps" in self.settings.budgets or method == self.settings.compute_reference:
                    steps = self.plan.steps_per_round(world, method)
                    self.entries.append(Entry(world, "steps", method, steps))
        if not self._run("choose rates", with_tests + self._tuning_tasks(self.entries)):
            return False
        if "compute" in self.settings.budgets:
            of_compute = self._compute_entries()
            if "steps" not in self.settings.budgets:
                self.entries = []
            self.entries += of_compute
            if not self._run("choose rates at equal compute", self._tuning_tasks(of_compute)):
                return False
        for entry in self.entries:
            entry.choice = choose({cell.training["learning_rate"]: self.means(cell) for cell in self.tuning(entry)})
            if entry.choice is not None and entry.steps_per_round:
                entry.cells = [
                    self.plan.cell(entry.world, entry.method, entry.choice.learning_rate, seed, entry.steps_per_round)
                    for seed in self.settings.all_seeds
                ]
        if not self._run("all seeds", [task for entry in self.entries for task in self._final_tasks(entry)]):
            return False
        if self.settings.every_round:
            for entry in self.entries:
                entry.best_round = self._best_round(entry)
            tests = [task for entry in self.entries for task in self._best_round_tasks(entry)]
            return self._run("best rounds", tests)
        return True

    def _tuning_tasks(self, entries: list[Entry]) -> list[Task]:
        return [
            self.task(cell, self.validation(cell))
            for entry in entries if entry.steps_per_round
            for cell in self.tuning(entry)
        ]  # fmt: skip

    def _final_tasks(self, entry: Entry) -> list[Task]:
        usual = self.plan.usual_guidance(entry.world)
        tasks = []
        for cell in entry.cells:
            views = [View("test", cell.rounds, scale) for scale in self.scales(cell.world)]
            if self.settings.every_round:
                views += [View("validation", k, usual) for k in range(1, cell.rounds + 1)]
            if self.settings.test_rounds:
                views += [View("test", k, scale) for k in range(1, cell.rounds) for scale in self.scales(cell.world)]
                if cell.seed == self.settings.all_seeds[0]:
                    views += [
                        View("validation", k, scale) for k in range(1, cell.rounds) for scale in self.scales(cell.world)
                    ]
            views = list(dict.fromkeys(views))
            tasks.append(self.task(cell, views))
        return tasks

    def _best_round(self, entry: Entry) -> int:
        means = [mean for mean in self.curve(entry).values() if mean]
        rounds = {k: float(np.mean(found)) for k, found in self.curve(entry).items() if found}
        return best_round(rounds) if means else 0

    def curve(self, entry: Entry) -> dict[int, list[float]]:
        """Round -> mean on validation prompts at the usual guidance, of each seed that has an end."""
        usual = self.plan.usual_guidance(entry.world)
        curve = {}
        for k in range(1, max((cell.rounds for cell in entry.cells), default=0) + 1):
            found = [self.mean(cell, View("validation", k, usual)) for cell in entry.cells]
            curve[k] = [mean for mean in found if mean is not None]
        return curve

    def _best_round_tasks(self, entry: Entry) -> list[Task]:
        if not entry.cells or entry.choice is None or entry.best_round in (0, entry.cells[0].rounds):
            return []
        scales = sorted({1.0, self.plan.usual_guidance(entry.world), entry.choice.guidance_scale})
        return [self.task(cell, [View("test", entry.best_round, s) for s in scales]) for cell in entry.cells]

    def _compute_entries(self) -> list[Entry]:
        found = []
        for world in self.plan.worlds():
            cell = self._reference_cell(world)
            for method in self.plan.methods(world):
                config = self.plan.config(
                    self.plan.cell(world, method, self.plan.rates(world, method)[0], self.settings.all_seeds[0], 1)
                )
                if cell is None:
                    found.append(Entry(world, "compute", method, 0))
                    continue
                unit, zeros = self.costs(cell)
                rows = cells.rows_of(self.folder(cell))
                steps = self.plan.steps_per_round(world, method)
                budget = run_flops(
                    self.plan.config(cell), unit, rows, [cell.training["max_train_steps"]] * cell.rounds, zeros
                )
                # What costs the same gets the same steps, and so shares its cells with equal steps
                mine = run_flops(config, unit, rows, [steps] * config.rounds.rounds, zeros)
                steps = steps if mine == budget else steps_for(config, unit, rows, budget, zeros)
                found.append(Entry(world, "compute", method, steps))
        return found

    def _reference_cell(self, world: str) -> Cell | None:
        """A finished run of the method whose cost is the budget."""
        entry = next(e for e in self.entries if (e.world, e.method) == (world, self.settings.compute_reference))
        whole = [cell for cell in self.tuning(entry) if cells.is_trained(self.task(cell, []))]
        return whole[0] if whole else None

    def costs(self, cell: Cell) -> tuple[Any, bool]:
        """FLOPs of one call of each network of the cell's base."""
        return cells.counted_costs(
            self.task(cell, []), self.output_dir / "costs" / f"{cell.world}-{self._base_key(cell)}.json"
        )

    def _base_key(self, cell: Cell) -> str:
        return self.plan.base(cell.world, self.settings.all_seeds[0]).key[:8]

    def _run(self, name: str, tasks: list[Task]) -> bool:
        """Run what is not done; False = time is up, with something left."""
        merged: dict[str, Task] = {}
        for task in tasks:  # one cell may be asked for by two budgets
            known = merged.setdefault(task.folder, task)
            known.views.extend(view for view in task.views if view not in known.views)
        for task in merged.values():
            cells.forget_stale(task)
        left = [task for task in merged.values() if not is_done(task)]
        if not left:
            return True
        print(f"{name}: {len(left)} of {len(merged)} runs to do", flush=True)
        # Long ones first, so that no process waits for a long last one
        left.sort(key=lambda task: -_steps(task))
        sizes = {task.folder: _size(task) for task in left}
        with tqdm(total=sum(sizes.values()), desc=name, unit="", bar_format=_BAR) as bar:

            def done(task: Task) -> None:
                failure = cells.last_failure(Path(task.folder))
                if failure is not None:
                    bar.write(f"{Path(task.folder).name} {failure['kind']}: {failure['message']}")
                bar.update(sizes[task.folder])

            run_all(left, self.settings.jobs, done, self._has_time)
        return all(is_done(task) or self._was_killed(task) for task in left)

    def _was_killed(self, task: Task) -> bool:
        return cells.last_failure(Path(task.folder)) is not None

    def _has_time(self) -> bool:
        limit = self.settings.max_hours
        return limit is None or time.monotonic() - self.started < limit * 3600

    def took(self) -> dict[str, Any] | None:
        """`runs`, and the `seconds` and `cpu_seconds` of all their processes; None where not all have noted them."""
        every = [
            cell for entry in self.entries if entry.steps_per_round for cell in (*self.tuning(entry), *entry.cells)
        ]
        every += [self.plan.base(world, seed) for world in self.plan.worlds() for seed in self.settings.all_seeds]
        found = {folder: cells.took(folder) for folder in {self.folder(cell) for cell in every}}
        noted = [said for said in found.values() if said is not None]
        if len(noted) < len(found):
            return None
        return {"runs": len(found)} | {key: sum(said[key] for said in noted) for key in ("seconds", "cpu_seconds")}

    def lacking(self, results: dict[str, Any]) -> str:
        """Of which methods the table lacks results, and why, in one line; empty = of none.

        That a run diverges is a result of its method, where other rates or seeds of it came to their end.
        """
        said = []
        for world in results["worlds"]:
            base = world["base"]["failures"]
            said += [f"{world['name']}, base: {line}" for line in base[:1]]
            for budget in world["budgets"]:
                for row in budget["rows"]:
                    reasons = [line for line in row["failures"] if " diverged: " not in line] or row["failures"]
                    if row["state"] == "failed" or any(" diverged: " not in line for line in reasons):
                        why = reasons[0] if reasons else "no run of it came to its end"
                        said.append(f"{world['name']}, equal {budget['budget']}, {row['method']}: {why}")
        if not said:
            return ""
        more = f", and {len(said) - 3} more" if len(said) > 3 else ""
        return (
            f"the comparison lacks results ({'; '.join(said[:3])}{more}): mend the cause; runs that were refused or "
            "diverged are run again with --retry_failed"
        )

    # What the folder says

    def claim(self) -> None:
        """Take the folder; another program's is refused."""
        take_folder(self.output_dir, "comparison")
        settle(self.output_dir)
        saved = self.output_dir / "config.yaml"
        text = dump_yaml(self.settings.flat())
        write_file(saved, lambda part: part.write_text(text, encoding="utf-8"))


_BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} to go"


def _steps(task: Task) -> int:
    return task.rounds * task.training.get("max_train_steps", 0)


def _size(task: Task) -> int:
    """For the bar: how long a task takes, roughly."""
    drawn = sum(100 if view.prompts == "test" else 40 for view in cells.missing_views(task))
    return 1 + drawn // 10 + (0 if cells.is_trained(task) else 4 * _steps(task))
