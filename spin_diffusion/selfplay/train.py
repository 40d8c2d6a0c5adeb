"""The training loop of a round: the same for every game and every objective. Accelerate lives here.

A run's randomness is a function of (seed, round, position of the pair in the stream), never of a process, so a resumed
run, or one on another number of processes with the same global batch, sees the same pairs with the same noise.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from spin_diffusion.samples.pairs import Pairs, ReadAhead
from spin_diffusion.selfplay import health
from spin_diffusion.selfplay.checkpoints import Checkpoints, Snapshots
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.health import METRICS, StepEntry
from spin_diffusion.selfplay.looks import Watch
from spin_diffusion.selfplay.objectives import Loss
from spin_diffusion.selfplay.record import SelectionRecord, TrainingRecord
from spin_diffusion.selfplay.sharded import Sharded, wants_shards
from spin_diffusion.selfplay.tracking import LEVEL, log_step, name_axis, record, summary, tracked
from spin_diffusion.selfplay.train_settings import TrainSettings, check_batch
from spin_diffusion.selfplay.trainee import Average, Fused, Trainee, trained_parameters
from spin_diffusion.selfplay.watching import Looks, Selection
from spin_diffusion.store.progress import in_bar, tell
from spin_diffusion.store.run_dir import write_file


@dataclass(frozen=True)
class RoundPlan:
    """What the loop needs to know of one round: the settings' values for it, and the objective bound to its beta."""

    name: str
    """For trackers: the objective and the round."""
    round_: int
    seed: int
    steps: int
    learning_rate: float
    warmup_steps: int
    beta: float
    loss: Loss
    anchored_at_player: bool
    """Whether the round starts with player = opponent, so that every r must be 0 at step 0."""
    said: frozenset[str] = frozenset()
    """Rules of health that have spoken in an earlier round, whose advice is not repeated."""


def train(
    game: Game,
    pairs: Pairs,
    plan: RoundPlan,
    settings: TrainSettings,
    directory: Path,
    progress: Callable[[int, str], None],
    average: Average | None,
    watch: Watch,
) -> TrainingRecord:
    """Train the player for one round, from the newest checkpoint in `directory` on, and return what it came to.

    Args:
        average: follows the player's weights, step by step.
        watch: who looks at the player now and then; with a judge its best step is what is left.

    Raises:
        InputError: fewer pairs than one global batch, a damaged checkpoint, a missing extra.
        FloatingPointError: a loss or gradient that is not finite.
    """
    per_step = check_batch(len(pairs.ids), settings, game.accelerator.num_processes)
    trainee, schedule = _prepared(game, plan, settings)
    checkpoints = Checkpoints(directory, trainee, average, per_step)
    first_step, history, judged = checkpoints.load(settings.resume_from_checkpoint)
    said = health.said_in(history)
    selection = Selection(directory, trainee, average, watch.judge, judged) if watch.judge is not None else None
    looks = Looks(watch, directory, trainee, plan.name, plan.steps, settings.select_every or 1, selection)
    schedule.last_epoch = first_step  # the optimizer already has this step's rate

    stride = settings.train_batch_size * game.accelerator.num_processes
    ahead = ReadAhead(replace(pairs, per_step=per_step), stride, plan.steps * per_step)
    name_axis(plan.name, game.accelerator)
    ended: health.Finding | None = None
    snapshots = Snapshots(directory, trainee, average) if health.rolls_back(settings.health) else None
    if first_step == 0:
        looks.after(0)
    for step in range(first_step, plan.steps):
        if snapshots is not None and step % health.WINDOW_STEPS == 0:
            snapshots.take(step)
        started, lr = time.perf_counter(), trainee.optimizer.param_groups[0]["lr"]
        metrics, norm = _take_step(step, trainee, ahead, plan)
        schedule.step()
        trainee.update_averages(average)
        rates: StepEntry = {"grad_norm": norm, "lr": lr, "pairs_per_second": per_step / (time.perf_counter() - started)}
        history.append(_entry(step, summary(metrics) | rates, plan, trainee, progress))
        ended = _heeded(history, said, plan, trainee)
        is_last = ended is not None or step + 1 == plan.steps
        if ended is None or ended.action != "roll_back":
            looks.after(step + 1, is_last)
        if is_last:
            break
        if (step + 1) % settings.checkpointing_steps == 0:
            checkpoints.save(step + 1, history, selection.state if selection is not None else None)
    ahead.close()

    kept_step, selected = _left(trainee, history[-1]["step"], ended, snapshots, selection)
    health.check_weights(trained_parameters(game), plan.round_)
    _write_history(directory, history, game)
    came_to = _came_to(first_step, history, ended, kept_step, settings)
    return came_to if selected is None else {**came_to, "selection": selected}


