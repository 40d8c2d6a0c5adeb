"""What trackers are told of a round's steps, which begin anew in every round."""

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.store.input_error import printable
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import write_file

RUN_ID = "tracker_run_id"


def start_trackers(project: str, settings: dict[str, Any], run_dir: Path, logs: Path, accelerator: Accelerator) -> None:
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
