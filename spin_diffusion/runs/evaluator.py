"""The evaluations of a run of any kind: base, rounds and rivals by the same code; table, page, curves, promotion."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from accelerate import Accelerator

from spin_diffusion.evaluation.comparison import Comparison, as_markdown, print_table
from spin_diffusion.evaluation.closing import closing_lines
from spin_diffusion.evaluation.in_rounds import metrics_of, promotion
from spin_diffusion.evaluation.mending import records_in, remove_damaged
from spin_diffusion.evaluation.report import write_report
from spin_diffusion.evaluation.records import read_results
from spin_diffusion.evaluation.results import EvaluatedModel
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.store.input_error import InputError
from spin_diffusion.runs.start import AnyConfig, rivals
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.ledger import COUNTED
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.one_round import EVALUATION
from spin_diffusion.store.progress import Progress, tell
from spin_diffusion.selfplay.record import FINAL, read_record
from spin_diffusion.store.run_dir import (
    AGAIN,
    Damaged,
    file_hashes,
    read_json,
    read_json_lines,
    write_file,
    write_json,
)
from spin_diffusion.samples.stored_pairs import Column
from spin_diffusion.selfplay.table import Evaluate, Judgement
from spin_diffusion.selfplay.train_settings import of_round

_CURVES = ("loss", "r_real", "r_generated", "score_real", "score_generated", "implicit_accuracy", "saturation")

_SHORTCUTS = {"generated": "real from generated", "decoder": "traces of the decoder in real ones"}
"""What the page shows of the shortcut probe."""


_Step = TypedDict("_Step", {"step": int} | dict.fromkeys(_CURVES, Any))
"""A line of metrics.jsonl, as far as the page shows it."""


class _Plan(TypedDict):
    """plan.json, as far as the ledger shows it."""

    rounds: list[dict[str, Any]]
    memory_bytes: dict[str, Any]
    disk_bytes: Any


class _Model(TypedDict):
    """model.json: the fields of an EvaluatedModel without its folder."""

    name: str
    role: str
    round_: int | None


class RunEvaluator:
    """What a run measures, and what it tells of it. A kind of run says how its samples are drawn and scored.

    Attributes:
        active: False = there is nothing to evaluate with, and everything here does nothing.
        specs: NAME[=PATH] of what scores the samples.
        saved: name of the folder in which a round's player lies.
        last: what the last report was made of.
    """

    active: bool
    specs: Sequence[str]
    saved: str

    def __init__(
        self, config: AnyConfig, game: Game, base: str, output_dir: Path, accelerator: Accelerator, progress: Progress
    ) -> None:
        self.config, self.game, self.base_name, self.output_dir = config, game, base, output_dir
        self.accelerator, self.progress = accelerator, progress
        self.last: tuple[dict[str, Any], list[Comparison]] | None = None

    # What a kind of run says

    def model_at(self, name: str, folder: Path, role: str, round_: int | None, **said: Any) -> EvaluatedModel:
        """A model whose samples and scores lie in `folder`."""
        raise NotImplementedError

    def said_of(self, folder: Path, name: str) -> dict[str, Any]:
        """What is known of a scorer in the evaluation in `folder`: whether it was run, or why not."""
        raise NotImplementedError

    def weights_hash(self) -> str:
        """Of the present player."""
        raise NotImplementedError

    def draw_and_score(self, model: EvaluatedModel) -> None:
        """Samples of the present player, and their scores; what is there already stays."""
        raise NotImplementedError

    def is_drawn(self, model: EvaluatedModel) -> bool:
        """Whether the model's samples are there, whole, and its alone, with whatever else only it can say."""
        raise NotImplementedError

    def is_scored(self, model: EvaluatedModel) -> bool:
        """Whether its samples have scores by the scorers as they are now."""
        raise NotImplementedError

    def score(self, model: EvaluatedModel) -> None:
        """Scores of samples that are there, without the model."""
        raise NotImplementedError

    def conclude(
        self, root: Path, models: list[EvaluatedModel], title: str, **more: Any
    ) -> tuple[dict[str, Any], list[Comparison]]:
        """The results of these models, the first of which is the baseline, written below `root`; main process only.

        Args:
            more: `curves`, `measures`, `events` and `ledger`, for the page of the whole run.
        """
        raise NotImplementedError

    def show(self, name: str, folder: Path) -> None:
        """Samples to the trackers; main process only."""

    # The models of a run

    def base(self) -> None:
        """Evaluate the base, and bring the evaluations of finished rounds up to date; what is as it should be stays."""
        if not self.active:
            return
        self.game.restore(None)
        self._evaluate("base", self.output_dir / "base", "baseline", 0, self.base_name, self.base_kind)
        self._renew()
        promote_if = self.config.evaluation.promote_if
        if promote_if != "always":
            for spec in self.specs:
                said = self.said_of(self.output_dir / "base", parse_spec(spec)[0])
                if said["state"] != "run":
                    raise InputError(
                        f"--promote_if {promote_if} needs every scorer, and {said['name']} cannot be run: "
                        f"{said['reason']}"
                    )
        self._report()

    base_kind = "pipeline"

    def _renew(self) -> None:
        """Bring the evaluations of finished rounds and rivals up to date: samples that are lost or damaged are drawn
        anew, and all are scored by the scorers as they are now. What was decided by older scores stays so."""
        last = self.config.rounds.rounds
        places = [(self._round_name(k), self.output_dir / f"round-{k}", "round", k) for k in range(1, last + 1)]
        places += [(name, folder / f"round-{last}", "rival", None) for name, folder in self._runs()[1:]]
        places = [place for place in places if self._was_evaluated(place[1])]
        if self.accelerator.is_main_process:
            for _, directory, *_ in places:
                remove_damaged(directory / EVALUATION)
        self.accelerator.wait_for_everyone()
        whole = {folder for folder, model in self._evaluated() if self.is_drawn(model)}
        self.accelerator.wait_for_everyone()  # all have looked before one of them changes something
        for name, directory, role, k in places:
            if directory / EVALUATION not in whole:
                self.accelerator.print(f"{name}: its samples in {directory / EVALUATION} are made anew where they lack")
                source = f"{directory.relative_to(self.output_dir)}/{self.saved}"
                self.game.restore(directory)
                self._evaluate(name, directory / EVALUATION, role, k, source, "round")
        self._score_again(self._models())
        for _, directory, role, _ in places:
            if role == "round" and directory / EVALUATION not in whole:
                self._conclude_round(directory)

    def _states(self, folder: Path) -> list[str]:
        return [self.said_of(folder, parse_spec(spec)[0])["state"] for spec in self.specs]

    def _was_evaluated(self, directory: Path) -> bool:
        """Whether a round's evaluation is behind it."""
        record = read_record(directory) if (directory / EVALUATION).is_dir() else {}
        return record.get("state") in ("EVALUATED", *FINAL)

    def _score_again(self, models: Sequence[EvaluatedModel]) -> None:
        """Score those of the models whose scores are by other scorers than are there now."""
        states = self._states(self.output_dir / "base")  # a scorer may run now that could not before
        folders = {model.name: folder for folder, model in self._evaluated()}
        stale = [model for model in models if not self.is_scored(model) or self._states(folders[model.name]) != states]
        self.accelerator.wait_for_everyone()
        for model in stale:
            self.accelerator.print(
                f"{model.name}: a scorer has changed since its samples were scored, or scores were lost: they are "
                "scored anew" + ("; what was decided by the old ones stays" if model.round_ else "")
            )
            self.score(model)
            self._note(model, folders[model.name])
        for model in stale:
            if model.role == "round" and model.round_:
                self._conclude_round(self.output_dir / f"round-{model.round_}")

    def of_rounds(self) -> Evaluate | None:
        """The evaluation of the run's own rounds."""
        if not self.active:
            return None

        def evaluate(k: int, folder: Path, parent: int) -> Judgement:
            if k < self.config.rounds.rounds and not self.config.evaluation.eval_every_round:
                return Judgement({})
            name = self._round_name(k)
            self._evaluate(name, folder, "round", k, f"round-{k}/{self.saved}", "round")
            self._score_again(self._models())
            if self.accelerator.is_main_process:
                self._conclude_round(folder.parent, parent)
                self._report()
            self.accelerator.wait_for_everyone()
            results = read_results(folder / "results.json")
            title = name.replace(" ", "/")
            self.accelerator.log({f"{title}/{key}": value for key, value in metrics_of(results, name).items()})
            if self.accelerator.is_main_process:
                self.show(title, folder)
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
        player = next(model for folder, model in self._evaluated() if folder == directory / EVALUATION)
        opponent = self._read_model(parent) or self._read_model(0)
        assert opponent is not None
        self.conclude(
            directory / EVALUATION,
            [dataclasses.replace(opponent, role="baseline"), dataclasses.replace(player, role="candidate")],
            f"{player.name} against {opponent.name}",
        )

    def of_rival(self, objective: str) -> Evaluate | None:
        """The evaluation of a rival: its last round, since it has as many steps as the run's last round."""
        if not self.active:
            return None

        def evaluate(k: int, folder: Path, parent: int) -> Judgement:
            if k == self.config.rounds.rounds:
                source = f"compare-{objective}/round-{k}/{self.saved}"
                self._evaluate(f"{objective}, same steps", folder, "rival", None, source, "round")
                self._score_again(self._models())
                self._report()
            return Judgement({})

        return evaluate

    def tell(self) -> list[Comparison]:
        """Print and write the table, finish the page; main process only."""
        if not self.active:
            return []
        results, comparisons = self.last or self._report()
        if ledger := self._ledger():  # the last round's is whole only now
            write_json(self.output_dir / "results.json", results | {"ledger": ledger})
            write_report(self.output_dir)
        closing = closing_lines(results)
        if comparisons:
            print_table(comparisons)
            markdown = as_markdown(comparisons) + "".join(f"{line}\n\n" for line in closing)
            write_file(self.output_dir / "table.md", lambda part: part.write_text(markdown, encoding="utf-8"))
        headline = results["headline"]
        for alarm in results["alarms"]:
            if alarm["state"] == "alarm" and alarm["guidance_scale"] == headline["guidance_scale"]:
                print(f"Alarm for {alarm['model']}: {alarm['explanation']}")
        for said in results["verdicts"]:
            if (said["model"], said["guidance_scale"]) == (headline["model"], headline["guidance_scale"]):
                print(f"Verdict on {said['model']}: {said['verdict']}. {said['reason']}")
        for line in closing:
            print(line)
        print(f"Report: {self.output_dir / 'report.html'}")
        return comparisons

    # Parts

    def _round_name(self, k: int) -> str:
        return f"{title_of(of_round(self.config.rounds.objective, k))} round {k}"

    def _evaluate(self, name: str, folder: Path, role: Any, round_: int | None, source: str, kind: Any) -> None:
        """Draw and score with the present player, and note whose samples these are."""
        model = self.model_at(
            name, folder, role, round_, source=source, kind=kind, base=self.base_name,
            weights_sha256=self.weights_hash(),
        )  # fmt: skip
        if self.accelerator.is_main_process:
            remove_damaged(folder)
        self.accelerator.wait_for_everyone()
        self.draw_and_score(model)
        self._note(model, folder)

    def _note(self, model: EvaluatedModel, folder: Path) -> None:
        """Write down whose samples lie in a folder, and what its files are now."""
        if self.accelerator.is_main_process:
            said = {key: value for key, value in dataclasses.asdict(model).items() if key != "folder"}
            write_json(folder / "model.json", said | {"files": file_hashes(records_in(folder), folder)})
        self.accelerator.wait_for_everyone()

    def _folders(self) -> list[Path]:
        """Where an evaluation can be, in the order of the table."""
        rounds = self.config.rounds.rounds
        return [
            self.output_dir / "base",
            *(self.output_dir / f"round-{k}" / "evaluation" for k in range(1, rounds + 1)),
            *(self.output_dir / f"compare-{name}" / f"round-{rounds}" / "evaluation" for name in rivals(self.config)),
        ]

    def _models(self) -> list[EvaluatedModel]:
        """The models that were evaluated so far, the base first."""
        return [model for _, model in self._evaluated()]

    def _evaluated(self) -> list[tuple[Path, EvaluatedModel]]:
        """The same with the folder of each."""
        found = []
        for folder in self._folders_with_models():
            said = read_json(folder / "model.json", _Model, AGAIN)
            said.pop("files", None)
            model = self.model_at(said.pop("name"), folder, said.pop("role"), said.pop("round_"), **said)
            found.append((folder, model))
        return found

    def _folders_with_models(self) -> list[Path]:
        return [folder for folder in self._folders() if (folder / "model.json").is_file()]

    def _read_model(self, k: int) -> EvaluatedModel | None:
        return next((m for m in self._models() if m.round_ == k and m.role != "rival"), None)

    def _report(self) -> tuple[dict[str, Any], list[Comparison]]:
        if not self.accelerator.is_main_process or not self.active:
            return {}, []
        title = f"Self-play run {self.output_dir.name}"
        self.last = self.conclude(
            self.output_dir, self._models(), title, curves=self._curves(), measures=self._measures(),
            events=self._events(), ledger=self._ledger(),
        )  # fmt: skip
        write_report(self.output_dir)
        return self.last

    def _curves(self) -> list[dict[str, Any]]:
        """Every step of the rounds and the rivals, absolute r and scores."""
        found = []
        for name, folder in self._runs():
            for k in range(1, self.config.rounds.rounds + 1):
                path = folder / f"round-{k}" / "metrics.jsonl"
                for entry in self._for_the_page(read_json_lines, path, _Step) or []:
                    values = {key: entry[key] for key in _CURVES}
                    found.append({"model": name, "round": k, "step": entry["step"]} | values)
        return found

    def _for_the_page(self, read: Callable[..., Any], path: Path, kind: Any) -> Any:
        """What a file has for the page, which does without it when there is none or it is damaged."""
        try:
            return read(path, kind, "the page does without it") if path.is_file() else None
        except Damaged as error:
            tell(str(error))
            return None

    def _events(self) -> list[dict[str, Any]]:
        """What the rules of health said of the rounds and the rivals."""
        found = []
        for name, folder in self._runs():
            for k in range(1, self.config.rounds.rounds + 1):
                training = read_record(folder / f"round-{k}").get("training", {})
                ended = training.get("ended_by") or {}
                for event in training.get("health", []):
                    ends = event["rule"] == ended.get("rule")
                    kept = {"weights_from_step": ended["kept_step"] if ends else None}
                    found.append({"model": name, "round": k} | event | kept)
        return found

    def _ledger(self) -> list[dict[str, Any]]:
        """What each phase of the rounds and the rivals took, beside what was predicted of the rounds."""
        path = self.output_dir / "plan.json"
        plan = self._for_the_page(read_json, path, _Plan) or {"rounds": [], "memory_bytes": {}, "disk_bytes": None}
        planned = {entry["round"]: entry for entry in plan["rounds"]}
        memory = {"generated": plan["memory_bytes"].get("drawing"), "trained": plan["memory_bytes"].get("training")}
        found = []
        for name, folder in self._runs():
            for k in range(1, self.config.rounds.rounds + 1):
                record = read_record(folder / f"round-{k}")
                ledger = record.get("ledger", {})
                predicted = planned.get(k, {}) if folder == self.output_dir else {}
                for phase in COUNTED:
                    if phase in ledger and ledger[phase]["samples"] != 0:
                        said = {"model": name, "round": k, "phase": phase, "predicted_seconds": predicted.get(phase)}
                        said["predicted_memory_bytes"] = memory.get(phase) if predicted else None
                        said["predicted_disk_bytes"] = plan["disk_bytes"]
                        found.append(said | ledger[phase])
                overhead = sum(took for phase, took in record.get("seconds", {}).items() if phase not in COUNTED)
                if record.get("state") in FINAL:
                    unknown = ("predicted_seconds", "predicted_memory_bytes", "samples", "samples_per_second", "flops")
                    nothing = dict.fromkeys((*unknown, "matrix_share", "peak_memory_bytes"))
                    found.append({"model": name, "round": k, "phase": "overhead", "seconds": overhead} | nothing)
        return found

    def _measures(self) -> list[dict[str, Any]]:
        """The held-out gap and the shortcut probe of every round that has one, and of each rival's last."""
        last = self.config.rounds.rounds
        rounds = [(self._round_name(k), k, self.output_dir / f"round-{k}") for k in range(1, last + 1)]
        rounds += [(name, None, folder / f"round-{last}") for name, folder in self._runs()[1:]]
        found = []
        for name, k, folder in rounds:
            record = read_record(folder)
            gap = record.get("held_out_gap")
            if gap is not None:
                found.append(
                    {"model": name, "round": k, "name": "held_out_gap", "title": "held-out gap, loss at r = 0 minus "
                     "loss", "value": gap["mean"], "low": gap["low"], "high": gap["high"], "better": "none"}
                )  # fmt: skip
            auc = record.get("shortcut", {}).get("auc", {})
            found += [
                {"model": name, "round": k, "name": f"shortcut_{key}", "title": f"before training, a linear probe: AUC "
                 f"of {title} (0.5 = none)", "value": auc[key]["mean"], "low": auc[key]["low"],
                 "high": auc[key]["high"], "better": "none"}
                for key, title in _SHORTCUTS.items() if auc.get(key) is not None
            ]  # fmt: skip
        return found

    def _runs(self) -> list[tuple[str, Path]]:
        """The run itself and its rivals."""
        objective = title_of(of_round(self.config.rounds.objective, 1))
        return [(objective, self.output_dir)] + [
            (f"{name}, same steps", self.output_dir / f"compare-{name}") for name in rivals(self.config)
        ]

    def _training_prompts(self) -> Sequence[str]:
        """They are read from the prepared data when they are asked for."""
        return Column(self.output_dir / "data", "prompt")
