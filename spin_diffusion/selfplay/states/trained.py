"""TRAINED: the player; before it, what a probe says of the samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from spin_diffusion.samples.sample import Row
from spin_diffusion.samples.shards import some_pairs
from spin_diffusion.selfplay.game import FixedDraws
from spin_diffusion.selfplay.gap import gap_text, held_out_gap, is_above_zero
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.objectives import Loss, bind, with_anchor
from spin_diffusion.selfplay.one_round import Probe, Round, StepResult
from spin_diffusion.selfplay.record import EMA, SAMPLES, GapRecord, RoundFields, RoundRecord, TrainingRecord
from spin_diffusion.selfplay.train import RoundPlan, train
from spin_diffusion.selfplay.train_settings import check_batch, of_round, steps_of_round
from spin_diffusion.selfplay.trainee import Average, trained_parameters
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hashes, verify_hashes


def look(round_: Round, probe: Probe) -> StepResult:
    """What the probe says of the round's samples, by the main process."""
    real: list[Row] = []
    findings: list[dict[str, Any] | None] = [None]
    if round_.accelerator.is_main_process:
        samples = round_.sets[0]
        real, generated = some_pairs(samples.data, samples.folder / SAMPLES, samples.part, probe.samples)
        findings = [probe(real, generated)]
    return StepResult({"shortcut": broadcast_object_list(findings)[0]}, worked_on=len(real))


def heed(round_: Round, probe: Probe, record: RoundRecord) -> None:
    """Print what the probe has said; InputError where it warns and is to stop the run."""
    shortcut = record["shortcut"]
    for line in shortcut["lines"]:
        round_.accelerator.print(f"{round_.title}, before training: {line}")
    if probe.stops and shortcut["state"] == "warn":
        raise InputError(f"{round_.title} is not trained (--on_shortcut stop): {shortcut['lines'][0]}")


def train_player(round_: Round, record: RoundRecord) -> StepResult:
    """The player, trained from its parent on and saved; with the next opponent of --opponent ema, and what the round
    learnt that carries over to held-out samples."""
    run, game, settings = round_.run, round_.game, round_.run.training
    average = _average_so_far(round_)
    before = None if round_.scores_kept else round_.seat(max(round_.anchors), record)
    run.seat_player(run.folder(round_.parent))
    loss, pairs = _loss(round_), round_.pairs(record, round_.sets[0])
    plan = _plan(round_, loss, len(pairs.ids))
    bar = run.progress.phase(f"{round_.title}: train", plan.steps)
    run.player_is(None)
    if isinstance(game, FixedDraws) and game.fixed_draws:
        _release_opponent(round_, game, plan.steps, len(pairs.ids))
    training = train(
        game,
        pairs,
        plan,
        # Without a generated side there is nothing to tell apart
        replace(settings, health=replace(settings.health, saturation="ignore"))
        if round_.source == "none"
        else settings,
        round_.accelerator,
        round_.directory,
        lambda done, total, text: bar(done, text),
        average,
    )
    _check_opponent(round_, record, before, training)
    _tell_training(round_, training)
    saved = game.save(round_.directory)
    round_.accelerator.wait_for_everyone()
    run.player_is(round_.directory)
    fields: RoundFields = {"training": training}
    if len(round_.sets) > 1:
        fields["held_out_gap"] = _gap(round_, record, loss)
    if average is not None:
        saved = [*saved, *_save_average(round_, average)]
    steps_here = training["steps"] - training["resumed_from"]
    pairs_here = steps_here * settings.train_batch_size * settings.gradient_accumulation_steps
    return StepResult(fields, file_hashes(saved, run.output_dir), pairs_here)


def _loss(round_: Round) -> Loss:
    """The round's objective with its settings."""
    rounds = round_.settings
    settings = {
        "beta": of_round(rounds.beta, round_.k),
        "mu": of_round(rounds.mu, round_.k) or float(rounds.num_generated),
    }
    return bind(round_.objective, **settings | (rounds.objective_options or {}))


