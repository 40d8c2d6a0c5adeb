"""EVALUATED: how good the player is. PROMOTED or REJECTED: who plays on."""

import shutil
from functools import partial
from pathlib import Path

from spin_diffusion.selfplay.gap import gap_text, is_above_zero
from spin_diffusion.selfplay.one_round import Round, StepResult
from spin_diffusion.selfplay.record import EVALUATION, RoundRecord, saved_names
from spin_diffusion.store.run_dir import commit, is_whole, part_of, write_file


def evaluate(round_: Round, record: RoundRecord) -> StepResult:
    """What the evaluation says of the player, and why it is rejected, if it is."""
    gap, reason = record.get("held_out_gap"), None
    learnt = round_.settings.stop_when_learnt and gap is not None and not is_above_zero(gap)
    if learnt and gap is not None:
        reason = f"its held-out gap {gap_text(gap)} is not above 0"
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
        round_.accelerator.print(
            f"round {round_.k} is rejected ({record['rejected_because']}): the player of "
            f"{f'round {round_.parent}' if round_.parent else 'the base'} plays on"
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
