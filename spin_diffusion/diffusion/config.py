"""Settings of a training run: frozen dataclasses, one per topic, read from YAML and the command line.

To add a setting, add a field with a docstring to the dataclass of the room that uses it.
"""

from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from spin_diffusion.data.settings import DataSettings
from spin_diffusion.diffusion.settings import (
    CacheSettings,
    CurationSettings,
    DenoiserSettings,
    ImageSettings,
    LoraSettings,
    ProbeSettings,
    SamplingSettings,
    TrajectorySettings,
)
from spin_diffusion.evaluation.settings import EvaluationSettings
from spin_diffusion.selfplay.round_settings import CandidateSettings, RoundSettings, objectives_of, source_of
from spin_diffusion.selfplay.run_settings import RunSettings
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.parsing import parse_sections
from spin_diffusion.store.settings import Settings, setting


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The base checkpoint."""

    pretrained_model_name_or_path: str | None = setting(None, first=True)
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
    curation: CurationSettings
    images: ImageSettings
    caches: CacheSettings
    sampling: SamplingSettings
    trajectory: TrajectorySettings
    rounds: RoundSettings
    candidates: CandidateSettings
    training: TrainSettings
    denoiser: DenoiserSettings
    lora: LoraSettings
    probe: ProbeSettings
    evaluation: EvaluationSettings
    run: RunSettings

    def __post_init__(self) -> None:
        _check(self)

    def flat(self) -> dict[str, Any]:
        """Every setting by its flag."""
        return {key: value for section in asdict(self).values() for key, value in section.items()}


SECTIONS: dict[str, type] = get_type_hints(Config)


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
    if config.rounds.stop_when_learnt:
        raise InputError("--stop_when_learnt needs held-out samples, which are not set aside for images: leave it out")
    if config.curation.one_per_prompt and config.data.one_image_per_prompt:
        raise InputError(
            "--one_per_prompt keeps the best image of each prompt, --one_image_per_prompt the first: give one of them"
        )
    if config.trajectory.trajectory != "forward":
        _check_trajectory(config)
    if config.images.max_aspect_ratio > 1:
        _check_sizes(config)
    _check_candidates(config.candidates, config.rounds)
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


def _check_trajectory(config: Config) -> None:
    flag = f"--trajectory {config.trajectory.trajectory}"
    if config.sampling.sampler != "ddim":
        raise InputError(
            f"{flag} is made of the steps of --sampler ddim, not of {config.sampling.sampler}: give --sampler ddim"
        )
    if config.rounds.opponent in ("last_two", "pool"):
        raise InputError(f"{flag} keeps the trajectories of one opponent, not of --opponent {config.rounds.opponent}")
    if config.candidates.num_candidates:
        raise InputError(f"{flag} has no way for the real side of candidates: leave --num_candidates out")
    if config.images.random_flip:
        raise InputError(f"{flag} keeps the denoising steps of images as they were drawn: leave --random_flip out")
    if config.images.max_aspect_ratio > 1:
        raise InputError(f"{flag} keeps the denoising steps of images of one size: leave --max_aspect_ratio out")
    for name in objectives_of(config.rounds) + [name for name in config.run.compare_with or []]:
        if source_of(config.rounds, name) == "data":
            raise InputError(
                f"{flag} needs the generated side's denoising steps, which the data set's worse images of --objective "
                f"{name} do not have: take --trajectory forward, or --generated_from opponent"
            )


def _check_fixed_draws(config: Config) -> None:
    flag = f"--fixed_draws {config.denoiser.fixed_draws}"
    if config.trajectory.trajectory != "forward":
        raise InputError(f"{flag} are of --trajectory forward, not of {config.trajectory.trajectory}")
    if config.training.refresh_opponent_steps:
        raise InputError(
            f"{flag} keep the errors of one opponent, which --refresh_opponent_steps "
            f"{config.training.refresh_opponent_steps} changes in the middle of a round: leave one of them out"
        )
    if config.lora.use_lora and config.lora.lora_dropout:
        raise InputError(
            f"{flag} are scored once, in other batches than the player's, and --lora_dropout "
            f"{config.lora.lora_dropout} would drop other weights there: set it to 0"
        )
    if config.candidates.num_candidates:
        raise InputError(f"{flag} are not made for candidates: leave --num_candidates out")


def _check_candidates(candidates: CandidateSettings, rounds: RoundSettings) -> None:
    num, share = candidates.num_candidates, candidates.candidate_share
    if num == 0:
        if candidates.candidate_scorer is not None or share != 1.0:
            flag = (
                f"scorer {candidates.candidate_scorer}" if candidates.candidate_scorer is not None else f"share {share}"
            )
            raise InputError(f"--candidate_{flag} needs --num_candidates 2 or more")
        return
    if num < 2:
        raise InputError(f"--num_candidates {num} must be at least 2, a best and a worst, or 0 for none")
    if candidates.candidate_scorer is None:
        raise InputError(
            f"--num_candidates {num} needs --candidate_scorer, which tells the best from the worst: NAME[=PATH], such "
            "as pickscore, or the path of a .py file"
        )
    if not 0 < share <= 1:
        raise InputError(f"--candidate_share {share} must be above 0 and at most 1")
    if rounds.num_generated > 1:
        raise InputError(
            f"--num_generated {rounds.num_generated} and --num_candidates {num} exclude each other: one draws several "
            "images against each real one, the other keeps two of several; leave one of them out"
        )
    for name in objectives_of(rounds):
        if source_of(rounds, name) != "opponent":
            raise InputError(
                f"--num_candidates {num} needs an objective whose generated side the opponent draws, which --objective "
                f"{name}{' with --generated_from data' if rounds.generated_from == 'data' else ''} has not: give spin, "
                "say, or leave it out"
            )
