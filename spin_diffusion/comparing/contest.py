"""A contest of methods and its folder: who takes part, what its cells have scored so far, and what they took."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spin_diffusion.comparing import cells
from spin_diffusion.comparing.cells import Drawing, Task, View, prompt_sets, read_view
from spin_diffusion.comparing.choosing import ChosenRate
from spin_diffusion.comparing.plan import Cell, make_plan
from spin_diffusion.comparing.settings import Budget, CompareSettings
from spin_diffusion.diffusion.cost import UnitCosts
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
    choice: ChosenRate | None = None
    cells: list[Cell] = field(default_factory=list)
    """One per seed, at the rate that was chosen."""
    best_round: int = 0
    """By validation prompts, over the seeds; 0 = not looked for."""


class Contest:
    """The methods of a comparison, in its folder."""

    def __init__(self, settings: CompareSettings) -> None:
        self.settings, self.plan = settings, make_plan(settings)
        self.output_dir = Path(settings.output_dir)
        self.drawing = Drawing(
            str(settings.prompts),
            settings.num_validation_prompts,
            settings.num_test_prompts,
            settings.images_per_prompt,
            settings.scorers or [],
            settings.num_inference_steps,
        )
        self.sets = prompt_sets(self.drawing)
        self.scorers = [parse_spec(spec)[0] for spec in self.drawing.scorers]
        self.entries: list[Entry] = []
        self.started = time.monotonic()

    def claim(self) -> None:
        """Take the folder; another program's is refused."""
        take_folder(self.output_dir, "comparison")
        settle(self.output_dir)
        saved = self.output_dir / "config.yaml"
        text = dump_yaml(self.settings.flat())
        write_file(saved, lambda part: part.write_text(text, encoding="utf-8"))

    # Cells and their scores

    def task(self, cell: Cell, views: list[View]) -> Task:
        """What is asked of a cell."""
        folder = str(self.output_dir / "cells" / cell.folder)
        return Task(folder, cell.training, cell.rounds, cell.seed, views, self.drawing, self.settings.retry_failed)

    def folder(self, cell: Cell) -> Path:
        """Where a cell lies."""
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

    def curve(self, entry: Entry) -> dict[int, list[float]]:
        """Round -> mean on validation prompts at the usual guidance, of each seed that has an end."""
        usual = self.plan.usual_guidance(entry.world)
        curve = {}
        for k in range(1, max((cell.rounds for cell in entry.cells), default=0) + 1):
            found = [self.mean(cell, View("validation", k, usual)) for cell in entry.cells]
            curve[k] = [mean for mean in found if mean is not None]
        return curve

    def bases(self) -> list[Cell]:
        """The base of every world with every seed."""
        return [self.plan.base(world, seed) for world in self.plan.worlds() for seed in self.settings.all_seeds]

    def cells(self) -> list[Cell]:
        """All cells that the report rests on, the bases first; one that two budgets share is there twice."""
        of_entries = [(*self.tuning(entry), *entry.cells) for entry in self.entries if entry.steps_per_round]
        return [*self.bases(), *(cell for row in of_entries for cell in row)]

    # What they took

    def costs(self, cell: Cell) -> tuple[UnitCosts, bool]:
        """FLOPs of one call of each network of the cell's base, and whether its empty prompt needs no embedding."""
        base = self.plan.base(cell.world, self.settings.all_seeds[0])
        path = self.output_dir / "costs" / f"{cell.world}-{base.key[:8]}.json"
        return cells.counted_costs(self.task(cell, []), path)

    def took(self) -> dict[str, int | float] | None:
        """`runs`, and the `seconds` and `cpu_seconds` of all their processes; None where not all have noted them."""
        taken = [cells.took(folder) for folder in {self.folder(cell) for cell in self.cells()}]
        noted = [seconds for seconds in taken if seconds is not None]
        if len(noted) < len(taken):
            return None
        return {"runs": len(taken)} | {key: sum(each[key] for each in noted) for key in ("seconds", "cpu_seconds")}
