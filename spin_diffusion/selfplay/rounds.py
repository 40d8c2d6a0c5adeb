"""The rounds of self-play, and what is on the disk after each of their states.

PLANNED -> OPPONENT -> GENERATED -> CACHED -> TRAINED -> EVALUATED -> PROMOTED | REJECTED. A state is committed by
replacing the round's `round.json` once the state's files are complete and hashed. Running again goes on at the first
state that is not committed, so the same command starts, resumes and finishes a run; where files of a state are damaged
the round goes back to the state before it.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

from accelerate.utils import gather_object

from spin_diffusion.samples.real import data_manifest
from spin_diffusion.selfplay.checkpoints import remove_checkpoints
from spin_diffusion.selfplay.device import forget_peak_memory, peak_memory
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.one_round import Round, SelfPlay, StepResult
from spin_diffusion.selfplay.opponents import OPPONENTS
from spin_diffusion.selfplay.record import (
    CHOICES,
    ENCODED,
    EVALUATION,
    FINAL,
    SAMPLES,
    SCORES,
    STATES,
    LedgerEntry,
    RoundRecord,
    Share,
    State,
    find_record,
    has_reached,
    made_in,
    replay,
    weights_of,
    write_record,
)
from spin_diffusion.selfplay.sampled import DRAWN_BY, SCORED_BY, cache, choose_opponent, generate
from spin_diffusion.selfplay.tracking import log_phase
from spin_diffusion.selfplay.trained import decide, evaluate, heed, look, mend_copy, train_player
from spin_diffusion.store.hashes import find_damage
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import Damaged, is_shard, remove_files, settle, tell_remade, trouble_of
from spin_diffusion.store.sharing import waited_s

Step = Callable[[Round, RoundRecord], StepResult]
"""A state's function."""
BETWEEN = "between"
"""Among the record's `seconds`: what no step took."""
STEPS_BEFORE_TRAINING: dict[State, Step] = {"OPPONENT": choose_opponent, "GENERATED": generate, "CACHED": cache}
STEPS_FROM_TRAINING_ON: dict[State, Step] = {"TRAINED": train_player, "EVALUATED": evaluate, "PROMOTED": decide}
"""The states after PLANNED and what reaches them; `decide` may end in REJECTED."""


def play(run: SelfPlay) -> list[RoundRecord]:
    """Play all rounds and return their records; a finished run returns at once. The run's folder gets `round-1/`,
    `round-2/`, ... and what the game saves of the last promoted round.

    Raises:
        InputError: the probe warns, and is to stop the run.
    """
    assert run.candidates is None or run.rounds.num_generated == 1, "the configuration checks it"
    records: list[RoundRecord] = []
    promoted: list[Round] = []
    for k in range(1, run.rounds.rounds + 1):
        round_ = Round(run, k, [earlier.k for earlier in promoted])
        record = play_round(round_)
        records.append(record)
        if record["state"] == "PROMOTED":
            promoted.append(round_)
        _remove_weights(run, records, [earlier.k for earlier in promoted])
        if record.get("learnt"):
            tell(f"The run ends with round {k}: {record['rejected_because']}", run.accelerator)
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


