"""The rounds of self-play, and what is on the disk after each of their states.

PLANNED -> OPPONENT -> GENERATED -> CACHED -> TRAINED -> EVALUATED -> PROMOTED | REJECTED. A state is committed by
replacing the round's `round.json` once the state's files are complete and hashed. Running again goes on at the first
state that is not committed, so the same command starts, resumes and finishes a run.
"""

from pathlib import Path

from accelerate import Accelerator

from spin_diffusion.samples.candidates import Candidates
from spin_diffusion.samples.real import data_manifest
from spin_diffusion.selfplay.checkpoints import remove_checkpoints
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.journal import Journal, Step
from spin_diffusion.selfplay.ledger import Costs
from spin_diffusion.selfplay.one_round import Evaluate, Probe, Round, SelfPlay
from spin_diffusion.selfplay.record import ENCODED, KEPT, RoundRecord, State
from spin_diffusion.selfplay.round_settings import RoundSettings
from spin_diffusion.selfplay.states.cached import SCORED_BY, cache
from spin_diffusion.selfplay.states.decided import decide, evaluate, mend_copy
from spin_diffusion.selfplay.states.generated import DRAWN_BY, generate
from spin_diffusion.selfplay.states.opponent import choose_opponent
from spin_diffusion.selfplay.states.trained import heed, look, train_player
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.store.progress import Progress
from spin_diffusion.store.run_dir import is_shard, remove_files, settle, trouble_of

STEPS_BEFORE_TRAINING: dict[State, Step] = {"OPPONENT": choose_opponent, "GENERATED": generate, "CACHED": cache}
STEPS_FROM_TRAINING_ON: dict[State, Step] = {"TRAINED": train_player, "EVALUATED": evaluate, "PROMOTED": decide}
"""The states after PLANNED and what reaches them; `decide` may end in REJECTED."""


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
) -> list[RoundRecord]:
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
    run = SelfPlay(
        game=game,
        data=data,
        held_out=held_out,
        output_dir=output_dir,
        rounds=rounds,
        training=training,
        accelerator=accelerator,
        evaluate=evaluate,
        progress=progress or Progress(),
        candidates=candidates,
        probe=probe,
        costs=costs,
        run_dir=run_dir,
        start=start,
    )
    records: list[RoundRecord] = []
    promoted: list[Round] = []
    for k in range(1, rounds.rounds + 1):
        round_ = Round(run, k, [earlier.k for earlier in promoted])
        record = play_round(round_)
        records.append(record)
        if record["state"] == "PROMOTED":
            promoted.append(round_)
        if record.get("learnt"):
            accelerator.print(f"The run ends with round {k}: {record['rejected_because']}")
            break
    if promoted:
        mend_copy(promoted[-1], records[promoted[-1].k - 1])
    return records


def play_round(round_: Round) -> RoundRecord:
    """Take every step of a round that is not committed yet; its record. What a full disk leaves half-written is
    removed."""
    try:
        journal = Journal(round_, data_manifest(round_.run.data)["hash"])
        for state, step in STEPS_BEFORE_TRAINING.items():
            journal.reach(state, step)
        if journal.record["state"] == "CACHED":
            _ask_probe(round_, journal)
        for state, step in STEPS_FROM_TRAINING_ON.items():
            journal.reach(state, step)
    except Exception as error:
        if round_.accelerator.is_main_process and trouble_of(error) is not None:
            settle(round_.directory)
        raise
    _clean(round_)
    return journal.record


def _ask_probe(round_: Round, journal: Journal) -> None:
    """Let the probe look at the samples, once in a round."""
    probe = round_.run.probe
    if probe is None or probe.samples == 0 or round_.source != "opponent":
        return
    if "shortcut" not in journal.record:
        journal.reach("CACHED", lambda round_, record: look(round_, probe), "probed")
    heed(round_, probe, journal.record)


def _clean(round_: Round) -> None:
    """Remove what a finished round does not need: encodings, which the samples give again, what was kept for its
    training alone, and checkpoints."""
    if round_.accelerator.is_main_process:
        for samples in round_.sets:
            for name in (ENCODED, KEPT, DRAWN_BY, SCORED_BY):
                remove_files(samples.folder / name, is_shard)
        if not round_.run.training.keep_checkpoints:
            remove_checkpoints(round_.directory)
    round_.accelerator.wait_for_everyone()
