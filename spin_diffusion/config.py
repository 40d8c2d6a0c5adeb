"""Settings of a training run: frozen dataclasses, one per topic, read from YAML and the command line.

To add a setting, add a field with a docstring to the dataclass of the room that uses it.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import yaml

from spin_diffusion.data import DataSettings
from spin_diffusion.diffusion.game import DenoiserSettings
from spin_diffusion.diffusion.images import ImageSettings
from spin_diffusion.diffusion.sampling import SamplingSettings
from spin_diffusion.evaluation.settings import EvaluationSettings
from spin_diffusion.input_error import InputError
from spin_diffusion.parsing import nearest, parse_sections
from spin_diffusion.selfplay.objectives import OBJECTIVES
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
class RunSettings:
    """Where results go."""

    output_dir: str = "runs/spin"
    """Everything is written here; the same command again resumes."""
    compare_with: list[str] | None = None
    """Objectives to train beside the run, from the same base with the same steps, for the table; sft, say."""
    logging_dir: str = "logs"
    """Folder of the trackers below output_dir."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, trackio, all or none. The last two of the names need their extra."""
    tracker_project_name: str = "spin-diffusion"
    """The trackers' project."""
    push_to_hub: bool = False
    """Upload the UNet, the model card and the report at the end."""
    hub_model_id: str | None = None
    """Repository to upload to; default: the output folder's name."""
    hub_token: str | None = None
    """Token for the hub; default: the one that is logged in."""
    debug: bool = False
    """Show the traceback of an error."""


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
    evaluation: EvaluationSettings
    run: RunSettings

    def __post_init__(self) -> None:
        _check(self)

    def flat(self) -> dict[str, Any]:
        """Every setting by its flag."""
        return {key: value for section in asdict(self).values() for key, value in section.items() if key != "hub_token"}


SECTIONS = {field.name: field.type for field in fields(Config)}

# A change of these does not change the result, or only continues it
HARMLESS = {
    "output_dir", "debug", "logging_dir", "report_to", "tracker_project_name", "rounds", "checkpointing_steps",
    "checkpoints_total_limit", "keep_checkpoints", "resume_from_checkpoint", "vae_encode_batch_size", "cache_dir",
    "push_to_hub", "hub_model_id", "hub_token",
}  # fmt: skip


def parse_config(argv: list[str] | None = None) -> Config:
    """The settings on the command line over those of `--config` over the defaults.

    Raises:
        InputError: an unknown key (with the nearest one), a wrong type, a value out of range.
    """
    return Config(**parse_sections(SECTIONS, argv, listed=("scorers",)))


def write_config(config: Config, path: Any) -> None:
    """All settings as a YAML file that `--config` reads."""
    path.write_text(yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True))


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that differ and would change a result, each as `key: old -> new`."""
    keys = sorted((old.keys() | new.keys()) - HARMLESS)
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _check(config: Config) -> None:
    """Ranges and rules across settings. Each message names the flags and their values."""
    if not config.model.pretrained_model_name_or_path:
        raise InputError("--pretrained_model_name_or_path is missing: give a hub id or a local folder")
    flat = config.flat()
    at_least = {
        "rounds": 1, "max_train_steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1,
        "checkpointing_steps": 1, "lr_warmup_steps": 0, "max_grad_norm": 0, "samples_per_shard": 1,
        "num_validation_images": 1, "vae_encode_batch_size": 1, "adam_weight_decay": 0, "seed": 0,
    }  # fmt: skip
    for key, lowest in at_least.items():
        for value in flat[key] if isinstance(flat[key], list) else [flat[key]]:
            if value < lowest:
                raise InputError(f"--{key} {value} must be at least {lowest}")
    for key in ("learning_rate", "beta", "mu", "adam_epsilon", "ema_decay"):
        for value in flat[key] if isinstance(flat[key], list) else [flat[key]]:
            if value <= 0:
                raise InputError(f"--{key} {value} must be above 0")
    for key in ("max_train_steps", "learning_rate", "beta", "lr_warmup_steps"):
        if flat[key] == []:
            raise InputError(f"--{key} is an empty list: give one value, or one per round")
    if config.training.checkpoints_total_limit is not None and config.training.checkpoints_total_limit < 1:
        raise InputError(f"--checkpoints_total_limit {config.training.checkpoints_total_limit} must be at least 1")
    saturation = config.training.stop_at_saturation
    if saturation is not None and not 0 < saturation <= 1:
        raise InputError(f"--stop_at_saturation {saturation} must be above 0 and at most 1")
    for name in config.run.compare_with or []:
        if name not in OBJECTIVES:
            raise InputError(f"--compare_with {name}: no such objective{nearest(name, list(OBJECTIVES))}")