class Journal:
    """The record of a round, begun anew or as far as it came before.

    Raises:
        InputError: the round was trained on other data.
    """

    def __init__(self, round_: Round, data_hash: str) -> None:
        self.round = round_
        self.marked = time.perf_counter()
        record = find_record(round_.directory)
        # All have read the record before one of them changes it: otherwise a late one would skip a step
        round_.accelerator.wait_for_everyone()
        if record is not None and record["data_hash"] != data_hash:
            raise InputError(
                f"{round_.directory} was trained on other data (hash {record['data_hash'][:12]}, now "
                f"{data_hash[:12]}): restore {round_.run.data}, or start in another --output_dir"
            )
        self.record: RoundRecord = record or {
            "round": round_.k,
            "parent": round_.parent,
            "data_hash": data_hash,
            "files": {},
            "seconds": {},
            "state": "PLANNED",
        }
        if record is None:
            self._write()
        while damage := self._damage():
            self._go_back(damage)
        if self._visits_too_few():
            self._back_before("GENERATED")

    @property
    def is_finished(self) -> bool:
        """Whether the player was promoted or rejected."""
        return self.record["state"] in FINAL

    def reach(self, state: State, step: Step, phase: str | None = None) -> None:
        """Take a state's step and commit what it has done, with what it took and what lay between it and the one
        before; nothing where the state was committed before.

        Args:
            phase: its name in the ledger, where it is a step within a state; None = the state's.
        """
        if phase is None and has_reached(self.record, state):
            return
        round_, run = self.round, self.round.run
        started, waited, phase = time.perf_counter(), waited_s(), phase or state.lower()
        forget_peak_memory(round_.accelerator.device)
        between = self.record["seconds"].get(BETWEEN, 0.0) + started - self.marked
        result = step(round_, self.record)
        self.marked = time.perf_counter()
        aside = sum(took.seconds for took in result.within.values())
        took = self.marked - started - aside
        shares = _shares(took - (waited_s() - waited), result.worked_on)
        entries = {phase: ledger_entry(run, round_.k, phase, took, shares)}
        for other, looked in result.within.items():
            of_looks = _shares(looked.seconds, looked.samples)
            entries[other] = ledger_entry(run, round_.k, other, looked.seconds, of_looks)
        if len(shares) > 1:
            self.record["shares"] = self.record.get("shares", {}) | {phase: shares}
            for line in stragglers(shares):
                tell(f"{round_.title}, {phase}: {line}", round_.accelerator)
        self.record["seconds"] |= {name: entry["seconds"] for name, entry in entries.items()}
        self.record["seconds"][BETWEEN] = round(between, 3)
        self.record["ledger"] = self.record.get("ledger", {}) | entries
        self.record["files"] |= result.files
        self.record.update(result.fields)
        self.record["state"] = "REJECTED" if result.fields.get("decision") == "rejected" else state
        self._write()
        for name, entry in entries.items():
            log_phase(title_of(round_.objective), round_.k, name, entry, round_.accelerator)
        if run.reached is not None and phase == state.lower() and round_.accelerator.is_main_process:
            run.reached(round_, state)

    def _write(self) -> None:
        if self.round.accelerator.is_main_process:
            write_record(self.round.directory, self.record)
        self.round.accelerator.wait_for_everyone()

    def _damage(self) -> dict[str, str]:
        """What is wrong with the files that are still needed. A trained player needs no samples any more; that they are
        not there, or not as they were, is said."""
        accelerator, of_samples = self.round.accelerator, ("GENERATED", "CACHED")
        damage = find_damage(self._unremoved_files(), self.round.run.output_dir, accelerator)
        is_trained = has_reached(self.record, "TRAINED")
        needed = {name: what for name, what in damage.items() if not (is_trained and made_in(name) in of_samples)}
        if rest := damage.keys() - needed:
            tell(
                f"{self.round.title}: {len(rest)} files such as {min(rest)} are missing or damaged; it is trained and "
                "needs them no more",
                accelerator,
            )
        return needed

    def _unremoved_files(self) -> dict[str, str]:
        """The files that a round still has as they were: a finished one has removed what its samples give again, and
        its evaluation may have been made anew by other scorers."""
        removed = {ENCODED, EVALUATION} if self.is_finished else {EVALUATION}
        weights = weights_of(self.record) if "weights_removed_after" in self.record else set()
        files = self.record["files"].items()
        return {
            name: digest for name, digest in files if name not in weights and not removed & set(Path(name).parent.parts)
        }

    def _go_back(self, damage: dict[str, str]) -> None:
        """Go back to the state before the one that made the first of the damaged files, which makes them anew.

        Raises:
            Damaged: the player of a finished round.
        """
        below, remedy = self.round.run.output_dir, replay(self.round.directory)
        first = min(STATES.index(made_in(name)) for name in damage)
        errors = [Damaged(below / name, what, remedy) for name, what in damage.items()]
        if self.is_finished:
            raise errors[0]
        if self.round.accelerator.is_main_process:
            for error in errors:
                tell_remade(error)
                for path in _resting_on(error.path, below):
                    path.unlink(missing_ok=True)
        self.round.accelerator.wait_for_everyone()
        self._back_before(STATES[first])

    def _visits_too_few(self) -> bool:
        """Whether the round would now visit more pairs than it has drawn for, as its batches have become larger."""
        ready = has_reached(self.record, "GENERATED") and not has_reached(self.record, "TRAINED")
        return ready and "visits" in self.record and self.record["visits"] < self.round.visits()

    def _back_before(self, state: State) -> None:
        """Forget a state and those after it."""
        first = STATES.index(state)
        files = self.record["files"].items()
        self.record["files"] = {name: digest for name, digest in files if STATES.index(made_in(name)) < first}
        self.record["state"] = STATES[first - 1]
        self._write()


