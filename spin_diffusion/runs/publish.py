"""What every kind of run leaves for others: the model card, README.md in the output folder, and the upload to a hub."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import spin_diffusion
from spin_diffusion.evaluation.comparison import Comparison, as_markdown
from spin_diffusion.evaluation.records import read_results
from spin_diffusion.runs.start import AnyConfig
from spin_diffusion.selfplay.objective_names import objective_of, title_of
from spin_diffusion.selfplay.round_settings import objectives_of, source_of
from spin_diffusion.selfplay.train_settings import of_round, steps_of_round
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.opening import read_bytes
from spin_diffusion.store.run_dir import write_file

UPLOADED = ("README.md", "config.yaml", "manifest.json", "report.html", "results.json")
"""Of every run, beside its model."""


def write_card(
    output_dir: Path,
    config: AnyConfig,
    template: Path,
    *,
    base: str,
    facts: Sequence[tuple[str, Any]],
    comparisons: Sequence[Comparison],
    samples: str,
    library: str,
    task: str,
    sources: Mapping[str, tuple[str, str]] | None = None,
    **more: Any,
) -> None:
    """Write README.md: base, data, settings, the table with its intervals.

    Args:
        template: fills the blocks `opening` and `use` of `model_card.md.j2`.
        base: hub id or local folder of what was trained.
        samples: what the page shows, in the plural.
        library, task: the hub's names of what loads it and of what it does.
        sources: objective -> method and arXiv number, where they are not those of `OBJECTIVES` in this kind of run.
        more: what the template's own blocks need.
    """
    results = read_results(output_dir / "results.json") if (output_dir / "results.json").is_file() else None
    on_hub = not Path(base).exists()
    objectives = objectives_of(config.rounds)
    generated = {source_of(config.rounds, name) for name in objectives}
    # Jinja without autoescape: this is Markdown. What a user or a data set wrote goes in as code or on one line.
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]), undefined=StrictUndefined,
        trim_blocks=False, autoescape=False,
    )  # fmt: skip
    text = environment.get_template(template.name).render(
        title=_line(config.run.hub_model_id or output_dir.resolve().name),
        base=_line(base if on_hub else Path(base).name),
        base_link=f"https://huggingface.co/{base}" if on_hub else "#use",
        base_argument=json.dumps(base),
        methods=_methods(objectives, sources or {}),
        plays="opponent" in generated,
        prefers="data" in generated,
        facts=[(name, _line(str(value))) for name, value in facts],
        table=as_markdown(comparisons) if comparisons else "",
        verdict=_verdict(results),
        protocol=results["protocol"]["id"][:16] if results else "",
        samples=samples,
        licence_note="The licence of the base applies to this model." if on_hub else "",
        version=spin_diffusion.__version__,
        **more,
    )
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name=library,
        pipeline_tag=task,
        tags=[task, library, "self-play", *objectives],
    )
    card = f"---\n{data.to_yaml()}\n---\n\n{text}\n"
    encoded = card.encode("utf-8", errors="backslashreplace")  # a data set's path need not be UTF-8
    path = output_dir / "README.md"
    if path.exists() and not _is_as_written(path):
        print(f"{path} was edited, or is somebody's own, and stays as it is: delete it, then the same command writes "
              "it anew")  # fmt: skip
        return
    write_file(path, lambda part: part.write_bytes(encoded + _seal_of(encoded)))


def _seal_of(card: bytes) -> bytes:
    """The last line of a card, by which it is known that nobody edited it."""
    return f"<!-- by spin-diffusion; without this line its SHA-256 is {hashlib.sha256(card).hexdigest()} -->\n".encode()


def _is_as_written(path: Path) -> bool:
    lines = read_bytes(path).splitlines(keepends=True) if path.is_file() else []
    seal = lines.pop() if lines else b""
    return seal == _seal_of(b"".join(lines))


def push_to_hub(output_dir: Path, config: AnyConfig, patterns: Sequence[str], at_root: Path | None = None) -> str:
    """Upload what a user of the model needs; return its address.

    Args:
        patterns: of files below the output folder.
        at_root: folder whose files are to lie at the repository's root, where the libraries look for them.

    Raises:
        InputError: the hub cannot be reached, or refuses. Nothing is lost, the same command tries again.
    """
    name = config.run.hub_model_id or output_dir.resolve().name
    message = f"{', '.join(objectives_of(config.rounds))}, {config.rounds.rounds} rounds"
    try:
        api = HfApi(token=config.run.hub_token)
        repository = api.create_repo(name, exist_ok=True).repo_id
        if at_root is not None:
            api.upload_folder(repo_id=repository, folder_path=at_root, commit_message=message)
        api.upload_folder(
            repo_id=repository, folder_path=output_dir, allow_patterns=list(patterns), commit_message=message
        )
    except Exception as error:  # the hub's client raises dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"--push_to_hub: {name} could not be uploaded ({reason}); everything is in {output_dir}, run the same "
            "command again to upload it"
        ) from error
    return f"https://huggingface.co/{repository}"


def by_round(config: AnyConfig, value: Any) -> str:
    """A setting of one value, or one per round, in words."""
    values = [f"{of_round(value, k):g}" for k in range(1, config.rounds.rounds + 1)]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def round_facts(config: AnyConfig, rows: int) -> list[tuple[str, Any]]:
    """What every kind of run says of its rounds' training, for the card."""
    rounds, training = config.rounds, config.training
    pairs, world = rows // rounds.real_parts, int(os.environ.get("WORLD_SIZE", "1"))
    steps = [steps_of_round(training, k, pairs, world)[0] for k in range(1, rounds.rounds + 1)]
    steps = steps[:1] if len(set(steps)) == 1 else steps
    return [
        ("optimizer steps a round", ", ".join(str(number) for number in steps)),
        ("pairs a step and process", training.train_batch_size * training.gradient_accumulation_steps),
        ("learning rate", by_round(config, training.learning_rate)),
    ]


def objective_fact(config: AnyConfig) -> tuple[str, str]:
    """The same of its objectives."""
    beta = by_round(config, config.rounds.beta)
    return (
        "objective",
        f"{', '.join(title_of(name) for name in objectives_of(config.rounds))}"
        f", beta {beta}, {config.rounds.rounds} rounds",
    )


def _methods(objectives: Sequence[str], sources: Mapping[str, tuple[str, str]]) -> str:
    """The methods of all objectives with links to their papers, in a sentence."""
    methods = [sources.get(name) or objective_of(name)[1:] for name in objectives]
    links = [f"[{method}](https://arxiv.org/abs/{paper})" if paper else method for method, paper in methods]
    return " and ".join([", ".join(links[:-1]), links[-1]] if links[1:] else links)


def _verdict(results: dict[str, Any] | None) -> str:
    if not results:
        return ""
    headline = results["headline"]
    for said in results["verdicts"]:
        if (said["model"], said["guidance_scale"]) == (headline["model"], headline["guidance_scale"]):
            scale = said["guidance_scale"]
            at = _line(said["model"]) + (f" at guidance {scale:g}" if scale is not None else "")
            return f"{at}: **{said['verdict']}**. {said['reason']}"
    return ""


def _line(text: str) -> str:
    """Text that stays within one line and one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
