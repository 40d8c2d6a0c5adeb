"""What a run of any kind tells of itself, and its evaluations: base, rounds and rivals by the same code; table, page,
curves, promotion."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from accelerate import Accelerator

from spin_diffusion.evaluation.evaluated import EvaluatedModel, scorer_record
from spin_diffusion.evaluation.features import Comparison, embed
from spin_diffusion.evaluation.judges import LogLikelihood
from spin_diffusion.evaluation.records import (
    ANSWERS,
    MeasureEntry,
    OfTraining,
    Protocol,
    Results,
    ScorerRecord,
    guidance_scales,
    modality_of,
    read_results,
)
from spin_diffusion.evaluation.report import write_report, write_run_page
from spin_diffusion.evaluation.results import conclude, training_entries
from spin_diffusion.evaluation.scoring import SampleFolder, are_scored, score_samples
from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.evaluation.tables import closing_lines, metrics_of, print_table
from spin_diffusion.evaluation.verdicts import promotion
from spin_diffusion.runs.page import page_of, rival_name, round_name, run_folders
from spin_diffusion.samples.drawn import Shards, are_drawn, claim, draw_samples
from spin_diffusion.samples.pairs import Column
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.one_round import Evaluate, Judgement
from spin_diffusion.selfplay.record import EVALUATION, check_weights, find_record, has_reached, read_record
from spin_diffusion.store.files import Tell, read_if_whole, write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress, tell

PAGE_SHARE = 0.05
"""The most of the time that goes into writing the page anew while rounds are played."""


class _Model(TypedDict):
    """model.json: the fields of an EvaluatedModel without its folder."""

    name: str
    role: str
    round_: int | None


class EvaluationSamples:
    """What every model of a run is asked for, pictures or answers, and what is told of them.

    Attributes:
        specs: NAME[=PATH] of what scores the samples.
        protocol: how they are drawn.
        progress: told how far drawing and scoring are.
        shards: the files of a model's samples, drawn by the present player where they are missing.
    """

    headline_scale: float | None = None
    """Guidance scale of the verdict at the top of the page."""
    in_domain: Sequence[str] = ()
    """Scorers that chose what was trained on."""
    real: Comparison | None = None
    """The real pictures that the models' are compared with."""
    shares_prompts = False
    """Whether prompts of training are asked on purpose, so that nobody needs to be warned of them."""
    log_likelihood: LogLikelihood | None = None
    """The present player's, where judges may ask it."""

    def __init__(
        self,
        specs: Sequence[str],
        protocol: Protocol,
        progress: Progress,
        shards: Callable[[EvaluatedModel], Shards],
    ) -> None:
        self.specs, self.protocol, self.progress, self.shards = specs, protocol, progress, shards

    def place(self, folder: Path) -> SampleFolder:
        """Where samples and scores lie in the folder of an evaluation."""
        of_answers = modality_of(self.protocol) is ANSWERS
        return SampleFolder(folder / ("answers" if of_answers else "images"), folder / "scores", of_answers)

    def measure(self, model: EvaluatedModel) -> None:
        """Whatever else only the present player can say; what is there already stays."""

    def is_measured(self, model: EvaluatedModel) -> bool:
        """Whether nothing is missing that only the model can say."""
        return True

    def measures(self, models: list[EvaluatedModel]) -> list[MeasureEntry]:
        """What else was measured of the models, for the page."""
        return []

    def show(self, title: str, folder: Path) -> None:
        """Samples to the trackers; main process only."""

    def finish(self, models: list[EvaluatedModel]) -> None:
        """What is made of the samples of all models in the end; main process only."""


def _place_of(model: EvaluatedModel) -> Path:
    """The folder of a model's evaluation."""
    return model.folder.scores.parent


