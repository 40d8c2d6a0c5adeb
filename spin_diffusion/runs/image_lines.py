"""What an image run says of itself: before its rounds what it plays with, after them how its model is loaded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from spin_diffusion.diffusion.base import Base, python_arguments
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.curation import curation_line
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.given_lora import split_strength
from spin_diffusion.diffusion.images import fitting_lines, sizes_in_words
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.runs.publish import Card, place_name, round_facts
from spin_diffusion.samples.pairs import kinds_of
from spin_diffusion.samples.real import DataManifest
from spin_diffusion.samples.sample import ENCODED
from spin_diffusion.samples.sampling import free_in_words
from spin_diffusion.samples.shards import Part, shards
from spin_diffusion.selfplay.trainee import trained_parameters
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.shipped import shipped_name


def header(config: Config, game: DiffusionGame, manifest: DataManifest, output_dir: Path) -> str:
    """What a run plays with, in a few lines.

    Args:
        manifest: of the prepared data.
    """
    curated = manifest["left_out"].get("curation")
    return (
        f"Base       {game.base.placed(shipped_name)} ({game.family.PIPELINE.__name__}, "
        f"{game.resolution} px, {game.noising.prediction_type}{_said_by(game.base)})\n"
        f"{trained_line(game)}"
        f"Data       {manifest['rows']} pairs{', ' + curation_line(curated) if curated else ''}\n"
        f"{_sizes_lines(game, output_dir)}"
        f"Objective  {config.titles}, opponent {config.rounds.opponent}, drawn at "
        f"{game.opponent_sampling.in_words}\n"
        f"{_candidate_lines(config)}"
    )


def _said_by(base: Base) -> str:
    """For the header: who says what is predicted, where it is not the checkpoint's scheduler."""
    return "" if base.file is None or not base.file.noise else ", as the file says"


def trained_line(game: DiffusionGame) -> str:
    """For the header: how much is trained, beside how much."""
    trained = sum(parameter.numel() for parameter in trained_parameters(game))
    weights = sum(parameter.numel() for parameter in game.player.parameters())
    if game.saved == "unet":
        return f"Trained    all {weights / 1e6:.1f} M parameters, fp32\n"
    base = weights - 2 * trained  # the opponent has an adapter too
    return f"Trained    an adapter of {trained / 1e6:.2g} M parameters, fp32, beside the base's {base / 1e6:.1f} M\n"


def _sizes_lines(game: DiffusionGame, output_dir: Path) -> str:
    """For the header: how many real images have which size, where they differ; what was done to bring them there."""
    kinds = kinds_of(output_dir / "data" / ENCODED, Part())
    sizes = [f"Sizes      {sizes_in_words(game.sizes, kinds)}"] if kinds is not None else []
    files = shards(output_dir / "data" / "samples", ".parquet")
    frames = [row["frame"] for path in files for row in read_rows(path, columns=["frame"])]
    return "".join(f"{line}\n" for line in (*sizes, *fitting_lines(np.array(frames))))


def _candidate_lines(config: Config) -> str:
    """For the header: where pairs come from that have no real image, and what their scorer cannot be used for."""
    found, scorers = config.rounds.candidates, config.evaluation.scorers or []
    if not found.number:
        return ""
    of = "all prompts" if found.share == 1 else f"{found.share:.0%} of the prompts"
    line = f"Candidates {found.number} for {of}, best against worst by {found.scorer}\n"
    if found.scorer in scorers:
        line += f"           so {found.scorer} says what was aimed at, not what was gained: trust the others\n"
    return line