def _plan(round_: Round, loss: Loss, pairs: int) -> RoundPlan:
    """What the training loop needs to know, with so many pairs to train on."""
    k, rounds, training = round_.k, round_.settings, round_.run.training
    beta = of_round(rounds.beta, k)
    steps, warmup_steps = steps_of_round(training, k, pairs, round_.accelerator.num_processes)
    return RoundPlan(
        name=f"{title_of(round_.objective)}/round-{k}",
        round_=k,
        seed=rounds.seed,
        steps=steps,
        learning_rate=of_round(training.learning_rate, k),
        warmup_steps=warmup_steps,
        beta=beta,
        loss=with_anchor(loss, rounds.sft_weight * beta),
        anchored_at_player=round_.anchors == {round_.parent: 1.0}
        and (rounds.opponent != "ema" or round_.parent == 0 or rounds.anchor == "base"),
    )


def _release_opponent(round_: Round, game: FixedDraws, steps: int, pairs: int) -> None:
    """With fixed draws it has said all that it is asked; whether that was worth it is printed."""
    game.release_opponent()
    round_.run.opponent_has_moved()
    visited = steps * check_batch(pairs, round_.run.training, round_.accelerator.num_processes)
    visits = visited / (pairs * game.fixed_draws)
    gain = "" if visits >= 2 else ": fewer than 2 saves memory, not time"
    round_.accelerator.print(f"{round_.title}: {visits:.2g} visits of each of the pairs' fixed draws{gain}")


def _check_opponent(round_: Round, record: RoundRecord, before: str | None, training: TrainingRecord) -> None:
    """It is what it was, whose hash was `before` (None = its scores were kept), or what it was refreshed to."""
    if before is None:
        verify_hashes(record["files"], round_.run.output_dir)  # the kept scores are among them
        return
    if training["anchors"]:
        round_.run.opponent_has_moved()
        before = training["anchors"][-1]["hash"]
    now = round_.game.opponent_hash()
    assert now == before, f"round {round_.k}: the opponent changed while the player was trained"


def _tell_training(round_: Round, training: TrainingRecord) -> None:
    ended, how = training["ended_by"], ""
    if ended is not None:
        kept = f", the player as it was at step {ended['kept_step']}" if ended["action"] == "roll_back" else ""
        how = f", ended by {ended['rule']}{kept}"
    round_.accelerator.print(
        f"{round_.title}: {training['steps']} steps{how}; over the last ones r_real {training['r_real']:+.2e}, "
        f"r_generated {training['r_generated']:+.2e}, accuracy {training['implicit_accuracy']:.2f}"
    )


def _average_so_far(round_: Round) -> Average | None:
    """For the opponent ema: the average as the opponent of this round is it."""
    if round_.settings.opponent != "ema":
        return None
    run = round_.run
    run.seat_opponent(round_.parent)
    folder = run.folder(round_.parent)
    run.seat_player(folder / EMA if round_.parent else folder)
    return Average(trained_parameters(round_.game), round_.settings.opponent_ema_decay)


def _save_average(round_: Round, average: Average) -> list[Path]:
    """The average after the round, as the next opponent; the player is put back."""
    average.copy_to(trained_parameters(round_.game))
    saved = round_.game.save(round_.directory / EMA)
    round_.accelerator.wait_for_everyone()
    round_.run.player_is(round_.directory / EMA)
    round_.run.seat_player(round_.directory)
    return saved


def _gap(round_: Round, record: RoundRecord, loss: Loss) -> GapRecord:
    """How well the player tells held-out samples apart."""
    pairs, settings = round_.pairs(record, round_.sets[1]), round_.settings
    batch_size = round_.run.training.train_batch_size
    gap = held_out_gap(round_.game, pairs, loss, batch_size, settings.seed, round_.k, round_.accelerator)
    round_.accelerator.print(
        f"{round_.title}: held-out gap {gap_text(gap)} nats over {gap['num_samples']} samples"
        + ("" if is_above_zero(gap) else "; nothing is learnt that carries over")
    )
    return gap
