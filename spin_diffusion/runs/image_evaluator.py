"""The evaluations of an image run: pictures of the present player at every guidance scale, their scores, a gallery."""

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.evaluation.comparison import Comparison
from spin_diffusion.samples.pictures import (folder_of)
from spin_diffusion.evaluation.protocols import (precision_of)
from spin_diffusion.samples.requests import (requests_of)
from spin_diffusion.evaluation.gallery import draw_gallery
from spin_diffusion.evaluation.in_rounds import RunEvaluation, model_of, run_evaluation
from spin_diffusion.evaluation.prompt_sets import PromptSet
from spin_diffusion.evaluation.results import EvaluatedModel
from spin_diffusion.evaluation.scorers import parse_spec
from spin_diffusion.evaluation.scoring import read_scorer
from spin_diffusion.runs.evaluator import RunEvaluator
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.pictures import read_picture
from spin_diffusion.store.progress import Progress


class Evaluator(RunEvaluator):
    """What an image run measures. Without validation prompts it does nothing."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSet | None,
        game: DiffusionGame,
        output_dir: Path,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        super().__init__(config, game, str(game.base), output_dir, accelerator, progress)
        self.saved = game.saved
        self.active, self.specs = prompts is not None, config.evaluation.scorers or []
        self.evaluation: RunEvaluation | None = None
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
                eta=config.sampling.eta,
                precision=precision_of(accelerator.mixed_precision, config.training.allow_tf32),
            )
        self.drawn_with = key_of(unet=game.base_hash, parts=game.parts_hash)

    def model_at(self, name: str, folder: Path, role: str, round_: int | None, **said: Any) -> EvaluatedModel:
        """A model whose images and scores lie in `folder`."""
        return model_of(name, folder, role, round_, **said)

    def said_of(self, folder: Path, name: str) -> dict[str, Any]:
        """What is known of a scorer of images, and whether it was run."""
        return read_scorer(folder / "scores", name)

    def weights_hash(self) -> str:
        """Of the player's UNet, or of its adapter."""
        return self.game.player_hash()

    def draw_and_score(self, model: EvaluatedModel) -> None:
        """The player's images of the run's prompts, and their scores."""
        assert self.evaluation is not None
        steps = self.evaluation.protocol["num_inference_steps"]
        self.evaluation.evaluate(
            model,
            lambda prompts, seeds, scale, done: self.game.draw(self.game.player, prompts, seeds, scale, steps, done),
            self._drawn_by(model),
        )

    def is_drawn(self, model: EvaluatedModel) -> bool:
        """Whether its pictures are there, and theirs alone."""
        assert self.evaluation is not None
        return self.evaluation.is_drawn(model, self._drawn_by(model))

    def is_scored(self, model: EvaluatedModel) -> bool:
        """Whether they have the scores of the scorers as they are now."""
        assert self.evaluation is not None
        return self.evaluation.is_scored(model)

    def score(self, model: EvaluatedModel) -> None:
        """Scores of pictures that are there."""
        assert self.evaluation is not None
        self.evaluation.score(model)

    def _drawn_by(self, model: EvaluatedModel) -> str:
        return key_of(base=self.drawn_with, weights=model.weights_sha256)

    def conclude(
        self, root: Path, models: list[EvaluatedModel], title: str, **more: Any
    ) -> tuple[dict[str, Any], list[Comparison]]:
        """The results, with the curator's scorer as one that was aimed at."""
        assert self.evaluation is not None
        curator = self.config.curation.curation_scorer
        in_domain = [parse_spec(curator)[0]] if curator else []
        return self.evaluation.conclude(
            root, models, title, training_captions=self._training_prompts(), in_domain=in_domain, **more
        )

    def show(self, name: str, folder: Path) -> None:
        """The gallery's images to TensorBoard, wandb or trackio."""
        pictures = self._gallery_pictures(folder)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(picture) for _, picture in pictures])
                tracker.writer.add_images(f"validation/{name}", stacked, 0, dataformats="NHWC")
            elif tracker.name in ("wandb", "trackio"):
                library = __import__(tracker.name)
                images = [library.Image(picture, caption=prompt) for prompt, picture in pictures]
                if tracker.name == "wandb":
                    tracker.log({f"validation/{name}": images})
                else:  # it leaves out lists without a word
                    tracker.log({f"validation/{name}/{number}": image for number, image in enumerate(images, start=1)})

    def tell(self) -> list[Comparison]:
        """Print and write the table, draw the gallery, finish the page; main process only."""
        comparisons = super().tell()
        if self.active:
            self._draw_gallery()
            print(f"Pictures, the same prompts and seeds for every model: {self.output_dir / 'samples.png'}")
        return comparisons

    def _gallery_pictures(self, folder: Path) -> list[tuple[str, Image.Image]]:
        """The first picture of each gallery prompt at the headline's guidance scale; grey where it is lost."""
        assert self.evaluation is not None
        found = []
        wanted = self.evaluation.prompts.requests(1, self.evaluation.protocol["seed"])
        for row in wanted[: self.config.evaluation.num_gallery_prompts]:
            path = folder / "images" / folder_of(self.evaluation.headline_scale) / f"{row['id']}-0.png"
            size = (self.game.resolution,) * 2
            picture = read_picture(path) if path.is_file() else Image.new("RGB", size, "grey")
            found.append((row["prompt"], picture))
        return found

    def _draw_gallery(self) -> None:
        """The same prompts and seeds side by side, base to last round."""
        models = self._models()
        columns = [self._gallery_pictures(model.folder.pictures.parent) for model in models]
        rows = [(cells[0][0], [picture for _, picture in cells]) for cells in zip(*columns, strict=True)]
        draw_gallery([model.name for model in models], rows, self.output_dir / "samples.png")
