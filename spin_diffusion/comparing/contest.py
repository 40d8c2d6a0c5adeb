"""A contest of methods and its folder: who takes part, what the cells have scored so far, and what is chosen by that.

A rate, settings of the sampler and a round are chosen on validation prompts alone, by mean scores (larger = better);
settings of the sampler by the distance to real pictures where that is asked for.
"""

import bisect
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from spin_diffusion.comparing import cells
from spin_diffusion.comparing.cells import Task, View, prompt_sets, read_view, scores_path
from spin_diffusion.comparing.distances import nearest
from spin_diffusion.comparing.plan import Cell, make_plan, parsed
from spin_diffusion.comparing.results import TookAll
from spin_diffusion.comparing.settings import Budget, CompareSettings
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import UnitCosts, generation_flops, step_flops, work_of
from spin_diffusion.evaluation.distribution import MIN_PICTURES
from spin_diffusion.evaluation.features import Comparison
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.runs.real_pictures import of_data
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.selfplay.round_settings import source_of
from spin_diffusion.selfplay.train_settings import of_round
from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import settle, write_file
from spin_diffusion.store.yaml_files import dump_yaml

At = TypeVar("At", int, float, Sampling)


@dataclass(frozen=True)
class ChosenRate:
    """What a method was given, and what it was chosen by."""

    learning_rate: float
    score: float
    """Mean on validation prompts."""
    at_edge: bool
    """The rate is the lowest or the highest of several that could be had: a better one may lie outside."""


def highest(means: Mapping[At, float]) -> At:
    """The rate, settings of the sampler, or round, with the highest mean; of equal ones the lowest, which is the
    cheapest and the closest to the base."""
    return max(sorted(means), key=lambda at: means[at])


def choose(by_rate: Mapping[float, Mapping[Sampling, float] | None]) -> ChosenRate | None:
    """The rate whose best guidance scale scores highest; of equal ones the lower rate. None when no rate has a score.

    Args:
        by_rate: learning rate -> drawn how, at which guidance scale -> mean, or None for a run that has no end.
    """
    finished = {rate: max(means.values()) for rate, means in by_rate.items() if means}
    if not finished:
        return None
    rate = highest(finished)
    at_edge = len(by_rate) > 1 and rate in (min(by_rate), max(by_rate))
    return ChosenRate(rate, finished[rate], at_edge)


@dataclass
class Entry:
    """One method in one world under one budget, as far as it has come."""

    world: str
    budget: Budget
    method: str
    steps_per_round: int
    """0 = its images alone cost more than the budget."""
    choice: ChosenRate | None = None
    cells: list[Cell] = field(default_factory=list)
    """One per seed, at the rate that was chosen."""
    best: Sampling | None = None
    """The settings of the sampler that are best for its first seed on validation prompts."""
    best_round: int = 0
    """By validation prompts, over the seeds; 0 = not looked for."""
    rates: list[float] = field(default_factory=list)
    """Its grid of learning rates, from low to high, as far as it has been widened."""

    @property
    def rounds(self) -> int:
        """Rounds of its runs; 0 = it has none."""
        return self.cells[0].rounds if self.cells else 0

    def widen(self) -> bool:
        """Add the rate beyond the edge at which the best one lies, as far from it as its neighbour; whether it did."""
        if self.choice is None or not self.choice.at_edge:
            return False
        edge = self.rates.index(self.choice.learning_rate)
        beyond = self.rates[edge] ** 2 / self.rates[1 if edge == 0 else -2]
        self.rates = sorted([*self.rates, float(f"{beyond:.3g}")])
        return True


