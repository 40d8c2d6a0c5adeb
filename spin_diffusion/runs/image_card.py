"""The model card of an image run, and what of it goes to the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_diffusion.diffusion.base import Base, python_arguments
from spin_diffusion.diffusion.config import Config
from spin_diffusion.evaluation.comparison import Comparison
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.runs import publish
from spin_diffusion.runs.image_lines import loading_code
from spin_diffusion.runs.publish import UPLOADED, objective_fact, round_facts, write_card

SOURCES = {
    "spin": ("SPIN-Diffusion", "2402.10210"),
    "kto": ("Diffusion-KTO", "2404.04465"),
    "dpo": ("Diffusion-DPO", "2311.12908"),
    "sft": ("supervised fine-tuning", "2112.10752"),
}
"""Method and arXiv number of the objectives that a paper of its own brought to images."""


def write_model_card(
    output_dir: Path, config: Config, pipeline: str, rows: int, comparisons: Sequence[Comparison]
) -> None:
    """Write README.md: base, data, settings, the table with its intervals, and pictures."""
    folder, base = "lora" if config.lora.use_lora else "unet", Base.of_settings(config.flat())
    arguments = python_arguments(str(output_dir / folder))
    if config.run.hub_model_id:
        arguments = python_arguments(config.run.hub_model_id, subfolder=folder)
    write_card(
        output_dir,
        config,
        Path(__file__).parent / "pipeline_card.md.j2",
        base=base.name,
        facts=_facts(config, rows),
        comparisons=comparisons,
        samples="pictures",
        library="diffusers",
        task="text-to-image",
        sources=SOURCES,
        pipeline=pipeline,
        code=loading_code(base, pipeline, folder, arguments),
    )


def push_to_hub(output_dir: Path, config: Config) -> str:
    """Upload the UNet or adapter, card and report; return the address. Raises as `publish.push_to_hub`."""
    return publish.push_to_hub(output_dir, config, [*UPLOADED, "samples.png", "unet/**", "lora/**"])


def _facts(config: Config, rows: int) -> list[tuple[str, Any]]:
    curator = config.curation.curation_scorer
    chosen_by = f", chosen by {parse_spec(curator)[0]}" if curator else ""
    base = Base.of_settings(config.flat())
    options = [("base", f"`{base}`")] if base != Base(base.name) else []
    return [
        *options,
        ("images", f"{rows} from `{config.data.dataset_name or config.data.train_data_dir}`{chosen_by}"),
        objective_fact(config),
        ("opponent", f"{config.rounds.opponent}, guidance {config.sampling.guidance_scale:g}, "
                     f"{config.sampling.num_inference_steps} steps of {config.sampling.sampler}"),
        *round_facts(config, rows),
        ("trained", f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}" if config.lora.use_lora
                    else "all weights of the UNet"),
        ("winner-preserving mu", config.denoiser.winner_preserving_mu),
        ("seed", config.rounds.seed),
    ]  # fmt: skip
