"""What a run says while it goes on: how long each stage of a round took, and when the whole run will be over."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.runs.page import read_for_page, run_folders
from spin_diffusion.selfplay.one_round import Costs
from spin_diffusion.selfplay.record import RoundRecord, State, find_record, has_reached
from spin_diffusion.selfplay.round_settings import source_of
from spin_diffusion.selfplay.train_settings import of_round, pairs_per_step, steps_of_round
from spin_diffusion.store.files import read_json
from spin_diffusion.store.progress import span

STAGES: dict[State, tuple[str, tuple[str, ...]]] = {
    "CACHED": ("drawn", ("opponent", "generated", "cached", "probed")),
    "TRAINED": ("trained", ("trained", "judged", "previewed")),
    "EVALUATED": ("evaluated", ("evaluated",)),
}
"""What a round is after a state, and the phases of its record that led there."""


@dataclass(frozen=True)
class Stage:
    """A stage of a round.

    Attributes:
        where: the round's folder.
        amount: what its time is proportional to, among stages of the same state; 0 = there is nothing to do.
        seconds: what it took; None = it is not over.
    """

    where: Path
    state: State
    amount: int
    seconds: float | None = None


@dataclass(frozen=True)
class Left:
    """What the stages that are not over will take, in seconds; `is_rough` where the pace of one is a guess."""

    seconds: float
    is_rough: bool = False


def time_left(stages: Sequence[Stage], guessed: Mapping[State, float]) -> Left | None:
    """What is left at the pace of the last stage of each state that is over; None where none is, and no guess.

    Args:
        guessed: seconds for each unit of a stage's amount.
    """
    pace = {stage.state: stage.seconds / stage.amount for stage in stages if stage.seconds is not None and stage.amount}
    left = [stage for stage in stages if stage.seconds is None and stage.amount]
    if any(stage.state not in pace and stage.state not in guessed for stage in left):
        return None
    seconds = sum(pace.get(stage.state, guessed.get(stage.state, 0.0)) * stage.amount for stage in left)
    return Left(seconds, any(stage.state not in pace for stage in left))


class _PlannedRounds(TypedDict):
    rounds: list[dict[str, float]]


def guessed_paces(config: RunConfig, pairs: int, world: int, costs: Costs | None) -> dict[State, float]:
    """Seconds for each unit of a stage's amount, before one was timed: as `plan` predicted of round 1, else a step's
    by its FLOPs, at the rate at which round 1's samples were drawn.

    Args:
        pairs: of real samples, in a round.
        world: processes.
        costs: what the phases of a round take; None = not known.
    """
    output_dir, training = Path(config.run.output_dir), config.training
    planned = read_for_page(read_json, output_dir / "plan.json", _PlannedRounds)
    if planned is not None and planned["rounds"]:
        phases, steps = planned["rounds"][0], steps_of_round(training, 1, pairs, world)[0]
        return {
            "CACHED": phases.get("generated", 0.0) + phases.get("cached", 0.0),
            "TRAINED": (phases.get("trained", 0.0) + phases.get("looked", 0.0)) / max(steps, 1),
            "EVALUATED": phases.get("evaluated", 0.0),
        }
    record = find_record(output_dir / "round-1")
    drawn = record.get("ledger", {}).get("generated") if record is not None else None
    flops = costs.flops(1, "trained", pairs_per_step(training, world)) if costs is not None else None
    if drawn is None or not drawn["flops"] or flops is None:
        return {}
    return {"TRAINED": flops * drawn["seconds"] / drawn["flops"]}


def stages_of(config: RunConfig, output_dir: Path, pairs: int, world: int, evaluates: bool) -> list[Stage]:
    """The stages of all rounds of a run and its rivals, in their order.

    Args:
        pairs: of real samples, in a round.
        world: processes.
        evaluates: whether players are evaluated.
    """
    stages: list[Stage] = []
    last = config.rounds.rounds
    for rival, folder in zip((None, *config.rivals), run_folders(config, output_dir).values(), strict=True):
        for k in range(1, last + 1):
            record = find_record(folder / f"round-{k}")
            objective = rival or of_round(config.rounds.objective, k)
            shown = evaluates and (k == last or rival is None and config.evaluation.eval_every_round)
            amounts: dict[State, int] = {
                "CACHED": int(source_of(config.rounds, objective) == "opponent"),
                "TRAINED": steps_of_round(config.training, k, pairs, world)[0],
                "EVALUATED": int(shown),
            }
            stages += [_stage(folder / f"round-{k}", state, amount, record) for state, amount in amounts.items()]
            if record is not None and record.get("learnt"):
                break  # no further round is played
    return stages


def _stage(where: Path, state: State, amount: int, record: RoundRecord | None) -> Stage:
    """A stage as its round's record has it; of training that was killed, the steps that were timed."""
    if record is None or not has_reached(record, state):
        return Stage(where, state, amount)
    if state == "TRAINED" and amount:
        amount = record["training"]["steps"] - record["training"]["resumed_from"]
    return Stage(where, state, amount, sum(record["seconds"].get(phase, 0.0) for phase in STAGES[state][1]))


def status_line(title: str, stage: Stage, left: Left | None) -> str:
    """What is said after a stage of the round of this title, in less than 80 characters.

    Args:
        left: what the run will still take; None = not known yet.
    """
    line = f"{title}: {STAGES[stage.state][0]} in {span(stage.seconds or 0.0)}"
    if left is None:
        return f"{line}; the time left is not known yet"
    if left.seconds == 0:
        return line
    if left.is_rough:
        return f"{line}; roughly {span(left.seconds)} left, a guess"
    over = time.strftime("%a %H:%M", time.localtime(time.time() + left.seconds))
    return f"{line}; some {span(left.seconds)} left, until {over}"
