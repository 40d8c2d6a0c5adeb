"""How every kind of run is started: its folder, its processes, its manifest and the first lines that it prints."""

import logging
import os
import platform
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import diffusers
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import KwargsHandler, LoggerType, set_seed
from torch import nn

from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.runs.advice import visits_of_round
from spin_diffusion.runs.continuing import BaseRecord, check_origin, origin_of, take_over
from spin_diffusion.samples.real import DataManifest, forget_prepared
from spin_diffusion.selfplay.round_settings import file_hashes, objectives_of
from spin_diffusion.selfplay.sharded import check_sharding
from spin_diffusion.selfplay.train_settings import of_round, pairs_per_step, steps_of_round
from spin_diffusion.selfplay.trainee import check_fused
from spin_diffusion.store.files import read_json, write_json
from spin_diffusion.store.folder import check_folder, take_folder
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.parsing import saved_settings
from spin_diffusion.store.run_dir import settle, write_file
from spin_diffusion.store.settings import harmless, per_round
from spin_diffusion.store.sharing import TIME_OUT
from spin_diffusion.store.yaml_files import dump_yaml

LOGS = "logs"
"""Folder of tensorboard's files; wandb and trackio keep to their own (WANDB_DIR, TRACKIO_DIR)."""


def changes(old: dict[str, object], config: RunConfig, but: Collection[str] = ()) -> list[str]:
    """The settings that differ and would change a result, `but` for some, each as `key: old -> new`."""
    return _differences(old, config.flat(), harmless(_sections(config)) | set(but))


def _differences(old: dict[str, object], new: dict[str, object], but: Collection[str] = (), of: str = "") -> list[str]:
    """What differs, key by key of settings that have keys."""
    found = []
    for key in sorted((old.keys() | new.keys()).difference(but)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, of=f"{of}{key} ")
        elif before != after:
            found.append(f"{of}{key}: {before!r} -> {after!r}")
    return found


def _sections(config: RunConfig) -> list[type]:
    return [type(section) for section in vars(config).values()]


def write_config(config: RunConfig, path: Any) -> None:
    """All settings as a YAML file that `--config` reads."""
    path.write_text(dump_yaml(config.flat()), encoding="utf-8")


# The steps that every kind of run takes


def check_run_folder(config: RunConfig, output_dir: Path, program: str) -> None:
    """Refuse another program's folder and a run with other settings, before a model is loaded; nothing is written."""
    check_origin(config.flat(), output_dir, program)
    if check_folder(output_dir, program) and _has_begun(output_dir):
        saved = saved_settings(output_dir / "config.yaml")
        if unknown := sorted(saved.keys() - config.flat().keys()):
            raise InputError(
                f"{output_dir} holds a run that another version began (its config.yaml has {', '.join(unknown)[:200]}, "
                "which this one does not know): go on with that version, or start in another --output_dir"
            )
        changed = changes(saved, config, but=config.name_the_base)
        if changed:
            raise InputError(
                f"{output_dir} holds a run with other settings ({'; '.join(changed)}): start in another --output_dir"
            )


def quiet_libraries() -> None:
    """Their notes are about parts that are not used here."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").disabled = True  # where it is installed accelerate loads it, asked or not


def start(config: RunConfig, output_dir: Path, program: str) -> Accelerator:
    """Quiet the libraries and set the seeds. A folder in which another command works is refused; one that is not there
    yet is not made."""
    quiet_libraries()
    accelerator = _accelerator(config, output_dir)
    if accelerator.is_main_process and check_folder(output_dir, program):
        take_folder(output_dir, program)
    accelerator.wait_for_everyone()
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    set_seed(config.rounds.seed)
    return accelerator


def take_run_folder(
    config: RunConfig, output_dir: Path, program: str, base: Mapping[str, object], accelerator: Accelerator
) -> None:
    """Make the folder this run's, put right what a killed run left in it, and write the settings; called once the base
    is known to be good.

    Args:
        base: as of `write_manifest`.
    """
    if accelerator.is_main_process:
        take_folder(output_dir, program)
        settle(output_dir)
        if not _has_begun(output_dir) and changes(_settings_before(output_dir), config):
            # What a command with other settings had prepared before it was refused
            for name in ("data", "held_out"):
                forget_prepared(output_dir / name)
        write_file(output_dir / "config.yaml", lambda part: write_config(config, part))
    take_over(config.flat(), output_dir, str(base["weights"]), accelerator)
    accelerator.wait_for_everyone()


def _has_begun(output_dir: Path) -> bool:
    """Whether base and data were found good once; until then settings may be corrected in the same folder."""
    return (output_dir / "manifest.json").is_file()


def _settings_before(output_dir: Path) -> dict[str, object]:
    """Settings of a command that did not get far enough for them to matter; none where they cannot be read."""
    try:
        return saved_settings(output_dir / "config.yaml")
    except InputError:
        return {}


def _accelerator(config: RunConfig, output_dir: Path) -> Accelerator:
    report_to = None if config.run.report_to == "none" else config.run.report_to
    # Accelerate would train on without it
    if report_to in LoggerType.list()[1:] and LoggerType(report_to) not in get_available_trackers():
        package = f"'spin-diffusion[{report_to}]'" if report_to in ("wandb", "trackio") else report_to
        raise InputError(f"--report_to {report_to}: not installed: pip install {package}, or give another tracker")
    return make_accelerator(
        config.training.mixed_precision,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        log_with=report_to,
        project_dir=str(output_dir / LOGS),
        # Gradients lie in the buckets that are exchanged, rather than in both: 4 bytes a weight less
        handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def make_accelerator(
    mixed_precision: str | None, handlers: Sequence[KwargsHandler] = (), **options: Any
) -> Accelerator:
    """Accelerate's, in a precision that the device has, whose processes wait for each other for `TIME_OUT`; InputError
    when it has not.

    Args:
        mixed_precision: None = what the launcher says.
        handlers: further settings, as Accelerate takes them.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(
            "the accelerate config says distributed_type: DEEPSPEED, which nothing here runs on: launch with "
            "training/accelerate/fsdp2.yaml for ZeRO-3, or with training/accelerate/fsdp2_keep_weights.yaml for ZeRO-2"
        )
    try:
        waits = InitProcessGroupKwargs(timeout=TIME_OUT)
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[waits, *handlers], **options)
    except (ValueError, ImportError) as error:
        raise InputError(str(error).splitlines()[0]) from error
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise InputError(
            "--mixed_precision fp16 is computed on a GPU alone, and there is none here, only the CPU: give bf16 or no"
        )
    return accelerator


