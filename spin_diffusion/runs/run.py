"""A run of any kind from its settings to the upload of its model, and the plan of one.

check -> open the base -> take the folder -> prepare the data -> play the rounds and their rivals -> card, upload
"""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator

from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.runs.advice import advice
from spin_diffusion.runs.continuing import start_of
from spin_diffusion.runs.evaluator import RunReporter
from spin_diffusion.runs.live import Stage, guessed_paces, stages_of, status_line, time_left
from spin_diffusion.runs.plateau import gains
from spin_diffusion.runs.publish import Card, push_to_hub, write_card
from spin_diffusion.runs.start import (
    LOGS,
    check_run_folder,
    check_training,
    make_accelerator,
    quiet_libraries,
    round_lines,
    start,
    take_run_folder,
    write_manifest,
)
from spin_diffusion.samples.candidates import Candidates
from spin_diffusion.samples.real import DataManifest
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.looks import Judge, Preview
from spin_diffusion.selfplay.objectives import options_for
from spin_diffusion.selfplay.one_round import Costs, Judgement, Probe, Round
from spin_diffusion.selfplay.record import RoundRecord, State
from spin_diffusion.selfplay.round_settings import RoundSettings
from spin_diffusion.selfplay.rounds import SelfPlay, play
from spin_diffusion.selfplay.tracking import start_trackers
from spin_diffusion.selfplay.train_settings import check_batch
from spin_diffusion.store.files import read_json, write_json
from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.progress import Bars, Progress, tell


class Run(ABC):
    """A run of one kind: what each does in its own way, in the order of the calls."""

    program: ClassVar[str]
    """What the run's folder is marked as."""
    config: RunConfig
    game: Game
    """The two models that play; there from `open` on."""
    candidates: Candidates | None = None
    """How generated samples are chosen among several; None = each is taken."""
    probe: Probe | None = None
    """What looks for shortcuts before a round is trained; None = nothing does."""
    held_out: Path | None = None
    """Folder of the real samples that are never trained on."""
    judge: Judge | None = None
    """Who judges the steps of a round, where it is not the gap; there once `evaluator` was asked for."""
    each_from_base = False
    """Whether every round starts from the base: no player is promoted, and none is evaluated."""
    preview: Preview | None = None
    """Who draws previews; there once `evaluator` was asked for."""

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.config.run.output_dir)

    @abstractmethod
    def fine_tuning(self) -> "Run":
        """A run of the same kind that fine-tunes the base at several rates, by `plateau.fine_tuning`."""

    @abstractmethod
    def check(self) -> None:
        """Raises InputError for what can be refused at once."""

    def launch(self, accelerator: Accelerator) -> dict[str, str]:
        """Print what the settings warn of; versions of packages that this run needs beside the usual ones.

        Raises:
            InputError: the opponent cannot draw in the processes at hand.
        """
        return {}

    @abstractmethod
    def open(self, accelerator: Accelerator) -> None:
        """Load the base. Raises InputError when it cannot be trained as it is asked to."""

    @abstractmethod
    def plan(self, progress: Progress) -> list[str]:
        """Write `plan.json`; the plan for people, in lines."""

    @abstractmethod
    def prepare(self, progress: Progress) -> DataManifest:
        """The manifest of the real samples below the run's folder; what was left out of them is printed."""

    @abstractmethod
    def base(self) -> Mapping[str, object]:
        """What the run was started from."""

    @abstractmethod
    def header(self, data: DataManifest) -> str:
        """What the run plays with, in lines."""

    @abstractmethod
    def ready(self, pairs: int, progress: Progress) -> None:
        """Make ready for rounds of so many pairs."""

    @abstractmethod
    def evaluator(self, progress: Progress) -> RunReporter:
        """What tells of the run, and evaluates the base, the rounds and the rivals where that is asked for."""

    def costs(self, pairs: int) -> Callable[[RoundSettings], Costs] | None:
        """For the ledgers: rounds of so many pairs -> what their phases take. None = that is not counted."""
        return None

    @abstractmethod
    def card(self, rows: int) -> Card:
        """What the model card says of the model."""

    @abstractmethod
    def loading_code(self) -> tuple[Path, str]:
        """The folder of the last promoted player, and lines of Python that load it, from wherever they run."""


def play_run(run: Run) -> list[RoundRecord]:
    """Play all rounds and return their records.

    Raises:
        InputError: anything the user gave that cannot be used; nothing that exists is touched.
    """
    config, output_dir = run.config, run.output_dir
    check_run_folder(config, output_dir, run.program)
    run.check()
    accelerator = start(config, output_dir, run.program)
    versions = run.launch(accelerator)
    run.open(accelerator)
    check_training(config, run.game.player, accelerator)
    base = run.base()
    take_run_folder(config, output_dir, run.program, base, accelerator)
    progress = Bars() if accelerator.is_main_process else Progress()

    data = run.prepare(progress)
    rows, pairs = data["rows"], data["rows"] // config.rounds.real_parts
    check_batch(pairs, config.training, accelerator.num_processes)  # now, not after a night of drawing
    write_manifest(output_dir, base, data, config, accelerator, versions)
    of_rounds = [*round_lines(config, rows, accelerator), *advice(config, rows, run.game, accelerator.num_processes)]
    header = run.header(data) + "\n".join(of_rounds)
    tell(header, accelerator)

    run.ready(pairs, progress)
    _open_trackers(config, output_dir, accelerator)
    evaluator = run.evaluator(progress)
    evaluator.header = header
    records = _play_with_rivals(run, evaluator, pairs, accelerator, progress)
    accelerator.end_training()
    if accelerator.is_main_process:
        path = output_dir / "manifest.json"
        write_json(path, read_json(path) | {"rounds": lineage(records)}, sealed=True)
        card = run.card(rows)
        evaluator.tell()
        write_card(output_dir, config, card)
        _print_loading(run, records)
        if config.run.push_to_hub:
            print(f"Uploaded to {push_to_hub(output_dir, config, card)}")
    return records


