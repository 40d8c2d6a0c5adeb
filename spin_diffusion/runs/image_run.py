"""The whole main job: load the base, prepare the data, play the rounds, compare, and say what came out."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from spin_diffusion.data.reading import Example, read_examples
from spin_diffusion.data.report import ReadReport
from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.buckets import area_share
from spin_diffusion.diffusion.candidates import candidates_of, check_scorer
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import count_units, phase_flops, work_of
from spin_diffusion.diffusion.curation import Curation, check_curator, content_settings, curation_lines
from spin_diffusion.diffusion.families import load_checkpoint
from spin_diffusion.diffusion.game import DiffusionGame, example_id
from spin_diffusion.diffusion.prompts import CutPrompts
from spin_diffusion.diffusion.shortcuts import ShortcutProbe
from spin_diffusion.evaluation.prompt_sets import PromptSet, load_prompts
from spin_diffusion.evaluation.scoring import check_specs
from spin_diffusion.runs.image_card import push_to_hub, write_model_card
from spin_diffusion.runs.image_evaluator import Evaluator
from spin_diffusion.runs.image_lines import header, keeps_trajectories, tell_where, trajectory_bytes
from spin_diffusion.runs.image_plan import make_plan, settle_draws
from spin_diffusion.runs.plan import lines
from spin_diffusion.runs.start import (
    check_run_folder,
    check_training,
    make_accelerator,
    needs_losers,
    open_trackers,
    play_with_rivals,
    quiet_libraries,
    round_lines,
    start,
    take_run_folder,
    write_manifest,
)
from spin_diffusion.selfplay.ledger import Costs, matrix_rate
from spin_diffusion.selfplay.precision import autocast_dtype
from spin_diffusion.selfplay.round_settings import RoundSettings, source_of
from spin_diffusion.samples.real import prepare
from spin_diffusion.selfplay.sharded import wants_shards
from spin_diffusion.samples.shards import ENCODED, Part
from spin_diffusion.samples.stored_pairs import Column, kinds_of
from spin_diffusion.selfplay.train_settings import check_batch, of_round, steps_of_round
from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Bars, Progress

PROGRAM = "image training"


def run(config: Config, family_name: str) -> None:
    """Play all rounds of `config` with a checkpoint of a family: `sd` or `sdxl`.

    Raises:
        InputError: anything the user gave that cannot be used; nothing that exists is touched.
    """
    output_dir = Path(config.run.output_dir)
    check_run_folder(config, output_dir, PROGRAM)
    prompts = _check_inputs(config)
    accelerator = start(config, output_dir, PROGRAM)

    game = open_game(config, accelerator, family_name)
    _check_training(config, game)
    take_run_folder(config, output_dir, PROGRAM, accelerator)
    base = game.base
    progress = Bars() if accelerator.is_main_process else Progress()

    manifest = _prepared(config, game, output_dir, progress)
    pairs = manifest["rows"] // config.rounds.real_parts
    # Now, not after a night of drawing
    check_batch(pairs, config.training, accelerator.num_processes)
    write_manifest(output_dir, base.as_dict(), game.base_hash, game.parts_hash, manifest, config, accelerator)
    accelerator.print(header(config, game, manifest, output_dir) + round_lines(config, manifest["rows"], accelerator))
    if prompts is not None and (line := cut_validation(game, prompts)):
        accelerator.print(line)
    if prompts is not None and prompts.broken:
        accelerator.print(f"{len(prompts.rows)} prompts of {prompts.name}{prompts.said_left_out()}")
    config = settle_draws(config, game, pairs)
    _check_room(config, game, pairs)

    if config.caches.cache_text_embeddings:
        _keep_prompts(config, game, output_dir, progress)
    _play(config, game, prompts, output_dir, progress, manifest["rows"], pairs)


def _prepared(config: Config, game: DiffusionGame, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """The real samples below the run's folder, chosen by a scorer if one is named; their manifest. What was read, and
    what was left out, is printed."""
    accelerator = game.accelerator
    report = ReadReport()
    with_losers = needs_losers(config)
    curation = _curation(config, game, with_losers, output_dir, str(accelerator.device), progress)

    def read() -> Iterator[Example]:
        return read_examples(config.data, with_losers=with_losers, report=report)

    # `prepare` asks the main process alone for the real samples
    if curation and not any((output_dir / "data" / name).exists() for name in ("left_out.json", "manifest.json")):
        curation.score(accelerator)
    manifest = prepare(
        output_dir / "data",
        lambda: game.real_rows(curation.take(read) if curation else read()),
        _data_settings(config, game, with_losers) | content_settings(config.curation),
        config.rounds.samples_per_shard,
        game,
        accelerator,
        progress,
        lambda: report.as_dict() | ({"curation": curation.summary} if curation else {}),
    )
    for line in report.lines() if report.read else []:
        accelerator.print(line)
    if report.read and (line := CutPrompts(game.pipeline).add(Column(output_dir / "data", "prompt")).line("captions")):
        accelerator.print(line)
    if curation and report.read:
        for line in curation_lines(curation.summary, config.curation):
            accelerator.print(line)
    if curation and accelerator.is_main_process:
        curation.forget()
    return manifest


def _play(
    config: Config, game: DiffusionGame, prompts: PromptSet | None, output_dir: Path, progress: Progress, rows: int,
    pairs: int,
) -> None:  # fmt: skip
    """The rounds on prepared data, what they are compared with, and what is told of them."""
    accelerator, base = game.accelerator, game.base
    open_trackers(config, output_dir, accelerator)
    evaluator = Evaluator(config, prompts, game, output_dir, accelerator, progress)
    evaluator.base()
    kinds = kinds_of(output_dir / "data" / ENCODED, Part())
    records = play_with_rivals(
        config, game, output_dir, accelerator, evaluator.of_rounds(), evaluator.of_rival, progress,
        candidates=candidates_of(config.candidates, str(accelerator.device)),
        probe=ShortcutProbe(game.pipeline.vae, config.images, config.probe), costs=_costs(config, game, pairs, kinds),
    )  # fmt: skip
    if accelerator.is_main_process:
        comparisons = evaluator.tell()
        write_model_card(output_dir, config, game.family.PIPELINE.__name__, rows, comparisons)
        tell_where(records, output_dir, base, game.family.PIPELINE.__name__)
        if config.run.push_to_hub:
            print(f"Uploaded to {push_to_hub(output_dir, config)}")


def _costs(config: Config, game: DiffusionGame, pairs: int, kinds: Tensor | None) -> Callable[[RoundSettings], Costs]:
    """For the ledgers: what the phases of rounds of so many pairs take, by the rounds' settings.

    Args:
        kinds: of the real images, where they differ in size.
    """
    game.prompts.bring_back()
    unit = count_units(game.family, game.pipeline, game.resolution)
    if kinds is not None:
        unit = unit.of_area(area_share(game.sizes, kinds))
    rate = config.run.matrix_flops_per_second or matrix_rate(
        game.accelerator.device, autocast_dtype(game.accelerator.mixed_precision) or torch.float32
    )
    zeros = bool(game.pipeline.config.get("force_zeros_for_empty_prompt"))
    world = game.accelerator.num_processes
    batch = config.training.train_batch_size * config.training.gradient_accumulation_steps

    def of(rounds: RoundSettings) -> Costs:
        def flops(k: int, phase: str, samples: int) -> int | None:
            source = source_of(rounds, of_round(rounds.objective, k))
            steps, _ = steps_of_round(config.training, k, pairs, world)
            return phase_flops(unit, work_of(config, source, pairs, steps, zeros), phase, samples, batch)

        return Costs(flops, rate)

    return of


def _keep_prompts(config: Config, game: DiffusionGame, output_dir: Path, progress: Progress) -> None:
    """Encode the prompts of all real samples."""
    folder = Path(config.caches.encodings_dir or output_dir / "encodings") / "prompts"
    dtype = autocast_dtype(game.accelerator.mixed_precision) or torch.float32
    game.prompts.keep(folder, Column(output_dir / "data", "prompt"), game.accelerator, dtype, progress)


def plan(config: Config) -> None:
    """Say what a run will take, before it is started.

    Raises:
        InputError: as `run`; a batch that does not fit in memory.
    """
    output_dir = Path(config.run.output_dir)
    check_run_folder(config, output_dir, PROGRAM)
    prompts = _check_inputs(config)
    quiet_libraries()
    accelerator = make_accelerator(config.training.mixed_precision)
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    game = open_game(config, accelerator)
    _check_training(config, game)
    progress = Bars() if accelerator.is_main_process else Progress()
    if accelerator.is_main_process:
        take_folder(output_dir, PROGRAM)
    captions = CutPrompts(game.pipeline)
    found = make_plan(config, game, captions, progress)
    for line in lines(found, config.run.output_dir, accelerator.device, "scorers"):
        accelerator.print(line)
    for line in (captions.line("captions"), cut_validation(game, prompts) if prompts is not None else None):
        if line is not None:
            accelerator.print(line)


def cut_validation(game: DiffusionGame, prompts: PromptSet) -> str | None:
    """A warning where the text encoders do not read validation prompts to their ends."""
    return CutPrompts(game.pipeline).add(row.prompt for row in prompts.rows).line("validation prompts")


def open_game(config: Config, accelerator: Accelerator, family_name: str | None = None) -> DiffusionGame:
    """The base checkpoint as a game.

    Args:
        family_name: the only family that is allowed.
    """
    base = Base.of_settings(config.flat())
    family, pipeline = load_checkpoint(base, cache_dir=config.data.cache_dir)
    if family_name is not None and family.__name__.rsplit(".", 1)[-1] != family_name:
        right = family.__name__.rsplit(".", 1)[-1]
        raise InputError(f"{base.name} is a {family.PIPELINE.__name__}: run training/train_spin_{right}.py for it")
    denoiser = config.denoiser
    plain = config.training.optimizer == "adamw_8bit"  # it lays weights out plainly in its first step
    if plain or wants_shards(config.training, accelerator):
        # A player in parts has the plain layout; an opponent of another one would round differently
        denoiser = dataclasses.replace(denoiser, channels_last=False)
    return DiffusionGame(
        family,
        pipeline,
        base,
        images=config.images,
        sampling=config.sampling,
        denoiser=denoiser,
        trajectory=config.trajectory,
        lora=config.lora,
        accelerator=accelerator,
        gradient_checkpointing=config.training.gradient_checkpointing,
        shared_latents=Path(config.caches.encodings_dir) / "latents" if config.caches.encodings_dir else None,
    )


def _check_inputs(config: Config) -> PromptSet | None:
    """The prompts to evaluate with. Refuses before a model is loaded: no data, prompts that cannot be read, scorers
    that do not exist."""
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise InputError("give the training data: --dataset_name (hub id, folder, parquet file) or --train_data_dir")
    check_scorer(config.candidates)
    check_curator(config.curation)
    if not config.evaluation.validation_prompts:
        return None
    check_specs(config.evaluation.scorers or [])
    return load_prompts(config.evaluation.validation_prompts, config.evaluation.max_validation_prompts)


def _check_training(config: Config, game: DiffusionGame) -> None:
    """InputError names what the processes at hand, or the way of training asked for, cannot do."""
    check_training(config, game.player, game.accelerator)
    if wants_shards(config.training, game.accelerator) and config.trajectory.trajectory == "exact":
        raise InputError(
            "--trajectory exact computes its scores again in the backward pass, which needs whole weights on every "
            "process: take --trajectory steps, or launch with training/accelerate/eight_gpus.yaml"
        )


def _data_settings(config: Config, game: DiffusionGame, with_losers: bool) -> dict[str, Any]:
    """What decides the content of the prepared data."""
    kept = dataclasses.asdict(config.data) | dataclasses.asdict(config.images)
    kept |= {"resolution": game.resolution, "with_losers": with_losers, "shard": config.rounds.samples_per_shard}
    return {key: value for key, value in kept.items() if key not in ("cache_dir", "vae_encode_batch_size")}


def _curation(
    config: Config, game: DiffusionGame, with_losers: bool, output_dir: Path, device: str, progress: Progress
) -> Curation | None:
    """What chooses the real images; None = all of them are used."""
    if config.curation.curation_scorer is None:
        return None
    return Curation(
        config.curation,
        output_dir / "curation",
        output_dir / "data" / "curation.parquet",
        _data_settings(config, game, with_losers),
        lambda: read_examples(config.data, with_losers=with_losers),
        example_id,
        game.real_rows,
        config.rounds.samples_per_shard,
        device,
        progress,
    )


def _check_room(config: Config, game: DiffusionGame, pairs: int) -> None:
    """InputError when a round's trajectories do not fit on the disk."""
    if not keeps_trajectories(config, game):
        return
    needed = trajectory_bytes(game) * pairs * config.rounds.num_generated
    free = shutil.disk_usage(config.run.output_dir).free
    if needed > free:
        raise InputError(
            f"--trajectory {config.trajectory.trajectory} keeps {needed / 1e9:,.1f} GB in a round, and "
            f"{free / 1e9:,.1f} GB are free in {config.run.output_dir}: make room, or give fewer images "
            "(--max_train_samples, --real_parts)"
        )
