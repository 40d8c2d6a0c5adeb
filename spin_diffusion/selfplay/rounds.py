"""The rounds of self-play, and what is on the disk after each of their states.

PLANNED -> OPPONENT -> GENERATED -> CACHED -> TRAINED -> EVALUATED -> PROMOTED | REJECTED. A state is committed by
replacing the round's `round.json` once the state's files are complete and hashed. Running again goes on at the first
state that is not committed, so the same command starts, resumes and finishes a run.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.samples.candidates import Candidates
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.ledger import Costs
from spin_diffusion.selfplay.one_round import Round
from spin_diffusion.selfplay.round_settings import RoundSettings
from spin_diffusion.selfplay.table import Evaluate, Probe, Table
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.store.progress import Progress


def play(
    game: Game,
    data: Path,
    output_dir: Path,
    rounds: RoundSettings,
    training: TrainSettings,
    accelerator: Accelerator,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    held_out: Path | None = None,
    candidates: Candidates | None = None,
    probe: Probe | None = None,
    costs: Costs | None = None,
    run_dir: Path | None = None,
    start: Path = Path(),
) -> list[dict[str, Any]]:
    """Play all rounds and return their records; a finished run returns at once.

    Args:
        data: folder of the real samples that `prepare` wrote.
        output_dir: gets `round-1/`, `round-2/`, ... and what the game saves of the last promoted round.
        held_out: the same of real samples that are never trained on. The opponent draws for them too, and every
            round is asked how well it tells the two apart.
        candidates: where the opponent plays, its own samples make the pairs; needs num_generated = 1.
        probe: is shown pairs of each round that has an opponent's samples; what it says is kept as `shortcut`.
        costs: for the rounds' ledgers.
        run_dir: the whole folder whose bytes the ledgers count; None = output_dir.
        start: folder with the player that round 1 starts from; Path() = the base.

    Raises:
        InputError: the probe warns, and is to stop the run.
    """
    assert candidates is None or rounds.num_generated == 1, "the configuration checks it"
    progress = progress or Progress()
    table = Table(
        game,
        data,
        held_out,
        output_dir,
        rounds,
        training,
        accelerator,
        evaluate,
        progress,
        candidates,
        probe,
        costs,
        run_dir,
        start,
    )
    records: list[dict[str, Any]] = []
    last: Round | None = None
    for k in range(1, rounds.rounds + 1):
        promoted = [record["round"] for record in records if record["state"] == "PROMOTED"]
        round_ = Round(table, k, promoted)
        records.append(round_.run())
        last = round_ if records[-1]["state"] == "PROMOTED" else last
        if records[-1].get("learnt"):
            accelerator.print(f"The run ends with round {k}: {records[-1]['rejected_because']}")
            break
    if last is not None:
        last.mend_copy()
    return records
