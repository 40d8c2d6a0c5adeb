"""One cell: train it by the ordinary run, then draw and score what is asked of it. What is there already stays.

CELL/run/                                       the training run's own folder
CELL/scores/test-round-3-guidance-2.parquet     one file per set of prompts, round and guidance scale
CELL/failed.json                                why it has no end: diverged, refused or killed
CELL/log.txt                                    what the run said
"""

import contextlib
import functools
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from accelerate.state import AcceleratorState

from spin_diffusion.comparing.plan import parsed
from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import UnitCosts, count_units
from spin_diffusion.diffusion.sampling import draw_images, drawing_pipeline, load_to_draw
from spin_diffusion.evaluation.prompt_sets import PromptRow, PromptSet, load_prompts, prompts_hash
from spin_diffusion.evaluation.protocols import precision_of, protocol_of
from spin_diffusion.evaluation.scorers import LoadedScorer, load_scorer, parse_spec
from spin_diffusion.evaluation.scorers import __name__ as SCORERS
from spin_diffusion.evaluation.scoring import BATCH, score_images
from spin_diffusion.evaluation.specs import part_key
from spin_diffusion.runs.image_run import run
from spin_diffusion.runs.start import quiet_libraries
from spin_diffusion.samples.real import data_manifest
from spin_diffusion.selfplay.record import FINAL, RoundRecord, find_record, read_record, replay
from spin_diffusion.store.files import Made, build, is_built, read_if_whole, read_rows, write_json
from spin_diffusion.store.folder import release, take_folder
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of, place_hash
from spin_diffusion.store.run_dir import Damaged, find_damage, settle, trouble_of

SetName = Literal["validation", "test"]


@dataclass(frozen=True)
class View:
    """Pictures of one round of a cell at one guidance scale."""

    prompts: SetName
    round: int
    """0 = the base."""
    guidance_scale: float

    @property
    def name(self) -> str:
        """The name of its file of scores."""
        return f"{self.prompts}-round-{self.round}-guidance-{self.guidance_scale:g}"


@dataclass(frozen=True)
class Drawing:
    """How the pictures of all cells are drawn and scored."""

    prompts: str
    num_validation_prompts: int
    num_test_prompts: int
    images_per_prompt: int
    scorers: list[str]
    num_inference_steps: int | None


_TOOK = "took.json"


@dataclass(frozen=True)
class Task:
    """What a process is asked: one cell, and the views of it that are wanted."""

    folder: str
    training: dict[str, Any]
    rounds: int
    """0 = the base, which is not trained."""
    seed: int
    views: list[View]
    drawing: Drawing
    retry_failed: bool = False


def prompt_sets(drawing: Drawing) -> dict[SetName, PromptSet]:
    """The first prompts choose, the next ones report; no prompt is in both.

    Raises:
        InputError: there are too few.
    """
    wanted = drawing.num_validation_prompts + drawing.num_test_prompts
    found = load_prompts(drawing.prompts, wanted)
    if len(found.rows) < wanted:
        raise InputError(
            f"--prompts {drawing.prompts} has {len(found.rows)} prompts, fewer than --num_validation_prompts "
            f"{drawing.num_validation_prompts} and --num_test_prompts {drawing.num_test_prompts} together"
        )
    split = drawing.num_validation_prompts

    def part(name: SetName, rows: tuple[PromptRow, ...]) -> PromptSet:
        return PromptSet(name, rows, prompts_hash([row.prompt for row in rows]), found.licence, found.source)

    return {"validation": part("validation", found.rows[:split]), "test": part("test", found.rows[split:])}


def missing_views(task: Task) -> list[View]:
    """The views that have no scores yet, or scores of another drawing."""
    return [view for view in task.views if not _is_scored(task, view)]


def is_trained(task: Task) -> bool:
    """Whether the training run is finished."""
    path = Path(task.folder) / "run" / f"round-{task.rounds}" / "round.json"
    return task.rounds == 0 or path.is_file() and read_record(path.parent)["state"] in FINAL


class Failure(TypedDict):
    """What ended a cell."""

    kind: str
    message: str


class Took(TypedDict):
    """What a cell's processes took."""

    seconds: float
    cpu_seconds: float


def failure_of(task: Task) -> dict[str, str] | None:
    """`kind` and `message` of what ended a cell for good; None = nothing did, or it is to be run again."""
    found = last_failure(Path(task.folder))
    return None if found is None or task.retry_failed or found["kind"] == "killed" else found


def last_failure(folder: Path) -> dict[str, str] | None:
    """`kind` and `message` of the last failure."""
    return read_if_whole(folder / "failed.json", Failure)


def is_done(task: Task) -> bool:
    """Whether there is nothing left to do."""
    return failure_of(task) is not None or is_trained(task) and not missing_views(task)


