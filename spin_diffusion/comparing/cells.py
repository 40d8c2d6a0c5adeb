"""A cell and what lies in its folder: what it is asked for, what of that is there, what it took.

CELL/run/                                       the training run's own folder
CELL/scores/test-round-3-guidance-2-steps-10-x1.parquet     one file per set of prompts, round and way of drawing
CELL/failed.json                                why it has no end: diverged, refused or killed
CELL/took.json                                  what its processes took
CELL/log.txt                                    what the run said
"""

import functools
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from spin_diffusion.comparing.settings import CompareSettings, SetName
from spin_diffusion.diffusion.base import Base, load_to_draw
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import UnitCosts, count_units
from spin_diffusion.evaluation.embeddings import __name__ as EMBEDDINGS
from spin_diffusion.evaluation.prompt_sets import PromptRow, PromptSet, load_prompts, prompts_hash
from spin_diffusion.evaluation.protocols import protocol_of
from spin_diffusion.evaluation.scorers import __name__ as SCORERS
from spin_diffusion.evaluation.specs import parse_spec, part_key
from spin_diffusion.runs.start import quiet_libraries
from spin_diffusion.samples.real import data_manifest
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.selfplay.record import FINAL, RoundRecord, find_record, read_record
from spin_diffusion.store.files import is_built, read_if_whole, read_rows, write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of


@dataclass(frozen=True)
class View:
    """Pictures of one round of a cell, drawn in one way."""

    prompts: SetName
    round: int
    """0 = the base."""
    sampling: Sampling

    @property
    def name(self) -> str:
        """The name of its file of scores, by what is free to choose of the sampler."""
        how = self.sampling
        drawn = f"guidance-{how.guidance_scale:g}-steps-{how.num_inference_steps}-x{how.prediction_scale:g}"
        return f"{self.prompts}-round-{self.round}-{drawn}"


VIEW = re.compile(
    r"(?P<prompts>\w+)-round-(?P<round>\d+)"
    r"-guidance-(?P<guidance_scale>.+)-steps-(?P<num_inference_steps>\d+)-x(?P<prediction_scale>.+)"
)
"""The name of a view's file of scores, in parts."""


@dataclass(frozen=True)
class Task:
    """What a process is asked: one cell, and the views of it that are wanted."""

    folder: Path
    config: Config
    """The settings of the training run, whose own folder is `folder`/run."""
    rounds: int
    """0 = the base, which is not trained."""
    seed: int
    views: list[View]
    settings: CompareSettings
    """How its pictures are asked for and scored."""

    def embedding(self, view: View) -> str | None:
        """What gives features of the pictures of a view: of those that report, and of those that choose by distance."""
        wanted = view.prompts == "test" or self.settings.sweep.by == "fd"
        return self.settings.distribution_features if wanted else None


def prompt_sets(settings: CompareSettings) -> dict[SetName, PromptSet]:
    """The first prompts choose, the next ones report; no prompt is in both.

    Raises:
        InputError: there are too few.
    """
    wanted = settings.num_validation_prompts + settings.num_test_prompts
    found = load_prompts(str(settings.prompts), wanted)
    if len(found.rows) < wanted:
        raise InputError(
            f"--prompts {settings.prompts} has {len(found.rows)} prompts, fewer than --num_validation_prompts "
            f"{settings.num_validation_prompts} and --num_test_prompts {settings.num_test_prompts} together"
        )
    split = settings.num_validation_prompts

    def part(name: SetName, rows: tuple[PromptRow, ...]) -> PromptSet:
        return PromptSet(name, rows, prompts_hash([row.prompt for row in rows]), found.licence, found.source)

    return {"validation": part("validation", found.rows[:split]), "test": part("test", found.rows[split:])}


# What is there


def missing_views(task: Task) -> list[View]:
    """The views that have no scores yet, or scores of another drawing."""
    return [view for view in task.views if not is_built(scores_path(task.folder, view), view_key(task, view))]


def is_trained(task: Task) -> bool:
    """Whether the training run is finished."""
    path = task.folder / "run" / f"round-{task.rounds}" / "round.json"
    return task.rounds == 0 or path.is_file() and read_record(path.parent)["state"] in FINAL


def is_done(task: Task) -> bool:
    """Whether there is nothing left to do."""
    return failure_of(task) is not None or is_trained(task) and not missing_views(task)


