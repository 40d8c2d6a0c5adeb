"""The phases of a comparison: rates on validation prompts, then all seeds on test prompts, then the best rounds.

Every phase is a list of cells; what is done is not done again, so the same command starts, resumes and finishes it.
"""

import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from spin_diffusion.comparing import cells
from spin_diffusion.comparing.cells import Task, View, is_done
from spin_diffusion.comparing.choosing import best_round, choose
from spin_diffusion.comparing.contest import Contest, Entry
from spin_diffusion.comparing.plan import Cell, run_flops, steps_for
from spin_diffusion.comparing.workers import run_all


def play(contest: Contest) -> bool:
    """Run everything; False = --max_hours came first."""
    # The steps of equal compute are known only when the reference has been trained at equal steps
    with_tests = [
        contest.task(cell, contest.validation(cell) + [View("test", 0, s) for s in contest.scales(cell.world)])
        for cell in contest.bases()
    ]
    for world in contest.plan.worlds():
        for method in contest.plan.methods(world):
            if "steps" in contest.settings.budgets or method == contest.settings.compute_reference:
                steps = contest.plan.steps_per_round(world, method)
                contest.entries.append(Entry(world, "steps", method, steps))
    if not _run(contest, "choose rates", with_tests + _tuning_tasks(contest, contest.entries)):
        return False
    if "compute" in contest.settings.budgets:
        of_compute = _compute_entries(contest)
        if "steps" not in contest.settings.budgets:
            contest.entries = []
        contest.entries += of_compute
        if not _run(contest, "choose rates at equal compute", _tuning_tasks(contest, of_compute)):
            return False
    for entry in contest.entries:
        entry.choice = choose({cell.training["learning_rate"]: contest.means(cell) for cell in contest.tuning(entry)})
        if entry.choice is not None and entry.steps_per_round:
            entry.cells = [
                contest.plan.cell(entry.world, entry.method, entry.choice.learning_rate, seed, entry.steps_per_round)
                for seed in contest.settings.all_seeds
            ]
    if not _run(contest, "all seeds", [task for entry in contest.entries for task in _final_tasks(contest, entry)]):
        return False
    if contest.settings.every_round:
        for entry in contest.entries:
            entry.best_round = _best_round(contest, entry)
        tests = [task for entry in contest.entries for task in _best_round_tasks(contest, entry)]
        return _run(contest, "best rounds", tests)
    return True


def _tuning_tasks(contest: Contest, entries: list[Entry]) -> list[Task]:
    tuned = [cell for entry in entries if entry.steps_per_round for cell in contest.tuning(entry)]
    return [contest.task(cell, contest.validation(cell)) for cell in tuned]


def _final_tasks(contest: Contest, entry: Entry) -> list[Task]:
    usual = contest.plan.usual_guidance(entry.world)
    tasks = []
    for cell in entry.cells:
        views = [View("test", cell.rounds, scale) for scale in contest.scales(cell.world)]
        if contest.settings.every_round:
            views += [View("validation", k, usual) for k in range(1, cell.rounds + 1)]
        if contest.settings.test_rounds:
            views += [View("test", k, scale) for k in range(1, cell.rounds) for scale in contest.scales(cell.world)]
            if cell.seed == contest.settings.all_seeds[0]:
                earlier = range(1, cell.rounds)
                views += [View("validation", k, scale) for k in earlier for scale in contest.scales(cell.world)]
        tasks.append(contest.task(cell, list(dict.fromkeys(views))))
    return tasks


def _best_round(contest: Contest, entry: Entry) -> int:
    means = {k: float(np.mean(of_seeds)) for k, of_seeds in contest.curve(entry).items() if of_seeds}
    return best_round(means) if means else 0


def _best_round_tasks(contest: Contest, entry: Entry) -> list[Task]:
    if not entry.cells or entry.choice is None or entry.best_round in (0, entry.cells[0].rounds):
        return []
    scales = sorted({1.0, contest.plan.usual_guidance(entry.world), entry.choice.guidance_scale})
    return [contest.task(cell, [View("test", entry.best_round, s) for s in scales]) for cell in entry.cells]


def _compute_entries(contest: Contest) -> list[Entry]:
    found = []
    for world in contest.plan.worlds():
        cell = _reference_cell(contest, world)
        for method in contest.plan.methods(world):
            config = contest.plan.config(
                contest.plan.cell(world, method, contest.plan.rates(world, method)[0], contest.settings.all_seeds[0], 1)
            )
            if cell is None:
                found.append(Entry(world, "compute", method, 0))
                continue
            unit, zeros = contest.costs(cell)
            rows = cells.rows_of(contest.folder(cell))
            steps = contest.plan.steps_per_round(world, method)
            budget = run_flops(
                contest.plan.config(cell), unit, rows, [cell.training["max_train_steps"]] * cell.rounds, zeros
            )
            # What costs the same gets the same steps, and so shares its cells with equal steps
            mine = run_flops(config, unit, rows, [steps] * config.rounds.rounds, zeros)
            steps = steps if mine == budget else steps_for(config, unit, rows, budget, zeros)
            found.append(Entry(world, "compute", method, steps))
    return found


def _reference_cell(contest: Contest, world: str) -> Cell | None:
    """A finished run of the method whose cost is the budget."""
    entry = next(e for e in contest.entries if (e.world, e.method) == (world, contest.settings.compute_reference))
    whole = [cell for cell in contest.tuning(entry) if cells.is_trained(contest.task(cell, []))]
    return whole[0] if whole else None


def _run(contest: Contest, name: str, tasks: list[Task]) -> bool:
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

        run_all(left, contest.settings.jobs, done, lambda: _has_time(contest))
    return all(is_done(task) or _was_killed(contest, task) for task in left)


def _was_killed(contest: Contest, task: Task) -> bool:
    return cells.last_failure(Path(task.folder)) is not None


def _has_time(contest: Contest) -> bool:
    limit = contest.settings.max_hours
    return limit is None or time.monotonic() - contest.started < limit * 3600


_BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} to go"


def _steps(task: Task) -> int:
    return task.rounds * task.training.get("max_train_steps", 0)


def _size(task: Task) -> int:
    """For the bar: how long a task takes, roughly."""
    drawn = sum(100 if view.prompts == "test" else 40 for view in cells.missing_views(task))
    return 1 + drawn // 10 + (0 if cells.is_trained(task) else 4 * _steps(task))
