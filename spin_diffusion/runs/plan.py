"""What a run will take: a probe of one batch of each kind, times how often the settings ask for it. What every kind of
run shares: how a probe is timed, the arithmetic, the file, and the plan for people."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from torch import Tensor

from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.runs.plateau import RATES
from spin_diffusion.samples.sample import Batch, Row
from spin_diffusion.selfplay.checkpoints import KEPT
from spin_diffusion.selfplay.device import wait_for
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.looks import JUDGED_PROMPTS, PREVIEWED_PROMPTS, preview_steps
from spin_diffusion.selfplay.objectives import bind
from spin_diffusion.selfplay.round_settings import objectives_of, source_of
from spin_diffusion.selfplay.train_settings import of_round, pairs_per_step, steps_of_round
from spin_diffusion.selfplay.trainee import Fused, Trainee
from spin_diffusion.store.files import write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress, end_bars, span
from spin_diffusion.store.run_dir import seed_from

PROBE_SECONDS = 20.0
"""The most that each of a probe's parts takes, beyond its first two calls."""
PHASES = {"generated": "draw", "cached": "encode", "trained": "train", "looked": "look", "evaluated": "evaluate"}
"""The phases of the ledger that are planned, and what they are called here."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a probe measured of one process.

    Attributes:
        prepare: seconds of a real sample on its way to what is trained on.
        draw: seconds of a sample, by the opponent or for an evaluation.
        encode: seconds of the encoding of a drawn sample.
        score: seconds of the opponent's score of a pair or of a row; 0 where none is kept.
        pair: seconds of a pair in a step, forward and backward, both models.
        update: seconds of the optimizer's part of a step.
        real_bytes, sample_bytes, shown_bytes, encoded_bytes: what is stored of a real sample with its encodings, of a
            drawn one, of one of an evaluation, and of an encoding.
        player_bytes, checkpoint_bytes: of what is saved of a player, and of a checkpoint within a round.
        drawing_memory, training_memory: peak bytes of the probe's parts; of the process as a whole on a CPU.
    """

    prepare: float
    draw: float
    encode: float
    score: float
    pair: float
    update: float
    real_bytes: int
    sample_bytes: int
    shown_bytes: int
    encoded_bytes: int
    player_bytes: int
    checkpoint_bytes: int
    drawing_memory: int
    training_memory: int


@dataclass(frozen=True)
class Sizes:
    """How much there is: real samples, those of them that are held out, and samples that an evaluation draws."""

    rows: int
    held_out: int = 0
    shown: int = 0


@dataclass(frozen=True)
class Work:
    """What is done in a round beside its steps: samples that are drawn, encoded, kept at a time, and scored by the
    opponent; and scored by both models once the player is trained."""

    drawn: int
    encoded: int = 0
    kept: int = 0
    scored: int = 0
    measured: float = 0.0


class Plan(TypedDict):
    """What plan.json holds, for the run's report; seconds of a round by the ledger's phases."""

    rows: int
    rounds: list[dict[str, float | int]]
    encode_real_seconds: float
    disk_bytes: int
    rates: dict[str, float | int]
    memory_bytes: dict[str, int]
    processes: int
    free_bytes: int
    device_bytes: int


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


def probe_training(config: RunConfig, game: Game, batch: Batch) -> tuple[float, float, int]:
    """Seconds of a pair of this batch in a step, forward and backward, and of an update; bytes of a checkpoint."""
    loss = bind(objectives_of(config.rounds)[0], **config.rounds.numbers(1))
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


def stand_in_batch(config: RunConfig, rows: list[Row], encoded: dict[str, Tensor]) -> Batch:
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


def make_plan(
    config: RunConfig, accelerator: Accelerator, rates: Rates, sizes: Sizes, work: Callable[[str, int], Work]
) -> Plan:
    """Predict, and write `plan.json` into the output folder, where the run's report finds it.

    Args:
        work: (objective, round) -> the round's.
    """
    output_dir = Path(config.run.output_dir)
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    plan: Plan = {
        "rows": sizes.rows,
        "rounds": predict(config, rates, sizes, work, accelerator.num_processes),
        "encode_real_seconds": (sizes.rows + sizes.held_out) * rates.prepare,
        "disk_bytes": disk(config, rates, sizes, work),
        "rates": asdict(rates),
        "memory_bytes": {"drawing": rates.drawing_memory, "training": rates.training_memory},
        "processes": accelerator.num_processes,
        "free_bytes": shutil.disk_usage(existing).free,
        "device_bytes": _device_bytes(accelerator.device),
    }
    if accelerator.is_main_process:
        write_json(output_dir / "plan.json", plan)
    return plan


