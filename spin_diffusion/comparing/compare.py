"""A whole comparison: rates on validation prompts, all seeds on test prompts, the best rounds; conclusions; a report.

Every phase is a list of cells; what is done is not done again, so the same command starts, resumes and finishes it.
"""

import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from spin_diffusion.comparing import cells
from spin_diffusion.comparing.analysis import conclude
from spin_diffusion.comparing.cells import Task, View, is_done
from spin_diffusion.comparing.contest import Contest, Entry, choose, highest, run_flops, steps_for
from spin_diffusion.comparing.making import run_all
from spin_diffusion.comparing.plan import Cell, parsed
from spin_diffusion.comparing.report import write_reports
from spin_diffusion.comparing.results import Comparison
from spin_diffusion.comparing.settings import CompareSettings
from spin_diffusion.evaluation.scoring import check_specs
from spin_diffusion.runs.image_run import run
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.input_error import InputError


def compare_methods(settings: CompareSettings) -> None:
    """Run the comparison and write its report.

    Raises:
        InputError: anything the user gave that cannot be used; nothing that exists is touched. Or, once the report is
            written, a method without a result, or a run that did not end by itself.
    """
    check_specs(settings.scorers or [])
    contest = Contest(settings)
    contest.claim()
    if not play(contest):
        print(f"--max_hours {settings.max_hours:g} is over: the same command goes on")
        return
    results = conclude(contest)
    for path in write_reports(results, contest.output_dir):
        print(f"Report: {path}")
    if missing := lacking(results):
        raise InputError(missing)


def lacking(results: Comparison) -> str:
    """Which methods the table lacks results of, and why, in one line; empty = none.

    That a run diverges is a result of its method, where other rates or seeds of it came to their end.
    """
    lines = []
    for world in results["worlds"]:
        lines += [f"{world['name']}, base: {line}" for line in world["base"]["failures"][:1]]
        for budget in world["budgets"]:
            for row in budget["rows"]:
                reasons = [line for line in row["failures"] if " diverged: " not in line] or row["failures"]
                if row["state"] == "failed" or any(" diverged: " not in line for line in reasons):
                    why = reasons[0] if reasons else "no run of it came to its end"
                    lines.append(f"{world['name']}, equal {budget['budget']}, {row['method']}: {why}")
    if not lines:
        return ""
    more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
    return (
        f"the comparison lacks results ({'; '.join(lines[:3])}{more}): mend the cause; runs that were refused or "
        "diverged are run again with --retry_failed"
    )


# Phases


def play(contest: Contest) -> bool:
    """Run everything; False = --max_hours came first."""
    settings, plan = contest.settings, contest.plan
    # The steps of equal compute are known only when the reference has been trained at equal steps
    bases = [contest.task(cell, contest.validation(cell, plan.guided(cell.world))) for cell in contest.bases()]
    contest.entries = [
        contest.entry(world, "steps", method, plan.steps_per_round(world, method))
        for world in plan.worlds()
        for method in settings.methods_of(world)
        if "steps" in settings.budgets or method == settings.compute_reference
    ]
    if not _run(contest, "bases", bases) or not _choose_rates(contest, "choose rates", contest.entries):
        return False
    if "compute" in settings.budgets:
        of_compute = _compute_entries(contest)
        if "steps" not in settings.budgets:
            contest.entries = []
        contest.entries += of_compute
        if not _choose_rates(contest, "choose rates at equal compute", of_compute):
            return False
    for entry in contest.entries:
        if entry.choice is not None:
            rate, steps = entry.choice.learning_rate, entry.steps_per_round
            entry.cells = [plan.cell(entry.world, entry.method, rate, seed, steps) for seed in settings.all_seeds]
    if not _run(contest, "choose settings of the sampler", _free_tasks(contest)):
        return False
    for entry in contest.entries:
        entry.best = contest.best(entry.cells[0]) if entry.cells else None
    finals = [task for entry in contest.entries for task in _final_tasks(contest, entry)]
    if not _run(contest, "all seeds", _base_tasks(contest) + finals):
        return False
    if not settings.every_round:
        return True
    for entry in contest.entries:
        entry.best_round = _best_round(contest, entry)
    tests = [task for entry in contest.entries for task in _best_round_tasks(contest, entry)]
    return _run(contest, "best rounds", tests)


def _choose_rates(contest: Contest, name: str, entries: list[Entry]) -> bool:
    """Give every method its best rate; False = --max_hours came first.

    A best rate at the edge of its grid may have a better one outside, so the grid is widened there.
    """
    for widened in range(contest.settings.widen_rates + 1):
        cells_ = [cell for entry in entries for cell in contest.tuning(entry)]
        views = [contest.validation(cell, contest.plan.guided(cell.world)) for cell in cells_]
        if not _run(contest, name, list(map(contest.task, cells_, views))):
            return False
        for entry in entries:
            guided = contest.plan.guided(entry.world)
            tuned = {cell.training["learning_rate"]: contest.means(cell, guided) for cell in contest.tuning(entry)}
            entry.choice = choose(tuned)
        if widened == contest.settings.widen_rates or not any([entry.widen() for entry in entries]):
            break
    return True