def do(task: Task) -> None:
    """Train and score; a failure is written down rather than raised, but for what the machine has against it."""
    folder = Path(task.folder)
    with _alone(folder):
        if is_done(task):
            return
        (folder / "failed.json").unlink(missing_ok=True)
        try:
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), _timed(folder):
                    _train(task)
                    for view in missing_views(task):
                        _score(task, view)
        except FloatingPointError as error:
            write_failure(folder, "diverged", str(error))
        except InputError as error:
            write_failure(folder, "refused", str(error))
        except Exception as error:
            if trouble_of(error) is not None:
                raise  # the next cell would meet it too
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                log.write(traceback.format_exc())
            said = (str(error).strip().splitlines() or [""])[0]
            write_failure(folder, "killed", f"{type(error).__name__}: {said}, see {folder / 'log.txt'}")


def write_failure(folder: Path, kind: Literal["diverged", "refused", "killed"], message: str) -> None:
    """Write down why a cell has no end."""
    write_json(folder / "failed.json", {"kind": kind, "message": message})


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works on the cell: one may be left of a comparison that was killed."""
    take_folder(folder, "run of a comparison", wait=True, inside=True)
    try:
        settle(folder)
        yield
    finally:
        release(folder / "run")
        release(folder)


@contextlib.contextmanager
def _timed(folder: Path) -> Iterator[None]:
    """Add to what the cell has taken; of a process that was killed nothing is known."""
    started, worked = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        before = took(folder) or {"seconds": 0.0, "cpu_seconds": 0.0}
        now = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
        write_json(folder / _TOOK, {key: round(before[key] + now[key], 3) for key in now})


def took(folder: Path) -> dict[str, float] | None:
    """`seconds` of a cell's process, and its `cpu_seconds`; None = nobody noted them."""
    return read_if_whole(folder / _TOOK, Took)


# Training


def _train(task: Task) -> None:
    if is_trained(task):
        return
    AcceleratorState._reset_state(reset_partial_state=True)  # the cell before may have had another precision
    config = config_of(task)
    run(config, _family_name(Base.of_settings(config.flat())))


def config_of(task: Task) -> Config:
    """The settings of the cell's training run."""
    return parsed(task.training | {"output_dir": str(Path(task.folder) / "run")})


# Pictures


def _score(task: Task, view: View) -> None:
    build(_scores_path(task, view), _view_key(task, view), lambda: Made(_scored(task, view)))


def _scored(task: Task, view: View) -> list[dict[str, Any]]:
    """The rows of a view: its pictures are drawn and scored, and kept nowhere."""
    config = config_of(task)
    family, pipeline = _pipeline(Base.of_settings(config.flat()))
    saved: dict[str, Path] = {}
    if view.round:
        run_ = Path(task.folder) / "run"
        for name, problem in find_damage(_saved(run_, view.round), run_).items():
            raise Damaged(run_ / name, problem, replay(run_ / f"round-{view.round}"))
        kind = "lora" if (run_ / f"round-{view.round}" / "lora").is_dir() else "unet"
        saved = {kind: run_ / f"round-{view.round}" / kind}
    wanted = prompt_sets(task.drawing)[view.prompts].requests(_per_prompt(task, view), task.seed)
    prompts = [row["prompt"] for row in wanted]
    images = draw_images(
        drawing_pipeline(pipeline, config.sampling.sampler, **saved),
        prompts,
        [row["seed"] for row in wanted],
        resolution=config.images.resolution or family.RESOLUTION,
        num_inference_steps=_num_inference_steps(task, config),
        guidance_scale=view.guidance_scale,
        batch_size=config.sampling.generation_batch_size,
        eta=config.sampling.eta,
        autocast=contextlib.nullcontext,
    )
    columns: dict[str, list[float]] = {}
    distances: list[float | None] = [None] * len(wanted)
    for spec in task.drawing.scorers:
        scorer = _scorer(spec, part_key(SCORERS, spec))
        columns[parse_spec(spec)[0]] = score_images(scorer, images, prompts)
        if scorer.features and _per_prompt(task, view) > 1 and None in distances:
            batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
            features = np.concatenate([np.asarray(scorer.features(batch)) for batch in batches])
            of_prompts = mean_distances(features.reshape(-1, _per_prompt(task, view), features.shape[1]))
            distances = of_prompts.repeat(_per_prompt(task, view)).tolist()
    return [
        {"id": row["id"], "k": row["k"], "prompt": row["prompt"], "seed": row["seed"]}
        | {name: scores[place] for name, scores in columns.items()}
        | {"distance": distances[place]}
        for place, row in enumerate(wanted)
    ]


def _per_prompt(task: Task, view: View) -> int:
    """Images of each prompt: those that choose need one."""
    return task.drawing.images_per_prompt if view.prompts == "test" else 1