def _left(
    trainee: Trainee, step: int, ended: health.Finding | None, snapshots: Snapshots | None, selection: Selection | None
) -> tuple[int, SelectionRecord | None]:
    """Leave the player of the last step, of the one that is rolled back to, or of the best one: the step that training
    is kept until, and what was selected."""
    if ended is not None and ended.action == "roll_back" and snapshots is not None:
        step = snapshots.go_back(before=step - health.WINDOW_STEPS)
    trainee.finish()
    if selection is None:
        return step, None
    best = selection.put_back(until=step)
    judge = selection.judge
    return step, {"by": judge.name, "better": judge.better, "step": best, "curve": selection.state["curve"]}


def _write_history(directory: Path, history: health.History, game: Game) -> None:
    if game.accelerator.is_main_process:
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        write_file(directory / "metrics.jsonl", lambda part: part.write_text(lines))


def _prepared(game: Game, plan: RoundPlan, settings: TrainSettings) -> tuple[Trainee, LRScheduler]:
    """The player as it is laid out over the processes, and the schedule of its learning rate."""
    sharded = wants_shards(settings, game.accelerator)
    kind = Sharded if sharded else Fused if settings.fused_backward else Trainee
    trainee = kind(game, plan.learning_rate, settings, game.accelerator)
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer=trainee.schedulable,
        num_warmup_steps=plan.warmup_steps,
        num_training_steps=plan.steps,
    )
    return trainee, schedule


def _entry(
    step: int, said: StepEntry, plan: RoundPlan, trainee: Trainee, progress: Callable[[int, str], None]
) -> StepEntry:
    """What is logged of a step, told to trackers and whoever waits; with the distance of the weights now and then."""
    if (step + 1) % health.WINDOW_STEPS == 0 or step + 1 == plan.steps:
        distance = trainee.distance()
        if distance is not None:
            said["distance"] = distance
    log_step(plan.name, tracked(said, plan.name), step + 1, trainee.accelerator)
    progress(
        step + 1, f"r_real {in_bar(said['r_real'])} r_generated {in_bar(said['r_generated'])} loss {said['loss']:.2f}"
    )
    first: StepEntry = {"step": step + 1}
    return first | said


def _heeded(history: health.History, said: set[str], plan: RoundPlan, trainee: Trainee) -> health.Finding | None:
    """Print what the rules of health say of the last step and note it beside its numbers; what ends the round.

    Args:
        said: the rules that have spoken in the round, to which those that speak now are added.
    """
    found = health.findings(history, plan.beta, trainee.settings.health, said)
    said.update(one.rule for one in found)
    for one in found:
        sentence = one.sentence
        if health.tells_apart(history):
            sentence += trainee.game.remedies.get(one.rule, "")
        history[-1].setdefault("findings", {})[one.rule] = sentence
        if trainee.accelerator.is_main_process:
            shown = sentence.partition(". ")[0] if one.rule in plan.said else sentence
            tell(f"Round {plan.round_}, step {history[-1]['step']}, {one.rule}: {shown}")
    return health.gravest(found)


