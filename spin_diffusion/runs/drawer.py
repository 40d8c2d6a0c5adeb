"""Models of any kind, opened to draw."""

from typing import Any

import torch
from accelerate import Accelerator

from spin_diffusion.diffusion.base import Base, load_to_draw, parts_hash
from spin_diffusion.diffusion.model_sources import ModelSource
from spin_diffusion.diffusion.prompts import CutPrompts
from spin_diffusion.diffusion.sampling import draw_images, drawing_pipeline
from spin_diffusion.evaluation.prompt_sets import PromptSet
from spin_diffusion.runs.evaluate_settings import EvaluateSettings
from spin_diffusion.samples.drawn import Draw
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.progress import tell
from spin_diffusion.store.weights import config_of


class Drawer:
    """Draws with any of the models; rounds of one base share its pipeline, and one base is held at a time."""

    def __init__(self, settings: EvaluateSettings, prompts: PromptSet, accelerator: Accelerator) -> None:
        self.settings, self.prompts, self.accelerator = settings, prompts, accelerator
        self.base: Base | None = None
        self.family: Any = None
        self.pipeline: Any = None
        self.parts = ""
        self._told: set[Base] = set()
        """Bases whose cut prompts were said: a sweep opens them again and again."""

    def resolution(self, source: ModelSource) -> int:
        """The usual image size of a model's family."""
        self._load(source)
        return self.family.RESOLUTION

    def open(self, source: ModelSource) -> tuple[Draw, str, str]:
        """The function that draws, the hash of the UNet's weights, and that of the model with all of its parts."""
        self._load(source)
        strength = source.strength if source.strength != 1 else None
        pipeline = drawing_pipeline(
            self.pipeline,
            self.settings.sampler,
            unet=source.unet,
            lora=source.lora,
            strength=strength,
            base_hash=source.base_hash,
        )
        digest = weights_hash(pipeline.unet)
        batch_size = self.settings.generation_batch_size

        def draw(prompts, seeds, sampling, done):
            return draw_images(pipeline, prompts, seeds, sampling, batch_size=batch_size, done=done)

        return draw, digest, key_of(weights=digest, unet=config_of(pipeline.unet), parts=self.parts)

    def close(self) -> None:
        """Free the memory for the scorers."""
        self.base = self.pipeline = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, source: ModelSource) -> None:
        assert source.base is not None
        if self.base != source.base:
            self.close()
            self.family, self.pipeline = load_to_draw(source.base, self.accelerator.device)
            self.base, self.parts = source.base, parts_hash(self.pipeline)
            if source.base not in self._told:
                self._told.add(source.base)
                if line := CutPrompts(self.pipeline).add(row.prompt for row in self.prompts.rows).line("prompts"):
                    tell(line, self.accelerator)
