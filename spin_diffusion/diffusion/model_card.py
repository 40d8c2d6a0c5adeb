"""The model card: README.md in the output folder, and the folder on the hub if that is asked for."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import spin_diffusion
from spin_diffusion.config import Config
from spin_diffusion.evaluation.comparison import Comparison, as_markdown
from spin_diffusion.evaluation.specs import parse_spec
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.objectives import OBJECTIVES
from spin_diffusion.selfplay.round_settings import objectives_of
from spin_diffusion.selfplay.run_dir import read_json, write_file
from spin_diffusion.selfplay.train_settings import of_round, steps_of_round

UPLOADED = ["README.md", "config.yaml", "manifest.json", "report.html", "results.json", "samples.png", "unet/**",
            "lora/**"]  # fmt: skip


def write_model_card(
    output_dir: Path, config: Config, pipeline: str, rows: int, comparisons: Sequence[Comparison]
) -> None:
    """Write README.md: base, data, settings, the table with its intervals, and pictures."""
    base = str(config.model.pretrained_model_name_or_path)
    results = read_json(output_dir / "results.json") if (output_dir / "results.json").is_file() else None
    on_hub = not Path(base).exists()
    # Jinja without autoescape: this is Markdown. What a user or a data set wrote goes in as code or on one line.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=False, autoescape=False
    )
    folder = "lora" if config.lora.use_lora else "unet"
    objectives = objectives_of(config.rounds)
    last = OBJECTIVES[objectives[-1]]
    text = environment.get_template("model_card.md.j2").render(
        title=_line(config.run.hub_model_id or output_dir.resolve().name),
        pipeline=pipeline,
        base=_line(base if on_hub else Path(base).name),
        base_link=f"https://huggingface.co/{base}" if on_hub else "#use",
        method=last.method,
        method_link=f"https://arxiv.org/abs/{last.paper}",
        uses_lora=config.lora.use_lora,
        arguments=f'{json.dumps(config.run.hub_model_id)}, subfolder="{folder}"'
        if config.run.hub_model_id
        else json.dumps(str(output_dir / folder)),
        base_argument=json.dumps(base),
        facts=[(name, _line(str(value))) for name, value in _facts(config, rows)],
        table=as_markdown(comparisons) if comparisons else "",
        verdict=_verdict(results),
        protocol=results["protocol"]["id"][:16] if results else "",
        licence_note="The licence of the base applies to this model." if on_hub else "",
        version=spin_diffusion.__version__,
    )
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "self-play", *objectives],
    )
    card = f"---\n{data.to_yaml()}\n---\n\n{text}\n"
    write_file(output_dir / "README.md", lambda part: part.write_text(card, encoding="utf-8"))


def push_to_hub(output_dir: Path, config: Config) -> str:
    """Upload what a user of the model needs; return its address.

    Raises:
        InputError: the hub cannot be reached, or refuses. Nothing is lost, the same command tries again.
    """
    name = config.run.hub_model_id or output_dir.resolve().name
    try:
        api = HfApi(token=config.run.hub_token)
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=output_dir,
            allow_patterns=UPLOADED,
            commit_message=f"{', '.join(objectives_of(config.rounds))}, {config.rounds.rounds} rounds",
        )
    except Exception as error:  # the hub's client raises dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"--push_to_hub: {name} could not be uploaded ({reason}); everything is in {output_dir}, run the same "
            "command again to upload it"
        ) from error
    return f"https://huggingface.co/{repository}"


def _facts(config: Config, rows: int) -> list[tuple[str, Any]]:
    rounds, training = config.rounds, config.training

    def by_round(value: Any) -> str:
        values = [f"{of_round(value, k):g}" for k in range(1, rounds.rounds + 1)]
        return values[0] if len(set(values)) == 1 else ", ".join(values)

    curator = config.curation.curation_scorer
    chosen_by = f", chosen by {parse_spec(curator)[0]}" if curator else ""
    return [
        ("images", f"{rows} from `{config.data.dataset_name or config.data.train_data_dir}`{chosen_by}"),
        ("objective", f"{', '.join(objectives_of(rounds))}, beta {by_round(rounds.beta)}, {rounds.rounds} rounds"),
        ("opponent", f"{rounds.opponent}, guidance {config.sampling.guidance_scale:g}, "
                     f"{config.sampling.num_inference_steps} steps of {config.sampling.sampler}"),
        ("optimizer steps a round", ", ".join(str(steps) for steps in _steps(config, rows))),
        ("pairs a step and process", training.train_batch_size * training.gradient_accumulation_steps),
        ("learning rate", by_round(training.learning_rate)),
        ("trained", f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}" if config.lora.use_lora
                    else "all weights of the UNet"),
        ("winner-preserving mu", config.denoiser.winner_preserving_mu),
        ("seed", rounds.seed),
    ]  # fmt: skip


def _steps(config: Config, rows: int) -> list[int]:
    """What each round was to take, on the processes of the present run."""
    pairs, world = rows // config.rounds.real_parts, int(os.environ.get("WORLD_SIZE", "1"))
    steps = [steps_of_round(config.training, k, pairs, world)[0] for k in range(1, config.rounds.rounds + 1)]
    return steps[:1] if len(set(steps)) == 1 else steps


def _verdict(results: dict[str, Any] | None) -> str:
    if not results:
        return ""
    headline = results["headline"]
    for said in results["verdicts"]:
        if (said["model"], said["guidance_scale"]) == (headline["model"], headline["guidance_scale"]):
            at = f"{_line(said['model'])} at guidance {said['guidance_scale']:g}"
            return f"{at}: **{said['verdict']}**. {said['reason']}"
    return ""


def _line(text: str) -> str:
    """Text that stays within one line and one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
