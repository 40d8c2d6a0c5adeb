"""Settings of a training run: frozen dataclasses, one per topic, read from YAML and the command line.

To add a setting, add a field with a docstring to the dataclass of the room that uses it.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

from spin_diffusion.data.settings import DataSettings
from spin_diffusion.diffusion.settings import (
    DenoiserSettings,
    ImageRoundSettings,
    ImageSettings,
    SamplingSettings,
)
from spin_diffusion.evaluation.settings import EvaluationSettings, RunConfig, check_selection
from spin_diffusion.selfplay.round_settings import objectives_of, source_of
from spin_diffusion.selfplay.run_settings import RunSettings
from spin_diffusion.selfplay.train_settings import LoraSettings, TrainSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.parsing import parse
from spin_diffusion.store.settings import Settings, setting


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The base checkpoint."""

    pretrained_model_name_or_path: str | None = setting(None, first=True)
    """Hub id, local folder in diffusers' layout, or single .safetensors file, of a Stable Diffusion 1.x, 2.x or SDXL
    pipeline."""
    base_config: str | None = None
    """Folder or hub id of a checkpoint in diffusers' layout, from which configuration and tokenizers of a single file
    are taken, and no weights. Default: that of SD 1.5 or SDXL base on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE than the checkpoint's."""
    init_lora: str | None = None
    """PATH or PATH@STRENGTH of an adapter in diffusers' or kohya's form, .safetensors, that is fused into UNet and text
    encoders before the first round."""


@dataclass(frozen=True)
class Config(RunConfig):
    """All settings of a run."""

    model: ModelSettings
    data: DataSettings
    images: ImageSettings
    sampling: SamplingSettings
    rounds: ImageRoundSettings
    training: TrainSettings
    denoiser: DenoiserSettings
    lora: LoraSettings
    evaluation: EvaluationSettings
    run: RunSettings

    name_the_base: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(ModelSettings))

    def __post_init__(self) -> None:
        _check(self)


def parse_config(argv: list[str] | None = None) -> Config:
    """The settings on the command line over those of `--config` over the defaults.

    Raises:
        InputError: an unknown key (with the nearest one), a wrong type, a value out of range.
    """
    return parse(Config, argv, listed=("scorers",))


def _check(config: Config) -> None:
    """Ranges and rules across settings. Each message names the flags and their values."""
    if not config.model.pretrained_model_name_or_path:
        raise InputError("--pretrained_model_name_or_path is missing: give a hub id or a local folder")
    check_selection(config, config.data.holds_out)
    if config.training.select_by == "fd" and config.evaluation.distribution_features is None:
        raise InputError("--select_by fd needs the features whose distance it is: give --distribution_features")
    if config.images.max_aspect_ratio > 1:
        _check_sizes(config)
    if config.rounds.candidates.number:
        _check_candidates(config.rounds)
    if config.denoiser.fixed_draws:
        _check_fixed_draws(config)


def _check_sizes(config: Config) -> None:
    flag = f"--max_aspect_ratio {config.images.max_aspect_ratio:g}"
    if config.denoiser.compile != "no":
        raise InputError(
            f"{flag}: --compile {config.denoiser.compile} would compile the UNet anew for every size of its images: "
            "leave one of the two out"
        )
    if config.training.fully_shard and config.training.train_batch_size > 1:
        raise InputError(
            f"{flag}: a batch of several sizes takes several passes, and with --fully_shard all processes must take as "
            f"many: set --train_batch_size 1 instead of {config.training.train_batch_size}, with more "
            "--gradient_accumulation_steps"
        )


def _check_fixed_draws(config: Config) -> None:
    flag = f"--fixed_draws {config.denoiser.fixed_draws}"
    if config.rounds.candidates.number:
        raise InputError(f"{flag} are not made for candidates: leave --candidates out")


def _check_candidates(rounds: ImageRoundSettings) -> None:
    flag = f"--candidates number {rounds.candidates.number}"
    if rounds.num_generated > 1:
        raise InputError(
            f"--num_generated {rounds.num_generated} and {flag} exclude each other: one draws several "
            "images against each real one, the other keeps two of several; leave one of them out"
        )
    for name in objectives_of(rounds):
        if source_of(rounds, name) != "opponent":
            raise InputError(
                f"{flag} needs an objective whose generated side the opponent draws, which --objective "
                f"{name}{' with --generated_from data' if rounds.generated_from == 'data' else ''} has not: give spin, "
                "say, or leave it out"
            )
