"""`spin-diffusion export`: what a run made, in the form that another program reads."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from spin_diffusion.diffusion.base import load_checkpoint
from spin_diffusion.diffusion.kohya import KohyaForm, model_spec
from spin_diffusion.diffusion.lora import CONFIG, load_adapter
from spin_diffusion.diffusion.model_sources import ModelSource, round_at
from spin_diffusion.diffusion.sampling import drawing_pipeline
from spin_diffusion.diffusion.single_file import write_single_file, write_unet_file
from spin_diffusion.llm.base import ADAPTER_CONFIG, LanguageBase, load_language_model
from spin_diffusion.runs.continuing import player_of
from spin_diffusion.runs.start import quiet_libraries
from spin_diffusion.selfplay.record import check_weights
from spin_diffusion.store.files import read_if_whole, read_json, tensors_hash, weights_hash, write_json
from spin_diffusion.store.folder import check_folder, take_folder
from spin_diffusion.store.input_error import InputError, one_line, open_regular, printable
from spin_diffusion.store.parsing import saved_settings
from spin_diffusion.store.run_dir import file_hash, remove_files, settle, write_file, write_folder

Format = Literal["diffusers", "kohya", "single_file", "unet_file"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
IMAGE_PLAYERS, LANGUAGE_PLAYERS = ("unet", "lora"), ("adapter", "model")
PROGRAM, MANIFEST, ABOUT = "export", "manifest.json", "export.json"
ORIGIN = "spin_diffusion.run"
"""Key of a file's metadata that every export has, and by which one is known: the run that it was made of."""


@dataclass(frozen=True)
class Export:
    """What is written, and where.

    Attributes:
        run: output folder of a run.
        round: whose player; None = the last promoted one's.
        form: "diffusers" is the one that is a folder, also of a language model.
        strength: how far to go from the base to the player.
        output: file, or folder of form "diffusers"; None = below the run.
    """

    run: Path
    round: int | None
    form: Format
    dtype: str
    strength: float
    output: Path | None

    @property
    def title(self) -> str:
        """What programs show it as, and the name of its file: run, round, and strength where it is not 1."""
        round_ = f"-round-{self.round}" if self.round is not None else ""
        return f"{self.run.resolve().name}{round_}{f'@{self.strength:g}' if self.strength != 1 else ''}"

    @property
    def place(self) -> Path:
        """Where it is written; a link is its user's, and stays."""
        name = self.title if self.form == "diffusers" else f"{self.title}-{self.form}.safetensors"
        place = self.output or self.run / "export" / name
        return place.resolve() if place.is_symlink() else place


def export(what: Export) -> Path:
    """Write it; where it is.

    Raises:
        InputError: no such run or round, a form that its player does not have, or something of somebody else's in the
            place.
    """
    player = _player_of(what.run, what.round, IMAGE_PLAYERS)
    source = round_at("export", str(player), **{player.name: player})
    assert source.base is not None
    if what.form == "kohya" and source.lora is None:
        raise InputError(
            f"--format kohya is of adapters, and {printable(player)} is a whole UNet: give unet_file or single_file"
        )
    if not math.isfinite(what.strength):
        raise InputError(f"--strength {what.strength} must be a number: 1 is the player, 0 the base")
    _take_place(what)
    quiet_libraries()
    family, pipeline = load_checkpoint(source.base)
    resolution = _settings_of(what.run).get("resolution") or family.RESOLUTION
    prediction_type = str(pipeline.scheduler.config.get("prediction_type", "epsilon"))
    said = {
        "modelspec.title": what.title,
        ORIGIN: what.run.resolve().name,
        "spin_diffusion.manifest": file_hash(what.run / MANIFEST),
        "spin_diffusion.round": "last promoted" if what.round is None else str(what.round),
        "spin_diffusion.strength": f"{what.strength:g}",
    }
    if source.base.lora is not None:
        said["spin_diffusion.init_lora"] = Path(source.base.lora).name
    if what.form == "kohya":
        kohya = KohyaForm.of(family, pipeline.unet, prediction_type, resolution)
        _write_adapter(what, source, pipeline, kohya, said)
        return what.place
    made = drawing_pipeline(
        pipeline,
        "checkpoint",
        unet=source.unet,
        lora=source.lora,
        strength=what.strength,
        base_hash=source.base_hash,
    )
    made.unet.to(memory_format=torch.contiguous_format)  # which files are in
    said["spin_diffusion.weights"] = weights_hash(made.unet)
    made.to(DTYPES[what.dtype])  # in place: the writer of single files holds no second copy
    if what.form == "diffusers":
        _write_folder(what.place, made.save_pretrained, said)
    else:
        write = write_single_file if what.form == "single_file" else write_unet_file
        write(what.place, made, DTYPES[what.dtype], model_spec(family, made.unet, prediction_type, resolution) | said)
    return what.place


