"""What every kind of run leaves for others: the model card, README.md in the output folder, and the upload to a hub."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import spin_diffusion
from spin_diffusion.data.sources import looks_like_a_path
from spin_diffusion.evaluation.records import Results, read_results
from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.evaluation.tables import as_markdown, in_cell
from spin_diffusion.selfplay.round_settings import objective_of, objectives_of, source_of
from spin_diffusion.selfplay.train_settings import of_round, steps_of_round
from spin_diffusion.store.input_error import InputError, is_local, read_bytes
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import write_file
from spin_diffusion.store.shipped import shipped_name

UPLOADED = ("README.md", "config.yaml", "manifest.json", "report.html", "results.json")
"""Files of every run that are uploaded beside its model."""


@dataclass(frozen=True)
class Card:
    """What the model card and the upload of one kind of run have beside what every kind has."""

    what: str
    """What the model is, with which the card begins."""
    base: str
    """Hub id or local folder of what was trained."""
    code: str
    """Lines of Python that load the model: by its name on the hub, or in the folder of the card."""
    tags: Sequence[str]
    """The hub's words for it, beside those of every run."""
    dataset: str
    """Hub id or place on this disk of what was trained on."""
    facts: Sequence[tuple[str, Any]]
    samples: str
    """What the page shows, in the plural."""
    library: str
    """The hub's name of what loads the model."""
    task: str
    """The hub's name of what the model does."""
    is_adapter: bool
    sources: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Objective -> method and arXiv number, where they are not those of `OBJECTIVES` in this kind of run."""
    uploaded: tuple[str, ...] = ()
    """Patterns of files below the output folder that are uploaded beside those of every run."""
    at_root: Path | None = None
    """Folder whose files are to lie at the repository's root, where the libraries look for them."""


def write_card(output_dir: Path, config: RunConfig, card: Card) -> None:
    """Write README.md: base, data, settings, the table with its intervals. No path of this machine is in it."""
    results = read_results(output_dir / "results.json") if (output_dir / "results.json").is_file() else None
    on_hub, own = not is_local(card.base), place_name(card.base)
    objectives = objectives_of(config.rounds)
    generated = {source_of(config.rounds, name) for name in objectives}
    # Jinja without autoescape: this is Markdown. What a user or a data set wrote goes in as code or on one line.
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=False, autoescape=False)
    text = environment.get_template("model_card.md.j2").render(
        what=card.what,
        has_gallery="samples.png" in card.uploaded,
        title=in_cell(config.run.hub_model_id or output_dir.resolve().name),
        base=in_cell(own),
        base_link=f"https://huggingface.co/{card.base}" if on_hub else "#use",
        code=card.code,
        where=" and ".join(
            ([] if config.run.hub_model_id else ["in the folder of this card"])
            + ([f"with the path of the base in place of `{in_cell(own)}`"] if not on_hub and own in card.code else [])
        ),
        methods=_methods(objectives, card.sources),
        plays="opponent" in generated,
        prefers="data" in generated,
        facts=[(name, in_cell(str(value))) for name, value in card.facts],
        table=as_markdown(results) if results else "",
        verdict=_verdict(results),
        protocol=results["protocol"]["id"][:16] if results else "",
        samples=card.samples,
        licence_note="The licence of the base applies to this model." if on_hub else "",
        version=spin_diffusion.__version__,
    )
    data = ModelCardData(
        **_licence(card.base, on_hub),
        base_model=card.base if on_hub else None,
        base_model_relation=("adapter" if card.is_adapter else "finetune") if on_hub else None,
        datasets=None if looks_like_a_path(card.dataset) else [card.dataset],
        library_name=card.library,
        pipeline_tag=card.task,
        tags=[card.task, card.library, *card.tags, *(["lora"] if card.is_adapter else []), "self-play", *objectives],
    )
    encoded = f"---\n{data.to_yaml()}\n---\n\n{text}\n".encode("utf-8", errors="backslashreplace")
    # A data set's path need not be UTF-8
    path = output_dir / "README.md"
    if path.exists() and not _is_as_written(path):
        tell(
            f"{path} was edited, or is somebody's own, and stays as it is: delete it, then the same command writes it "
            "anew"
        )
        return
    write_file(path, lambda part: part.write_bytes(encoded + _seal_of(encoded)))