def _free_tasks(contest: Contest) -> list[Task]:
    """What chooses the settings of the sampler: of every base, and of every method at its rate, with the first seed."""
    seed = contest.settings.all_seeds[0]
    firsts = [contest.plan.base(world, seed) for world in contest.plan.worlds()]
    firsts += [entry.cells[0] for entry in contest.entries if entry.cells]
    return [contest.task(cell, contest.validation(cell, contest.plan.free(cell.world))) for cell in firsts]


def _shown(contest: Contest, world: str, best: Sampling | None) -> list[Sampling]:
    """How the pictures are drawn that are reported: without guidance, as usual, and at the best settings."""
    drawn = (contest.plan.unguided(world), contest.plan.usual(world), best)
    return sorted({how for how in drawn if how is not None})


def _base_tasks(contest: Contest) -> list[Task]:
    best = {world: contest.best_of_base(world) for world in contest.plan.worlds()}
    return [
        contest.task(cell, [View("test", 0, how) for how in _shown(contest, cell.world, best[cell.world])])
        for cell in contest.bases()
    ]


def _final_tasks(contest: Contest, entry: Entry) -> list[Task]:
    shown, usual = _shown(contest, entry.world, entry.best), contest.plan.usual(entry.world)
    tasks = []
    for cell in entry.cells:
        views = [View("test", cell.rounds, how) for how in shown]
        if contest.settings.every_round:
            views += [View("validation", k, usual) for k in range(1, cell.rounds + 1)]
        tested = contest.settings.test_rounds or []
        views += [View("test", k, how) for k in tested if k < cell.rounds for how in shown]
        tasks.append(contest.task(cell, list(dict.fromkeys(views))))
    return tasks


def _best_round(contest: Contest, entry: Entry) -> int:
    means = {k: float(np.mean(of_seeds)) for k, of_seeds in contest.curve(entry).items() if of_seeds}
    return highest(means) if means else 0


def _best_round_tasks(contest: Contest, entry: Entry) -> list[Task]:
    if entry.best is None or entry.best_round in (0, entry.rounds):
        return []
    shown = _shown(contest, entry.world, entry.best)
    return [contest.task(cell, [View("test", entry.best_round, how) for how in shown]) for cell in entry.cells]


def _compute_entries(contest: Contest) -> list[Entry]:
    """Every method with the steps that cost what the reference's run cost; with none where the reference has no end."""
    entries, plan = [], contest.plan
    for world in plan.worlds():
        cell = _reference_cell(contest, world)
        for method in contest.settings.methods_of(world):
            steps = 0
            if cell is not None:
                config = parsed(plan.training_of(world, method))
                unit, zeros = contest.costs(cell)
                rows = cells.rows_of(contest.folder(cell))
                of_reference = [cell.training["max_train_steps"]] * cell.rounds
                budget = run_flops(parsed(cell.training), unit, rows, of_reference, zeros)
                # What costs the same gets the same steps, and so shares its cells with equal steps
                steps = plan.steps_per_round(world, method)
                if run_flops(config, unit, rows, [steps] * config.rounds.rounds, zeros) != budget:
                    steps = steps_for(config, unit, rows, budget, zeros)
            entries.append(contest.entry(world, "compute", method, steps))
    return entries


def _reference_cell(contest: Contest, world: str) -> Cell | None:
    """A finished run of the method whose cost is the budget."""
    entry = next(e for e in contest.entries if (e.world, e.method) == (world, contest.settings.compute_reference))
    return next((cell for cell in contest.tuning(entry) if cells.is_trained(contest.task(cell, []))), None)


def _run(contest: Contest, name: str, tasks: list[Task]) -> bool:
    """Run what is not done; False = time is up, with something left."""
    merged: dict[Path, Task] = {}
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
            failure = cells.last_failure(task.folder)
            if failure is not None:
                bar.write(f"{task.folder.name} {failure['kind']}: {failure['message']}")
            bar.update(sizes[task.folder])

        run_all(left, run, contest.settings.jobs, done, lambda: _has_time(contest))
    return all(is_done(task) or cells.last_failure(task.folder) is not None for task in left)


def _has_time(contest: Contest) -> bool:
    limit = contest.settings.max_hours
    return limit is None or time.monotonic() - contest.started < limit * 3600


_BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} to go"


def _steps(task: Task) -> int:
    per_round = task.config.training.max_train_steps
    return task.rounds * per_round if isinstance(per_round, int) else 0


def _size(task: Task) -> int:
    """For the bar: how long a task takes, roughly."""
    drawn = sum(100 if view.prompts == "test" else 40 for view in cells.missing_views(task))
    return 1 + drawn // 10 + (0 if cells.is_trained(task) else 4 * _steps(task))
