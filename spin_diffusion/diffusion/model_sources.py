"""What `NAME=PATH` means: a pipeline, a round of a run, or a folder of pictures that somebody drew already."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.families import single_file
from spin_diffusion.diffusion.lora import WEIGHTS as LORA_WEIGHTS
from spin_diffusion.diffusion.parts import is_local
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.run_dir import read_json

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_METADATA = ("metadata.jsonl", "metadata.csv")
_PROMPTS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class ModelSource:
    """A model to evaluate."""

    name: str
    path: str
    kind: Literal["pipeline", "round", "images"]
    base: Base | None
    """What it draws with; None for pictures."""
    unet: Path | None = None
    """Folder of a round's UNet."""
    lora: Path | None = None
    """Folder of a round's LoRA adapter, relative to the base."""


def read_source(
    spec: str, revision: str | None = None, variant: str | None = None, vae: str | None = None
) -> ModelSource:
    """The model of a `NAME=PATH_OR_ID`.

    Args:
        revision, variant, vae: of pipelines; a round has those that its run was started with.

    Raises:
        InputError: not NAME=PATH, a path that is nothing of the kind, or a round whose base is unknown.
    """
    name, equals, path = spec.partition("=")
    if not equals or not name or not path:
        raise InputError(
            f"--models {spec!r}: give NAME=PATH_OR_ID, such as base=stabilityai/stable-diffusion-xl-base-1.0"
        )
    if name != name.strip() or name.startswith(".") or any(character in name for character in '/\\:*?"<>|'):
        raise InputError(f"--models {spec!r}: the name becomes a folder's, use letters, digits, - and _")
    folder = Path(path)
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return ModelSource(name, path, "pipeline", Base(path, revision, variant, vae))
        if (folder / "diffusion_pytorch_model.safetensors").is_file() and (folder / "config.json").is_file():
            return ModelSource(name, path, "round", _base_of(folder), folder)
        if (folder / "unet" / "config.json").is_file():
            return ModelSource(name, path, "round", _base_of(folder), folder / "unet")
        for place in (folder, folder / "lora"):
            if (place / LORA_WEIGHTS).is_file():
                return ModelSource(name, path, "round", _base_of(folder), lora=place)
        if any(file.suffix.lower() in PICTURES for file in folder.rglob("*")):
            return ModelSource(name, path, "images", None)
        raise InputError(
            f"--models {spec!r}: the folder is neither a pipeline (model_index.json), nor a round (unet/ or lora/), "
            "nor has it pictures"
        )
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        if folder.is_file():
            raise InputError(f"--models {spec!r}: {path} {single_file(folder)}")
        raise InputError(f"--models {spec!r}: {path} does not exist; give a folder, or a hub id such as owner/name")
    return ModelSource(name, path, "pipeline", Base(path, revision, variant, vae))


def _base_of(folder: Path) -> Base:
    """The base of a round, from the manifest of its run: in the folder or up to three above it."""
    for place in [folder.resolve(), *folder.resolve().parents[:3]]:
        if (place / "manifest.json").is_file():
            said = read_json(place / "manifest.json").get("base", {})
            if "name" not in said:
                continue
            base = Base.of_manifest(said, place / "config.yaml")
            for path in (base.name, base.vae):
                if path is not None and is_local(path) and not Path(path).is_dir():
                    raise InputError(
                        f"{folder} was trained from {path}, which is not there: run this where the run was started, or "
                        "put it there"
                    )
            return base
    raise InputError(
        f"{folder} has a UNet or an adapter but no run's manifest.json above it that names its base: evaluate it "
        "in its run"
    )


def read_given_pictures(folder: Path) -> list[dict[str, Any]]:
    """The pictures of a folder with their prompts.

    They are read from metadata.jsonl or metadata.csv (file_name and prompt, caption or text), from the index files of
    an evaluation, or from a .txt file beside each picture.

    Returns:
        Rows of path, prompt and, where it is known, category.

    Raises:
        InputError: a picture without a prompt, a line that cannot be read.
    """
    metadata = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    rows = _read_metadata(metadata) if metadata else _read_indices(folder)
    if rows:
        return [row | {"path": folder / row["path"]} for row in rows]
    found = []
    for path in sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES):
        sidecar = path.with_suffix(".txt")
        if not sidecar.is_file():
            raise InputError(
                f"{path} has no prompt: give {folder}/metadata.jsonl with file_name and prompt, or {sidecar.name} "
                "beside it"
            )
        found.append({"path": path, "prompt": sidecar.read_text(encoding="utf-8").strip(), "category": ""})
    return found


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            lines = list(csv.DictReader(text.splitlines()))
        else:
            lines = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): one JSON object per line, or CSV") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        prompt = next((line[key] for key in _PROMPTS if isinstance(line, dict) and line.get(key)), None)
        if prompt is None or not line.get("file_name"):
            raise InputError(f"{path}, entry {number}: file_name and prompt are needed")
        name = Path(line["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{path}, entry {number}: {line['file_name']!r} leaves the folder")
        rows.append({"path": name, "prompt": str(prompt).strip(), "category": str(line.get("category") or "")})
    return rows


def _read_indices(folder: Path) -> list[dict[str, Any]]:
    """The index files that an evaluation leaves beside its pictures."""
    rows = []
    for index in sorted(folder.glob("*-of-*.jsonl")):
        for line in index.read_text(encoding="utf-8").split("\n"):
            row = json.loads(line) if line else {}
            if row.get("file"):
                rows.append({"path": Path(row["file"]), "prompt": row["prompt"], "category": row.get("category", "")})
    return rows
