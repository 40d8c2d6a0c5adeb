"""The states of a round from training on, and before it what a probe says of the samples.

TRAINED     the player
EVALUATED   how good it is
PROMOTED    it plays on, or else the round is REJECTED
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from spin_diffusion.samples.pairs import Pairs
from spin_diffusion.samples.sample import Row
from spin_diffusion.samples.shards import some_pairs
from spin_diffusion.selfplay.auto_beta import beta_of_score, mean_score
from spin_diffusion.selfplay.clustered import interval_text, is_above_zero
from spin_diffusion.selfplay.game import FixedDraws
from spin_diffusion.selfplay.gap import Told, gap_of, tell_apart
from spin_diffusion.selfplay.looks import Judge, Judged, Watch
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.objectives import Loss, bind, with_anchor
from spin_diffusion.selfplay.one_round import Probe, Round, StepResult
from spin_diffusion.selfplay.record import (
    EMA,
    EVALUATION,
    SAMPLES,
    GapRecord,
    RoundFields,
    RoundRecord,
    SelectionRecord,
    TrainingRecord,
    find_record,
    saved_names,
)
from spin_diffusion.selfplay.train import RoundPlan, train
from spin_diffusion.selfplay.train_settings import check_batch, of_round, steps_of_round
from spin_diffusion.selfplay.trainee import Average, trained_parameters
from spin_diffusion.selfplay.watching import best_of, gain
from spin_diffusion.store.hashes import file_hashes, verify_hashes
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import commit, is_whole, part_of, write_file


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
        tell(f"{round_.title}, before training: {line}", round_.accelerator)
    if probe.stops and shortcut["state"] == "warn":
        raise InputError(f"{round_.title} is not trained (--probe action: stop): {shortcut['lines'][0]}")


def train_player(round_: Round, record: RoundRecord) -> StepResult:
    """The player, trained from its parent on and saved; with the next opponent of --opponent ema, and what the round
    learnt that carries over to held-out samples."""
    run, game, settings = round_.run, round_.game, round_.run.training
    average = _average_so_far(round_)
    before = None if round_.scores_kept else round_.seat(max(round_.anchors), record)
    run.seat_player(run.folder(round_.parent))
    pairs = round_.pairs(record, round_.sets[0])
    numbers = _numbers(round_, pairs)
    loss = bind(round_.objective, **numbers)
    plan = _plan(round_, numbers, loss, len(pairs.ids))
    bar = run.progress.phase(f"{round_.title}: train", plan.steps)
    run.player_is(None)
    if isinstance(game, FixedDraws) and game.fixed_draws:
        _release_opponent(round_, game, plan.steps, len(pairs.ids))
    if round_.source == "none":  # there is nothing to tell apart
        settings = replace(settings, health=replace(settings.health, saturation="ignore"))
    watch = Watch(_judge(round_, record, loss), run.preview)
    training = train(game, pairs, plan, settings, round_.directory, bar, average, watch)
    _check_opponent(round_, record, before)
    _tell_training(round_, training)
    saved = game.save(round_.directory)
    round_.accelerator.wait_for_everyone()
    run.player_is(round_.directory)
    fields: RoundFields = {"training": training, "beta": plan.beta}
    if len(round_.sets) > 1:
        fields["held_out_gap"] = _gap(round_, _told(round_, record, loss))
    if average is not None:
        saved = [*saved, *_save_average(round_, average)]
    steps_here = training["steps"] - training["resumed_from"]
    pairs_here = steps_here * settings.train_batch_size * settings.gradient_accumulation_steps
    return StepResult(fields, file_hashes(saved, run.output_dir, round_.accelerator), pairs_here, watch.took)


def _numbers(round_: Round, pairs: Pairs) -> dict[str, float]:
    """What the round's objective is computed with, beside the scores; the player stands where the round starts."""
    numbers = round_.settings.numbers(round_.k)
    if of_round(round_.settings.beta, round_.k) != "auto" or round_.source == "none":
        return numbers
    score = mean_score(round_, pairs)
    beta = beta_of_score(score)
    tell(f"{round_.title}: beta {beta:g}, the real samples' mean score being {score:.3g}", round_.accelerator)
    return numbers | {"beta": beta}


