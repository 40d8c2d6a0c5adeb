"""What an image run is evaluated by: pictures of the player at every guidance scale, their scores, a gallery."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.evaluation.evaluated import EvaluatedModel
from spin_diffusion.evaluation.gallery import draw_gallery, log_pictures, picture_or_grey
from spin_diffusion.evaluation.prompt_sets import PromptSet
from spin_diffusion.evaluation.protocols import protocol_of
from spin_diffusion.evaluation.records import Protocol
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.runs.evaluator import EvaluationSamples
from spin_diffusion.runs.real_pictures import of_run
from spin_diffusion.samples.drawn import Shards, folder_of, picture_shards
from spin_diffusion.samples.sampling import OWN_SIZE, Sampling
from spin_diffusion.store.progress import Progress, tell

GALLERY_PROMPTS = 6
"""Prompts shown in samples.png."""


def picture_protocol(config: Config, prompts: PromptSet, sampling: Sampling) -> tuple[Protocol, float]:
    """How the pictures of a run's evaluations are drawn, and the guidance scale of its headline; what is not set is
    that of the opponent's samples.

    Args:
        sampling: of the opponent.
    """
    scales = config.evaluation.validation_guidance_scales or [sampling.guidance_scale]
    protocol = protocol_of(
        prompts,
        images_per_prompt=config.evaluation.num_validation_images,
        seed=config.rounds.seed,
        sampling=replace(sampling, size_condition=OWN_SIZE),
        guidance_scales=scales,
    )
    return protocol, sampling.guidance_scale if sampling.guidance_scale in scales else scales[-1]


class PictureSamples(EvaluationSamples):
    """The pictures of a run's validation prompts."""

    def __init__(
        self, config: Config, prompts: PromptSet, game: DiffusionGame, progress: Progress, held_out: Path | None
    ) -> None:
        """Args: held_out: folder of the real images that are not trained on."""
        protocol, self.headline_scale = picture_protocol(config, prompts, game.opponent_sampling)
        super().__init__(config.evaluation.scorers or [], protocol, progress, self._shards)
        self.config, self.prompts, self.game, self.accelerator = config, prompts, game, game.accelerator
        self.wanted = prompts.requests(config.evaluation.num_validation_images, self.protocol["seed"])
        curator = config.data.curation.scorer  # it was aimed at
        self.real = of_run(config, held_out)
        self.in_domain = [parse_spec(curator)[0]] if curator else []

    def _shards(self, model: EvaluatedModel) -> Shards:
        """The player's images of the run's prompts."""
        drawn_by = self.game.player_key(model.weights_sha256)
        draw = partial(self.game.draw, self.game.player)
        # As few at a time as there are in a batch, which is the same in the whole run: no process is to stand idle
        batch = self.game.sampling.generation_batch_size
        return picture_shards(self.wanted, model.folder.samples, self.protocol, drawn_by, draw, batch)

    def show(self, title: str, folder: Path) -> None:
        """The gallery's images to TensorBoard, wandb or trackio."""
        log_pictures(f"validation/{title}", self._gallery_pictures(folder), 0, self.accelerator)

    def finish(self, models: list[EvaluatedModel]) -> None:
        """Draw the gallery: the same prompts and seeds side by side, base to last round."""
        path = Path(self.config.run.output_dir) / "samples.png"
        columns = [self._gallery_pictures(model.folder.samples.parent) for model in models]
        rows = [(cells[0][0], [picture for _, picture in cells]) for cells in zip(*columns, strict=True)]
        draw_gallery([model.name for model in models], rows, path)
        tell(f"Pictures, the same prompts and seeds for every model: {path}")

    def _gallery_pictures(self, folder: Path) -> list[tuple[str, Image.Image]]:
        """The first picture of each gallery prompt at the headline's guidance scale; grey where it is lost."""
        images = folder / "images" / folder_of(self.headline_scale)
        rows = self.prompts.requests(1, self.protocol["seed"])[:GALLERY_PROMPTS]
        side = self.game.resolution
        return [(row["prompt"], picture_or_grey(images / f"{row['id']}-0.png", side)) for row in rows]
