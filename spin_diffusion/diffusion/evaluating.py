"""The evaluations of a run: base, rounds and rivals by the same code; table, report page, pictures, promotion."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from spin_diffusion.config import Config
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.evaluation.comparison import Comparison, as_markdown, print_table
from spin_diffusion.evaluation.drawing import folder_of, requests
from spin_diffusion.evaluation.gallery import draw_gallery
from spin_diffusion.evaluation.in_rounds import RunEvaluation, metrics_of, model_of, promotion, run_evaluation
from spin_diffusion.evaluation.prompt_sets import PromptSet
from spin_diffusion.evaluation.report.reading import read_results
from spin_diffusion.evaluation.results import EvaluatedModel
from spin_diffusion.evaluation.scorers import parse_spec
from spin_diffusion.evaluation.scoring import read_scorer
from spin_diffusion.input_error import InputError
from spin_diffusion.running import rivals
from spin_diffusion.selfplay.progress import Progress
from spin_diffusion.selfplay.rounds import Evaluate, Judgement
from spin_diffusion.selfplay.run_dir import read_json, read_rows, weights_hash, write_file, write_json
from spin_diffusion.selfplay.samples import shards
from spin_diffusion.selfplay.train import of_round


class Evaluator:
    """What a run measures, and what it tells of it. Without validation prompts it does nothing."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSet | None,
        game: DiffusionGame,
        output_dir: Path,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.config, self.game, self.output_dir, self.accelerator = config, game, output_dir, accelerator
        self.evaluation: RunEvaluation | None = None
        self.last: tuple[dict[str, Any], list[Comparison]] | None = None
        """What the last report was made of."""
        if prompts is not None:
            self.evaluation = run_evaluation(
                config.evaluation,
                prompts,
                output_dir,
                accelerator,
                progress,
                seed=config.rounds.seed,
                sampler=config.sampling.sampler,
                num_inference_steps=config.sampling.num_inference_steps,
                guidance_scale=config.sampling.guidance_scale,
                resolution=game.resolution,
                training_captions=self._training_captions,
            )

    def base(self) -> None:
        """Evaluate the base, once."""
        if self.evaluation is None:
            return
        if not (self.output_dir / "base" / "model.json").is_file():
            self.game.restore(None)
            base = self.config.model.pretrained_model_name_or_path
            self._evaluate("base", self.output_dir / "base", "baseline", 0, base, "pipeline")
        if self.config.evaluation.promote_if != "always":
            for spec in self.config.evaluation.scorers or []:
                said = read_scorer(self.output_dir / "base" / "scores", parse_spec(spec)[0])
                if said["state"] != "run":
                    raise InputError(
                        f"--promote_if {self.config.evaluation.promote_if} needs every scorer, and {said['name']} "
                        f"cannot be run: {said['reason']}"
                    )
        self._report()

    def of_rounds(self) -> Evaluate | None:
        """The evaluation of the run's own rounds."""
        if self.evaluation is None:
            return None

        def evaluate(k: int, folder: Path, parent: int) -> Judgement:
            if k < self.config.rounds.rounds and not self.config.evaluation.eval_every_round:
                return Judgement({})
            name = self._round_name(k)
            self._evaluate(name, folder, "round", k, f"round-{k}/unet", "round")
            if self.accelerator.is_main_process:
                opponent = self._read_model(parent) or self._read_model(0)
                player = self._read_model(k)
                assert opponent is not None and player is not None
                self.evaluation.conclude(
                    folder,
                    [dataclasses.replace(opponent, role="baseline"), dataclasses.replace(player, role="candidate")],
                    f"{name} against {opponent.name}",
                )
                self._report()
            self.accelerator.wait_for_everyone()
            results = read_results(folder / "results.json")
            self._log(name, results, folder)
            promote, reason = promotion(results, self.config.evaluation.promote_if)
            return Judgement(metrics_of(results, name), promote, reason)

        return evaluate

    def of_rival(self, objective: str) -> Evaluate | None:
        """The evaluation of a rival: its last round, since it has as many steps as the run's last round."""
        if self.evaluation is None:
            return None

        def evaluate(k: int, folder: Path, parent: int) -> Judgement:
            if k == self.config.rounds.rounds:
                source = f"compare-{objective}/round-{k}/unet"
                self._evaluate(f"{objective}, same steps", folder, "rival", None, source, "round")
                self._report()
            return Judgement({})

        return evaluate

    def tell(self) -> list[Comparison]:
        """Print and write the table, draw the gallery, finish the page; main process only."""
        if self.evaluation is None:
            return []
        results, comparisons = self.last or self._report()
        if comparisons:
            print_table(comparisons)
            markdown = as_markdown(comparisons)
            write_file(self.output_dir / "table.md", lambda part: part.write_text(markdown, encoding="utf-8"))
        for alarm in results["alarms"]:
            if alarm["state"] == "alarm" and alarm["guidance_scale"] == self.evaluation.headline_scale:
                print(f"Alarm for {alarm['model']}: {alarm['explanation']}")
        for said in results["verdicts"]:
            if (said["model"], said["guidance_scale"]) == (
                results["headline"]["model"],
                results["headline"]["guidance_scale"],
            ):
                print(f"Verdict on {said['model']}: {said['verdict']}. {said['reason']}")
        self._draw_gallery()
        print(f"Pictures, the same prompts and seeds for every model: {self.output_dir / 'samples.png'}")
        print(f"Report: {self.output_dir / 'report.html'}")
        return comparisons

    # Parts

    def _round_name(self, k: int) -> str:
        return f"{of_round(self.config.rounds.objective, k)} round {k}"

    def _evaluate(self, name: str, folder: Path, role: Any, round_: int | None, source: str | None, kind: Any) -> None:
        """Draw and score with the present player, and note whose pictures these are."""
        assert self.evaluation is not None
        steps = self.evaluation.protocol["num_inference_steps"]
        model = model_of(
            name, folder, role, round_, source=str(source), kind=kind,
            base=str(self.config.model.pretrained_model_name_or_path), weights_sha256=weights_hash(self.game.player),
        )  # fmt: skip
        self.evaluation.evaluate(
            model,
            lambda prompts, seeds, scale, done: self.game.draw(self.game.player, prompts, seeds, scale, steps, done),
        )
        if self.accelerator.is_main_process:
            said = {key: value for key, value in dataclasses.asdict(model).items() if key != "folder"}
            write_json(folder / "model.json", said)
        self.accelerator.wait_for_everyone()

    def _folders(self) -> list[Path]:
        """Where an evaluation can be, in the order of the table."""
        rounds = range(1, self.config.rounds.rounds + 1)
        return [
            self.output_dir / "base",
            *(self.output_dir / f"round-{k}" / "evaluation" for k in rounds),
            *(
                self.output_dir / f"compare-{name}" / f"round-{self.config.rounds.rounds}" / "evaluation"
                for name in rivals(self.config)
            ),
        ]

    def _models(self) -> list[EvaluatedModel]:
        """The models that were evaluated so far, the base first."""
        found = []
        for folder in self._folders():
            if (folder / "model.json").is_file():
                said = read_json(folder / "model.json")
                found.append(model_of(said.pop("name"), folder, said.pop("role"), said.pop("round_"), **said))
        return found

    def _read_model(self, k: int) -> EvaluatedModel | None:
        return next((m for m in self._models() if m.round_ == k and m.role != "rival"), None)

    def _report(self) -> tuple[dict[str, Any], list[Comparison]]:
        if not self.accelerator.is_main_process or self.evaluation is None:
            return {}, []
        self.last = self.evaluation.report(self._models())
        return self.last

    def _training_captions(self) -> Sequence[str]:
        return [
            row["prompt"]
            for path in shards(self.output_dir / "data" / "samples", ".parquet")
            for row in read_rows(path, ["prompt"])
        ]

    def _log(self, name: str, results: dict[str, Any], folder: Path) -> None:
        """Scores and the gallery's pictures to the trackers."""
        title = name.replace(" ", "/")
        self.accelerator.log({f"{title}/{key}": value for key, value in metrics_of(results, name).items()})
        if not self.accelerator.is_main_process:
            return
        pictures = self._gallery_pictures(folder)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(picture) for _, picture in pictures])
                tracker.writer.add_images(f"validation/{title}", stacked, 0, dataformats="NHWC")
            elif tracker.name in ("wandb", "trackio"):
                library = __import__(tracker.name)
                images = [library.Image(picture, caption=prompt) for prompt, picture in pictures]
                tracker.log({f"validation/{title}": images})

    def _gallery_pictures(self, folder: Path) -> list[tuple[str, Image.Image]]:
        """The first picture of each gallery prompt at the headline's guidance scale; grey where it is lost."""
        assert self.evaluation is not None
        found = []
        wanted = requests(self.evaluation.prompts, 1, self.evaluation.protocol["seed"])
        for row in wanted[: self.config.evaluation.num_gallery_prompts]:
            path = folder / "images" / folder_of(self.evaluation.headline_scale) / f"{row['id']}-0.png"
            size = (self.game.resolution,) * 2
            picture = Image.open(path).convert("RGB") if path.is_file() else Image.new("RGB", size, "grey")
            found.append((row["prompt"], picture))
        return found

    def _draw_gallery(self) -> None:
        """The same prompts and seeds side by side, base to last round."""
        models = self._models()
        columns = [self._gallery_pictures(model.folder.pictures.parent) for model in models]
        rows = [(cells[0][0], [picture for _, picture in cells]) for cells in zip(*columns, strict=True)]
        draw_gallery([model.name for model in models], rows, self.output_dir / "samples.png")