def _num_inference_steps(task: Task, config: Config) -> int:
    return task.drawing.num_inference_steps or config.sampling.num_inference_steps


def mean_distances(features: np.ndarray) -> np.ndarray:
    """Mean pairwise 1 - cosine of the images of each prompt: (prompts, images, width) -> (prompts,)."""
    unit = features / np.linalg.norm(features.astype(np.float64), axis=2, keepdims=True)
    first, second = np.triu_indices(features.shape[1], k=1)
    return 1 - (unit[:, first] * unit[:, second]).sum(axis=2).mean(axis=1)


def read_view(folder: Path, view: View) -> list[dict[str, Any]] | None:
    """Rows of a view: id, k, prompt, seed, one column per scorer, distance; None = it has none."""
    path = folder / "scores" / f"{view.name}.parquet"
    return read_rows(path) if path.is_file() else None


def _scores_path(task: Task, view: View) -> Path:
    return Path(task.folder) / "scores" / f"{view.name}.parquet"


def _view_key(task: Task, view: View) -> str:
    """What the scores of a view depend on: the weights, how they draw, the prompts, and what is behind each scorer."""
    config, run_ = config_of(task), Path(task.folder) / "run"
    base = Base.of_settings(config.flat())
    protocol = protocol_of(
        prompt_sets(task.drawing)[view.prompts],
        images_per_prompt=_per_prompt(task, view),
        seed=task.seed,
        sampler=config.sampling.sampler,
        num_inference_steps=_num_inference_steps(task, config),
        guidance_scales=[view.guidance_scale],
        resolution=config.images.resolution,  # None = the base's own
        eta=config.sampling.eta,
        precision=precision_of("no"),
    )
    return key_of(
        protocol=protocol["id"],
        scorers={parse_spec(spec)[0]: part_key(SCORERS, spec) for spec in task.drawing.scorers},
        base=asdict(base),
        content=[place and place_hash(place) for place in (base.name, base.vae)],
        weights=_saved(run_, view.round) if view.round and (run_ / f"round-{view.round}").is_dir() else None,
    )


def _saved(run_: Path, round_: int) -> dict[str, str]:
    """SHA-256 of the files of a round's player, by their names in the run's folder, as its record has them."""
    record = find_record(run_ / f"round-{round_}")
    files = record["files"].items() if record is not None else ()
    return {name: digest for name, digest in files if Path(name).parent.name in ("unet", "lora")}


def _is_scored(task: Task, view: View) -> bool:
    return is_built(_scores_path(task, view), _view_key(task, view))


def forget_stale(task: Task) -> None:
    """Remove scores of other weights, scorers or prompts than there are now: a run that fails would keep them."""
    for view in missing_views(task):
        _scores_path(task, view).unlink(missing_ok=True)


@functools.lru_cache(maxsize=1)
def _pipeline(base: Base) -> tuple[Any, Any]:
    """The base's pipeline, kept for the next cell of its world."""
    quiet_libraries()
    return load_to_draw(base, "cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=8)
def _scorer(spec: str, key: str) -> LoadedScorer:
    """A scorer, kept for the next view as long as it is the one of this key."""
    return load_scorer(spec, "cuda" if torch.cuda.is_available() else "cpu")


def _family_name(base: Base) -> str:
    family, _ = _pipeline(base)
    return family.__name__.rsplit(".", 1)[-1]


# What a run took


def unit_costs(task: Task) -> tuple[UnitCosts, bool]:
    """The costs of the networks of a cell's base, and whether its empty prompt needs no embedding."""
    config = config_of(task)
    family, pipeline = _pipeline(Base.of_settings(config.flat()))
    unit = count_units(family, pipeline, config.images.resolution or family.RESOLUTION)
    return unit, bool(pipeline.config.get("force_zeros_for_empty_prompt"))


class _CountedCosts(TypedDict):
    """The costs, and whether the empty prompt needs no embedding."""

    unit: UnitCosts
    zeros_for_empty: bool


def counted_costs(task: Task, path: Path) -> tuple[UnitCosts, bool]:
    """`unit_costs`, kept in a file."""
    counted: _CountedCosts | None = read_if_whole(path, _CountedCosts)
    if counted is not None:
        return counted["unit"], counted["zeros_for_empty"]
    unit, zeros = unit_costs(task)
    write_json(path, {"unit": asdict(unit), "zeros_for_empty": zeros})
    return unit, zeros


def rounds_of(folder: Path, rounds: int) -> list[RoundRecord]:
    """The records of a cell's finished rounds."""
    paths = [folder / "run" / f"round-{k}" / "round.json" for k in range(1, rounds + 1)]
    return [read_record(path.parent) for path in paths if path.is_file()]


def rows_of(folder: Path) -> int:
    """Real samples that a cell was trained on."""
    return data_manifest(folder / "run" / "data")["rows"]