def _licence(base: str, on_hub: bool) -> dict[str, Any]:
    """The hub's fields of a licence: those of the base's own card; where that cannot be read, where it is to be found.

    Args:
        base: hub id or local folder.
    """
    try:
        path = hf_hub_download(base, "README.md") if on_hub else Path(base) / "README.md"
        said = ModelCard.load(path).data.to_dict()
    except Exception:  # somebody's file, and the hub's client raises dozens of kinds
        said = {}
    if isinstance(said.get("license"), str):
        return {key: str(said[key]) for key in ("license", "license_name", "license_link") if said.get(key)}
    if on_hub:
        return {
            "license": "other",
            "license_name": "that-of-the-base",
            "license_link": f"https://huggingface.co/{base}",
        }
    return {"license": "unknown"}


def place_name(place: str) -> str:
    """What a card calls something: a hub id as it is, what is shipped by its name, and of what else lies on this
    machine the last part of its path."""
    known = shipped_name(place)
    return Path(place).name if known == place and is_local(place) else known


def _seal_of(card: bytes) -> bytes:
    """The last line of a card, by which it is known that nobody edited it."""
    return f"<!-- by spin-diffusion; without this line its SHA-256 is {hashlib.sha256(card).hexdigest()} -->\n".encode()


def _is_as_written(path: Path) -> bool:
    lines = read_bytes(path).splitlines(keepends=True) if path.is_file() else []
    seal = lines.pop() if lines else b""
    return seal == _seal_of(b"".join(lines))


def push_to_hub(output_dir: Path, config: RunConfig, card: Card) -> str:
    """Upload what a user of the model needs; return its address.

    Raises:
        InputError: the hub cannot be reached, or refuses. Nothing is lost, the same command tries again.
    """
    name = config.run.hub_model_id or output_dir.resolve().name
    message = f"{config.titles}, {config.rounds.rounds} rounds"
    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True).repo_id
        if card.at_root is not None:
            api.upload_folder(repo_id=repository, folder_path=card.at_root, commit_message=message)
        patterns = [*UPLOADED, *card.uploaded]
        api.upload_folder(repo_id=repository, folder_path=output_dir, allow_patterns=patterns, commit_message=message)
    except Exception as error:  # the hub's client raises dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"--push_to_hub: {name} could not be uploaded ({reason}); everything is in {output_dir}, run the same "
            "command again to upload it"
        ) from error
    return f"https://huggingface.co/{repository}"


def by_round(config: RunConfig, value: Any) -> str:
    """A setting of one value, or one per round, in words."""
    values = [of_round(value, k) for k in range(1, config.rounds.rounds + 1)]
    values = [str(value) if isinstance(value, int | str) else f"{value:g}" for value in values]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def round_facts(config: RunConfig, rows: int, sampling: str) -> list[tuple[str, Any]]:
    """What every kind of run says of its rounds on the card.

    Args:
        rows: real samples of the run.
        sampling: how the opponent draws, in words.
    """
    rounds, training = config.rounds, config.training
    pairs, world = rows // rounds.real_parts, int(os.environ.get("WORLD_SIZE", "1"))
    steps = [steps_of_round(training, k, pairs, world)[0] for k in range(1, rounds.rounds + 1)]
    return [
        ("objective", f"{config.titles}, beta {by_round(config, rounds.beta)}, {rounds.rounds} rounds"),
        ("opponent", f"{rounds.opponent}, {sampling}"),
        ("optimizer steps a round", by_round(config, steps)),
        ("pairs a step and process", training.train_batch_size * training.gradient_accumulation_steps),
        ("learning rate", by_round(config, training.learning_rate)),
    ]


def _methods(objectives: Sequence[str], sources: Mapping[str, tuple[str, str]]) -> str:
    """The methods of all objectives with links to their papers, in a sentence."""
    methods = [sources.get(name) or objective_of(name)[1:] for name in objectives]
    links = [f"[{method}](https://arxiv.org/abs/{paper})" if paper else method for method, paper in methods]
    return " and ".join([", ".join(links[:-1]), links[-1]] if links[1:] else links)


def _verdict(results: Results | None) -> str:
    if not results:
        return ""
    headline = results["headline"]
    for verdict in results["verdicts"]:
        if (verdict["model"], verdict["guidance_scale"]) == (headline["model"], headline["guidance_scale"]):
            scale = verdict["guidance_scale"]
            at = in_cell(verdict["model"]) + (f" at guidance {scale:g}" if scale is not None else "")
            return f"{at}: **{verdict['verdict']}**. {verdict['reason']}"
    return ""
