"""The whole main job: load the base, prepare the data, play the rounds, compare, and say what came out."""

import dataclasses
import platform
import shutil
import warnings
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed

from spin_diffusion.config import Config, changes, write_config
from spin_diffusion.data import ReadReport, read_examples
from spin_diffusion.diffusion.evaluating import Evaluator
from spin_diffusion.diffusion.families import load_checkpoint
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.model_card import push_to_hub, write_model_card
from spin_diffusion.evaluation.prompt_sets import PromptSet, load_prompts
from spin_diffusion.evaluation.scoring import check_specs
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.objectives import OBJECTIVES
from spin_diffusion.selfplay.progress import Bars, Progress
from spin_diffusion.selfplay.rounds import of_round, play
from spin_diffusion.selfplay.run_dir import read_json, weights_hash, write_file, write_json
from spin_diffusion.selfplay.samples import prepare
from spin_diffusion.selfplay.train import check_batch


def run(config: Config, family_name: str) -> None:
    """Play all rounds of `config` with a checkpoint of a family: `sd` or `sdxl`.

    Raises:
        InputError: anything the user gave that cannot be used; nothing that exists is touched.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    output_dir = Path(config.run.output_dir)
    prompts = _check_inputs(config, output_dir)
    accelerator = _accelerator(config, output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        _forget_false_start(config, output_dir)
        write_file(output_dir / "config.yaml", lambda part: write_config(config, part))
    accelerator.wait_for_everyone()
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    set_seed(config.rounds.seed)

    # The base checkpoint
    options = {
        "revision": config.model.revision,
        "variant": config.model.variant,
        "cache_dir": config.data.cache_dir,
    }
    base = str(config.model.pretrained_model_name_or_path)
    family, pipeline = load_checkpoint(base, vae_name_or_path=config.model.pretrained_vae_model_name_or_path, **options)
    if family.__name__.rsplit(".", 1)[-1] != family_name:
        right = family.__name__.rsplit(".", 1)[-1]
        raise InputError(f"{base} is a {family.PIPELINE.__name__}: run training/train_spin_{right}.py for it")
    game = DiffusionGame(
        family,
        pipeline,
        base,
        images=config.images,
        sampling=config.sampling,
        denoiser=config.denoiser,
        accelerator=accelerator,
        gradient_checkpointing=config.training.gradient_checkpointing,
        base_options=options,
    )
    progress = Bars() if accelerator.is_main_process else Progress()

    # The real samples
    report = ReadReport()
    with_losers = "data" in {OBJECTIVES[name].generated for name in (config.rounds.objective, *_rivals(config))}
    manifest = prepare(
        output_dir / "data",
        lambda: game.real_rows(read_examples(config.data, with_losers=with_losers, report=report)),
        _data_settings(config, game, with_losers),
        config.rounds.samples_per_shard,
        game,
        accelerator,
        progress,
        report.as_dict,
    )
    for line in report.lines() if report.read else []:
        accelerator.print(line)
    check_batch(manifest["rows"], config.training, accelerator.num_processes)  # now, not after a night of drawing
    _write_manifest(config, game, manifest, output_dir, accelerator)
    _print_header(config, game, manifest, accelerator)

    # The rounds, and what they are compared with
    accelerator.init_trackers(
        config.run.tracker_project_name,
        config={key: value for key, value in config.flat().items() if isinstance(value, int | float | str | bool)},
    )
    evaluator = Evaluator(config, prompts, game, output_dir, accelerator, progress)
    evaluator.base()
    records = play(
        game, output_dir / "data", output_dir, config.rounds, config.training, accelerator, evaluator.of_rounds(),
        progress,
    )  # fmt: skip
    for rival in _rivals(config):
        accelerator.print(f"For comparison: {rival}, with the same base, data and steps")
        play(
            game, output_dir / "data", output_dir / f"compare-{rival}",
            dataclasses.replace(config.rounds, objective=rival), config.training, accelerator,
            evaluator.of_rival(rival), progress,
        )  # fmt: skip
    accelerator.end_training()
    if accelerator.is_main_process:
        comparisons = evaluator.tell()
        write_model_card(output_dir, config, family.PIPELINE.__name__, manifest["rows"], comparisons)
        _tell_where(records, output_dir, base, family.PIPELINE.__name__)
        if config.run.push_to_hub:
            print(f"Uploaded to {push_to_hub(output_dir, config)}")


def _tell_where(records: list[dict[str, Any]], output_dir: Path, base: str, pipeline: str) -> None:
    promoted = [record["round"] for record in records if record["state"] == "PROMOTED"]
    if not promoted:
        print("No round was promoted: the base stands, and there is no unet/ to load")
        return
    print(f"The player of round {promoted[-1]} is in {output_dir / 'unet'}; load it with\n"
          f"  {pipeline}.from_pretrained({base!r}, "
          f"unet=UNet2DConditionModel.from_pretrained({str(output_dir / 'unet')!r}))")  # fmt: skip


def _check_inputs(config: Config, output_dir: Path) -> PromptSet | None:
    """The prompts to evaluate with. Refuses before a model is loaded: another run's folder, changed settings, prompts
    that cannot be read, scorers that do not exist, no data."""
    saved = output_dir / "config.yaml"
    if saved.is_file():
        changed = changes(yaml.safe_load(saved.read_text()) or {}, config.flat())
        if changed and _has_begun(output_dir):
            raise InputError(
                f"{output_dir} holds a run with other settings ({'; '.join(changed)}): start in another --output_dir"
            )
    elif output_dir.is_dir() and any(path.name != "config.yaml.part" for path in output_dir.iterdir()):
        raise InputError(f"{output_dir} is not empty and not a run's folder (it has no config.yaml): give another")
    elif output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file: give a folder")
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise InputError("give the training data: --dataset_name (hub id, folder, parquet file) or --train_data_dir")
    if not config.evaluation.validation_prompts:
        return None
    check_specs(config.evaluation.scorers or [])
    return load_prompts(config.evaluation.validation_prompts, config.evaluation.max_validation_prompts)


def _has_begun(output_dir: Path) -> bool:
    """Whether base and data were found good once; until then settings may be corrected in the same folder."""
    return (output_dir / "manifest.json").is_file()


def _forget_false_start(config: Config, output_dir: Path) -> None:
    """Remove what a command with other settings prepared before it was refused."""
    saved = output_dir / "config.yaml"
    if saved.is_file() and not _has_begun(output_dir) and changes(yaml.safe_load(saved.read_text()), config.flat()):
        for name in ("data", "base"):
            shutil.rmtree(output_dir / name, ignore_errors=True)


def _accelerator(config: Config, output_dir: Path) -> Accelerator:
    report_to = None if config.run.report_to == "none" else config.run.report_to
    try:
        return Accelerator(
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            mixed_precision=config.training.mixed_precision,
            log_with=report_to,
            project_dir=str(output_dir / config.run.logging_dir),
            # One process may read the data while the others wait
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
        )
    except (ValueError, ImportError) as error:
        raise InputError(str(error).splitlines()[0]) from error


def _rivals(config: Config) -> list[str]:
    return [name for name in config.run.compare_with or [] if name != config.rounds.objective]


def _data_settings(config: Config, game: DiffusionGame, with_losers: bool) -> dict[str, Any]:
    """What decides the content of the prepared data."""
    kept = dataclasses.asdict(config.data) | dataclasses.asdict(config.images)
    kept |= {"resolution": game.resolution, "with_losers": with_losers, "shard": config.rounds.samples_per_shard}
    return {key: value for key, value in kept.items() if key not in ("cache_dir", "vae_encode_batch_size")}


def _write_manifest(
    config: Config, game: DiffusionGame, data: dict[str, Any], output_dir: Path, accelerator: Accelerator
) -> None:
    """Lineage of the run; a base or data other than those it was started with is refused."""
    path = output_dir / "manifest.json"
    packages = ("torch", "diffusers", "transformers", "accelerate", "datasets", "spin-diffusion")
    base = {"name": config.model.pretrained_model_name_or_path, "unet": weights_hash(game.player)}
    content = {
        "base": base,
        "data": {"rows": data["rows"], "hash": data["hash"], "left_out": data["left_out"]},
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }
    if path.is_file():
        old = read_json(path)
        if old["base"]["unet"] != base["unet"]:
            raise InputError(
                f"the UNet of {base['name']} is not the one this run was started with: restore it, or start in "
                "another --output_dir"
            )
    elif accelerator.is_main_process:
        write_json(path, content)
    accelerator.wait_for_everyone()


def _print_header(config: Config, game: DiffusionGame, data: dict[str, Any], accelerator: Accelerator) -> None:
    training, rounds = config.training, config.rounds
    batch = training.train_batch_size * training.gradient_accumulation_steps * accelerator.num_processes
    per_round = [
        f"round {k}: {of_round(training.max_train_steps, k)} steps at lr {of_round(training.learning_rate, k):g}, "
        f"beta {of_round(rounds.beta, k):g}"
        for k in range(1, rounds.rounds + 1)
    ]
    accelerator.print(
        f"Base       {config.model.pretrained_model_name_or_path} ({game.family.PIPELINE.__name__}, "
        f"{sum(p.numel() for p in game.player.parameters()) / 1e6:.1f} M parameters, {game.resolution} px, "
        f"{game.noising.prediction_type})\n"
        f"Data       {data['rows']} pairs\n"
        f"Objective  {rounds.objective}, opponent {rounds.opponent}, drawn at guidance "
        f"{config.sampling.guidance_scale:g} in {config.sampling.num_inference_steps} steps\n"
        f"Batch      {batch} pairs a step = {training.train_batch_size} x {training.gradient_accumulation_steps} "
        f"accumulation x {accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''} on "
        f"{accelerator.device.type}, {accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}\n"
        + "\n".join(f"           {line}" for line in per_round)
    )