def check_training(config: RunConfig, player: nn.Module, accelerator: Accelerator) -> None:
    """InputError names what the processes at hand, or the way of training asked for, cannot do."""
    moving_average = config.rounds.opponent == "ema"
    check_fused(config.training, accelerator)
    check_sharding(player, config.training, accelerator, moving_average)


class RunManifest(TypedDict):
    """What a run was started from."""

    base: BaseRecord
    data: dict[str, object]
    objective_files: dict[str, str]
    versions: dict[str, str]
    pairs_per_step: NotRequired[int]


def write_manifest(
    output_dir: Path,
    base: Mapping[str, object],
    data: DataManifest,
    config: RunConfig,
    accelerator: Accelerator,
    versions: dict[str, str] | None = None,
) -> None:
    """Write what the run was started from; a base or a global batch other than those is refused.

    Args:
        base: `name`, its path or hub id; `weights`, the hash of those that are trained; `parts`, the hash of its other
            parts and its configurations; and what else identifies it.
        versions: of packages that this run needs beside the usual ones.
    """
    path = output_dir / "manifest.json"
    packages = ("torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "spin-diffusion")
    objective_files = file_hashes(objectives_of(config.rounds))
    per_step = pairs_per_step(config.training, accelerator.num_processes)
    installed = {name: version(name) for name in packages} | {"python": platform.python_version()} | (versions or {})
    content = {
        "base": base,
        "data": {"rows": data["rows"], "hash": data["hash"], "left_out": data["left_out"]},
        "continued_from": origin_of(output_dir),
        "objective_files": objective_files,
        "pairs_per_step": per_step,
        "versions": installed,
    }
    if path.is_file():
        begun = read_json(path, RunManifest, "delete it and run the same command again, which writes it anew")
        if begun["base"]["weights"] != base["weights"]:
            raise InputError(
                f"the weights of {base['name']} are not the ones that this run was started with: restore them, or "
                "start in another --output_dir"
            )
        # Under the same names, another version of a library may know keys of a configuration more
        libraries = [{name: said.get(name) for name in packages[:3]} for said in (begun["versions"], installed)]
        renamed = any(begun["base"].get(key) != value for key, value in base.items() if key not in ("weights", "parts"))
        is_other = begun["base"].get("parts", base["parts"]) != base["parts"]
        if is_other and (libraries[0] == libraries[1] or renamed):
            raise InputError(
                f"{base['name']} is not what this run was started with (its weights are, its configuration or another "
                "of its parts is not): restore it, or start in another --output_dir"
            )
        for name, known in begun["objective_files"].items():
            if objective_files.get(name) != known:
                raise InputError(
                    f"--objective {name} is not the file that this run was started with, or what it imports is not: "
                    "restore it, or start in another --output_dir"
                )
        if begun.get("pairs_per_step", per_step) != per_step:
            raise InputError(
                f"{output_dir} was started with {begun['pairs_per_step']} pairs in each optimizer step, this command "
                f"has {per_step}: change --train_batch_size, --gradient_accumulation_steps or the "
                "number of processes to keep their product, or start in another --output_dir"
            )
    elif accelerator.is_main_process:
        write_json(path, content, sealed=True)
    accelerator.wait_for_everyone()


def round_lines(config: RunConfig, rows: int, accelerator: Accelerator) -> list[str]:
    """For the header: the batch, and each round's steps, rate, beta and visits of a sample."""
    training, rounds, world = config.training, config.rounds, accelerator.num_processes
    batch = pairs_per_step(training, world)
    lines = [
        f"Batch      {batch} pairs a step = {training.train_batch_size} x {training.gradient_accumulation_steps} "
        f"accumulation x {world} process{'es' if world > 1 else ''} on {accelerator.device.type}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}"
    ]
    for k in range(1, rounds.rounds + 1):
        beta = of_round(rounds.beta, k)
        steps, _ = steps_of_round(training, k, rows // rounds.real_parts, world)
        lines.append(
            f"           round {k}: {steps} steps at lr {of_round(training.learning_rate, k):g}, beta "
            f"{beta if beta == 'auto' else f'{beta:g}'}, {visits_of_round(config, rows, k, world):.2g} visits of each "
            "sample"
        )
    by_round = {name for section in _sections(config) for name in per_round(section)}
    for key, value in config.flat().items():
        if key in by_round and isinstance(value, list) and len(value) > rounds.rounds:
            left = len(value) - rounds.rounds
            of = f"of the {len(value)} values of --{key} the last {left}"
            lines.append(f"           {of} have no round: --rounds {rounds.rounds}")
    return lines