class Contest:
    """The methods of a comparison, in its folder."""

    def __init__(self, settings: CompareSettings) -> None:
        self.settings, self.plan = settings, make_plan(settings)
        self.output_dir = Path(settings.output_dir)
        self.sets = prompt_sets(settings)
        self.scorers = [parse_spec(spec)[0] for spec in settings.scorers or []]
        if settings.sweep.by == "fd" and settings.num_validation_prompts < MIN_PICTURES:
            raise InputError(
                f"--sweep by fd takes {MIN_PICTURES} pictures of validation prompts, of which there is one each: give "
                f"--num_validation_prompts {MIN_PICTURES} or more, not {settings.num_validation_prompts}"
            )
        self.entries: list[Entry] = []
        self.started = time.monotonic()

    def claim(self) -> None:
        """Take the folder; another program's is refused."""
        take_folder(self.output_dir, "comparison")
        settle(self.output_dir)
        text = dump_yaml(asdict(self.settings))
        write_file(self.output_dir / "config.yaml", lambda part: part.write_text(text, encoding="utf-8"))

    # Cells and their scores

    def task(self, cell: Cell, views: list[View]) -> Task:
        """What is asked of a cell."""
        config = parsed({**cell.training, "output_dir": str(self.folder(cell) / "run")})
        return Task(self.folder(cell), config, cell.rounds, cell.seed, views, self.settings)

    def folder(self, cell: Cell) -> Path:
        """Where a cell lies."""
        return self.output_dir / "cells" / cell.folder

    def mean(self, cell: Cell, view: View) -> float | None:
        """Mean of the first scorer over a view; None = it has no scores."""
        rows = read_view(self.folder(cell), view)
        return None if rows is None else float(np.mean([row[self.scorers[0]] for row in rows]))

    def means(self, cell: Cell, samplings: list[Sampling]) -> dict[Sampling, float] | None:
        """Drawn how -> mean on validation prompts after the last round; None = a run without an end."""
        found = {view.sampling: self.mean(cell, view) for view in self.validation(cell, samplings)}
        return None if None in found.values() else {how: mean for how, mean in found.items() if mean is not None}

    def validation(self, cell: Cell, samplings: list[Sampling]) -> list[View]:
        """The views that choose between these ways of drawing, after the last round."""
        return [View("validation", cell.rounds, how) for how in samplings]

    def best(self, cell: Cell) -> Sampling | None:
        """The free settings of the sampler with the highest mean, or whose pictures are nearest to real ones; None = a
        run without an end."""
        free = self.plan.free(cell.world)
        if self.settings.sweep.by == "fd":
            real, prompts = self.real(cell.world), self.settings.num_validation_prompts
            views = {view.sampling: scores_path(self.folder(cell), view) for view in self.validation(cell, free)}
            return None if real is None else nearest(views, real, self.settings.images_of("validation"), prompts)
        means = self.means(cell, free)
        return highest(means) if means else None

    def real(self, world: str) -> Comparison | None:
        """The real pictures of a world, those that its first finished run was trained on; None where they are not asked
        for, or no run is finished."""
        spec, entries = self.settings.distribution_features, [one for one in self.entries if one.world == world]
        runs = [self.folder(cell) / "run" for entry in entries for cell in (*entry.cells, *self.tuning(entry))]
        data = next((run / "data" for run in runs if (run / "data" / "manifest.json").is_file()), None)
        if spec is None or data is None:
            return None
        return of_data(spec, data, f"images of {world}", self.output_dir / "worlds" / world)

    def best_of_base(self, world: str) -> Sampling | None:
        """The best free settings of a world's base."""
        return self.best(self.plan.base(world, self.settings.all_seeds[0]))

    def tuning(self, entry: Entry) -> list[Cell]:
        """One cell per rate of its grid, with the first seed; none where the budget leaves no step."""
        seed, steps = self.settings.all_seeds[0], entry.steps_per_round
        rates = entry.rates if steps else []
        return [self.plan.cell(entry.world, entry.method, rate, seed, steps) for rate in rates]

    def entry(self, world: str, budget: Budget, method: str, steps_per_round: int) -> Entry:
        """A method that has not begun, with its own grid of rates."""
        return Entry(world, budget, method, steps_per_round, rates=self.plan.rates(world, method))

    def curve(self, entry: Entry) -> dict[int, list[float]]:
        """Round -> mean on validation prompts at the usual guidance, of each seed that has an end."""
        usual = self.plan.usual(entry.world)
        curve = {}
        for k in range(1, entry.rounds + 1):
            found = [self.mean(cell, View("validation", k, usual)) for cell in entry.cells]
            curve[k] = [mean for mean in found if mean is not None]
        return curve

    def bases(self) -> list[Cell]:
        """The base of every world with every seed."""
        return [self.plan.base(world, seed) for world in self.plan.worlds() for seed in self.settings.all_seeds]

    def cells(self) -> list[Cell]:
        """All cells that the report rests on, the bases first; one that two budgets share is there twice."""
        of_entries = [(*self.tuning(entry), *entry.cells) for entry in self.entries]
        return [*self.bases(), *(cell for row in of_entries for cell in row)]

    # What they took

    def costs(self, cell: Cell) -> tuple[UnitCosts, bool]:
        """FLOPs of one call of each network of the cell's base, and whether its empty prompt needs no embedding."""
        base = self.plan.base(cell.world, self.settings.all_seeds[0])
        path = self.output_dir / "costs" / f"{cell.world}-{base.key[:8]}.json"
        return cells.counted_costs(self.task(cell, []), path)

    def took(self) -> TookAll | None:
        """What the processes of all runs took; None where not all have noted it."""
        taken = [cells.took(folder) for folder in dict.fromkeys(map(self.folder, self.cells()))]
        noted = [one for one in taken if one is not None]
        if len(noted) < len(taken):
            return None
        return {
            "runs": len(taken),
            "seconds": sum(one["seconds"] for one in noted),
            "cpu_seconds": sum(one["cpu_seconds"] for one in noted),
        }


# Equal compute


def run_flops(config: Config, unit: UnitCosts, rows: int, steps: list[int], zeros_for_empty: bool) -> int:
    """FLOPs of a run, with the encoding of the real images and of their prompts.

    Args:
        rows: real samples of the run.
        steps: optimizer steps of each round.
        zeros_for_empty: the empty prompt needs no embedding.
    """
    sources = [source_of(config.rounds, of_round(config.rounds.objective, k)) for k in range(1, len(steps) + 1)]
    works = [
        work_of(config, source, rows // config.rounds.real_parts, num, zeros_for_empty)
        for source, num in zip(sources, steps, strict=True)
    ]
    encoded = rows * (2 if "data" in sources else 1)
    trips = encoded if config.images.vae_round_trip else 0
    real = (encoded + trips) * unit.vae_encode + trips * unit.vae_decode
    rounds = (generation_flops(unit, work) + work.steps * step_flops(unit, work) for work in works)
    return real + rows * unit.text + sum(rounds)


def steps_for(config: Config, unit: UnitCosts, rows: int, budget: int, zeros_for_empty: bool) -> int:
    """The most optimizer steps in each round with which a run takes at most `budget` FLOPs; 0 = one is too many."""

    def takes(steps: int) -> int:
        return run_flops(config, unit, rows, [steps] * config.rounds.rounds, zeros_for_empty)

    longest = 1
    while takes(longest) <= budget:
        longest *= 2
    return bisect.bisect_right(range(1, longest), budget, key=takes)
