"""What a run will take: a probe of one batch of each kind, times how often the settings ask for it. What every kind of
run shares: how a probe is timed, the arithmetic, the file, and the plan for people."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from spin_diffusion.runs.config import AnyConfig, rivals
from spin_diffusion.samples.sample import Batch, Row
from spin_diffusion.selfplay.device import wait_for
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.objectives import bind
from spin_diffusion.selfplay.round_settings import objectives_of, source_of
from spin_diffusion.selfplay.train_settings import of_round, pairs_per_step, steps_of_round
from spin_diffusion.selfplay.trainee import Fused, Trainee
from spin_diffusion.store.files import write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress, end_bars
from spin_diffusion.store.run_dir import seed_from

PROBE_SECONDS = 20.0
"""The most that each of a probe's parts takes, beyond its first two calls."""
PHASES = {"generated": "draw", "cached": "encode", "trained": "train", "evaluated": "evaluate"}
"""The phases of the ledger that are planned, and what they are called here."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a probe measured of one process; a kind of run adds its own.

    Attributes:
        score: seconds of the opponent's score of a pair or of a row; 0 where none is kept.
        pair: seconds of a pair in a step, forward and backward, both models.
        update: seconds of the optimizer's part of a step.
        player_bytes, checkpoint_bytes: of what is saved of a player, and of a checkpoint within a round.
        drawing_memory, training_memory: peak bytes of the probe's parts; of the process as a whole on a CPU.
    """

    score: float
    pair: float
    update: float
    player_bytes: int
    checkpoint_bytes: int
    drawing_memory: int
    training_memory: int


def count_rows(known: int, rest: Iterator[Any], progress: Progress) -> int:
    """Rows that were read and those that are left."""
    bar = progress.phase("count the real samples", 0)
    for _ in rest:
        known += 1
        bar(known, "")
    end_bars()
    return known


def seconds_of(call: Callable[[], Any], device: torch.device, before: Callable[[], None] = lambda: None) -> float:
    """The fastest of up to three calls, in at most about PROBE_SECONDS.

    Args:
        before: is called before each, and not timed.
    """
    best, begun = float("inf"), time.perf_counter()
    for _ in range(3):
        before()
        wait_for(device)
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
        game.accelerator.backward(loss(game.scores(trainee.model, batch).scores).mean())

    passes()
    trainee.update()  # the optimizer's state is there from here on
    device = game.accelerator.device
    pair, update = seconds_of(passes, device) / len(batch.ids), seconds_of(trainee.update, device, before=passes)
    weights = sum(p.numel() * p.element_size() for p in trainee.parameters)
    state = sum(t.numel() * t.element_size() for t in trainee.optimizer_state())
    trainee.finish()
    return pair, update, weights + state


