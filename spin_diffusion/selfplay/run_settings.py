"""Where results go, which settings may change in a resumed run, and what values they may have."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from spin_diffusion.selfplay.objectives import OBJECTIVES, check_options
from spin_diffusion.selfplay.round_settings import RoundSettings
from spin_diffusion.selfplay.train_settings import LR_SCHEDULERS, POLYNOMIAL_END, TrainSettings
from spin_diffusion.store.folder import MARKER
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.names import file_name, folder_inside
from spin_diffusion.store.parsing import nearest

_TAKEN = ("data", "base", "encodings", "unet", "lora", "model")
"""Folders of a run."""
MAX_ROUNDS = 10_000
MAX_BETA = 1e30
"""Beyond, its product with a difference of scores is no number in fp32."""


@dataclass(frozen=True)
class RunSettings:
    """Where results go."""

    output_dir: str = "runs/spin"
    """Everything is written here; the same command again resumes."""
    compare_with: list[str] | None = None
    """Objectives to train beside the run, from the same base with the same steps, for the table; sft, say."""
    logging_dir: str = "logs"
    """Folder below output_dir for tensorboard; wandb and trackio keep to their own (WANDB_DIR, TRACKIO_DIR)."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, trackio, all (that are installed) or none. wandb and trackio need the extra of their name."""
    tracker_project_name: str = "spin-diffusion"
    """The trackers' project: a name, not a path."""
    matrix_flops_per_second: float | None = None
    """What one device can do in large matrix products, FLOP/s: the ledger says what share of it was reached. Default:
    measured at the start."""
    push_to_hub: bool = False
    """Upload the trained weights or adapter, the model card and the report at the end."""
    hub_model_id: str | None = None
    """Repository to upload to; default: the output folder's name."""
    hub_token: str | None = None
    """Token for the hub; default: the one that is logged in."""
    debug: bool = False
    """Show the traceback of an error."""


# A change of these does not change the result, or only continues it
HARMLESS = {
    "output_dir", "debug", "logging_dir", "report_to", "tracker_project_name", "rounds", "checkpointing_steps",
    "checkpoints_total_limit", "keep_checkpoints", "resume_from_checkpoint", "vae_encode_batch_size", "cache_dir",
    "push_to_hub", "hub_model_id", "hub_token", "probe_samples", "on_shortcut",
    "encodings_dir", "matrix_flops_per_second", "vllm_memory_share",
    # How a step's pairs are split, which the number of processes decides too; `write_manifest` checks their number
    "train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip


PER_ROUND = {
    field.name
    for settings in (RoundSettings, TrainSettings)
    for field in fields(settings)
    if {get_origin(kind) is list for kind in get_args(field.type) if kind is not NoneType} == {True, False}
}
"""Settings that take one value, or a list with one for each round."""


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that differ and would change a result, each as `key: old -> new`."""
    keys = sorted((old.keys() | new.keys()) - HARMLESS)
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def check_paths(flat: Mapping[str, Any]) -> None:
    """InputError for a name that would lead the trackers out of the run's folder."""
    file_name(flat["tracker_project_name"], "--tracker_project_name")
    first = Path(folder_inside(flat["logging_dir"], "--logging_dir")).parts[:1]
    if first and (first[0] in _TAKEN or first[0].startswith(("round-", MARKER)) or Path(first[0]).suffix):
        raise InputError(f"--logging_dir {flat['logging_dir']} is where a run keeps other things: give another name")


def check_ranges(flat: dict[str, Any]) -> None:
    """Ranges of the settings by their flags; those that a kind of run does not have are passed over.

    Raises:
        InputError: names the flag, its value and the range.
    """

    def values(key: str) -> list[Any]:
        if flat.get(key) == []:
            raise InputError(f"--{key} is an empty list: give one value, or one per round")
        found = flat[key] if isinstance(flat.get(key), list) else [flat.get(key)]
        return [value for value in found if value is not None]

    at_least = {
        "rounds": 1, "max_train_steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1,
        "checkpointing_steps": 1, "lr_warmup_steps": 0, "max_grad_norm": 0, "samples_per_shard": 1,
        "num_validation_images": 1, "vae_encode_batch_size": 1, "adam_weight_decay": 0, "seed": 0, "num_generated": 1,
        "real_parts": 1, "checkpoints_total_limit": 1, "generation_batch_size": 1, "refresh_opponent_steps": 1,
        "lr_num_cycles": 1, "lr_power": 0, "max_validation_prompts": 1, "validation_num_inference_steps": 1,
        "num_gallery_prompts": 0,
        "sft_weight": 0, "pool_weights": 0, "max_distance": 0, "max_error_growth": 0, "max_gradient_ratio": 1,
    }  # fmt: skip
    for key, lowest in at_least.items():
        for value in values(key):
            if value < lowest:
                raise InputError(f"--{key} {value} must be at least {lowest}")
    for key, highest in {"rounds": MAX_ROUNDS, "beta": MAX_BETA}.items():
        for value in values(key):
            if value > highest:
                raise InputError(f"--{key} {value} must be at most {highest:,}")
    for value in values("seed"):
        if value >= 2**32:  # numpy's generators take no larger one
            raise InputError(f"--seed {value} must be below {2**32}")
    above_0 = ("learning_rate", "beta", "mu", "adam_epsilon", "num_train_epochs", "matrix_flops_per_second")
    for key in above_0:
        for value in values(key):
            if value <= 0:
                raise InputError(f"--{key} {value} must be above 0")
    for value in values("lr_scheduler"):
        if value not in LR_SCHEDULERS:
            raise InputError(
                f"--lr_scheduler {value}: give one of {', '.join(LR_SCHEDULERS)}{nearest(value, list(LR_SCHEDULERS))}"
            )
        if value == "polynomial" and min(values("learning_rate"), default=1) <= POLYNOMIAL_END:
            raise InputError(
                f"--learning_rate {min(values('learning_rate'))} must be above {POLYNOMIAL_END}, where polynomial ends"
            )
    check_paths(flat)
    values("objective")
    for name in flat.get("compare_with") or []:
        if name not in OBJECTIVES:
            raise InputError(f"--compare_with {name}: no such objective{nearest(name, list(OBJECTIVES))}")
    for key in ("margin_dropout", "opponent_ema_decay", "adam_beta1", "adam_beta2"):
        for value in values(key):
            if not 0 <= value < 1:
                raise InputError(f"--{key} {value} must be at least 0 and below 1")
    if flat.get("pool_weights") and sum(values("pool_weights")) == 0:
        raise InputError("--pool_weights are all 0: give one of the selves a weight")
    objective = flat["objective"] if isinstance(flat["objective"], list) else [flat["objective"]]
    check_options(list(dict.fromkeys(objective)), flat.get("objective_options") or {})
    for key in ("stop_at_saturation", "ema_decay"):
        for value in values(key):
            if not 0 < value <= 1:
                raise InputError(f"--{key} {value} must be above 0 and at most 1")
    for value in values("lr_warmup_ratio"):
        if not 0 <= value <= 1:
            raise InputError(f"--lr_warmup_ratio {value} must be between 0 and 1")
    if not values("max_train_steps") and not values("num_train_epochs"):
        raise InputError("give the length of a round: --max_train_steps, or --num_train_epochs")
    if flat["real_parts"] > flat["samples_per_shard"]:
        raise InputError(
            f"--real_parts {flat['real_parts']} must be at most --samples_per_shard {flat['samples_per_shard']}: each "
            "part takes rows of every file"
        )
