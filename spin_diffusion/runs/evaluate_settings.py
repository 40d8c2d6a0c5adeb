"""What `spin-diffusion evaluate` can be told, without the libraries that draw and score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spin_diffusion.diffusion.settings import check_resolution
from spin_diffusion.evaluation.records import FailOn
from spin_diffusion.samples.sampling import Sweep
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.parsing import parse
from spin_diffusion.store.settings import SEEDS, Settings, setting

MAX_IMAGES_PER_PROMPT = 10_000


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """What is compared, on which prompts, by which scorers."""

    models: list[str] | None = setting(None, harmless=True)
    """NAME=PATH_OR_ID of each model: a pipeline (folder, single file or hub id), a round's folder, or a folder of
    pictures. A run or its round may have a strength: a=RUN@0.7 goes 0.7 of the way from its base to its player."""
    base_config: str | None = None
    """Folder or hub id of a checkpoint in diffusers' layout, from which the configuration and the tokenizers of single
    files are taken."""
    revision: str | None = None
    """Branch, tag or commit of the pipelines that are hub ids; a round takes all that its run was started with."""
    variant: str | None = None
    """Variant of the pipelines' weight files, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE than the pipelines' own."""
    baseline: str | None = setting(None, harmless=True)
    """Name of the model that the others are compared with; default: the first."""
    prompts: str | None = None
    """File of prompts or name of a set; default: those of the pictures, when all models are folders of pictures."""
    max_prompts: int | None = setting(None, minimum=1)
    """Only the first ones."""
    images_per_prompt: int | None = setting(None, minimum=1, maximum=MAX_IMAGES_PER_PROMPT)
    """Images of each prompt, each with a seed of its own that all models share; 2 or more show diversity. Default: as
    many as the given folders of pictures have, else 4."""
    scorers: list[str] | None = setting(None, harmless=True)
    """NAME[=PATH] of scorers, joined by commas."""
    distribution_features: str | None = setting(None, harmless=True)
    """NAME[=PATH] of an embedding (dinov2, clip_l14), or path of a .py file: compare the distribution of each model's
    images with that of --reference_images. It takes 100 of either."""
    reference_images: str | None = setting(None, harmless=True)
    """Folder of real pictures, or data set of them as --dataset_name of training takes it, for --distribution_features;
    they are cropped to the size of the drawn ones."""
    num_inference_steps: int = setting(50, minimum=1)
    """Denoising steps per image."""
    guidance_scale: float | list[float] = setting(7.5, minimum=0)
    """Guidance scale, or several to compare at each; the last is the headline's."""
    sampler: Literal["checkpoint", "ddim", "dpmpp"] = "ddim"
    """checkpoint = the scheduler that each model names."""
    prediction_scale: float = setting(1.0, above=0)
    """Factor of the noise that the denoiser predicts; above 1 the sampler is colder."""
    sweep: Sweep = setting(Sweep(), harmless=True)
    """Draw each model at every combination too, choose the best by the first scorer on one half of the prompts, and
    show what it gains on the other: "{guidance_scale: [1, 2, 3], num_inference_steps: [10, 20], prediction_scale: [1,
    1.04]}"; with `by: fd` among them by the distance to the real pictures."""
    resolution: int | None = None
    """Image size, px; default: the family's."""
    generation_batch_size: int = setting(8, minimum=1, harmless=True)
    """Images drawn at a time; guidance doubles the UNet's batch."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the UNet while it draws; scores are always computed in fp32."""
    training_captions: str | None = setting(None, harmless=True)
    """File of the training set's captions, to find evaluation prompts that were trained on."""
    allow_unequal_protocol: bool = setting(False, harmless=True)
    """Compare pictures although they were drawn by another protocol, or nobody knows by which."""
    seed: int = setting(0, minimum=0, below=SEEDS)
    """Seed of the pictures."""
    output_dir: str = setting("runs/evaluation", harmless=True)
    """Everything is written here; the same command again resumes."""
    fail_on: FailOn | None = setting(None, harmless=True)
    """Exit with code 3 where a verdict is this or worse (improved, inconclusive, suspect, regressed), for CI: regressed
    lets everything pass that is not worse, inconclusive only what is improved."""
    debug: bool = setting(False, harmless=True)
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.guidance_scales or len(set(self.guidance_scales)) < len(self.guidance_scales):
            raise InputError(f"--guidance_scale {self.guidance_scale} must have at least one value, and none twice")
        check_resolution(self.resolution)
        if (self.distribution_features is None) != (self.reference_images is None):
            raise InputError("--distribution_features and --reference_images need each other: give both, or neither")
        if self.sweep.by == "fd" and self.distribution_features is None:
            raise InputError("--sweep by fd needs real pictures: give --distribution_features and --reference_images")

    @property
    def num_images(self) -> int:
        """Images of each prompt."""
        return 4 if self.images_per_prompt is None else self.images_per_prompt

    @property
    def guidance_scales(self) -> list[float]:
        """As a list."""
        return self.guidance_scale if isinstance(self.guidance_scale, list) else [self.guidance_scale]


def parse_settings(argv: Sequence[str]) -> EvaluateSettings:
    """The settings on the command line over those of `--config` over the defaults."""
    return parse(EvaluateSettings, argv, listed=("models", "scorers"))