def export_merged(what: Export) -> Path:
    """Write the player of a language run whose adapter is merged into its base, with its tokenizer, as transformers
    and vLLM load it; the folder.

    Raises:
        InputError: another strength than 1, there is no adapter, it cannot be merged, or the folder is somebody else's.
    """
    if what.strength != 1:
        raise InputError(f"--strength {what.strength:g} is of image runs: leave it out with --merge")
    player = _player_of(what.run, what.round, LANGUAGE_PLAYERS)
    if not (player / ADAPTER_CONFIG).is_file():
        raise InputError(f"--merge is of adapters, and {printable(player)} has all weights: use it as it is")
    _take_place(what)
    quiet_libraries()
    trusted = bool(_settings_of(what.run).get("trust_remote_code"))
    model, tokenizer = load_language_model(LanguageBase(str(player), trust_remote_code=trusted))
    said = {ORIGIN: what.run.resolve().name, "spin_diffusion.weights": weights_hash(model)}

    def save(folder: Path) -> None:
        model.to(DTYPES[what.dtype]).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _write_folder(what.place, save, said)
    return what.place


def _player_of(run: Path, round_: int | None, kinds: Sequence[str]) -> Path:
    """The folder of a player's weights.

    Args:
        round_: whose; None = the last promoted one's.
        kinds: names that it may have.

    Raises:
        InputError: no such run or round, or a run of another kind.
    """
    if not (run / MANIFEST).is_file():
        raise InputError(
            f"{printable(run)} is no run (it has no {MANIFEST}): give the --output_dir of one, and a round by --round"
        )
    if round_ is not None:
        check_weights(run / f"round-{round_}")
    player = player_of(run if round_ is None else run / f"round-{round_}")
    if player is None:
        rounds = sorted(path.name for path in run.glob("round-*") if player_of(path) is not None)
        lacking = "no round was promoted yet" if round_ is None else f"there is no player of round {round_}"
        raise InputError(f"{printable(run)}: {lacking} (there are {', '.join(rounds) or 'none'})")
    if player.name not in kinds:
        right = "--format, and without --merge" if kinds == LANGUAGE_PLAYERS else "--merge, and without --format"
        raise InputError(f"{printable(player)} is a model of another kind: export it with {right}")
    return player


def _write_folder(place: Path, save: Callable[[Path], object], said: Mapping[str, str]) -> None:
    """Write a folder and what it says of itself, whole; of an earlier export there nothing stays, of its user all does.

    Args:
        save: writes into an empty folder.
    """
    take_folder(place, PROGRAM, "-o", inside=True)
    earlier = read_if_whole(place / ABOUT) or {}

    def write(part: Path) -> None:
        save(part)
        files = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
        write_json(part / ABOUT, {**said, "files": files})
        # Such as the shards of larger weights, which would be loaded instead of the new ones
        stale = set(earlier.get("files", ())) - set(files)
        remove_files(place, stale.__contains__)

    write_folder(place, write)


def _write_adapter(what: Export, source: ModelSource, pipeline: Any, kohya: KohyaForm, said: dict[str, str]) -> None:
    """Write an adapter in kohya's form; its strength goes into its alpha."""
    assert source.lora is not None
    settings, weights = read_json(source.lora / CONFIG), load_adapter(pipeline, source.lora)
    rank, alpha = settings["rank"], settings["lora_alpha"]
    said = said | {"spin_diffusion.adapter": tensors_hash(weights)}
    data = kohya.file(weights, rank, alpha * what.strength, DTYPES[what.dtype], said)
    write_file(what.place, lambda part: part.write_bytes(data))


def _settings_of(run: Path) -> dict[str, Any]:
    """The settings of a run; none where there is no file of them."""
    return saved_settings(run / "config.yaml") if (run / "config.yaml").is_file() else {}


def _take_place(what: Export) -> None:
    """Make RUN/export this command's, if the place is in it. InputError where something else than an export lies in the
    place, or another export works in RUN/export."""
    place, flag = what.place, f"-o {printable(what.place)}"
    if what.form == "diffusers":
        check_folder(place, PROGRAM, "-o", inside=True)
    elif place.exists():
        try:
            open_regular(place).close()
            with safe_open(place, framework="pt") as file:
                is_export = ORIGIN in (file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{flag} is there and is no export ({one_line(error)}): give another name") from None
        if not is_export:
            raise InputError(f"{flag} is there and is no export: give another name")
    if what.output is None:
        # With a marker of its own it is left alone by the run, which removes what is half-written when it starts again
        take_folder(what.run / "export", PROGRAM, "-o", inside=True)
        settle(what.run / "export")