def forget_stale(task: Task) -> None:
    """Remove scores of other weights, scorers or prompts than there are now: a run that fails would keep them."""
    for view in missing_views(task):
        scores_path(task.folder, view).unlink(missing_ok=True)


class Failure(TypedDict):
    """What ended a cell."""

    kind: Literal["diverged", "refused", "killed"]
    message: str


def failure_of(task: Task) -> Failure | None:
    """What ended a cell for good; None = nothing did, or it is to be run again."""
    found = last_failure(task.folder)
    return None if found is None or task.settings.retry_failed or found["kind"] == "killed" else found


def last_failure(folder: Path) -> Failure | None:
    """The last failure of a cell."""
    return read_if_whole(folder / "failed.json", Failure)


def read_view(folder: Path, view: View) -> list[dict[str, Any]] | None:
    """Rows of a view: id, k, prompt, seed, one column per scorer, distance, perhaps features; None = it has none."""
    path = scores_path(folder, view)
    return read_rows(path) if path.is_file() else None


def scores_path(folder: Path, view: View) -> Path:
    """The file of a view's scores."""
    return folder / "scores" / f"{view.name}.parquet"


def view_key(task: Task, view: View) -> str:
    """What the scores of a view depend on beside the base, by which its cell's folder is named: the weights, how they
    draw, the prompts, and what is behind each scorer."""
    run_ = task.folder / "run"
    protocol = protocol_of(
        prompt_sets(task.settings)[view.prompts],
        images_per_prompt=task.settings.images_of(view.prompts),
        seed=task.seed,
        sampling=view.sampling,
        guidance_scales=[view.sampling.guidance_scale],
    )
    embedding = task.embedding(view)
    return key_of(
        protocol=protocol["id"],
        **({"embedding": part_key(EMBEDDINGS, embedding)} if embedding is not None else {}),
        scorers={parse_spec(spec)[0]: part_key(SCORERS, spec) for spec in task.settings.scorers or []},
        weights=saved_player(run_, view.round) if view.round and (run_ / f"round-{view.round}").is_dir() else None,
    )


def saved_player(run_: Path, round_: int) -> dict[str, str]:
    """SHA-256 of the files of a round's player, by their names in the run's folder, as its record has them."""
    record = find_record(run_ / f"round-{round_}")
    files = record["files"].items() if record is not None else ()
    return {name: digest for name, digest in files if Path(name).parent.name in ("unet", "lora")}


# What it took


class Took(TypedDict):
    """What a cell's processes took."""

    seconds: float
    cpu_seconds: float


def took(folder: Path) -> Took | None:
    """What a cell took; None = nobody noted it."""
    return read_if_whole(folder / "took.json", Took)


def rounds_of(folder: Path, rounds: int) -> list[RoundRecord]:
    """The records of a cell's finished rounds."""
    paths = [folder / "run" / f"round-{k}" / "round.json" for k in range(1, rounds + 1)]
    return [read_record(path.parent) for path in paths if path.is_file()]


def rows_of(folder: Path) -> int:
    """Real samples that a cell was trained on."""
    return data_manifest(folder / "run" / "data")["rows"]


@functools.lru_cache(maxsize=1)
def base_pipeline(base: Base) -> tuple[Any, Any]:
    """The family and the pipeline of a base, kept for the next cell of its world."""
    quiet_libraries()
    return load_to_draw(base, "cuda" if torch.cuda.is_available() else "cpu")


class _CountedCosts(TypedDict):
    """The costs, and whether the empty prompt needs no embedding."""

    unit: UnitCosts
    zeros_for_empty: bool


def counted_costs(task: Task, path: Path) -> tuple[UnitCosts, bool]:
    """The costs of the networks of a cell's base, and whether its empty prompt needs no embedding; kept in a file."""
    counted: _CountedCosts | None = read_if_whole(path, _CountedCosts)
    if counted is not None:
        return counted["unit"], counted["zeros_for_empty"]
    config = task.config
    family, pipeline = base_pipeline(Base.of_settings(config.flat()))
    unit = count_units(family, pipeline, config.images.resolution or family.RESOLUTION)
    zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
    write_json(path, {"unit": asdict(unit), "zeros_for_empty": zeros})
    return unit, zeros