def plan_run(run: Run) -> None:
    """Say what a run will take, before it is started.

    Raises:
        InputError: as `play_run`; a batch that does not fit in memory.
    """
    config, output_dir = run.config, run.output_dir
    check_run_folder(config, output_dir, run.program)
    run.check()
    quiet_libraries()
    accelerator = make_accelerator(config.training.mixed_precision)
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    run.open(accelerator)
    check_training(config, run.game.player, accelerator)
    if accelerator.is_main_process:
        take_folder(output_dir, run.program)
    tell("\n".join(run.plan(Bars() if accelerator.is_main_process else Progress())), accelerator)


def plateau_run(run: Run) -> None:
    """Say whether fine-tuning still gains on the base. Raises as `play_run`."""
    asked = run.fine_tuning()
    asked.each_from_base = True
    records = play_run(asked)
    tell("\n".join(gains(asked.config, records)), asked.game.accelerator)


def _play_with_rivals(
    run: Run,
    evaluator: RunReporter,
    pairs: int,
    accelerator: Accelerator,
    progress: Progress,
) -> list[RoundRecord]:
    """The rounds, then the same with each objective that they are compared with; the records of the rounds."""
    config, output_dir = run.config, run.output_dir
    records: list[RoundRecord] = []
    evaluates, costs = evaluator.evaluates and not run.each_from_base, run.costs(pairs)
    base = _evaluate_base(evaluator, output_dir)
    costs_of_run = costs(config.rounds) if costs is not None else None

    def tell_left(title: str, where: Path, state: State) -> None:
        stages = base + stages_of(config, output_dir, pairs, accelerator.num_processes, evaluates)
        for stage in stages:
            if (stage.where, stage.state) == (where, state) and stage.amount:
                guessed = guessed_paces(config, pairs, accelerator.num_processes, costs_of_run)
                evaluator.so_far = status_line(title, stage, time_left(stages, guessed))
                tell(evaluator.so_far, accelerator)

    def reached(round_: Round, state: State) -> None:
        tell_left(round_.title, round_.directory, state)
        evaluator.refresh()

    tell_left("base", output_dir / "base", "EVALUATED")

    of_rounds = _set_aside if run.each_from_base else evaluator.of_rounds()
    for rival in (None, *config.rivals):
        rounds, folder = config.rounds, output_dir
        if rival is not None:
            tell(f"For comparison: {rival}, with the same base, data and steps", accelerator)
            options, folder = options_for(rival, rounds.objective_options), output_dir / f"compare-{rival}"
            rounds = dataclasses.replace(rounds, objective=rival, objective_options=options)
        played = play(
            SelfPlay(
                run.game,
                output_dir / "data",
                folder,
                rounds,
                config.training,
                accelerator,
                of_rounds if rival is None else evaluator.of_rival(rival),
                progress,
                run.held_out,
                run.candidates,
                run.probe if rival is None else None,
                costs(rounds) if costs is not None else None,
                run.judge,
                run.preview if rival is None else None,
                reached=reached,
                run_dir=output_dir,
                start=start_of(output_dir),
            )
        )
        records = records or played
    return records


def _evaluate_base(evaluator: RunReporter, output_dir: Path) -> list[Stage]:
    """Evaluate the base; how long that took, where no round can tell how long an evaluation takes."""
    begun, started = (output_dir / "round-1").exists(), time.perf_counter()
    evaluator.base()
    if begun or not evaluator.evaluates:
        return []
    return [Stage(output_dir / "base", "EVALUATED", 1, time.perf_counter() - started)]


def _set_aside(k: int, folder: Path, parent: int) -> Judgement:
    """The judgement of a player after whom the next round starts from the base again."""
    return Judgement({}, False, "every round starts from the base")


def lineage(records: list[RoundRecord]) -> list[dict[str, object]]:
    """For the manifest: whose player each round went on with, which selves drew how many of its samples, and which
    ones anchored its scores."""
    return [
        {
            "round": record["round"],
            "started_from": record["parent"],
            "opponent": record["opponent"],
            "drawn": record.get("drawn", {}),
            "decision": record["decision"] if record["state"] == "PROMOTED" else record["rejected_because"],
        }
        for record in records
    ]


def _open_trackers(config: RunConfig, output_dir: Path, accelerator: Accelerator) -> None:
    """The trackers of --report_to, with the settings that they can show."""
    shown = {key: value for key, value in config.flat().items() if isinstance(value, int | float | str | bool)}
    logs = output_dir / LOGS
    start_trackers(config.run.tracker_project_name, shown, output_dir, logs, accelerator)


def _print_loading(run: Run, records: list[RoundRecord]) -> None:
    """Print where the last promoted player is, and how a user loads it."""
    promoted = [record["round"] for record in records if record["state"] == "PROMOTED"]
    if not promoted:
        tell("No round was promoted: the base stands, and there is nothing to load")
        return
    folder, code = run.loading_code()
    tell(f"The player of round {promoted[-1]} is in {folder}; load it with")
    print("\n".join(f"  {line}" for line in code.splitlines() if line))
