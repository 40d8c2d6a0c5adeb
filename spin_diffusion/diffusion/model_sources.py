"""What `NAME=PATH` means: a pipeline, a round of a run, or a folder of pictures that somebody drew already."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from spin_diffusion.data.files import inside, no_files
from spin_diffusion.data.image_folder import FILE_NAME, is_image, is_metadata, open_image_folder
from spin_diffusion.data.reading import caption_text
from spin_diffusion.data.rows import Bad, Expected, LeftOut, Row
from spin_diffusion.data.sources import list_files
from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.given_lora import split_strength
from spin_diffusion.diffusion.lora import WEIGHTS as LORA_WEIGHTS
from spin_diffusion.diffusion.single_file import open_checkpoint
from spin_diffusion.samples.drawn import GivenRow, read_index
from spin_diffusion.selfplay.record import check_weights
from spin_diffusion.store.files import read_json
from spin_diffusion.store.input_error import InputError, file_name, is_local, printable
from spin_diffusion.store.run_dir import Damaged
from spin_diffusion.store.shipped import shipped

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
    strength: float = 1.0
    """How far a round is gone from its base to its player."""
    base_hash: str | None = None
    """Hash of the weights of the UNet of a round's base, as it was trained; None = nobody recorded it."""


def read_source(
    spec: str,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    config: str | None = None,
) -> ModelSource:
    """The model of a `NAME=PATH_OR_ID`, or of a round's `NAME=PATH@STRENGTH`.

    Args:
        revision, variant, vae: of pipelines; a round has those that its run was started with.
        config: of pipelines in single files.

    Raises:
        InputError: not NAME=PATH, a path that is nothing of the kind, or a round whose base is unknown.
    """
    name, equals, path = spec.partition("=")
    if not equals or not name or not path:
        raise InputError(
            f"--models {spec!r}: give NAME=PATH_OR_ID, such as base=stabilityai/stable-diffusion-xl-base-1.0"
        )
    file_name(name, "--models")
    place, strength = split_strength(path)
    base = Base(place, revision, variant, vae, config if Path(place).is_file() else None)
    source = source_at(name, place, f"--models {spec!r}", base)
    if strength == 1:
        return source
    if source.kind != "round":
        raise InputError(f"--models {spec!r}: only a run and its rounds have a strength: leave @{strength:g} out")
    return replace(source, path=f"{place}@{strength:g}", strength=strength)


def source_at(name: str, path: str, where: str, pipeline: Base) -> ModelSource:
    """The model at a path.

    Args:
        where: how messages begin.
        pipeline: what it is if it is neither a round nor pictures.

    Raises:
        InputError: as `read_source`.
    """
    folder, whole = Path(path), ModelSource(name, path, "pipeline", pipeline)
    check_weights(folder)
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return whole
        if (folder / "diffusion_pytorch_model.safetensors").is_file() and (folder / "config.json").is_file():
            return round_at(name, path, unet=folder)
        if (folder / "unet" / "config.json").is_file():
            return round_at(name, path, unet=folder / "unet")
        for place in (folder, folder / "lora"):
            if (place / LORA_WEIGHTS).is_file():
                return round_at(name, path, lora=place)
        if any(is_image(file) for file in list_files(folder).files):
            return ModelSource(name, path, "images", None)
        raise InputError(
            f"{where}: the folder is neither a pipeline (model_index.json), nor a round (weights in unet/ or lora/), "
            "nor has it pictures"
        )
    if is_local(path) or "/" not in path:
        if folder.is_file():
            open_checkpoint(folder, f"{where}: {path}")
            return whole
        raise InputError(f"{where}: {path} does not exist; give a folder, or a hub id such as owner/name")
    return whole


class _BaseInManifest(TypedDict):
    name: str
    revision: str | None
    variant: str | None
    vae: str | None
    config: NotRequired[str | None]
    lora: NotRequired[str | None]
    """Earlier versions knew no single files, and no adapters to start from."""
    weights: NotRequired[str]


