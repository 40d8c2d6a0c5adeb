"""What every kind of run has of a plan: how a probe is timed, the file, and the plan for people."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from spin_diffusion.runs.start import AnyConfig
from spin_diffusion.selfplay.fused import Fused
from spin_diffusion.samples.sample import Batch
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.ledger import wait_for
from spin_diffusion.selfplay.objectives import bind
from spin_diffusion.selfplay.round_settings import objectives_of
from spin_diffusion.selfplay.train_settings import TrainSettings, of_round
from spin_diffusion.selfplay.trainee import Trainee
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress, end_bars
from spin_diffusion.store.run_dir import write_json

PROBE_SECONDS = 20.0
"""The most that each of a probe's parts takes, beyond its first two calls."""
PHASES = {"generated": "draw", "cached": "encode", "trained": "train", "evaluated": "evaluate"}
"""Of the ledger, those that are planned, and what they are called here."""


def count_rows(known: int, rest: Iterator[Any], progress: Progress) -> int:
    """Rows that were read and those that are left."""
    bar = progress.phase("count the real samples", 0)
    for _ in rest:
        known += 1
        bar(known, "")
    end_bars()
    return known


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """The fastest of up to three calls, in at most about PROBE_SECONDS."""
    best, begun = float("inf"), time.perf_counter()
    for _ in range(3):
        started = time.perf_counter()
        call()
        wait_for(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - begun > PROBE_SECONDS:
            break
    return best


def probe_training(config: AnyConfig, game: Game, batch: Batch) -> tuple[float, float, int]:
    """Seconds of a pair of this batch in a step, forward and backward, and of an update; bytes of a checkpoint."""
    beta = of_round(config.rounds.beta, 1)
    mu = of_round(config.rounds.mu, 1) or float(config.rounds.num_generated)
    objective = objectives_of(config.rounds)[0]
    loss = bind(objective, **{"beta": beta, "mu": mu} | (config.rounds.objective_options or {}))
    # A rate so small that nothing is learnt here
    trainee = (Fused if config.training.fused_backward else Trainee)(game, 1e-12, config.training, game.accelerator)

    def passes() -> None:
        trainee.backward(loss(game.scores(trainee.model, batch).scores).mean())

    def step() -> None:
        passes()
        trainee.update()

    step()  # the optimizer's state is there from here on
    device = game.accelerator.device
    by_pass, by_step = seconds_of(passes, device), seconds_of(step, device)
    pair, update = by_pass / len(batch.ids), max(by_step - by_pass, 0.0)
    weights = sum(p.numel() * p.element_size() for p in trainee.parameters)
    state = sum(t.numel() * t.element_size() for t in trainee.optimizer_state())
    trainee.finish()
    return pair, update, weights + state


def out_of_memory(error: torch.OutOfMemoryError, game: Game, remedies: str) -> InputError:
    """For a probe that did not fit.

    Args:
        remedies: settings of this kind of run, beside those that every kind has.
    """
    return InputError(
        f"this does not fit in the memory of {game.accelerator.device} ({str(error).splitlines()[0][:160]}): lower "
        f"--train_batch_size or --generation_batch_size, or set --gradient_checkpointing true, {remedies}"
    )


def kept_checkpoints(training: TrainSettings, steps: int) -> int:
    """The most checkpoints of a round of so many steps that lie on the disk at a time, one being written."""
    made = max(0, (steps - 1) // training.checkpointing_steps)
    return min(made, training.checkpoints_total_limit or made) + (1 if made else 0)


def write_plan(output_dir: Path, accelerator: Accelerator, rates: Any, **found: Any) -> dict[str, Any]:
    """Write `plan.json` into the output folder, where the run's report finds it, and return the plan.

    Args:
        rates: what a probe measured, a dataclass, among it drawing_memory and training_memory.
        found: rows, rounds (each with its number and the seconds of PHASES), encode_real_seconds, disk_bytes.
    """
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    plan = found | {
        "rates": asdict(rates),
        "memory_bytes": {"drawing": rates.drawing_memory, "training": rates.training_memory},
        "processes": accelerator.num_processes,
        "free_bytes": shutil.disk_usage(existing).free,
        "device_bytes": _device_bytes(accelerator.device),
    }
    if accelerator.is_main_process:
        write_json(output_dir / "plan.json", plan)
    return plan


def lines(plan: dict[str, Any], output_dir: str, device: torch.device, judges: str) -> list[str]:
    """The plan for people.

    Args:
        judges: what of an evaluation takes time that is not in the plan.
    """
    total = plan["encode_real_seconds"]
    told = [f"{'round':>5}  " + "  ".join(f"{name:>9}" for name in PHASES.values())]
    for entry in plan["rounds"]:
        parts = [entry[phase] for phase in PHASES]
        total += sum(parts)
        told.append(f"{entry['round']:>5}  " + "  ".join(f"{_span(seconds):>9}" for seconds in parts))
    told.append(f"Time     {_span(total)} for {plan['rows']} real samples on {plan['processes']} "
                f"process{'es' if plan['processes'] > 1 else ''}, without {judges}, start and rivals")  # fmt: skip
    told.append(_fits("Disk", plan["disk_bytes"], plan["free_bytes"], f"free in {output_dir}",
                      "lower --checkpoints_total_limit or --max_train_samples"))  # fmt: skip
    peak = max(plan["memory_bytes"].values())
    where = "of the GPU" if device.type == "cuda" else "of this machine"
    told.append(_fits("Memory", peak, plan["device_bytes"], where, "lower --train_batch_size"))
    return told


def _fits(what: str, needed: int, there: int, where: str, remedy: str) -> str:
    said = f"{what:<8} {needed / 1e9:,.2f} GB of {there / 1e9:,.1f} GB {where}"
    return said if needed <= there else f"{said}: does NOT fit; {remedy}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