def loading_code(base: Base, pipeline: str, folder: str, arguments: str, name: Callable[[str], str] = str) -> str:
    """Lines of Python by which a user loads what a run made of its base.

    Args:
        pipeline: the pipeline's class.
        folder: which of the two was saved: unet or lora.
        arguments: that name it to `from_pretrained` and `load_lora_weights`.
        name: from a place of the base on this disk to what the lines call it.
    """
    file, base = base.file, base.placed(name)
    unet = f"UNet2DConditionModel.from_pretrained({arguments})"
    parts = {"unet": unet} if folder == "unet" and base.lora is None else {}
    if base.vae is not None:
        parts["vae"] = f"AutoencoderKL.from_pretrained({python_arguments(base.vae)})"
    called = [*parts.values(), *([unet] if folder == "unet" else [])]
    classes = sorted({pipeline, *(call.partition(".")[0] for call in called)})
    options = {"config": base.config} if base.config else {"revision": base.revision, "variant": base.variant}
    of_base, noise = python_arguments(base.name, **options), file.noise if file else {}
    # Text encoders would come in the precision of their files, which need not be the UNet's
    given = ", ".join([of_base, *(f"{name}={name}" for name in parts), "dtype=torch.float32"])
    loaded = f"{pipeline}.{'from_single_file' if file else 'from_pretrained'}({given})"
    lines = ["import torch", f"from diffusers import {', '.join(classes)}", ""]
    lines += [f"{name} = {call}" for name, call in parts.items()] + [f"pipeline = {loaded}"]
    if noise:  # which diffusers does not read
        named = ", ".join(f"{key}={value!r}" for key, value in noise.items())
        lines.append("scheduler = pipeline.scheduler")
        lines.append(f"pipeline.scheduler = type(scheduler).from_config(scheduler.config, {named})")
    if base.lora is not None:  # first, for what it has for the text encoders, and below an adapter
        path, strength = split_strength(base.lora)
        lines += [f"pipeline.load_lora_weights({python_arguments(path)})", f"pipeline.fuse_lora(lora_scale={strength})"]
        lines += ["pipeline.unload_lora_weights()"]
        if folder == "unet":
            lines += [f"pipeline.unet = {unet}"]
    return "\n".join(lines + ([f"pipeline.load_lora_weights({arguments})"] if folder == "lora" else []))


SOURCES = {
    "spin": ("SPIN-Diffusion", "2402.10210"),
    "kto": ("Diffusion-KTO", "2404.04465"),
    "dpo": ("Diffusion-DPO", "2311.12908"),
    "sft": ("supervised fine-tuning", "2112.10752"),
}
"""Method and arXiv number of the objectives that a paper of its own brought to images."""


_FAMILY_TAGS = {
    "StableDiffusionPipeline": ("stable-diffusion", "stable-diffusion-diffusers"),
    "StableDiffusionXLPipeline": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
}
"""The words by which the hub's users look for a family's models."""


def card(config: Config, pipeline: str, rows: int) -> Card:
    """What the model card says of base, data and settings, and the code that loads the model.

    Args:
        pipeline: the pipeline's class.
        rows: real images of the run.
    """
    folder, base = "lora" if config.lora.use_lora else "unet", Base.of_settings(config.flat())
    arguments = python_arguments(f"./{folder}")
    if config.run.hub_model_id:
        arguments = python_arguments(config.run.hub_model_id, subfolder=folder)
    place = config.data.dataset_name or config.data.train_data_dir
    assert place is not None, "one of the two is given"
    curator, lora, sampling = config.data.curation.scorer, config.lora, config.sampling
    chosen_by = f", chosen by {parse_spec(curator)[0]}" if curator else ""
    free = free_in_words(sampling.guidance_scale, sampling.num_inference_steps, sampling.prediction_scale)
    how = f"{free}, by {sampling.sampler}"
    adapter = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}"
    return Card(
        pipeline,
        base.name,
        loading_code(base, pipeline, folder, arguments, place_name),
        _FAMILY_TAGS.get(pipeline, ()),
        place,
        [
            *([("base", f"`{base.placed(place_name)}`")] if base != Base(base.name) else []),
            ("images", f"{rows} from `{place_name(place)}`{chosen_by}"),
            *round_facts(config, rows, how),
            ("trained", adapter if lora.use_lora else "all weights of the UNet"),
            ("winner-preserving mu", config.denoiser.winner_preserving_mu),
            ("seed", config.rounds.seed),
        ],
        samples="pictures",
        library="diffusers",
        task="text-to-image",
        is_adapter=lora.use_lora,
        sources=SOURCES,
        uploaded=("samples.png", "unet/**", "lora/**"),
    )