def predict(
    config: RunConfig, rates: Rates, sizes: Sizes, work: Callable[[str, int], Work], world: int
) -> list[dict[str, float | int]]:
    """Seconds of each round's phases, as the ledger names them; what scorers and judges take is not in them.

    Args:
        world: processes.
    """
    predicted: list[dict[str, float | int]] = []
    training = config.training
    last, evaluation = config.rounds.rounds, sizes.shown * rates.draw + sizes.held_out * rates.score
    for k in range(1, last + 1):
        steps, _ = steps_of_round(training, k, sizes.rows // config.rounds.real_parts, world)
        visited, round_ = steps * pairs_per_step(training, 1), work(of_round(config.rounds.objective, k), k)
        is_evaluated = k == last or config.evaluation.eval_every_round
        predicted.append(
            {
                "round": k,
                "generated": round_.drawn * rates.draw / world,
                "cached": (round_.encoded * rates.encode + round_.scored * rates.score) / world,
                "trained": visited * rates.pair + steps * rates.update + round_.measured * rates.score / world,
                "looked": _looked(config, rates, sizes, steps) / world,
                "evaluated": evaluation / world if is_evaluated else 0.0,
            }
        )
    return predicted


def _looked(config: RunConfig, rates: Rates, sizes: Sizes, steps: int) -> float:
    """Seconds of the judgements and previews of a round of so many steps: one at its start as well, and a judgement of
    its last step; what scorers take is not in them."""
    training, seconds = config.training, 0.0
    if training.select_every is not None:
        # A gap takes the passes forward of a step alone, about half of a pair
        judged, by = 2 + (steps - 1) // training.select_every, training.select_by
        drawn = sizes.held_out if by == "fd" else min(sizes.held_out, JUDGED_PROMPTS)
        seconds += judged * (sizes.held_out * rates.pair / 2 if by == "gap" else drawn * rates.draw)
    every = getattr(config.evaluation, "preview_every", 0)  # of runs on pictures
    if every or every is None and (sizes.held_out or sizes.shown):
        seconds += len(preview_steps(every, steps)) * PREVIEWED_PROMPTS * rates.draw
    return seconds


def disk(config: RunConfig, rates: Rates, sizes: Sizes, work: Callable[[str, int], Work]) -> int:
    """The most bytes that the output folder holds at a time, rivals included."""
    rounds, training = config.rounds.rounds, config.training
    # One is saved before an older one goes; of last_two the next round needs two
    kept_rounds = max(config.rounds.keep_rounds or rounds, 2 if config.rounds.opponent == "last_two" else 1)
    players = min(kept_rounds + 1, rounds)
    works = [work(name, 1) for name in (objectives_of(config.rounds)[0], *config.rivals)]
    total = (sizes.rows + sizes.held_out) * rates.real_bytes + max(one.kept for one in works) * rates.encoded_bytes
    for one in works:
        samples = one.drawn * rates.sample_bytes + sizes.shown * rates.shown_bytes
        total += rounds * samples + (players + 1) * rates.player_bytes  # with the top folder's
    pairs = sizes.rows // config.rounds.real_parts
    steps = max(steps_of_round(training, k, pairs, 1)[0] for k in range(1, rounds + 1))
    made = max(0, (steps - 1) // training.checkpointing_steps)
    kept = min(made, KEPT) + (1 if made else 0)
    best = rates.player_bytes if training.select_every else 0  # in each checkpoint, and beside them
    return total + kept * (rates.checkpoint_bytes + best) + best


def lines(plan: Plan, output_dir: str, device: torch.device, judges: str) -> list[str]:
    """The plan for people.

    Args:
        judges: what of an evaluation takes time that is not in the plan.
    """
    total = plan["encode_real_seconds"]
    table = [f"{'round':>5}  " + "  ".join(f"{name:>9}" for name in PHASES.values())]
    for entry in plan["rounds"]:
        parts = [entry[phase] for phase in PHASES]
        total += sum(parts)
        table.append(f"{entry['round']:>5}  " + "  ".join(f"{span(seconds):>9}" for seconds in parts))
    processes = f"{plan['processes']} process{'es' if plan['processes'] > 1 else ''}"
    free, peak = f"free in {output_dir}", max(plan["memory_bytes"].values())
    where = "of the GPU" if device.type == "cuda" else "of this machine"
    smaller = "lower --max_train_samples"
    return [
        *table,
        f"Plateau  {span(len(RATES) * plan['rounds'][0]['trained'])} at most for --plateau: {len(RATES)} rounds of "
        "fine-tuning at rates around the run's",
        f"Time     {span(total)} for {plan['rows']} real samples on {processes}, without {judges}, start and rivals",
        _fits("Disk", plan["disk_bytes"], plan["free_bytes"], free, smaller),
        _fits("Memory", peak, plan["device_bytes"], where, "lower --train_batch_size"),
    ]


def _fits(what: str, needed: int, there: int, where: str, remedy: str) -> str:
    line = f"{what:<8} {needed / 1e9:,.2f} GB of {there / 1e9:,.1f} GB {where}"
    return line if needed <= there else f"{line}: does NOT fit; {remedy}"


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
