"""Settings of a training run: frozen dataclasses, one per topic, read from YAML and the command line.

To add a setting, add a field with a docstring to the dataclass of the room that uses it.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from spin_diffusion.data import DataSettings
from spin_diffusion.diffusion.game import DenoiserSettings
from spin_diffusion.diffusion.images import ImageSettings
from spin_diffusion.diffusion.sampling import SamplingSettings
from spin_diffusion.diffusion.shortcuts import ProbeSettings
from spin_diffusion.evaluation.settings import EvaluationSettings
from spin_diffusion.input_error import InputError
from spin_diffusion.parsing import parse_sections
from spin_diffusion.running import RunSettings, check_ranges
from spin_diffusion.selfplay.rounds import RoundSettings
from spin_diffusion.selfplay.train import TrainSettings


@dataclass(frozen=True)
class ModelSettings:
    """The base checkpoint."""

    pretrained_model_name_or_path: str | None = None
    """Hub id, or local folder in diffusers' layout, of a Stable Diffusion 1.x, 2.x or SDXL pipeline."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE than the checkpoint's."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelSettings
    data: DataSettings
    images: ImageSettings
    sampling: SamplingSettings
    rounds: RoundSettings
    training: TrainSettings
    denoiser: DenoiserSettings
    probe: ProbeSettings
    evaluation: EvaluationSettings
    run: RunSettings

    def __post_init__(self) -> None:
        _check(self)

    def flat(self) -> dict[str, Any]:
        """Every setting by its flag."""
        return {key: value for section in asdict(self).values() for key, value in section.items() if key != "hub_token"}


SECTIONS = {field.name: field.type for field in fields(Config)}


def parse_config(argv: list[str] | None = None) -> Config:
    """The settings on the command line over those of `--config` over the defaults.

    Raises:
        InputError: an unknown key (with the nearest one), a wrong type, a value out of range.
    """
    return Config(**parse_sections(SECTIONS, argv, listed=("scorers",)))


def _check(config: Config) -> None:
    """Ranges and rules across settings. Each message names the flags and their values."""
    if not config.model.pretrained_model_name_or_path:
        raise InputError("--pretrained_model_name_or_path is missing: give a hub id or a local folder")
    check_ranges(config.flat())
    if config.rounds.stop_when_learnt:
        raise InputError("--stop_when_learnt needs held-out samples, which are not set aside for images: leave it out")