def _plan(round_: Round, numbers: dict[str, float], loss: Loss, pairs: int) -> RoundPlan:
    """What the training loop needs to know, with so many pairs to train on."""
    k, rounds, training = round_.k, round_.settings, round_.run.training
    steps, warmup_steps = steps_of_round(training, k, pairs, round_.accelerator.num_processes)
    return RoundPlan(
        name=f"{title_of(round_.objective)}/round-{k}",
        round_=k,
        seed=rounds.seed,
        steps=steps,
        learning_rate=of_round(training.learning_rate, k),
        warmup_steps=warmup_steps,
        beta=numbers["beta"],
        loss=with_anchor(loss, numbers.get("sft_weight", 0.0) * numbers["beta"]),
        anchored_at_player=round_.anchors == {round_.parent: 1.0}
        and (rounds.opponent != "ema" or round_.parent == 0 or rounds.anchor == "base"),
        said=frozenset(
            event["rule"]
            for earlier in range(1, k)
            if (record := find_record(round_.directory.with_name(f"round-{earlier}"))) is not None
            for event in record["training"]["health"]
        ),
    )


def _release_opponent(round_: Round, game: FixedDraws, steps: int, pairs: int) -> None:
    """With fixed draws it has said all that it is asked; whether that was worth it is printed."""
    game.release_opponent()
    round_.run.opponent_has_moved()
    visited = steps * check_batch(pairs, round_.run.training, round_.accelerator.num_processes)
    visits = visited / (pairs * game.fixed_draws)
    note = "" if visits >= 2 else ": fewer than 2 saves memory, not time"
    tell(f"{round_.title}: {visits:.2g} visits of each of the pairs' fixed draws{note}", round_.accelerator)


def _check_opponent(round_: Round, record: RoundRecord, before: str | None) -> None:
    """It is what it was, whose hash was `before` (None = its scores were kept)."""
    if before is None:
        # The kept scores are among them
        verify_hashes(record["files"], round_.run.output_dir, accelerator=round_.accelerator)
        return
    now = round_.game.opponent_hash()
    assert now == before, f"round {round_.k}: the opponent changed while the player was trained"


def _judge(round_: Round, record: RoundRecord, loss: Loss) -> Judge | None:
    """Who judges the steps; None = nobody."""
    settings = round_.run.training
    if settings.select_every is None or settings.select_by != "gap":
        return round_.run.judge

    def judge(folder: Path) -> Judged:
        told = _told(round_, record, loss)
        return Judged(told.gaps, told.prompts, len(told.gaps) if round_.accelerator.is_main_process else 0)

    return Judge("gap", "gap", judge)


def _tell_training(round_: Round, training: TrainingRecord) -> None:
    ended, how = training["ended_by"], ""
    if ended is not None:
        kept = f", the player as it was at step {ended['kept_step']}" if ended["action"] == "roll_back" else ""
        how = f", ended by {ended['rule']}{kept}"
    tell(
        f"{round_.title}: {training['steps']} steps{how}; over the last ones r_real {training['r_real']:+.2e}, "
        f"r_generated {training['r_generated']:+.2e}, accuracy {training['implicit_accuracy']:.2f}",
        round_.accelerator,
    )
    if (selection := training.get("selection")) is not None:
        tell(f"{round_.title}: {_best_in_words(selection)}", round_.accelerator)


def _best_in_words(selection: SelectionRecord) -> str:
    """The best step, in a line."""
    best = best_of(selection["curve"], selection["better"])
    if best is None or best["mean"] is None:
        return f"no step could be judged by {selection['by']}"
    gained = interval_text({"mean": best["mean"], "low": best["low"], "high": best["high"]})
    by = selection["by"] + (" (lower is better)" if selection["better"] == "lower" else "")
    return f"best step {best['step']} of {selection['curve'][-1]['step']}, by {by} {gained}"


def _not_better(selection: SelectionRecord | None) -> str | None:
    """Why a round is rejected of which no step is better than its start; None = one is, or nobody looked."""
    if selection is None:
        return None
    best = best_of(selection["curve"], selection["better"])
    if best is not None and gain(best, selection["better"]) > 0:
        return None
    return f"no step is better than its start: {_best_in_words(selection)}"