class _WithBase(TypedDict):
    """The manifest of a run, as far as it names its base."""

    base: _BaseInManifest


def round_at(name: str, path: str, unet: Path | None = None, lora: Path | None = None) -> ModelSource:
    """A round, whose base the manifest of its run names: in the folder or up to three above it.

    Args:
        unet, lora: folder of its weights: one of them is given.

    Raises:
        InputError: there is no such manifest, or the base is not there.
    """
    folder, unread = Path(path), ""
    for place in [folder.resolve(), *folder.resolve().parents[:3]]:
        if (place / "manifest.json").is_file():
            try:
                names = read_json(place / "manifest.json", _WithBase)["base"]
            except Damaged as error:  # or another program's, or an earlier version's
                unread = f" ({str(error).rpartition(': ')[0]})"
                continue
            base = Base(
                names["name"], names["revision"], names["variant"], names["vae"], names.get("config"), names.get("lora")
            ).placed(shipped)
            for given in base.places:
                if given is not None and is_local(given) and not Path(given).exists():
                    raise InputError(
                        f"{folder} was trained from {given}, which is not there: run this where the run was started, "
                        "or put it there"
                    )
            return ModelSource(name, path, "round", base, unet, lora, base_hash=names.get("weights"))
    raise InputError(
        f"{folder} has a UNet or an adapter but no run's manifest.json above it that names its base{unread}: "
        "put it back into its run"
    )


class GivenPicture(TypedDict):
    """A picture that somebody drew."""

    path: Path
    prompt: str
    category: str
    """Empty where it is not known."""


@dataclass(frozen=True)
class GivenPictures:
    """The pictures of a folder."""

    rows: tuple[GivenPicture, ...]
    left_out: tuple[str, ...]
    """Where a picture is that has no prompt which can be read, or a link to nothing, and why."""

    def note(self) -> str:
        """What was left out, as the end of a line; empty if nothing was."""
        return f"; {len(self.left_out)} left out, the first is {self.left_out[0]}" if self.left_out else ""


def read_given_pictures(folder: Path) -> GivenPictures:
    """The pictures of a folder with their prompts.

    They are read from metadata.jsonl, .csv or .parquet (file_name and prompt, caption or text), from the index files of
    an evaluation, or from a .txt file beside each picture. Whether a picture can be read is not looked at here.

    Raises:
        InputError: no pictures or no prompts, a file that cannot be read, or a name that leads out of the folder.
    """
    listing = list_files(folder)
    files = [path for path in listing.files if path.parent == folder or not is_metadata(path)]
    indices = sorted(folder.glob("*-of-*.jsonl"))
    if indices and not any(map(is_metadata, files)):
        found: Iterable[Row] = chain(listing.left_out, *map(_rows_of_index, indices))
    else:
        found = listing.with_left_out(open_image_folder(folder, files)).rows(())
    rows: list[GivenPicture] = []
    left_out = []
    for row in found:
        prompt = next((row.values[key] for key in _PROMPTS if row.values.get(key)), None)
        category, name = printable(row.values.get("category") or ""), row.values.get("image")
        try:
            if row.left_out is not None:
                raise row.left_out
            if not isinstance(name, str):
                raise LeftOut(Bad.MISSING_IMAGE_FILE, f"no {FILE_NAME}")
            rows.append({"path": inside(folder, name), "prompt": caption_text(prompt), "category": category})
        except LeftOut as reason:
            if reason.reason != Expected.NOT_IN_METADATA:
                left_out.append(f"{row.where}: {reason}")
    return GivenPictures(tuple(rows), tuple(left_out))


def _rows_of_index(index: Path) -> Iterator[Row]:
    for row in read_index(index, GivenRow, "restore it, or remove it"):
        if row["file"] is not None:
            yield Row(str(index), row | {"image": row["file"]}, no_files(str(index)))