def _resting_on(path: Path, below: Path) -> list[Path]:
    """A damaged file of a run, and what was made of it where it holds samples: files of the same shard."""
    if made_in(path.relative_to(below).as_posix()) != "GENERATED":
        return [path]
    folder = path.parent.parent
    names = (SAMPLES, CHOICES, ENCODED, f"{SCORES}/real", f"{SCORES}/generated")
    return [made for name in names for made in (folder / name).glob(f"{path.stem}.*")]


def _shares(seconds: float, samples: int | None) -> list[Share]:
    """What every process did of a phase.

    Args:
        seconds: that this one worked.
        samples: that it worked on; what a killed run had done before is not among them. None = nobody counted them.
    """
    share: Share = {"seconds": round(seconds, 3), "samples": samples}
    return gather_object([share])


LONG_ENOUGH_S = 60.0
"""Work of so long shows a process's pace."""


def stragglers(shares: list[Share]) -> list[str]:
    """A line for each process that worked at less than two thirds of the pace of half of them."""
    paces = {
        process: share["samples"] / share["seconds"]
        for process, share in enumerate(shares)
        if share["samples"] and share["seconds"] > 0
    }
    usual = median(paces.values()) if paces else 0.0
    return [
        f"process {process} of {len(shares)} is slow, at {pace:.2g} samples a second where half of them do {usual:.2g} "
        "or more"
        for process, pace in paces.items()
        if shares[process]["seconds"] >= LONG_ENOUGH_S and pace < 2 / 3 * usual
    ]


def ledger_entry(run: SelfPlay, k: int, phase: str, seconds: float, shares: list[Share]) -> LedgerEntry:
    """The ledger's entry of a phase that took so many seconds."""
    accelerator, costs = run.accelerator, run.costs
    counted = [share["samples"] for share in shares if share["samples"] is not None]
    samples = sum(counted) if counted else None
    flops = costs.flops(k, phase, samples) if costs is not None and samples else None
    rate = None if costs is None or flops is None or not costs.matrix_rate else flops / seconds / costs.matrix_rate
    return {
        "seconds": round(seconds, 3),
        "samples": samples,
        "samples_per_second": samples / seconds if samples else None,
        "flops": flops,
        "matrix_share": None if rate is None else rate / accelerator.num_processes,
        "peak_memory_bytes": peak_memory(accelerator.device),
        "disk_bytes": bytes_in(run.run_dir or run.output_dir) if accelerator.is_main_process else None,
    }


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder and below it."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another process may have renamed it since
                found += (Path(parent) / name).lstat().st_size
    return found


def _ask_probe(round_: Round, journal: Journal) -> None:
    """Let the probe look at the samples, once in a round."""
    probe = round_.run.probe
    if probe is None or probe.samples == 0 or round_.source != "opponent":
        return
    if "shortcut" not in journal.record:
        journal.reach("CACHED", lambda round_, record: look(round_, probe), "probed")
    heed(round_, probe, journal.record)


def _remove_weights(run: SelfPlay, records: list[RoundRecord], promoted: list[int]) -> None:
    """Remove the players of all rounds so far but those of the last --keep_rounds and those that the next one plays
    with; the record of each says so before its files go."""
    if run.rounds.keep_rounds is None:
        return
    needed = {*promoted[-1:], *OPPONENTS[run.rounds.opponent](promoted)}
    for record in records[: -run.rounds.keep_rounds]:
        if record["round"] in needed:
            continue
        directory, is_new = run.output_dir / f"round-{record['round']}", "weights_removed_after" not in record
        record.setdefault("weights_removed_after", len(records))
        if run.accelerator.is_main_process:
            if is_new:
                write_record(directory, record)
            inside = {name.removeprefix(f"{directory.name}/") for name in weights_of(record)}
            remove_files(directory, inside.__contains__)
    run.accelerator.wait_for_everyone()


def _clean(round_: Round) -> None:
    """Remove what a finished round does not need: encodings, which the samples give again, and checkpoints."""
    if round_.accelerator.is_main_process:
        for samples in round_.sets:
            for name in (ENCODED, DRAWN_BY, SCORED_BY):
                remove_files(samples.folder / name, is_shard)
        remove_checkpoints(round_.directory)
    round_.accelerator.wait_for_everyone()
