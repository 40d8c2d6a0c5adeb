"""An image run: how its base, its real images, its evaluation and its costs come about. `run` does the rest."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from spin_diffusion.data.held_out import images_aside
from spin_diffusion.data.reading import read_examples, with_held_out
from spin_diffusion.data.rows import Example, Expected, ReadReport
from spin_diffusion.data.settings import CurationSettings, DataSettings
from spin_diffusion.diffusion.base import Base, load_checkpoint, python_arguments
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import count_units, phase_flops, work_of
from spin_diffusion.diffusion.curation import Curation, candidates_of, check_judges, content_settings, curation_lines
from spin_diffusion.diffusion.game import DiffusionGame, example_id
from spin_diffusion.diffusion.images import area_share
from spin_diffusion.diffusion.prompts import CutPrompts
from spin_diffusion.diffusion.settings import CandidateSettings
from spin_diffusion.diffusion.shortcuts import ShortcutProbe
from spin_diffusion.evaluation.features import check_embedding
from spin_diffusion.evaluation.prompt_sets import PromptSet, load_prompts
from spin_diffusion.evaluation.scoring import check_specs
from spin_diffusion.runs.advice import advice
from spin_diffusion.runs.evaluator import RunEvaluator, RunReporter
from spin_diffusion.runs.image_evaluator import PictureSamples
from spin_diffusion.runs.image_lines import card, header, loading_code
from spin_diffusion.runs.image_plan import plan_images, settle_draws
from spin_diffusion.runs.plan import lines
from spin_diffusion.runs.plateau import fine_tuning
from spin_diffusion.runs.player_pictures import PlayerPictures
from spin_diffusion.runs.publish import Card
from spin_diffusion.runs.real_pictures import of_run
from spin_diffusion.runs.run import Run, play_run
from spin_diffusion.samples.pairs import Column, kinds_of
from spin_diffusion.samples.real import DataManifest, prepare
from spin_diffusion.samples.sample import ENCODED
from spin_diffusion.samples.shards import Part
from spin_diffusion.selfplay.device import autocast_dtype, matrix_rate
from spin_diffusion.selfplay.one_round import Costs
from spin_diffusion.selfplay.record import HELD_OUT, RoundRecord
from spin_diffusion.selfplay.round_settings import RoundSettings, source_of
from spin_diffusion.selfplay.sharded import wants_shards
from spin_diffusion.selfplay.train_settings import of_round, steps_of_round
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress, tell
from spin_diffusion.store.shipped import shipped_name


def run(config: Config, family_name: str) -> list[RoundRecord]:
    """Play all rounds of `config` with a checkpoint of a family, `sd` or `sdxl`. Raises as `play_run`."""
    return play_run(ImageRun(config, family_name))


class ImageRun(Run):
    """An image run."""

    program = "image training"
    config: Config
    game: DiffusionGame

    def __init__(self, config: Config, family_name: str | None = None) -> None:
        """Args: family_name: the only family that is allowed."""
        self.config, self.family_name = config, family_name
        self.held_out = self.output_dir / HELD_OUT if config.data.holds_out else None
        self.prompts: PromptSet | None = None

    def fine_tuning(self) -> "ImageRun":
        """A run of the same kind that fine-tunes."""
        config = self.config
        rounds = dataclasses.replace(config.rounds, candidates=CandidateSettings())
        evaluation = dataclasses.replace(
            config.evaluation, promote_if="always", validation_prompts=None, preview_every=0
        )
        sections = fine_tuning(config, config.data, rounds=rounds, evaluation=evaluation)
        return ImageRun(dataclasses.replace(config, **sections))

    def check(self) -> None:
        """Refuse no data, prompts that cannot be read, scorers that do not exist."""
        config = self.config
        if config.data.dataset_name is None and config.data.train_data_dir is None:
            raise InputError(
                "give the training data: --dataset_name (hub id, folder, parquet file) or --train_data_dir"
            )
        check_judges(config.data.curation, config.rounds.candidates, config.training.select_by)
        if config.evaluation.distribution_features is not None:
            check_embedding(config.evaluation.distribution_features)
        if config.evaluation.validation_prompts:
            check_specs(config.evaluation.scorers or [])
            self.prompts = load_prompts(config.evaluation.validation_prompts, config.evaluation.max_validation_prompts)

    def open(self, accelerator: Accelerator) -> None:
        """The base checkpoint as a game."""
        config = self.config
        self.game = game = open_game(config, accelerator, self.family_name)
        self.candidates = candidates_of(config.rounds.candidates, str(self.game.accelerator.device))
        self.probe = ShortcutProbe(
            game.pipeline.vae, config.images, config.rounds.probe, config.sampling.generation_batch_size
        )

    def plan(self, progress: Progress) -> list[str]:
        """The plan, and what the text encoders do not read."""
        captions = CutPrompts(self.game.pipeline)
        plan = plan_images(self.config, self.game, captions, progress)
        cut = [captions.line("captions"), self._cut_prompts()]
        told = lines(plan, self.config.run.output_dir, self.game.accelerator.device, "scorers")
        told += advice(self.config, plan["rows"], self.game, plan["processes"])
        return told + [line for line in cut if line is not None]

    def prepare(self, progress: Progress) -> DataManifest:
        """The manifest of the real images, chosen by a scorer if one is named."""
        config, game, data = self.config, self.game, self.output_dir / "data"
        report, with_losers = ReadReport(), config.needs_losers
        curation = self._curation(with_losers, progress)
        trained_on, held_out = self._sides(curation, with_losers, report)
        # `prepare` asks the main process alone for the real samples
        if curation and not any((data / name).exists() for name in ("left_out.json", "manifest.json")):
            curation.score(self.game.accelerator)
        settings = self._data_settings(with_losers) | {"curation": content_settings(config.data.curation)}
        manifest = prepare(
            data,
            lambda: game.real_rows(trained_on()),
            settings,
            config.rounds.samples_per_shard,
            game,
            self.game.accelerator,
            progress,
            lambda: report.as_dict() | ({"curation": curation.summary} if curation else {}),
        )
        if self.held_out is not None:
            of_shard = config.rounds.samples_per_shard
            prepare(
                self.held_out, lambda: game.real_rows(held_out()), settings, of_shard, game, game.accelerator, progress
            )
        if report.read:
            cut = CutPrompts(game.pipeline).add(Column(data, "prompt")).line("captions")
            chosen = curation_lines(curation.summary, config.data.curation) if curation and curation.summary else []
            for line in [*report.lines(), *([cut] if cut else []), *chosen]:
                tell(line, self.game.accelerator)
        if curation and self.game.accelerator.is_main_process:
            curation.forget()
        return manifest

    def base(self) -> Mapping[str, object]:
        """The base with what it is loaded with, and the hash of its weights."""
        base = self.game.base.placed(shipped_name)
        return base.as_dict() | {"weights": self.game.base_hash, "parts": self.game.parts_hash}

    def header(self, data: DataManifest) -> str:
        """What the run plays with."""
        return header(self.config, self.game, data, self.output_dir)

    def ready(self, pairs: int, progress: Progress) -> None:
        """Settle how many draws are fixed, and keep the prompts' embeddings."""
        if (line := self._cut_prompts()) is not None:
            tell(line, self.game.accelerator)
        if self.prompts is not None and self.prompts.broken:
            tell(
                f"{len(self.prompts.rows)} prompts of {self.prompts.name}{self.prompts.said_left_out()}",
                self.game.accelerator,
            )
        self.config = settle_draws(self.config, self.game.accelerator, pairs)
        config, game = self.config, self.game
        game.fixed_draws = int(config.denoiser.fixed_draws)
        folder = self.output_dir / "encodings" / "prompts"
        dtype = autocast_dtype(self.game.accelerator.mixed_precision) or torch.float32
        game.prompts.keep(folder, self._captions(), self.game.accelerator, dtype, progress)

    def _captions(self) -> Sequence[str]:
        """The captions of the real images, those that are held out last."""
        return Column(self.output_dir / "data", "prompt", beside=self.held_out)

    def _let_look(self, to_page: Callable[[], None]) -> None:
        """Who looks at the player's pictures while it is trained.

        Args:
            to_page: puts previews on the page.
        """
        config, pictures = self.config, PlayerPictures(self.config, self.game)
        seed, by = config.rounds.seed, config.training.select_by
        held_out = Column(self.held_out, "prompt") if self.held_out is not None else None
        if by == "fd" and held_out is not None and (real := of_run(config, self.held_out)) is not None:
            self.judge = pictures.judge_by_distance(real, held_out, seed)
        elif by != "gap" and held_out is not None:
            self.judge = pictures.judge(by, held_out, seed)
        prompts = [row.prompt for row in self.prompts.rows] if self.prompts is not None else held_out
        if (every := config.evaluation.preview_every) != 0 and (prompts or every):
            self.preview = pictures.preview(every, prompts or self._captions(), seed, to_page)

    def evaluator(self, progress: Progress) -> RunReporter:
        """What measures by pictures of the validation prompts, where there are any."""
        prompts, config, game = self.prompts, self.config, self.game
        evaluator = RunReporter(config, game.accelerator, of_answers=False)
        if prompts is not None:
            samples = PictureSamples(config, prompts, game, progress, self.held_out)
            base = str(game.base.placed(shipped_name)), "pipeline"
            evaluator = RunEvaluator(config, game, base, game.saved, samples)
        self._let_look(evaluator.refresh)
        return evaluator

    def costs(self, pairs: int) -> Callable[[RoundSettings], Costs]:
        """What the phases of a round take, by its settings."""
        config, game = self.config, self.game
        game.prompts.bring_back()
        unit = count_units(game.family, game.pipeline, game.resolution)
        kinds = kinds_of(self.output_dir / "data" / ENCODED, Part())
        if kinds is not None:
            unit = unit.of_area(area_share(game.sizes, kinds))
        dtype = autocast_dtype(self.game.accelerator.mixed_precision) or torch.float32
        rate = matrix_rate(self.game.accelerator.device, dtype)
        zeros = bool(game.pipeline.config.get("force_zeros_for_empty_prompt"))
        world = self.game.accelerator.num_processes
        batch = config.training.train_batch_size * config.training.gradient_accumulation_steps

        def of(rounds: RoundSettings) -> Costs:
            def flops(k: int, phase: str, samples: int) -> int | None:
                if phase == "previewed" or phase == "judged" and config.training.select_by != "gap":
                    phase = "generated"
                source = source_of(rounds, of_round(rounds.objective, k))
                steps, _ = steps_of_round(config.training, k, pairs, world)
                return phase_flops(unit, work_of(config, source, pairs, steps, zeros), phase, samples, batch)

            return Costs(flops, rate)

        return of

    def card(self, rows: int) -> Card:
        """What the model card says."""
        return card(self.config, self.game.family.PIPELINE.__name__, rows)

    def loading_code(self) -> tuple[Path, str]:
        """The UNet's folder or the adapter's, and lines of Python that load it."""
        folder = (self.output_dir / self.game.saved).resolve()
        pipeline, arguments = self.game.family.PIPELINE.__name__, python_arguments(str(folder))
        return folder, loading_code(self.game.base, pipeline, folder.name, arguments, os.path.realpath)

    def _cut_prompts(self) -> str | None:
        """A warning where the text encoders do not read validation prompts to their ends."""
        rows = self.prompts.rows if self.prompts is not None else ()
        return CutPrompts(self.game.pipeline).add(row.prompt for row in rows).line("validation prompts")

    def _data_settings(self, with_losers: bool) -> dict[str, object]:
        """What decides the content of the prepared data."""
        config = self.config
        settings = dataclasses.asdict(config.data) | dataclasses.asdict(config.images)
        del settings["curation"]
        settings |= {"resolution": self.game.resolution, "with_losers": with_losers}
        return settings | {"shard": config.rounds.samples_per_shard}

    def _source(self) -> DataSettings:
        """What is read of the data set; where a scorer chooses it sees all images of a prompt."""
        data = with_held_out(self.config.data)
        if data.curation.scorer is None:
            return data
        return dataclasses.replace(data, one_image_per_prompt=False, curation=CurationSettings())

    def _sides(
        self, curation: Curation | None, with_losers: bool, report: ReadReport
    ) -> tuple[Callable[[], Iterator[Example]], Callable[[], list[Example]]]:
        """What reads the examples to train on, and what gives those that are held out, without worse images.

        Args:
            report: of the examples to train on.
        """
        aside = images_aside(self.config.data.num_held_out)

        def examples(report: ReadReport) -> Iterator[Example]:
            def read() -> Iterator[Example]:
                return read_examples(self._source(), with_losers=with_losers, report=report)

            return curation.take(read) if curation else read()

        @functools.cache
        def held_out() -> list[Example]:
            return aside.choose(examples(ReadReport())) if self.held_out is not None else []

        return (
            lambda: _trained_on(examples(report), aside.rule(held_out()), report),
            lambda: [dataclasses.replace(example, loser=None) for example in held_out()],
        )

    def _curation(self, with_losers: bool, progress: Progress) -> Curation | None:
        """What chooses the real images; None = all of them are used."""
        config = self.config
        if config.data.curation.scorer is None:
            return None
        return Curation(
            config.data.curation,
            self.output_dir / "curation",
            self.output_dir / "data" / "curation.parquet",
            self._data_settings(with_losers),
            lambda: read_examples(self._source(), with_losers=with_losers),
            example_id,
            self.game.real_rows,
            config.rounds.samples_per_shard,
            str(self.game.accelerator.device),
            config.data.one_image_per_prompt,
            progress,
        )