@contextmanager
def fitting(game: Game, remedies: str) -> Iterator[None]:
    """A probe within it that does not fit in memory is one line.

    Args:
        remedies: settings of this kind of run, beside those that every kind has.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"this does not fit in the memory of {game.accelerator.device} ({str(error).splitlines()[0][:160]}): lower "
            f"--train_batch_size or --generation_batch_size, or set --gradient_checkpointing true, {remedies}"
        ) from None


def stand_in_batch(config: AnyConfig, rows: list[Row], encoded: dict[str, Tensor]) -> Batch:
    """A training batch of the first objective, whose generated side is made of its real samples.

    Args:
        rows, encoded: real samples, as many as a training batch has.
    """
    real = {name: tensor for name, tensor in encoded.items() if not name.startswith("loser_")}
    other = {name: tensor.repeat_interleave(config.rounds.num_generated, dim=0) for name, tensor in real.items()}
    plays_none = source_of(config.rounds, objectives_of(config.rounds)[0]) == "none"
    ids, prompts = [row["id"] for row in rows], [row["prompt"] for row in rows]
    return Batch(ids, prompts, real, {} if plays_none else other, [seed_from("plan", at) for at in range(len(rows))])


# From rates to a run


@dataclass(frozen=True)
class PhaseSeconds:
    """What the phases of a round take of one process; any number of them share it."""

    generated: float
    cached: float
    measured: float = 0.0
    """Measured of the player once it is trained."""


def predict_rounds(
    config: AnyConfig, rates: Rates, pairs: int, world: int, phases: Callable[[int], PhaseSeconds], evaluation: float
) -> list[dict[str, float | int]]:
    """Seconds of each round's phases, as the ledger names them; what scorers and judges take is not in them.

    Args:
        pairs: real samples of a round.
        world: processes.
        phases: round -> what is shared.
        evaluation: seconds that the evaluation of a player takes of one process.
    """
    predicted: list[dict[str, float | int]] = []
    last, training = config.rounds.rounds, config.training
    for k in range(1, last + 1):
        steps, _ = steps_of_round(training, k, pairs, world)
        visited, seconds = steps * pairs_per_step(training, 1), phases(k)
        is_evaluated = k == last or config.evaluation.eval_every_round
        predicted.append(
            {
                "round": k,
                "generated": seconds.generated / world,
                "cached": seconds.cached / world,
                "trained": visited * rates.pair + steps * rates.update + seconds.measured / world,
                "evaluated": evaluation / world if is_evaluated else 0.0,
            }
        )
    return predicted


def predict_disk(
    config: AnyConfig, rates: Rates, pairs: int, data: int, samples: Callable[[str], int], working: int
) -> int:
    """The most bytes that the output folder holds at a time, rivals included.

    Args:
        data: bytes of the prepared data.
        samples: objective -> bytes of the samples of one of its rounds, which stay.
        working: bytes of one round at a time, beside its checkpoints and the one that is being written.
    """
    rounds, training = config.rounds.rounds, config.training
    total = data + working
    for name in (objectives_of(config.rounds)[0], *rivals(config)):
        total += rounds * (samples(name) + rates.player_bytes) + rates.player_bytes  # the top folder's
    steps = max(steps_of_round(training, k, pairs, 1)[0] for k in range(1, rounds + 1))
    made = max(0, (steps - 1) // training.checkpointing_steps)
    kept = min(made, training.checkpoints_total_limit or made) + (1 if made else 0)
    return total + kept * rates.checkpoint_bytes


def write_plan(output_dir: Path, accelerator: Accelerator, rates: Rates, **predicted: Any) -> dict[str, Any]:
    """Write `plan.json` into the output folder, where the run's report finds it, and return the plan.

    Args:
        predicted: rows, rounds (each with its number and the seconds of PHASES), encode_real_seconds, disk_bytes.
    """
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    plan = predicted | {
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
    table = [f"{'round':>5}  " + "  ".join(f"{name:>9}" for name in PHASES.values())]
    for entry in plan["rounds"]:
        parts = [entry[phase] for phase in PHASES]
        total += sum(parts)
        table.append(f"{entry['round']:>5}  " + "  ".join(f"{_span(seconds):>9}" for seconds in parts))
    processes = f"{plan['processes']} process{'es' if plan['processes'] > 1 else ''}"
    free, peak = f"free in {output_dir}", max(plan["memory_bytes"].values())
    where = "of the GPU" if device.type == "cuda" else "of this machine"
    smaller = "lower --checkpoints_total_limit or --max_train_samples"
    return [
        *table,
        f"Time     {_span(total)} for {plan['rows']} real samples on {processes}, without {judges}, start and rivals",
        _fits("Disk", plan["disk_bytes"], plan["free_bytes"], free, smaller),
        _fits("Memory", peak, plan["device_bytes"], where, "lower --train_batch_size"),
    ]


def _fits(what: str, needed: int, there: int, where: str, remedy: str) -> str:
    line = f"{what:<8} {needed / 1e9:,.2f} GB of {there / 1e9:,.1f} GB {where}"
    return line if needed <= there else f"{line}: does NOT fit; {remedy}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