class RunReporter:
    """Tells of a run that evaluates nothing: of its training alone.

    Attributes:
        header: what the run plays with, in lines, each with a name at its start or indented.
        so_far: how far the run is, in a line.
    """

    evaluates = False
    """Whether the models are evaluated."""
    header, so_far = "", "It has just begun."

    def __init__(self, config: RunConfig, accelerator: Accelerator, of_answers: bool) -> None:
        """Args: of_answers: whether a language model is trained."""
        self.config, self.accelerator, self.of_answers = config, accelerator, of_answers
        self.output_dir = Path(config.run.output_dir)
        self.title = f"Self-play run {self.output_dir.name}"
        self._page_due = 0.0

    def base(self) -> None:
        """What there is to tell before the first round."""
        self.refresh()

    def of_rounds(self) -> Evaluate | None:
        """The evaluation of the run's own rounds; None = they are not evaluated."""
        return None

    def of_rival(self, objective: str) -> Evaluate | None:
        """The evaluation of a rival's rounds; None = they are not evaluated."""
        return None

    def refresh(self) -> None:
        """Write the page anew, by the main process, where that takes no more than PAGE_SHARE of the time."""
        if self.accelerator.is_main_process and time.monotonic() >= self._page_due:
            self._renew_page()

    def tell(self) -> None:
        """Finish the page and print what there is to say in the end; main process only."""
        self.so_far = "It is over."
        self._renew_page()
        print(f"Report: {self.output_dir / 'report.html'}")

    def _renew_page(self) -> None:
        """Write the page with all that is known by now."""
        started = time.monotonic()
        self._write_page()
        now = time.monotonic()
        self._page_due = now + (now - started) / PAGE_SHARE

    def _write_page(self) -> None:
        training = training_entries(self._of_training())
        write_run_page(self.output_dir, self.title, _facts(self.header), self.so_far, self.of_answers, training)

    def _of_training(self) -> OfTraining:
        return cast(OfTraining, page_of(self.config, self.output_dir))


def _facts(header: str) -> list[tuple[str, str]]:
    """The lines of a header as (name, value); one that is indented belongs to the name before it."""
    facts: list[tuple[str, str]] = []
    for line in header.splitlines():
        name, _, value = line.partition(" ")
        if name:
            facts.append((name, value.strip()))
        else:
            facts[-1] = (facts[-1][0], f"{facts[-1][1]}; {value.strip()}")
    return facts