def _average_so_far(round_: Round) -> Average | None:
    """For the opponent ema: the average as the opponent of this round is it."""
    if round_.settings.opponent != "ema":
        return None
    run = round_.run
    run.seat_opponent(round_.parent)
    folder = run.folder(round_.parent)
    run.seat_player(folder / EMA if round_.parent else folder)
    return Average(trained_parameters(round_.game), run.training.ema_decay or 0.99)


def _save_average(round_: Round, average: Average) -> list[Path]:
    """The average after the round, as the next opponent; the player is put back."""
    average.copy_to(trained_parameters(round_.game))
    saved = round_.game.save(round_.directory / EMA)
    round_.accelerator.wait_for_everyone()
    round_.run.player_is(round_.directory / EMA)
    round_.run.seat_player(round_.directory)
    return saved


def _told(round_: Round, record: RoundRecord, loss: Loss) -> Told:
    """How the present player tells the held-out samples apart."""
    pairs, settings = round_.pairs(record, round_.sets[1]), round_.settings
    batch_size = round_.run.training.train_batch_size
    return tell_apart(round_.game, pairs, loss, batch_size, settings.seed, round_.k, round_.accelerator)


def _gap(round_: Round, told: Told) -> GapRecord:
    """How well the player tells held-out samples apart."""
    gap = gap_of(told)
    tell(
        f"{round_.title}: held-out gap {interval_text(gap)} nats over {gap['num_samples']} samples"
        + ("" if is_above_zero(gap) else "; nothing is learnt that carries over"),
        round_.accelerator,
    )
    return gap


def evaluate(round_: Round, record: RoundRecord) -> StepResult:
    """What the evaluation says of the player, and why it is rejected, if it is."""
    gap, reason = record.get("held_out_gap"), None
    learnt = round_.settings.stop_when_learnt and gap is not None and not is_above_zero(gap)
    if learnt and gap is not None:
        reason = f"its held-out gap {interval_text(gap)} is not above 0"
    reason = _not_better(record["training"].get("selection")) or reason
    ended = record["training"]["ended_by"]
    if ended is not None and ended["action"] == "roll_back" and ended["kept_step"] == 0:
        reason = f"it was rolled back to its start, {ended['rule']}: {ended['sentence']}"
    if round_.run.evaluate is None:
        return StepResult({"metrics": {}, "rejected_because": reason, "learnt": learnt})
    round_.run.seat_player(round_.directory)
    judged = round_.run.evaluate(round_.k, round_.directory / EVALUATION, round_.parent)
    round_.accelerator.wait_for_everyone()
    # Its files are not hashed here: they say themselves what they belong to, and are made anew when that changes
    reason = reason or (None if judged.promote else judged.reason)
    return StepResult({"metrics": judged.metrics, "rejected_because": reason, "learnt": learnt})


def decide(round_: Round, record: RoundRecord) -> StepResult:
    """Copy a promoted player to where users load it; a rejected one is set aside."""
    if record["rejected_because"] is not None:
        tell(
            f"round {round_.k} is rejected ({record['rejected_because']}): the player of "
            f"{f'round {round_.parent}' if round_.parent else 'the base'} plays on",
            round_.accelerator,
        )
        return StepResult({"decision": "rejected"})
    if round_.accelerator.is_main_process:
        for name in saved_names(round_.directory, record):
            target = round_.run.output_dir / name
            shutil.copytree(round_.directory / name, part_of(target), dirs_exist_ok=True)
            commit(target)
    return StepResult({"decision": "promoted"})


def mend_copy(round_: Round, record: RoundRecord) -> None:
    """Copy anew what was damaged or removed of a promoted round's player where users load it, beside the rounds."""
    if round_.accelerator.is_main_process:
        saved, below = saved_names(round_.directory, record), round_.run.output_dir
        for name, digest in record["files"].items():
            source, target = below / name, below.joinpath(*Path(name).parts[1:])
            if Path(name).parts[1] not in saved or is_whole(target, digest):
                continue
            print(f"{target} is not what round {round_.k} saved (damaged, or removed): it is copied anew")
            write_file(target, partial(shutil.copyfile, source))
    round_.accelerator.wait_for_everyone()
