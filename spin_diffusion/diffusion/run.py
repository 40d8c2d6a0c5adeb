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
import numpy as np
import torch
import transformers
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed

from spin_diffusion.config import Config, changes, write_config
from spin_diffusion.data import ReadReport, read_examples
from spin_diffusion.diffusion import images
from spin_diffusion.diffusion.families import load_checkpoint
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.evaluation.comparison import as_markdown, compare, print_table
from spin_diffusion.evaluation.gallery import draw_gallery
from spin_diffusion.evaluation.in_rounds import evaluate, models_of_run, read_prompts, rows_of_runs, write_prompts
from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.objectives import OBJECTIVES
from spin_diffusion.selfplay.progress import Bars, Progress
from spin_diffusion.selfplay.rounds import Evaluate, of_round, play
from spin_diffusion.selfplay.run_dir import read_json, read_rows, weights_hash, write_file, write_json
from spin_diffusion.selfplay.samples import prepare, shards
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
    _check_inputs(config, output_dir)
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
    evaluation = _Evaluation(config, game, output_dir, accelerator, progress)
    evaluation.base()
    play(
        game, output_dir / "data", output_dir, config.rounds, config.training, accelerator,
        evaluation.of(f"{config.rounds.objective} "), progress,
    )  # fmt: skip
    for rival in _rivals(config):
        accelerator.print(f"For comparison: {rival}, with the same base, data and steps")
        play(
            game, output_dir / "data", output_dir / f"compare-{rival}",
            dataclasses.replace(config.rounds, objective=rival), config.training, accelerator,
            evaluation.of(f"{rival} ", last_round_only=True), progress,
        )  # fmt: skip
    accelerator.end_training()
    if accelerator.is_main_process:
        evaluation.tell()
        print(f"The player of the last round is in {output_dir / 'unet'}; load it with\n"
              f"  {family.PIPELINE.__name__}.from_pretrained({base!r}, "
              f"unet=UNet2DConditionModel.from_pretrained({str(output_dir / 'unet')!r}))")  # fmt: skip


class _Evaluation:
    """The same evaluation for base, rounds and rivals, and the table of all of them."""

    def __init__(
        self, config: Config, game: DiffusionGame, output_dir: Path, accelerator: Accelerator, progress: Progress
    ) -> None:
        self.config, self.game, self.output_dir = config, game, output_dir
        self.accelerator, self.progress = accelerator, progress
        self.settings = config.evaluation
        self.scales = self.settings.validation_guidance_scales or [config.sampling.guidance_scale]
        self.prompts = output_dir / "validation"
        if self.settings.validation_prompts and accelerator.is_main_process:
            write_prompts(
                self.prompts,
                read_prompts(self.settings.validation_prompts, self.settings.max_validation_prompts),
                self.settings,
                config.rounds.samples_per_shard,
                config.rounds.seed,
            )
        accelerator.wait_for_everyone()

    def base(self) -> None:
        """Evaluate the base, once."""
        if self.settings.validation_prompts and not (self.output_dir / "base" / "results.json").is_file():
            self.game.restore(None)
            self._evaluate(self.output_dir / "base", "base")

    def of(self, title: str, last_round_only: bool = False) -> Evaluate | None:
        """The rounds' evaluation: the present player into a folder."""
        if not self.settings.validation_prompts:
            return None
        last = f"round-{self.config.rounds.rounds}"

        def evaluate_round(directory: Path) -> dict[str, Any]:
            if last_round_only and directory.parent.name != last:
                return {}
            return self._evaluate(directory, title + directory.parent.name)

        return evaluate_round

    def _evaluate(self, directory: Path, title: str) -> dict[str, Any]:
        steps = self.settings.validation_num_inference_steps
        results = evaluate(
            lambda prompts, seeds, scale, done: self.game.draw(self.game.player, prompts, seeds, scale, steps, done),
            lambda image: images.to_bytes(image, dataclasses.replace(self.config.images, image_format="png")),
            images.open_image,
            self.prompts,
            directory,
            self.scales,
            self.settings.scorers or [],
            self.accelerator,
            self.progress,
            title,
        )
        self._log(directory, title, results)
        return results

    def _log(self, directory: Path, title: str, results: dict[str, Any]) -> None:
        """Scores and the gallery's pictures to the trackers."""
        name = title.replace(" ", "/")
        self.accelerator.log({f"{name}/{key}": value for key, value in results.items()})
        if not self.accelerator.is_main_process:
            return
        rows = self._gallery_rows(directory)
        pictures = [images.open_image(row["image"]).convert("RGB") for row in rows]
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(picture) for picture in pictures])
                tracker.writer.add_images(f"validation/{name}", stacked, 0, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                captioned = [wandb.Image(p, caption=row["prompt"]) for p, row in zip(pictures, rows, strict=True)]
                tracker.log({f"validation/{name}": captioned})

    def _gallery_rows(self, directory: Path) -> list[dict[str, Any]]:
        """The first image of each of the gallery's prompts, at the last guidance scale."""
        rows = read_rows(shards(directory / f"images-guidance-{self.scales[-1]:g}", ".parquet")[0])
        step = self.settings.num_validation_images
        return rows[: self.settings.num_gallery_prompts * step : step]

    def tell(self) -> None:
        """Print and write the table, and draw the gallery: the same prompts and seeds, base to last round."""
        if not self.settings.validation_prompts:
            return
        if self.settings.scorers:
            rows = rows_of_runs([self.output_dir])
            comparisons = compare(rows, "base")
            print_table(comparisons)
            markdown = as_markdown(comparisons)
            write_file(self.output_dir / "table.md", lambda part: part.write_text(markdown))
        shown = {name: self._gallery_rows(folder) for name, folder in models_of_run(self.output_dir).items()}
        gallery = [
            (cells[0]["prompt"], [images.open_image(cell["image"]).convert("RGB") for cell in cells])
            for cells in zip(*shown.values(), strict=True)
        ]
        draw_gallery(list(shown), gallery, self.output_dir / "samples.png")
        print(f"Pictures, the same prompts and seeds for every model: {self.output_dir / 'samples.png'}")


def _check_inputs(config: Config, output_dir: Path) -> None:
    """Refuse early, before a model is loaded: another run's folder, changed settings, prompts or scorers that fail."""
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
    if config.evaluation.validation_prompts:
        read_prompts(config.evaluation.validation_prompts, config.evaluation.max_validation_prompts)
        for spec in config.evaluation.scorers or []:
            load_scorer(spec, "cpu")
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise InputError("give the training data: --dataset_name (hub id, folder, parquet file) or --train_data_dir")


def _has_begun(output_dir: Path) -> bool:
    """Whether base and data were found good once; until then settings may be corrected in the same folder."""
    return (output_dir / "manifest.json").is_file()


def _forget_false_start(config: Config, output_dir: Path) -> None:
    """Remove what a command with other settings prepared before it was refused."""
    saved = output_dir / "config.yaml"
    if saved.is_file() and not _has_begun(output_dir) and changes(yaml.safe_load(saved.read_text()), config.flat()):
        for name in ("data", "validation"):
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
