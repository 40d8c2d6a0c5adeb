"""An image run: how its base, its real images, its evaluation and its costs come about. `run` does the rest."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.rows import Example, ReadReport
from spin_diffusion.diffusion.base import Base, load_checkpoint, python_arguments
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import count_units, phase_flops, work_of
from spin_diffusion.diffusion.curation import Curation, candidates_of, check_judges, content_settings, curation_lines
from spin_diffusion.diffusion.game import DiffusionGame, example_id
from spin_diffusion.diffusion.images import area_share
from spin_diffusion.diffusion.prompts import CutPrompts
from spin_diffusion.diffusion.shortcuts import ShortcutProbe
from spin_diffusion.evaluation.prompt_sets import PromptSet, load_prompts
from spin_diffusion.evaluation.scoring import check_specs
from spin_diffusion.runs.config import needs_losers
from spin_diffusion.runs.evaluator import RunEvaluator
from spin_diffusion.runs.image_evaluator import PictureSamples
from spin_diffusion.runs.image_lines import card, header, keeps_trajectories, loading_code, trajectory_bytes
from spin_diffusion.runs.image_plan import make_plan, settle_draws
from spin_diffusion.runs.plan import lines
from spin_diffusion.runs.publish import Card
from spin_diffusion.runs.run import plan_run, play_run
from spin_diffusion.samples.pairs import Column, kinds_of
from spin_diffusion.samples.real import DataManifest, prepare
from spin_diffusion.samples.sample import ENCODED
from spin_diffusion.samples.shards import Part
from spin_diffusion.selfplay.device import autocast_dtype, matrix_rate
from spin_diffusion.selfplay.one_round import Costs
from spin_diffusion.selfplay.record import RoundRecord
from spin_diffusion.selfplay.round_settings import RoundSettings, source_of
from spin_diffusion.selfplay.sharded import wants_shards
from spin_diffusion.selfplay.train_settings import of_round, steps_of_round
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress


def run(config: Config, family_name: str) -> list[RoundRecord]:
    """Play all rounds of `config` with a checkpoint of a family, `sd` or `sdxl`. Raises as `play_run`."""
    return play_run(ImageSetup(config, family_name))


def plan(config: Config) -> None:
    """Say what a run will take, before it is started. Raises as `plan_run`."""
    plan_run(ImageSetup(config))


class ImageSetup:
    """An image run before its base is loaded."""

    program = "image training"

    def __init__(self, config: Config, family_name: str | None = None) -> None:
        """Args: family_name: the only family that is allowed."""
        self.config, self.family_name = config, family_name
        self.prompts: PromptSet | None = None

    def check(self) -> None:
        """Refuse no data, prompts that cannot be read, scorers that do not exist."""
        config = self.config
        if config.data.dataset_name is None and config.data.train_data_dir is None:
            raise InputError(
                "give the training data: --dataset_name (hub id, folder, parquet file) or --train_data_dir"
            )
        check_judges(config.curation, config.candidates)
        if config.evaluation.validation_prompts:
            check_specs(config.evaluation.scorers or [])
            self.prompts = load_prompts(config.evaluation.validation_prompts, config.evaluation.max_validation_prompts)

    def launch(self, accelerator: Accelerator) -> dict[str, str]:
        """Nothing: every launcher has processes that draw."""
        return {}

    def open(self, accelerator: Accelerator) -> "ImageRun":
        """The base checkpoint as a game."""
        if wants_shards(self.config.training, accelerator) and self.config.trajectory.trajectory == "exact":
            raise InputError(
                "--trajectory exact computes its scores again in the backward pass, which needs whole weights on every "
                "process: take --trajectory steps, or launch with training/accelerate/eight_gpus.yaml"
            )
        return ImageRun(self.config, open_game(self.config, accelerator, self.family_name), self.prompts)


class ImageRun:
    """An image run with its base."""

    held_out = None

    def __init__(self, config: Config, game: DiffusionGame, prompts: PromptSet | None) -> None:
        """Args: prompts: those of the evaluation; None = there is none."""
        self.config, self.game, self.prompts = config, game, prompts
        self.accelerator, self.output_dir = game.accelerator, Path(config.run.output_dir)
        self.candidates = candidates_of(config.candidates, str(self.accelerator.device))
        self.probe = ShortcutProbe(game.pipeline.vae, config.images, config.probe)

    def plan(self, progress: Progress) -> list[str]:
        """The plan, and what the text encoders do not read."""
        captions = CutPrompts(self.game.pipeline)
        plan = make_plan(self.config, self.game, captions, progress)
        cut = [captions.line("captions"), self._cut_prompts()]
        told = lines(plan, self.config.run.output_dir, self.accelerator.device, "scorers")
        return told + [line for line in cut if line is not None]

    def prepare(self, progress: Progress) -> DataManifest:
        """The manifest of the real images, chosen by a scorer if one is named."""
        config, game, data = self.config, self.game, self.output_dir / "data"
        report, with_losers = ReadReport(), needs_losers(config)
        curation = self._curation(with_losers, progress)

        def read() -> Iterator[Example]:
            return read_examples(config.data, with_losers=with_losers, report=report)

        # `prepare` asks the main process alone for the real samples
        if curation and not any((data / name).exists() for name in ("left_out.json", "manifest.json")):
            curation.score(self.accelerator)
        manifest = prepare(
            data,
            lambda: game.real_rows(curation.take(read) if curation else read()),
            self._data_settings(with_losers) | content_settings(config.curation),
            config.rounds.samples_per_shard,
            game,
            self.accelerator,
            progress,
            lambda: report.as_dict() | ({"curation": curation.summary} if curation else {}),
        )
        if report.read:
            cut = CutPrompts(game.pipeline).add(Column(data, "prompt")).line("captions")
            chosen = curation_lines(curation.summary, config.curation) if curation and curation.summary else []
            for line in [*report.lines(), *([cut] if cut else []), *chosen]:
                self.accelerator.print(line)
        if curation and self.accelerator.is_main_process:
            curation.forget()
        return manifest

    def base(self) -> dict[str, Any]:
        """The base with what it is loaded with, and the hash of its weights."""
        return self.game.base.as_dict() | {"weights": self.game.base_hash, "parts": self.game.parts_hash}

    def header(self, data: DataManifest) -> str:
        """What the run plays with."""
        return header(self.config, self.game, data, self.output_dir)

    def ready(self, pairs: int, progress: Progress) -> None:
        """Settle how many draws are fixed, see whether the disk has room, and keep the prompts' embeddings."""
        if (line := self._cut_prompts()) is not None:
            self.accelerator.print(line)
        if self.prompts is not None and self.prompts.broken:
            self.accelerator.print(
                f"{len(self.prompts.rows)} prompts of {self.prompts.name}{self.prompts.said_left_out()}"
            )
        self.config = settle_draws(self.config, self.game.accelerator, pairs)
        config, game = self.config, self.game
        game.fixed_draws = int(config.denoiser.fixed_draws)
        self._check_room(pairs)
        if config.caches.cache_text_embeddings:
            folder = Path(config.caches.encodings_dir or self.output_dir / "encodings") / "prompts"
            dtype = autocast_dtype(self.accelerator.mixed_precision) or torch.float32
            game.prompts.keep(folder, Column(self.output_dir / "data", "prompt"), self.accelerator, dtype, progress)

    def evaluator(self, progress: Progress) -> RunEvaluator:
        """What measures by pictures of the validation prompts."""
        prompts, config, game = self.prompts, self.config, self.game
        samples = PictureSamples(config, prompts, game, progress) if prompts is not None else None
        return RunEvaluator(config, game, (str(game.base), "pipeline"), game.saved, samples)

    def costs(self, pairs: int) -> Callable[[RoundSettings, Path], Costs]:
        """What the phases of a round take, by its settings."""
        config, game = self.config, self.game
        game.prompts.bring_back()
        unit = count_units(game.family, game.pipeline, game.resolution)
        kinds = kinds_of(self.output_dir / "data" / ENCODED, Part())
        if kinds is not None:
            unit = unit.of_area(area_share(game.sizes, kinds))
        dtype = autocast_dtype(self.accelerator.mixed_precision) or torch.float32
        rate = matrix_rate(self.accelerator.device, dtype)
        zeros = bool(game.pipeline.config.get("force_zeros_for_empty_prompt"))
        world = self.accelerator.num_processes
        batch = config.training.train_batch_size * config.training.gradient_accumulation_steps

        def of(rounds: RoundSettings, folder: Path) -> Costs:
            def flops(k: int, phase: str, samples: int) -> int | None:
                source = source_of(rounds, of_round(rounds.objective, k))
                steps, _ = steps_of_round(config.training, k, pairs, world)
                return phase_flops(unit, work_of(config, source, pairs, steps, zeros), phase, samples, batch)

            return Costs(flops, rate)

        return of

    def card(self, rows: int) -> Card:
        """What the model card says."""
        return card(self.config, self.game.family.PIPELINE.__name__, self.output_dir, rows)

    def loading_code(self) -> tuple[Path, str]:
        """The UNet's folder or the adapter's, and lines of Python that load it."""
        folder = self.output_dir / self.game.saved
        pipeline, arguments = self.game.family.PIPELINE.__name__, python_arguments(str(folder))
        return folder, loading_code(self.game.base, pipeline, folder.name, arguments)

    def _cut_prompts(self) -> str | None:
        """A warning where the text encoders do not read validation prompts to their ends."""
        rows = self.prompts.rows if self.prompts is not None else ()
        return CutPrompts(self.game.pipeline).add(row.prompt for row in rows).line("validation prompts")

    def _data_settings(self, with_losers: bool) -> dict[str, Any]:
        """What decides the content of the prepared data."""
        config = self.config
        settings = dataclasses.asdict(config.data) | dataclasses.asdict(config.images)
        settings |= {"resolution": self.game.resolution, "with_losers": with_losers}
        settings["shard"] = config.rounds.samples_per_shard
        return {key: value for key, value in settings.items() if key not in ("cache_dir", "vae_encode_batch_size")}

    def _curation(self, with_losers: bool, progress: Progress) -> Curation | None:
        """What chooses the real images; None = all of them are used."""
        config = self.config
        if config.curation.curation_scorer is None:
            return None
        return Curation(
            config.curation,
            self.output_dir / "curation",
            self.output_dir / "data" / "curation.parquet",
            self._data_settings(with_losers),
            lambda: read_examples(config.data, with_losers=with_losers),
            example_id,
            self.game.real_rows,
            config.rounds.samples_per_shard,
            str(self.accelerator.device),
            progress,
        )

    def _check_room(self, pairs: int) -> None:
        """Raises InputError when a round's trajectories do not fit on the disk."""
        if not keeps_trajectories(self.config, self.game):
            return
        needed = trajectory_bytes(self.game) * pairs * self.config.rounds.num_generated
        free = shutil.disk_usage(self.output_dir).free
        if needed > free:
            raise InputError(
                f"--trajectory {self.config.trajectory.trajectory} keeps {needed / 1e9:,.1f} GB in a round, and "
                f"{free / 1e9:,.1f} GB are free in {self.output_dir}: make room, or give fewer images "
                "(--max_train_samples, --real_parts)"
            )


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