class RunEvaluator(RunReporter):
    """Measures the base, the rounds and the rivals of a run, and tells of that beside the training.

    Attributes:
        samples: what every model is asked for.
    """

    evaluates = True

    def __init__(
        self,
        config: RunConfig,
        game: Game,
        base: tuple[str, str],
        saved: str,
        samples: EvaluationSamples,
    ) -> None:
        """Args: base: its name and the kind of its source; saved: name of the folder in which a round's player lies."""
        super().__init__(config, game.accelerator, modality_of(samples.protocol) is ANSWERS)
        self.game, self.base_source, self.saved, self.samples = game, base, saved, samples
        self._last: Results | None = None

    # The models of a run

    def base(self) -> None:
        """Evaluate the base, and bring the evaluations of finished rounds up to date; what is as it should be stays."""
        self.game.restore(None)
        self._evaluate("base", self.output_dir / "base", "baseline", 0, *self.base_source)
        self._renew()
        promote_if = self.config.evaluation.promote_if
        if promote_if != "always":
            for scorer in self._scorers(self.samples.place(self.output_dir / "base")):
                if scorer["state"] != "run":
                    raise InputError(
                        f"--promote_if {promote_if} needs every scorer, and {scorer['name']} cannot be run: "
                        f"{scorer['reason']}"
                    )
        self._report()

    def _renew(self) -> None:
        """Bring the evaluations of finished rounds and rivals up to date: samples that are lost or damaged are drawn
        anew, and all are scored by the scorers as they are now. What was decided by older scores stays so."""
        places = [place for place in self._places() if self._was_evaluated(place[1])]
        whole = {
            _place_of(model)
            for model in self._models()
            if are_drawn(self.samples.shards(model)) and self.samples.is_measured(model)
        }
        self.accelerator.wait_for_everyone()  # all have looked before one of them changes something
        for name, directory, role, k in places:
            if directory / EVALUATION not in whole:
                tell(f"{name}: its samples in {directory / EVALUATION} are made anew where they lack", self.accelerator)
                source = f"{directory.relative_to(self.output_dir)}/{self.saved}"
                check_weights(directory)
                self.game.restore(directory)
                self._evaluate(name, directory / EVALUATION, role, k, source, "round")
        self._score_again()
        for _, directory, role, _ in places:
            if role == "round" and directory / EVALUATION not in whole:
                self._conclude_round(directory)

    def _scorers(self, folder: SampleFolder) -> list[ScorerRecord]:
        """What is known of every scorer in an evaluation."""
        return [scorer_record(folder, parse_spec(spec)[0]) for spec in self.samples.specs]

    def _was_evaluated(self, directory: Path) -> bool:
        """Whether a round's evaluation is behind it."""
        record = find_record(directory) if (directory / EVALUATION).is_dir() else None
        return record is not None and has_reached(record, "EVALUATED")

    def _score_again(self) -> None:
        """Score those of the models whose scores are by other scorers than are there now, and keep all features."""
        if self.samples.real is not None:
            embed(
                self.samples.real,
                {model.name: model.folder for model in self._models()},
                guidance_scales(self.samples.protocol),
                self.accelerator,
                lambda total: self.samples.progress.phase("features of the pictures", total),
            )

        def states(folder: SampleFolder) -> list[str]:
            return [scorer["state"] for scorer in self._scorers(folder)]

        now = states(self.samples.place(self.output_dir / "base"))  # a scorer may run now that could not before
        scales, specs = guidance_scales(self.samples.protocol), self.samples.specs
        stale = [
            model
            for model in self._models()
            if not are_scored(model.folder, scales, specs) or states(model.folder) != now
        ]
        self.accelerator.wait_for_everyone()
        for model in stale:
            tell(
                f"{model.name}: a scorer has changed since its samples were scored, or scores were lost: they are "
                "scored anew" + ("; what was decided by the old ones stays" if model.round_ else ""),
                self.accelerator,
            )
            self._score(model, None)
            self._note(model)
        for model in stale:
            if model.role == "round" and model.round_:
                self._conclude_round(self.output_dir / f"round-{model.round_}")

    def of_rounds(self) -> Evaluate:
        """The evaluation of the run's own rounds."""

        def evaluate(k: int, folder: Path, parent: int) -> Judgement:
            if k < self.config.rounds.rounds and not self.config.evaluation.eval_every_round:
                return Judgement({})
            name = round_name(self.config, k)
            self._evaluate(name, folder, "round", k, f"round-{k}/{self.saved}", "round")
            self._score_again()
            if self.accelerator.is_main_process:
                self._conclude_round(folder.parent, parent)
                self._report()
            self.accelerator.wait_for_everyone()
            results = read_results(folder / "results.json")
            title = name.replace(" ", "/")
            self.accelerator.log({f"{title}/{key}": value for key, value in metrics_of(results, name).items()})
            if self.accelerator.is_main_process:
                self.samples.show(title, folder)
            promote, reason = promotion(results, self.config.evaluation.promote_if)
            return Judgement(metrics_of(results, name), promote, reason)

        return evaluate

    def _conclude_round(self, directory: Path, parent: int | None = None) -> None:
        """What is concluded of a round's player against its opponent.

        Args:
            directory: of the round.
            parent: whose player the opponent is; None = as the round's record says.
        """
        if not self.accelerator.is_main_process:
            return
        parent = read_record(directory)["parent"] if parent is None else parent
        player = next(model for model in self._models() if _place_of(model) == directory / EVALUATION)
        opponent = self._read_model(parent) or self._read_model(0)
        assert opponent is not None
        models = [dataclasses.replace(opponent, role="baseline"), dataclasses.replace(player, role="candidate")]
        title = f"{player.name} against {opponent.name}"
        self._conclude(directory / EVALUATION, models, title)

    def of_rival(self, objective: str) -> Evaluate:
        """The evaluation of a rival: its last round, since it has as many steps as the run's last round."""

        def evaluate(k: int, folder: Path, parent: int) -> Judgement:
            if k == self.config.rounds.rounds:
                source = f"compare-{objective}/round-{k}/{self.saved}"
                self._evaluate(rival_name(objective), folder, "rival", None, source, "round")
                self._score_again()
                self._report()
            return Judgement({})

        return evaluate

    def tell(self) -> None:
        """Print and write the table, finish the page; main process only."""
        if self._last is None:
            self._report()
        self._renew_page()  # the last round's ledger is whole only now
        results = self._last
        assert results is not None, "the main process reports"
        print_table(results)
        headline = results["headline"]
        for verdict in results["verdicts"]:
            if (verdict["model"], verdict["guidance_scale"]) == (headline["model"], headline["guidance_scale"]):
                tell(f"Verdict on {verdict['model']}: {verdict['verdict']}. {verdict['reason']}")
        for line in closing_lines(results):
            tell(line)
        print(f"Report: {self.output_dir / 'report.html'}")
        self.samples.finish(self._models())

    def _renew_page(self) -> None:
        """With all that is known of training by now, and the scores that there were at the last report."""
        if self._last is not None:
            self._last = cast(Results, {**self._last, **training_entries(self._of_training())})
            write_json(self.output_dir / "results.json", self._last)
            super()._renew_page()

    def _write_page(self) -> None:
        write_report(self.output_dir)

    def _of_training(self) -> OfTraining:
        of_training, measures = super()._of_training(), self.samples.measures(self._models())
        return {**of_training, "measures": [*(of_training.get("measures") or []), *map(dict, measures)]}

    # Parts

    def _evaluate(self, name: str, folder: Path, role: Any, round_: int | None, source: str, kind: Any) -> None:
        """Draw and score with the present player, and note whose samples these are."""
        model = EvaluatedModel(
            name,
            role,
            self.samples.place(folder),
            round_,
            source=source,
            kind=kind,
            base=self.base_source[0],
            weights_sha256=self.game.player_hash(),
        )
        if not model.folder.of_answers:
            claim(model.folder.samples, self.samples.protocol, self.accelerator)
        draw_samples(self.samples.shards(model), self.accelerator, partial(self._drawing, name))
        self._score(model, self.samples.log_likelihood)
        self.samples.measure(model)
        self._note(model)

    def _drawing(self, name: str, scale: float | None, total: int) -> Tell:
        """The phase of a model's samples."""
        phase = f"{name}: answer" if scale is None else f"{name}: draw at guidance {scale:g}"
        return self.samples.progress.phase(phase, total)

    def _score(self, model: EvaluatedModel, log_likelihood: LogLikelihood | None) -> None:
        """Score what has no scores by the scorers as they are now."""
        score_samples(
            {model.name: model.folder},
            guidance_scales(self.samples.protocol),
            self.samples.specs,
            self.accelerator,
            lambda scorer, total: self.samples.progress.phase(f"{model.name}: score by {scorer}", total),
            {model.name: log_likelihood} if log_likelihood is not None else {},
        )

    def _conclude(self, root: Path, models: list[EvaluatedModel], title: str, **page: Unpack[OfTraining]) -> Results:
        """The results of these models, the first of which is the baseline, written below `root`."""
        return conclude(
            root,
            models,
            self.samples.protocol,
            self.samples.specs,
            title=title,
            headline_scale=self.samples.headline_scale,
            training_prompts=None if self.samples.shares_prompts else Column(self.output_dir / "data", "prompt"),
            in_domain=self.samples.in_domain,
            real=self.samples.real,
            **page,
        )

    def _note(self, model: EvaluatedModel) -> None:
        """Write down whose samples lie in a folder."""
        if self.accelerator.is_main_process:
            fields = {key: value for key, value in dataclasses.asdict(model).items() if key != "folder"}
            write_json(_place_of(model) / "model.json", fields)
        self.accelerator.wait_for_everyone()

    def _places(self) -> list[tuple[str, Path, str, int | None]]:
        """Name, folder, role and number of every round that is evaluated, and of each rival's last."""
        last = self.config.rounds.rounds
        run, *others = run_folders(self.config, self.output_dir).items()
        rounds = [(round_name(self.config, k), run[1] / f"round-{k}", "round", k) for k in range(1, last + 1)]
        return [*rounds, *((name, folder / f"round-{last}", "rival", None) for name, folder in others)]

    def _models(self) -> list[EvaluatedModel]:
        """The models that were evaluated so far, the base first."""
        models = []
        for folder in [self.output_dir / "base", *(directory / EVALUATION for _, directory, *_ in self._places())]:
            if (fields := read_if_whole(folder / "model.json", _Model)) is not None:
                models.append(EvaluatedModel(folder=self.samples.place(folder), **fields))
        return models

    def _read_model(self, k: int) -> EvaluatedModel | None:
        return next((m for m in self._models() if m.round_ == k and m.role != "rival"), None)

    def _report(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self._last = self._conclude(self.output_dir, self._models(), self.title, **self._of_training())
        super()._renew_page()  # nothing is newer than these results
