"""Making cells: each is trained by the ordinary run, then drawn and scored; in several processes if that is asked for.

What is there already stays. A process loads its libraries once, and one that dies costs its own cell only.
"""

import contextlib
import functools
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.state import AcceleratorState

from spin_diffusion.comparing import cells
from spin_diffusion.comparing.cells import Task, View
from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.sampling import draw_images, drawing_pipeline
from spin_diffusion.evaluation.embeddings import LoadedEmbedding, load_embedding
from spin_diffusion.evaluation.embeddings import __name__ as EMBEDDINGS
from spin_diffusion.evaluation.picture_alarms import pair_cosines, unit
from spin_diffusion.evaluation.scorers import LoadedScorer, load_scorer
from spin_diffusion.evaluation.scorers import __name__ as SCORERS
from spin_diffusion.evaluation.scoring import BATCH, score_images
from spin_diffusion.evaluation.specs import parse_spec, part_key
from spin_diffusion.selfplay.record import check_weights, replay
from spin_diffusion.store.files import Made, build, write_json
from spin_diffusion.store.folder import release, take_folder
from spin_diffusion.store.hashes import find_damage
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import Damaged, settle, trouble_of

Train = Callable[[Config, str], object]
"""(settings of a run, name of its family): plays the run, as `runs.image_run.run` does. A function that a process can
be sent."""


def make(task: Task, train: Train) -> None:
    """Train and score; a failure is written down rather than raised, but for what the machine has against it."""
    folder = task.folder
    with _alone(folder):
        if cells.is_done(task):
            return
        (folder / "failed.json").unlink(missing_ok=True)
        try:
            with open(folder / "log.txt", "a", encoding="utf-8") as log:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), _timed(folder):
                    if not cells.is_trained(task):
                        _train(task, train)
                    for view in cells.missing_views(task):
                        path, key = cells.scores_path(folder, view), cells.view_key(task, view)
                        build(path, key, functools.partial(_scored, task, view))
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
    failure: cells.Failure = {"kind": kind, "message": message}
    write_json(folder / "failed.json", failure)


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
        before = cells.took(folder) or {"seconds": 0.0, "cpu_seconds": 0.0}
        seconds = before["seconds"] + time.perf_counter() - started
        cpu_seconds = before["cpu_seconds"] + time.process_time() - worked
        write_json(folder / "took.json", {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)})


def _train(task: Task, train: Train) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the cell before may have had another precision
    family, _ = cells.base_pipeline(Base.of_settings(task.config.flat()))
    train(task.config, family.__name__.rsplit(".", 1)[-1])


def _scored(task: Task, view: View) -> Made:
    """The rows of a view: its pictures are drawn and scored, and kept nowhere."""
    config, per_prompt = task.config, task.settings.images_of(view.prompts)
    family, pipeline = cells.base_pipeline(Base.of_settings(config.flat()))
    unet: Path | None = None
    lora: Path | None = None
    if view.round:
        run_ = task.folder / "run"
        check_weights(run_ / f"round-{view.round}")
        for name, problem in find_damage(cells.saved_player(run_, view.round), run_).items():
            raise Damaged(run_ / name, problem, replay(run_ / f"round-{view.round}"))
        folder = run_ / f"round-{view.round}"
        unet, lora = (None, folder / "lora") if (folder / "lora").is_dir() else (folder / "unet", None)
    wanted = cells.prompt_sets(task.settings)[view.prompts].requests(per_prompt, task.seed)
    prompts = [row["prompt"] for row in wanted]
    sampling = view.sampling
    images = draw_images(
        drawing_pipeline(pipeline, sampling.sampler, unet=unet, lora=lora),
        prompts,
        [row["seed"] for row in wanted],
        replace(sampling, resolution=sampling.resolution or family.RESOLUTION),
        batch_size=config.sampling.generation_batch_size,
    )
    columns: dict[str, list[float]] = {}
    distances: list[float | None] = [None] * len(wanted)
    for spec in task.settings.scorers or []:
        scorer = _scorer(spec, part_key(SCORERS, spec))
        columns[parse_spec(spec)[0]] = score_images(scorer, images, prompts)
        if scorer.features and per_prompt > 1 and None in distances:
            batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
            features = np.concatenate([np.asarray(scorer.features(batch)) for batch in batches])
            by_prompt = features.reshape(-1, per_prompt, features.shape[1])
            distances = (1 - pair_cosines(unit(by_prompt)).mean(axis=1)).repeat(per_prompt).tolist()
    features_of: list[list[float]] = []
    if (asked := task.embedding(view)) is not None:
        embedding = _embedding(asked, part_key(EMBEDDINGS, asked))
        for start in range(0, len(images), BATCH):
            features_of += embedding(images[start : start + BATCH]).tolist()
    return Made(
        [
            {"id": row["id"], "k": row["k"], "prompt": row["prompt"], "seed": row["seed"]}
            | {name: scores[place] for name, scores in columns.items()}
            | {"distance": distances[place]}
            | ({"features": features_of[place]} if features_of else {})
            for place, row in enumerate(wanted)
        ]
    )


