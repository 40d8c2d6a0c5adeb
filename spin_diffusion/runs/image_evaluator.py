"""What an image run is evaluated by: pictures of the player at every guidance scale, their scores, a gallery."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.evaluation.comparison import Comparison
from spin_diffusion.evaluation.gallery import draw_gallery
from spin_diffusion.evaluation.prompt_sets import PromptSet
from spin_diffusion.evaluation.protocols import precision_of, protocol_of
from spin_diffusion.evaluation.records import Results
from spin_diffusion.evaluation.results import EvaluatedModel, conclude
from spin_diffusion.evaluation.scorers import parse_spec
from spin_diffusion.evaluation.scoring import ScoredFolder, is_scored, read_scorer, score_pictures
from spin_diffusion.samples.pictures import are_drawn, draw_pictures, folder_of
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.pictures import read_picture
from spin_diffusion.store.progress import Progress

GALLERY_PROMPTS = 6
"""Prompts shown in samples.png."""


def picture_protocol(
    config: Config, prompts: PromptSet, resolution: int, precision: str
) -> tuple[dict[str, Any], float]:
    """How the pictures of a run's evaluations are drawn, and the guidance scale of its headline; what is not set is
    that of the opponent's samples."""
    settings, sampling = config.evaluation, config.sampling
    scales = settings.validation_guidance_scales or [sampling.guidance_scale]
    protocol = protocol_of(
        prompts,
        images_per_prompt=settings.num_validation_images,
        seed=config.rounds.seed,
        sampler=sampling.sampler,
        num_inference_steps=settings.validation_num_inference_steps or sampling.num_inference_steps,
        guidance_scales=scales,
        resolution=resolution,
        eta=sampling.eta,
        precision=precision,
    )
    return protocol, sampling.guidance_scale if sampling.guidance_scale in scales else scales[-1]


class PictureSamples:
    """The pictures of a run's validation prompts."""

    def __init__(self, config: Config, prompts: PromptSet, game: DiffusionGame, progress: Progress) -> None:
        self.config, self.prompts, self.game, self.progress = config, prompts, game, progress
        self.accelerator, self.specs = game.accelerator, config.evaluation.scorers or []
        precision = precision_of(self.accelerator.mixed_precision, config.training.allow_tf32)
        self.protocol, self.headline_scale = picture_protocol(config, prompts, game.resolution, precision)
        self.wanted = prompts.requests(config.evaluation.num_validation_images, self.protocol["seed"])
        self.drawn_with = key_of(unet=game.base_hash, parts=game.parts_hash)

    def place(self, folder: Path) -> ScoredFolder:
        """The folders of pictures and scores."""
        return ScoredFolder(folder / "images", folder / "scores")

    def scorer_record(self, folder: Path, name: str) -> dict[str, Any]:
        """What is known of a scorer of images, and whether it was run."""
        return read_scorer(folder / "scores", name)

    def draw_and_score(self, model: EvaluatedModel) -> None:
        """The player's images of the run's prompts, and their scores."""
        steps = self.protocol["num_inference_steps"]
        draw_pictures(
            self.wanted,
            model.picture_folder.pictures,
            self.protocol,
            lambda prompts, seeds, scale, done: self.game.draw(self.game.player, prompts, seeds, scale, steps, done),
            self.accelerator,
            lambda scale, total: self.progress.phase(f"{model.name}: draw at guidance {scale:g}", total),
            self._drawn_by(model),
        )
        self.score(model)

    def is_drawn(self, model: EvaluatedModel) -> bool:
        """Whether its pictures are there, and theirs alone."""
        return are_drawn(self.wanted, model.picture_folder.pictures, self.protocol, self._drawn_by(model))

    def is_scored(self, model: EvaluatedModel) -> bool:
        """Whether they have the scores of the scorers as they are now."""
        return is_scored(model.picture_folder, self.protocol["guidance_scales"], self.specs)

    def score(self, model: EvaluatedModel) -> None:
        """Scores of pictures that are there."""
        score_pictures(
            {model.name: model.picture_folder},
            self.protocol["guidance_scales"],
            self.specs,
            self.accelerator,
            lambda scorer, total: self.progress.phase(f"{model.name}: score by {scorer}", total),
        )

    def conclude(
        self, root: Path, models: list[EvaluatedModel], title: str, prompts: Sequence[str], **more: Any
    ) -> tuple[Results, list[Comparison]]:
        """The results, with the curator's scorer as one that was aimed at."""
        curator = self.config.curation.curation_scorer
        return conclude(
            root,
            models,
            self.protocol,
            self.specs,
            title=title,
            headline_scale=self.headline_scale,
            training_captions=prompts,
            in_domain=[parse_spec(curator)[0]] if curator else [],
            **more,
        )

    def measures(self, models: list[EvaluatedModel]) -> list[dict[str, Any]]:
        """Nothing beside the scores."""
        return []

    def show(self, title: str, folder: Path) -> None:
        """The gallery's images to TensorBoard, wandb or trackio."""
        pictures = self._gallery_pictures(folder)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(picture) for _, picture in pictures])
                tracker.writer.add_images(f"validation/{title}", stacked, 0, dataformats="NHWC")
            elif tracker.name in ("wandb", "trackio"):
                library = __import__(tracker.name)
                images = [library.Image(picture, caption=prompt) for prompt, picture in pictures]
                if tracker.name == "wandb":
                    tracker.log({f"validation/{title}": images})
                else:  # it leaves out lists without a word
                    tracker.log({f"validation/{title}/{number}": image for number, image in enumerate(images, start=1)})

    def finish(self, models: list[EvaluatedModel]) -> None:
        """Draw the gallery: the same prompts and seeds side by side, base to last round."""
        path = Path(self.config.run.output_dir) / "samples.png"
        columns = [self._gallery_pictures(model.picture_folder.pictures.parent) for model in models]
        rows = [(cells[0][0], [picture for _, picture in cells]) for cells in zip(*columns, strict=True)]
        draw_gallery([model.name for model in models], rows, path)
        print(f"Pictures, the same prompts and seeds for every model: {path}")

    def _gallery_pictures(self, folder: Path) -> list[tuple[str, Image.Image]]:
        """The first picture of each gallery prompt at the headline's guidance scale; grey where it is lost."""
        images = folder / "images" / folder_of(self.headline_scale)
        pictures = []
        for row in self.prompts.requests(1, self.protocol["seed"])[:GALLERY_PROMPTS]:
            path = images / f"{row['id']}-0.png"
            grey = Image.new("RGB", (self.game.resolution,) * 2, "grey")
            pictures.append((row["prompt"], read_picture(path) if path.is_file() else grey))
        return pictures

    def _drawn_by(self, model: EvaluatedModel) -> str:
        """Hash of the model with all of its parts."""
        return key_of(base=self.drawn_with, weights=model.weights_sha256)
