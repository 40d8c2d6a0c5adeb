"""What a round leaves behind while it is trained: checkpoints to resume from, snapshots to go back to. A checkpoint
holds the best player so far as well (`watching`).

Each appears whole or not at all, and a checkpoint is read only if every byte of it is as it was written.
"""

import json
import shutil
from pathlib import Path
from typing import Any, TypedDict

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from spin_diffusion.selfplay import health
from spin_diffusion.selfplay.record import BEST, SelectionState, replay
from spin_diffusion.selfplay.trainee import Average, Trainee, load_weights, save_weights
from spin_diffusion.store.files import read_json
from spin_diffusion.store.hashes import file_hashes, verify_hashes
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import Damaged, commit, make_folder, part_of, remove_files, writing

CHECKPOINT, HEALTHY = "checkpoint-", "healthy"
AVERAGE = "average.safetensors"
KEPT = 2
"""Checkpoints of a round in training: the newest, and one to go on from should its bytes be damaged."""
_EMA, _HASHES, _TRAINER = "ema.safetensors", "hashes.json", "trainer.json"


class _State(TypedDict):
    """What trainer.json holds."""

    step: int
    kind: str
    global_batch: int
    lr: float
    ema_steps: int
    history: list[Any]
    """As `health.History`; not looked into, since under fp16 a gradient's norm may be infinite."""
    selection: SelectionState | None


class Checkpoints:
    """A round's checkpoints.

    Args:
        average: the opponent's moving average, which a checkpoint holds as well.
        global_batch: pairs in each optimizer step, which a resumed run must keep.
    """

    def __init__(self, directory: Path, trainee: Trainee, average: Average | None, global_batch: int) -> None:
        self.directory, self.trainee, self.average = directory, trainee, average
        self.global_batch = global_batch
        self.game, self.accelerator = trainee.game, trainee.accelerator

    def save(self, step: int, history: health.History, selection: SelectionState | None) -> None:
        """Write checkpoint `step` with log and judgements as they are by now, in place of the oldest."""
        path, main, ema = self.directory / f"{CHECKPOINT}{step}", self.accelerator.is_main_process, self.trainee.ema
        part = part_of(path)
        if main:
            make_folder(part)
        self.accelerator.wait_for_everyone()
        with writing(path):
            self.trainee.save(part)
            self.accelerator.wait_for_everyone()
            if main:
                if self.average is not None:
                    save_weights(self.average.weights, part / AVERAGE)
                if _has_best(selection):
                    shutil.copytree(self.directory / BEST, part / BEST, dirs_exist_ok=True)
                state = {
                    "step": step,
                    "kind": self.trainee.kind,
                    "global_batch": self.global_batch,
                    "lr": self.trainee.optimizer.param_groups[0]["lr"],
                    "ema_steps": ema.optimization_step if ema is not None else 0,
                    "history": history,
                    "selection": selection,
                }
                (part / _TRAINER).write_text(json.dumps(state))
                commit_listed(part, path)
        if main:
            others = [old for old in _checkpoints(self.directory) if old != path]
            for old in others[: 1 - KEPT]:
                _remove(old)
        self.accelerator.wait_for_everyone()

    def load(self, wanted: str) -> tuple[int, health.History, SelectionState | None]:
        """Take up the wanted checkpoint, if there is one: its step (or 0), log and judgements.

        Where the newest is wanted and is not what was written, the one before it is taken, which is said.
        """
        path = first_whole(_wanted_checkpoints(self.directory, wanted), self.accelerator, stop=wanted != "latest")
        if path is None:
            return 0, [], None
        state = read_json(path / _TRAINER, _State)
        if state["global_batch"] != self.global_batch:
            raise InputError(
                f"{path} was made with {state['global_batch']} pairs in each optimizer step, this run has "
                f"{self.global_batch}: change --train_batch_size, --gradient_accumulation_steps or the number of "
                "processes to keep their product"
            )
        if state["kind"] != self.trainee.kind:
            raise InputError(
                f"{path} holds the player {state['kind']}, this run trains it {self.trainee.kind}: launch it as "
                f"before until the round is done, or delete all {CHECKPOINT}* in {self.directory}"
            )
        if self.accelerator.is_main_process and _has_best(state["selection"]):
            shutil.copytree(path / BEST, part_of(self.directory / BEST), dirs_exist_ok=True)
            commit(self.directory / BEST)
        self.accelerator.wait_for_everyone()
        self.trainee.load(path)
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = state["lr"]
        if self.trainee.ema is not None:
            self.trainee.ema.optimization_step = state["ema_steps"]
        if self.average is not None:
            self.average.weights = load_weights(path / AVERAGE, self.accelerator)
        tell(f"Resuming from {path.parent.name}/{path.name}", self.accelerator)
        return state["step"], state["history"], state["selection"]