@functools.lru_cache(maxsize=8)
def _scorer(spec: str, key: str) -> LoadedScorer:
    """A scorer, kept for the next view as long as it is the one of this key."""
    return load_scorer(spec, "cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)
def _embedding(spec: str, key: str) -> LoadedEmbedding:
    """An embedding, kept likewise."""
    return load_embedding(spec, "cuda" if torch.cuda.is_available() else "cpu")


# Processes


def run_all(
    tasks: Sequence[Task], train: Train, jobs: int, done: Callable[[Task], None], go_on: Callable[[], bool]
) -> None:
    """Run the tasks, in their order as processes become free.

    Args:
        jobs: processes, shared out over the GPUs; 0 = in this one.
        done: told after every task.
        go_on: asked before a task is begun; False leaves the rest.
    """
    if jobs == 0:
        for task in tasks:
            if go_on():
                make(task, train)
                done(task)
        return
    waiting, failure = deque(tasks), None
    free: list[tuple[Connection, BaseProcess]] = []
    busy: dict[Connection, tuple[BaseProcess, Task]] = {}
    places, place_of = list(range(jobs))[::-1], {}  # one that has died leaves its place, and GPU, to the next
    try:
        while True:
            while waiting and len(busy) < jobs and failure is None and go_on():
                if free:
                    pipe, process = free.pop()
                else:
                    pipe, process = _start(train, places[-1])
                    place_of[pipe] = places.pop()
                busy[pipe] = process, waiting.popleft()
                with contextlib.suppress(OSError):  # a process that has died is known by its pipe's end
                    pipe.send(busy[pipe][1])
            if not busy:
                break
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                process, task = busy.pop(pipe)
                try:
                    failure = pipe.recv() or failure
                    free.append((pipe, process))
                except (EOFError, OSError):
                    process.join()
                    places.append(place_of.pop(pipe))
                    write_failure(task.folder, "killed", f"its process ended with code {process.exitcode}")
                if failure is None:
                    done(task)
    finally:
        for process, _ in busy.values():
            process.kill()
        for pipe, process in free:
            pipe.close()
            process.join()
    if failure is not None:
        raise failure


def _start(train: Train, place: int) -> tuple[Connection, BaseProcess]:
    """A process that sees one GPU alone, where there are any: that of its place among the processes."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, train), daemon=True)
    seen = os.environ.get(_SEEN)
    gpus = seen.split(",") if seen is not None else [str(number) for number in range(torch.cuda.device_count())]
    try:
        if gpus:
            os.environ[_SEEN] = gpus[place % len(gpus)]  # a library may look for GPUs when it is imported
        process.start()
    finally:
        if seen is not None:
            os.environ[_SEEN] = seen
        else:
            os.environ.pop(_SEEN, None)
    theirs.close()
    return pipe, process


_SEEN = "CUDA_VISIBLE_DEVICES"


def _serve(pipe: Connection, train: Train) -> None:
    """What the process does: a task at a time until nobody asks any more."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one process per core is faster than one thread per core
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    while True:
        try:
            task = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        failure = None
        try:
            make(task, train)
        except KeyboardInterrupt:
            return
        except Exception as error:
            number = trouble_of(error)
            if number is None:
                raise
            failure = OSError(number, os.strerror(number), task.folder)
        try:
            pipe.send(failure)
        except OSError:
            return  # the comparison is gone
