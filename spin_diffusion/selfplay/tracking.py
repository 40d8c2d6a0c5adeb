"""What a step says of its pairs, one row of numbers each and their means, and what trackers are told of it. Steps begin
anew in every round."""

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from spin_diffusion.selfplay.game import PairScores
from spin_diffusion.selfplay.health import METRICS, StepEntry
from spin_diffusion.store.input_error import printable
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import write_file

SATURATION = 4.0
"""|beta * r| beyond which a pair counts as saturated: it has 7 % of the gradient that it had at step 0."""


def saturated(r: Float[Tensor, " batch"], beta: float) -> Float[Tensor, " batch"]:
    """1 where |beta * r| > SATURATION, else 0."""
    return ((beta * r).abs() > SATURATION).to(r.dtype)


def by_quarter(values: Float[Tensor, " pairs"], levels: Float[Tensor, " pairs"]) -> list[float | None]:
    """The mean of `values` in each quarter of the levels [0, 1); None where a quarter has no pair."""
    quarters = torch.clamp((levels * 4).long(), max=3)
    return [values[quarters == q].mean().item() if (quarters == q).any() else None for q in range(4)]


LEVEL = len(METRICS)
"""The column behind those of a pair's metrics: where on the game's scale of difficulty it was scored."""


def record(scores: PairScores, losses: Tensor, level: Tensor, beta: float) -> Tensor:
    """(pairs, columns) fp32, on the device: what is logged of each pair."""
    margin = scores.margin.detach()
    # A margin of exactly 0 is half right: at step 0 the accuracy is 0.5, not 0
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    return torch.stack(
        [
            losses.detach(),
            scores.r_real.detach(),
            scores.r_generated.detach(),
            margin,
            accuracy,
            saturated(margin, beta),
            scores.player_real.detach(),
            scores.player_generated.detach(),
            level,
        ],
        dim=1,
    )


def summary(metrics: Tensor) -> StepEntry:
    """Means over all pairs of `record`'s rows, and over those of each quarter of the levels."""
    means = {name: metrics[:, column].mean().item() for column, name in enumerate(METRICS)}
    quarters = {
        f"{name}_by_quarter": by_quarter(metrics[:, column], metrics[:, LEVEL])
        for column, name in enumerate(METRICS)
        if name != "loss"
    }
    return cast(StepEntry, {**means, **quarters})


def tracked(entry: StepEntry, prefix: str) -> dict[str, float]:
    """Tracker names: TRL's for what it has a name for, one scalar for each quarter of the levels."""
    names = {
        "r_real": "rewards/real",
        "r_generated": "rewards/generated",
        "margin": "rewards/margins",
        "implicit_accuracy": "rewards/accuracies",
        "loss": "train_loss",
        "score_real": "scores/real",
        "score_generated": "scores/generated",
    }
    flat: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, list):
            name = key.removesuffix("_by_quarter")
            flat |= {
                f"{prefix}/{names.get(name, name)}/quarter_{q + 1}": mean
                for q, mean in enumerate(value)
                if mean is not None
            }
        elif isinstance(value, int | float):
            flat[f"{prefix}/{names.get(key, key)}"] = value
    return flat


# Trackers

RUN_ID = "tracker_run_id"


def start_trackers(
    project: str, settings: Mapping[str, object], run_dir: Path, logs: Path, accelerator: Accelerator
) -> None:
    """Open the trackers; a run that was stopped and goes on also goes on in wandb's and trackio's run.

    Args:
        settings: that the trackers show.
        run_dir: whose name the run has there.
        logs: folder that keeps the run's id.
    """
    known = {}
    if accelerator.is_main_process:
        run_id = _run_id(logs / RUN_ID)
        name = run_dir.resolve().name
        wandb = {"name": name, "id": f"{name}-{run_id}"[-64:], "resume": "allow"}
        # wandb reads these itself, and what its user says there comes first
        given = {key for key in wandb if os.environ.get(f"WANDB_{'RUN_ID' if key == 'id' else key.upper()}")}
        known["wandb"] = {key: value for key, value in wandb.items() if key not in given}
        known["trackio"] = {"name": f"{name}-{run_id}", "resume": "allow"}  # its runs are told apart by name
    shown = {key: printable(value) if isinstance(value, str) else value for key, value in settings.items()}
    accelerator.init_trackers(project, config=shown, init_kwargs=known)


def _run_id(path: Path) -> str:
    """The id that the run has in the trackers; a new one where none can be read."""
    if path.is_file():
        known = path.read_bytes()
        if re.fullmatch(rb"[0-9a-f]{8}", known):
            return known.decode()
        tell(f"{path} is damaged: the trackers begin a new run")
    run_id = secrets.token_hex(4)
    write_file(path, lambda part: part.write_text(run_id))
    return run_id


def name_axis(name: str, accelerator: Accelerator) -> None:
    """Let wandb draw what `log_step` tells under this name over its own steps."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.tracker.define_metric(f"{name}/*", step_metric=f"{name}/step")


def log_phase(run: str, round_: int, phase: str, entry: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Tell all trackers what a phase of a round took, over the rounds.

    Args:
        entry: of the ledger; what is not known of it is left out.
    """
    name = f"{run}/ledger"
    name_axis(name, accelerator)
    log_step(
        name, {f"{name}/{phase}/{key}": value for key, value in entry.items() if value is not None}, round_, accelerator
    )


def log_step(name: str, values: dict[str, float], step: int, accelerator: Accelerator) -> None:
    """Tell all trackers an optimizer step's values.

    Args:
        name: that the values' names begin with.
        step: of the round, from 1 on.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            # One count for a whole run that must never fall: it would drop the second round's steps
            tracker.log(values | {f"{name}/step": step})
        else:
            tracker.log(values, step=step)