def _came_to(
    first_step: int,
    history: health.History,
    ended: health.Finding | None,
    kept_step: int,
    settings: TrainSettings,
) -> TrainingRecord:
    """For the round's record: how far training went, what the rules of health said, and means over the last steps."""
    last = history[-health.WINDOW_STEPS :]
    means = {name: sum(entry[name] for entry in last) / len(last) for name in METRICS}
    return {
        "steps": history[-1]["step"],
        "resumed_from": first_step,
        "stopped_early": ended is not None,
        "health": [
            {"step": entry["step"], "rule": rule, "action": settings.health.action(rule), "sentence": sentence}
            for entry in history
            for rule, sentence in entry.get("findings", {}).items()
        ],
        "ended_by": None
        if ended is None
        else {"rule": ended.rule, "action": ended.action, "sentence": ended.sentence, "kept_step": kept_step},
        "distance": next((entry["distance"] for entry in reversed(history) if "distance" in entry), None),
        "loss": means["loss"],
        "r_real": means["r_real"],
        "r_generated": means["r_generated"],
        "margin": means["margin"],
        "implicit_accuracy": means["implicit_accuracy"],
        "saturation": means["saturation"],
        "score_real": means["score_real"],
        "score_generated": means["score_generated"],
    }


def _take_step(step: int, trainee: Trainee, ahead: ReadAhead, plan: RoundPlan) -> tuple[Tensor, float]:
    """One optimizer step on one global batch.

    Returns:
        What is logged of the pairs of all processes, (pairs, columns) on the CPU, and the gradient's norm before
        clipping.
    """
    game, settings, accelerator = trainee.game, trainee.settings, trainee.accelerator
    records, rank, world = [], accelerator.process_index, accelerator.num_processes

    for micro in range(settings.gradient_accumulation_steps):
        batch = ahead.batch(_positions(step, micro, settings, rank, world), plan.seed, plan.round_)
        with trainee.accumulating():
            scored = game.scores(trainee.model, batch)
            losses = plan.loss(scored.scores)
            if step == 0 and plan.anchored_at_player:
                tolerance = game.start_tolerance[accelerator.mixed_precision]
                health.check_start(scored.scores, losses, plan.loss, tolerance, plan.beta)
            accelerator.backward(losses.mean())
            records.append(record(scored.scores, losses, scored.level, plan.beta))
            if accelerator.sync_gradients:
                norm_on_device = trainee.update()
                # Here, and nowhere else in a step, the host waits for the device
                metrics, gradient_norm = accelerator.gather(torch.cat(records)).cpu(), float(norm_on_device)
                # Under fp16 the scaler expects infinite gradients now and then and skips their step itself
                norm = gradient_norm if accelerator.mixed_precision != "fp16" else 0.0
                health.check_finite(
                    metrics[:, 0].mean().item(),
                    norm,
                    step=step,
                    levels=metrics[:, LEVEL],
                    ids=partial(_ids_everywhere, ahead.pairs, step, plan, settings, world),
                    round_=plan.round_,
                    level_name=game.level_name,
                )
    return metrics, gradient_norm


def _positions(step: int, micro: int, settings: TrainSettings, rank: int, world: int) -> list[int]:
    """This process's places in the stream of pairs. A step's set of places depends on the global batch alone."""
    start = ((step * settings.gradient_accumulation_steps + micro) * world + rank) * settings.train_batch_size
    return list(range(start, start + settings.train_batch_size))


def _ids_everywhere(pairs: Pairs, step: int, plan: RoundPlan, settings: TrainSettings, world: int) -> list[str]:
    """The ids of a step's pairs, in the order in which the processes' metrics are gathered."""
    return [
        id_
        for rank in range(world)
        for micro in range(settings.gradient_accumulation_steps)
        for id_ in pairs.ids_at(_positions(step, micro, settings, rank, world), plan.seed, plan.round_)
    ]
