"""The whole main job: load the base, prepare the data, play the rounds, compare, and say what came out."""

import dataclasses
from pathlib import Path
from typing import Any

from spin_diffusion.config import Config
from spin_diffusion.data import ReadReport, read_examples
from spin_diffusion.diffusion.evaluating import Evaluator
from spin_diffusion.diffusion.families import load_checkpoint
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.model_card import push_to_hub, write_model_card
from spin_diffusion.diffusion.shortcuts import ShortcutProbe
from spin_diffusion.evaluation.prompt_sets import PromptSet, load_prompts
from spin_diffusion.evaluation.scoring import check_specs
from spin_diffusion.input_error import InputError
from spin_diffusion.running import (
    check_folder,
    needs_losers,
    play_with_rivals,
    round_lines,
    start,
    tracked,
    write_manifest,
)
from spin_diffusion.selfplay.progress import Bars, Progress
from spin_diffusion.selfplay.rounds import objectives_of
from spin_diffusion.selfplay.run_dir import weights_hash
from spin_diffusion.selfplay.samples import prepare
from spin_diffusion.selfplay.train import check_batch


def run(config: Config, family_name: str) -> None:
    """Play all rounds of `config` with a checkpoint of a family: `sd` or `sdxl`.

    Raises:
        InputError: anything the user gave that cannot be used; nothing that exists is touched.
    """
    output_dir = Path(config.run.output_dir)
    check_folder(config, output_dir)
    prompts = _check_inputs(config)
    accelerator = start(config, output_dir)

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
    with_losers = needs_losers(config)
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
    pairs = manifest["rows"] // config.rounds.real_parts
    check_batch(pairs, config.training, accelerator.num_processes)  # now, not after a night of drawing
    write_manifest(output_dir, base, weights_hash(game.player), manifest, accelerator)
    accelerator.print(_header(config, game, manifest["rows"]) + round_lines(config, manifest["rows"], accelerator))

    # The rounds, and what they are compared with
    accelerator.init_trackers(config.run.tracker_project_name, config=tracked(config))
    evaluator = Evaluator(config, prompts, game, output_dir, accelerator, progress)
    evaluator.base()
    records = play_with_rivals(
        config, game, output_dir, accelerator, evaluator.of_rounds(), evaluator.of_rival, progress,
        probe=ShortcutProbe(game.pipeline.vae, config.images, config.probe),
    )  # fmt: skip
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


def _check_inputs(config: Config) -> PromptSet | None:
    """The prompts to evaluate with. Refuses before a model is loaded: no data, prompts that cannot be read, scorers
    that do not exist."""
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise InputError("give the training data: --dataset_name (hub id, folder, parquet file) or --train_data_dir")
    if not config.evaluation.validation_prompts:
        return None
    check_specs(config.evaluation.scorers or [])
    return load_prompts(config.evaluation.validation_prompts, config.evaluation.max_validation_prompts)


def _data_settings(config: Config, game: DiffusionGame, with_losers: bool) -> dict[str, Any]:
    """What decides the content of the prepared data."""
    kept = dataclasses.asdict(config.data) | dataclasses.asdict(config.images)
    kept |= {"resolution": game.resolution, "with_losers": with_losers, "shard": config.rounds.samples_per_shard}
    return {key: value for key, value in kept.items() if key not in ("cache_dir", "vae_encode_batch_size")}


def _header(config: Config, game: DiffusionGame, rows: int) -> str:
    return (
        f"Base       {config.model.pretrained_model_name_or_path} ({game.family.PIPELINE.__name__}, "
        f"{sum(p.numel() for p in game.player.parameters()) / 1e6:.1f} M parameters, {game.resolution} px, "
        f"{game.noising.prediction_type})\n"
        f"Data       {rows} pairs\n"
        f"Objective  {', '.join(objectives_of(config.rounds))}, opponent {config.rounds.opponent}, drawn at guidance "
        f"{config.sampling.guidance_scale:g} in {config.sampling.num_inference_steps} steps\n"
    )