class Snapshots:
    """The player at the last two multiples of the rules' window, to go back to what no rule has looked at yet."""

    def __init__(self, directory: Path, trainee: Trainee, average: Average | None) -> None:
        self.folder, self.trainee, self.average = directory / HEALTHY, trainee, average
        self.game, self.accelerator = trainee.game, trainee.accelerator

    def take(self, step: int) -> None:
        """Keep the player as it is before this step, in place of the one of three windows ago."""
        target, ema = self.folder / str(step), self.trainee.ema
        part = part_of(target)
        if not target.is_dir():
            self.trainee.gather()
            self.game.save(part, prove=False)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                if ema is not None:
                    save_weights(ema.shadow_params, part / _EMA)
                if self.average is not None:
                    save_weights(self.average.weights, part / AVERAGE)
                commit_listed(part, target)
        if self.accelerator.is_main_process:
            for old in self._steps():
                if 0 < old <= step - 3 * health.WINDOW_STEPS:
                    _remove(self.folder / str(old))
        self.accelerator.wait_for_everyone()

    def go_back(self, before: int) -> int:
        """Put the newest whole player of at most this step back, or the round's first; its step.

        Raises:
            Damaged: none of them is as it was written.
        """
        earlier = [self.folder / str(step) for step in self._steps() if step <= max(before, 0)]
        source, ema = first_whole(earlier[::-1], self.accelerator), self.trainee.ema
        if source is None:
            raise Damaged(self.folder / "0", "no snapshot to go back to is whole", replay(self.folder.parent))
        self.game.restore(source)
        self.trainee.scatter()
        if ema is not None:
            ema.shadow_params = load_weights(source / _EMA, self.accelerator)
        if self.average is not None:
            self.average.weights = load_weights(source / AVERAGE, self.accelerator)
        self.accelerator.wait_for_everyone()
        return int(source.name)

    def _steps(self) -> list[int]:
        found = self.folder.iterdir() if self.folder.is_dir() else []
        return sorted(int(path.name) for path in found if path.name.isdigit())


def _has_best(selection: SelectionState | None) -> bool:
    """Whether a best player was kept so far, which a checkpoint holds a copy of: later steps replace it."""
    curve = selection["curve"] if selection is not None else []
    return any(entry["step"] > 0 and entry["mean"] is not None for entry in curve)


def _checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in directory.glob(f"{CHECKPOINT}*") if p.name.removeprefix(CHECKPOINT).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def _wanted_checkpoints(directory: Path, wanted: str) -> list[Path]:
    """Those that may be taken up, the best first."""
    found = _checkpoints(directory)
    if wanted == "latest":
        return found[::-1]
    named = [path for path in found if path.name == Path(wanted).name]
    if found and not named:
        raise InputError(
            f"--resume_from_checkpoint {wanted}: {directory} has {', '.join(path.name for path in found)}; "
            "give one of these, or latest"
        )
    return named


def first_whole(folders: list[Path], accelerator: Accelerator, stop: bool = False) -> Path | None:
    """The first of the folders of which every byte is as it was written; all processes take the one that the main one
    finds. Those that are not are said.

    Args:
        stop: raise Damaged instead.
    """
    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        for path in folders:
            try:
                listed = read_json(path / _HASHES, dict[str, str], _ANOTHER)
                if not listed:
                    raise Damaged(path / _HASHES, "it lists no files", _ANOTHER)
                verify_hashes(listed, path, _ANOTHER)
                found = [path]
                break
            except Damaged as error:
                if stop:
                    raise
                tell(f"{str(error).rpartition(': ')[0]}: the round goes on from what it kept before, or from its start")
    return broadcast_object_list(found)[0]


_ANOTHER = "give another --resume_from_checkpoint, or latest"


def remove_checkpoints(directory: Path) -> None:
    """Delete a round's checkpoints, snapshots and best player, which are of no use once its player is saved."""
    snapshots = directory / HEALTHY
    for path in [*_checkpoints(directory), directory / BEST, *(snapshots.iterdir() if snapshots.is_dir() else [])]:
        _remove(path)
    remove_files(snapshots, lambda name: False)


def commit_listed(part: Path, path: Path) -> None:
    """Commit a folder with the hashes of its files in it, by which they are known when they are removed."""
    (part / _HASHES).unlink(missing_ok=True)  # of an attempt that ended before the commit: it does not list itself
    (part / _HASHES).write_text(json.dumps(file_hashes([part], part), indent=2))
    commit(path)


def _remove(folder: Path) -> None:
    """Delete the files that a folder lists as written, and folders that are empty then; without a list that can be read
    no file."""
    try:
        listed = read_json(folder / _HASHES)
    except (InputError, OSError):
        listed = None
    ours = set(listed) if isinstance(listed, dict) else set()
    remove_files(folder, lambda name: name in ours)
    remove_files(folder, lambda name: name == _HASHES and listed is not None)  # last: what a kill leaves is known