def _trained_on(
    examples: Iterable[Example], is_held_out: Callable[[Example], bool], report: ReadReport
) -> Iterator[Example]:
    """The examples that are not held out; the others are counted where the reader counts."""
    held_out = used = 0
    for example in examples:
        if is_held_out(example):
            held_out += 1
            report.leave_out(example.where, Expected.HELD_OUT, f"{example.prompt[:80]!r} is held out")
        else:
            used += 1
            yield example
    report.used -= held_out
    if not used:
        raise InputError(
            f"the captions of the held-out images are those of all {held_out} that can be used, and none with such a "
            "caption is trained on: hold out fewer (--num_held_out), or none where most captions are equal"
        )


def open_game(config: Config, accelerator: Accelerator, family_name: str | None = None) -> DiffusionGame:
    """The base checkpoint as a game.

    Args:
        family_name: the only family that is allowed.
    """
    base = Base.of_settings(config.flat())
    family, pipeline = load_checkpoint(base)
    if family_name is not None and family.__name__.rsplit(".", 1)[-1] != family_name:
        right = family.__name__.rsplit(".", 1)[-1]
        raise InputError(f"{base.name} is a {family.PIPELINE.__name__}: run training/train_spin_{right}.py for it")
    # A player in parts has the plain layout, and adamw_8bit lays weights out so in its first step; an opponent of
    # another layout would round differently
    plain = config.training.optimizer == "adamw_8bit" or wants_shards(config.training, accelerator)
    return DiffusionGame(
        family,
        pipeline,
        base,
        images=config.images,
        sampling=config.sampling,
        denoiser=config.denoiser,
        lora=config.lora,
        accelerator=accelerator,
        gradient_checkpointing=config.training.gradient_checkpointing,
        channels_last=not plain,
    )
