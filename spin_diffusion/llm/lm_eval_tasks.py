"""Tasks of lm-evaluation-harness for the present player, through its Python API. Needs the extra `lm-eval`."""

import copy
import functools
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from scipy.stats import t

from spin_diffusion.llm.config import HarnessTasks
from spin_diffusion.llm.game import LanguageGame
from spin_diffusion.llm.logprobs import language_model
from spin_diffusion.store.input_error import InputError, one_line

PRECISIONS = {"no": None, "bf16": "bfloat16", "fp16": "float16"}
"""The harness's names of what accelerate calls mixed precision."""


class Measure(TypedDict):
    """A metric of a task, as a run's page shows it."""

    title: str
    value: float
    low: float | None
    high: float | None
    """The 95 % interval; None where the harness gives no error."""
    better: str
    """ "higher", "lower", or "none" where it is not said."""


def check_tasks(tasks: HarnessTasks) -> None:
    """Raises InputError if the harness is not installed, the folder has no task files, or a task is not known."""
    _index(tuple(tasks.tasks or ()), tasks.folder)


def run_tasks(game: LanguageGame, tasks: HarnessTasks) -> dict[str, Measure]:
    """Each task's metrics by "task/metric": value, and a 95 % t-interval from the harness's own standard error.

    Raises:
        InputError: as `check_tasks`; or a task's data, or the chat template, cannot be used.
    """
    names = tasks.tasks or []
    index = _index(tuple(names), tasks.folder)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if tasks.chat_template and not game.tokenizer.chat_template:
        raise InputError(
            "--lm_eval chat_template needs a tokenizer with a chat template: give one with --chat_template"
        )
    model = language_model(game.model)
    with _as_it_was(model, game.accelerator.device):
        harness = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(game.tokenizer),  # it gets another pad token there
            batch_size="auto",
            mixed_precision_dtype=PRECISIONS[game.accelerator.mixed_precision],
            softmax_dtype="float32",
        )
        try:
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=names,
                task_manager=index,
                limit=tasks.limit,
                log_samples=False,
                apply_chat_template=tasks.chat_template,
            )
        except (KeyError, ValueError, OSError) as error:  # its data cannot be had, or are not as its file says
            raise InputError(f"--lm_eval tasks {', '.join(names)}: {one_line(error)}") from error
    return metrics_of(found["results"], found.get("higher_is_better", {}))


_BETTER: dict[Any, str] = {True: "higher", False: "lower"}
"""What the page calls the harness's `higher_is_better`; "none" where it is not said."""


def metrics_of(
    results: Mapping[str, Mapping[str, Any]], higher_is_better: Mapping[str, Mapping[str, Any]]
) -> dict[str, Measure]:
    """The harness's results as a run's measures.

    Args:
        results: by task or group, metrics as "name,filter" beside "name_stderr,filter" and other things it says.
        higher_is_better: by task and metric; None or absent = not said.
    """
    found: dict[str, Measure] = {}
    for task, said in results.items():
        for key, value in said.items():
            metric, is_metric, kind = key.partition(",")
            if not is_metric or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error, number = said.get(f"{metric}_stderr,{kind}"), said.get("sample_len", 0)
            # "N/A" where it has none; 0 says that all examples are alike, not that more would be
            has_spread = isinstance(error, int | float) and error > 0
            spread = float(error * t.ppf(0.975, number - 1 if number > 1 else 1_000)) if has_spread else None
            better = _BETTER.get(higher_is_better.get(task, {}).get(metric), "none")
            found[f"{task}/{key}"] = {
                "title": f"{task}, {metric}" + (f" ({kind})" if kind != "none" else ""),
                "value": float(value),
                "low": float(value) - spread if spread is not None else None,
                "high": float(value) + spread if spread is not None else None,
                "better": better,
            }
    return found


@functools.cache
def _index(names: tuple[str, ...], folder: str | None) -> Any:
    """The harness's index of tasks; its own 14,000, which take 20 seconds to read, only if they are asked for."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("--lm_eval needs lm-evaluation-harness: pip install 'spin-diffusion[lm-eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [name for name in names if Path(name).suffix in (".yaml", ".yml")]
    for name in files:
        if not Path(name).is_file():
            raise InputError(f"--lm_eval tasks {name}: there is no such file")
    index = TaskManager(include_path=folder, include_defaults=False)
    if folder is not None and not index.all_tasks:
        raise InputError(f"--lm_eval folder {folder}: it has no task files (YAML with task: and dataset_path:)")
    if not set(names) <= {*index.all_tasks, *files}:
        index = TaskManager(include_path=folder)
    for name in names:
        if name not in index.all_tasks and name not in files:
            where = f", nor is it in {folder}" if folder is not None else ""
            raise InputError(
                f"--lm_eval tasks {name}: lm-evaluation-harness has no such task{where}; `lm_eval ls tasks` lists its "
                "own, and --lm_eval '{folder: ...}' names a folder of task files"
            )
    return index


@contextmanager
def _as_it_was(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The harness seeds every generator and switches the model to evaluation: neither may reach the next round."""
    trained, of_python, of_numpy = model.training, random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        model.train(trained)
