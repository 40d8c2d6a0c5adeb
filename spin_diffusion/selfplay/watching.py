"""Looks at the player while it is trained: a judge, by whom the best step of a round is found, and previews.

A look changes nothing: training goes on with the same weights and random states as without it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from spin_diffusion.selfplay.checkpoints import AVERAGE, commit_listed, first_whole
from spin_diffusion.selfplay.looks import Judge, Took, Watch, preview_steps, step_name
from spin_diffusion.selfplay.record import BEST, JUDGED, PREVIEWS, Better, SelectionState, StepValue
from spin_diffusion.selfplay.trainee import Average, Trainee, load_weights, save_weights
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import AGAIN, Damaged, part_of


def gain(entry: StepValue, better: Better) -> float:
    """How much better than the start a step is, whichever change is the better one; the step was judged."""
    mean = entry["mean"] or 0.0
    return mean if better == "higher" else -mean


def best_of(curve: Sequence[StepValue], better: Better) -> StepValue | None:
    """The first of the best steps after the start; None where there is none whose samples are all whole."""
    found = [entry for entry in curve if entry["step"] > 0 and entry["mean"] is not None]
    return max(found, key=lambda entry: gain(entry, better), default=None)


class Selection:
    """The judgements of a round so far, and the best player, kept in the round's folder.

    Args:
        average: the opponent's moving average, which is kept with the player.
        before: what the checkpoint holds that training goes on from; None = there is none.
    """

    def __init__(
        self, directory: Path, trainee: Trainee, average: Average | None, judge: Judge, before: SelectionState | None
    ) -> None:
        self.directory, self.trainee, self.average, self.judge = directory, trainee, average, judge
        self.state = before or SelectionState(key=judge.key, start=[], curve=[])
        if self.state["key"] != judge.key:
            raise InputError(
                f"{directory}: its steps so far were judged by another {judge.name} ({self.state['key']}, now "
                f"{judge.key}): restore it, or delete the checkpoints of the round, which then is trained anew"
            )

    def look(self, step: int) -> int:
        """Judge the player, which is whole, and keep it where it is the best so far; the samples worked on here."""
        judged = self.judge.judge(self.directory / JUDGED / step_name(step))
        if step == 0:
            self.state["start"] = list(judged.values)
        found = self.judge.change(judged.values, self.state["start"], judged.prompts)
        entry: StepValue = {"step": step, "mean": None, "low": None, "high": None}
        if found is not None:
            entry = {"step": step, "mean": found["mean"], "low": found["low"], "high": found["high"]}
        self.state["curve"].append(entry)
        if best_of(self.state["curve"], self.judge.better) is entry:
            self._keep()
        return judged.worked_on

    def _keep(self) -> None:
        game, target = self.trainee.game, self.directory / BEST
        game.save(part_of(target), prove=False)
        if self.trainee.accelerator.is_main_process:
            if self.average is not None:
                save_weights(self.average.weights, part_of(target) / AVERAGE)
            commit_listed(part_of(target), target)
        self.trainee.accelerator.wait_for_everyone()

    def put_back(self, until: int) -> int | None:
        """Make the best player the game's, with the average as it was then, once training is over; its step.

        Args:
            until: the last step that counts; where the best one comes later the player stays as it is, and None is
                returned.

        Raises:
            Damaged: it is not as it was written.
        """
        best, source = best_of(self.state["curve"], self.judge.better), self.directory / BEST
        if best is None or best["step"] > until:
            return None
        accelerator = self.trainee.accelerator
        if first_whole([source], accelerator) is None:
            raise Damaged(source, "the best player so far is not whole", AGAIN)
        self.trainee.game.restore(source)
        if self.average is not None:
            self.average.weights = load_weights(source / AVERAGE, accelerator)
        accelerator.wait_for_everyone()
        return best["step"]


class Looks:
    """What is due after a step.

    Args:
        name: of the round, for trackers.
        steps: of the round.
        select_every: optimizer steps from one judgement to the next.
    """

    def __init__(
        self,
        watch: Watch,
        directory: Path,
        trainee: Trainee,
        name: str,
        steps: int,
        select_every: int,
        selection: Selection | None,
    ) -> None:
        self.trainee, self.took = trainee, watch.took
        self.looks: dict[str, tuple[Collection[int], Callable[[int], int]]] = {}
        if selection is not None:
            self.looks[JUDGED] = (range(0, steps + 1, select_every), selection.look)
        if (preview := watch.preview) is not None:
            self.looks["previewed"] = (
                preview_steps(preview.every, steps),
                lambda step: preview.draw(directory / PREVIEWS / step_name(step), name, step),
            )

    def after(self, step: int, is_last: bool = False) -> None:
        """Look at the player after so many steps; the last one is judged in any case."""
        for phase, (due, look) in self.looks.items():
            if step in due or is_last and phase == JUDGED:
                started, took = time.perf_counter(), self.took.setdefault(phase, Took())
                with self.trainee.shown():
                    took.samples += look(step)
                took.seconds += time.perf_counter() - started
