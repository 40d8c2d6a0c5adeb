"""A round's record as it is written: one commit for each state, and back where files of a state are damaged."""

import time
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list

from spin_diffusion.selfplay.ledger import Stopwatch, everywhere
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.one_round import Round, StepResult
from spin_diffusion.selfplay.record import (
    CHOICES,
    ENCODED,
    EVALUATION,
    FINAL,
    KEPT,
    SAMPLES,
    SCORES,
    STATES,
    RoundRecord,
    State,
    find_record,
    has_reached,
    made_in,
    replay,
    write_record,
)
from spin_diffusion.selfplay.tracking import log_phase
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import Damaged, find_damage, tell_remade

Step = Callable[[Round, RoundRecord], StepResult]
"""A state's function."""
BETWEEN = "between"
"""Among the record's `seconds`: what no step took."""


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
        stopwatch, started, phase = Stopwatch(round_.accelerator), time.perf_counter(), phase or state.lower()
        between = self.record["seconds"].get(BETWEEN, 0.0) + started - self.marked
        result = step(round_, self.record)
        self.marked = time.perf_counter()
        seconds = self.marked - started
        samples = None if result.worked_on is None else everywhere(result.worked_on, round_.accelerator)
        flops = run.costs.flops(round_.k, phase, samples) if run.costs is not None and samples else None
        rate = run.costs.matrix_rate if run.costs is not None else None
        entry = stopwatch.entry(seconds, samples, flops, rate, run.run_dir or run.output_dir)
        self.record["seconds"] |= {phase: entry["seconds"], BETWEEN: round(between, 3)}
        self.record["ledger"] = self.record.get("ledger", {}) | {phase: entry}
        self.record["files"] |= result.files
        self.record.update(result.fields)
        self.record["state"] = "REJECTED" if result.fields.get("decision") == "rejected" else state
        self._write()
        log_phase(title_of(round_.objective), round_.k, phase, entry, round_.accelerator)

    def _write(self) -> None:
        if self.round.accelerator.is_main_process:
            write_record(self.round.directory, self.record)
        self.round.accelerator.wait_for_everyone()

    def _damage(self) -> dict[str, str]:
        """What is wrong with the files that are still needed. A trained player needs no samples any more; that they are
        not there, or not as they were, is said."""
        needed: dict[str, str] = {}
        if self.round.accelerator.is_main_process:
            is_trained = has_reached(self.record, "TRAINED")
            damage = find_damage(self._unremoved_files(), self.round.run.output_dir)
            needed = {
                name: what
                for name, what in damage.items()
                if not is_trained or made_in(name) not in ("GENERATED", "CACHED")
            }
            if rest := damage.keys() - needed:
                tell(
                    f"{self.round.title}: {len(rest)} files such as {min(rest)} are missing or damaged; it is trained "
                    "and needs them no more"
                )
        return broadcast_object_list([needed])[0]

    def _unremoved_files(self) -> dict[str, str]:
        """The files that a round still has as they were: a finished one has removed what its samples give again, and
        its evaluation may have been made anew by other scorers."""
        removed = {ENCODED, KEPT, EVALUATION} if self.is_finished else {EVALUATION}
        files = self.record["files"].items()
        return {name: digest for name, digest in files if not removed & set(Path(name).parent.parts)}

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
        files = self.record["files"].items()
        self.record["files"] = {name: digest for name, digest in files if STATES.index(made_in(name)) < first}
        self.record["state"] = STATES[first - 1]
        self._write()


def _resting_on(path: Path, below: Path) -> list[Path]:
    """A damaged file of a run, and what was made of it where it holds samples: files of the same shard."""
    if made_in(path.relative_to(below).as_posix()) != "GENERATED":
        return [path]
    folder = path.parent.parent
    names = (SAMPLES, KEPT, CHOICES, ENCODED, f"{SCORES}/real", f"{SCORES}/generated")
    return [made for name in names for made in (folder / name).glob(f"{path.stem}.*")]
