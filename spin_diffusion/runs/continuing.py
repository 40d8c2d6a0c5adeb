"""A new run that starts from the last promoted player of another one, with other settings.

What it takes over is copied into its own folder: the player, into `start/`, and the other run's evaluation of the base.
So the other run may go on, move or be deleted.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from accelerate import Accelerator

from spin_diffusion.store.files import read_json, write_json
from spin_diffusion.store.folder import check_folder
from spin_diffusion.store.input_error import InputError, printable
from spin_diffusion.store.keys import place_hash
from spin_diffusion.store.parsing import saved_settings
from spin_diffusion.store.run_dir import commit, part_of

START = "start"
_FROM = "from.json"
_PLAYERS = ("unet", "lora", "model", "adapter")
"""What a run of any kind keeps its last promoted player in."""
_SAME_ADAPTER = ("rank", "lora_alpha", "lora_target_modules")


class Origin(TypedDict):
    """Where a run's first player comes from: the other run's folder, and the hashes of its base and of the player."""

    run: str
    base_weights: str
    player: str


class BaseRecord(TypedDict):
    """The base that a run was started from: its path or hub id, and the hash of its weights."""

    name: str
    weights: str


class _Begun(TypedDict):
    base: BaseRecord


def check_origin(settings: Mapping[str, Any], output_dir: Path, program: str) -> None:
    """InputError when `--continue_from` names no run that this one can go on from; nothing is written."""
    if settings["continue_from"] is None or (output_dir / START / _FROM).is_file():
        return
    run = Path(settings["continue_from"])
    flag = f"--continue_from {run}"
    if run.resolve() == output_dir.resolve():
        raise InputError(f"{flag} is the --output_dir: give another --output_dir, or leave it out to go on there")
    if not run.is_dir() or not check_folder(run, program, "--continue_from"):
        raise InputError(f"{flag}: there is no run: give the --output_dir of one")
    if player_of(run) is None or not (run / "manifest.json").is_file():
        raise InputError(f"{flag}: it has no promoted round yet: let it finish one, or start from its base")
    before = saved_settings(run / "config.yaml")
    keys = ("use_lora", *(_SAME_ADAPTER if settings.get("use_lora") else ()))
    other = [key for key in keys if before.get(key) != settings.get(key)]
    differ = [f"{key}: {before.get(key)!r} -> {settings.get(key)!r}" for key in other]
    if differ:
        raise InputError(f"{flag}: its player is one of another kind ({'; '.join(differ)}): give these as there")


def take_over(settings: Mapping[str, Any], output_dir: Path, base_weights: str, accelerator: Accelerator) -> None:
    """Copy the other run's player and its evaluation of the base, once.

    Args:
        base_weights: hash of the weights of this run's base, wherever they were loaded from.

    Raises:
        InputError: the other run's base had other weights.
    """
    if settings["continue_from"] is None or (output_dir / START / _FROM).is_file():
        return
    run = Path(settings["continue_from"])
    player = player_of(run)
    assert player is not None, "check_origin has looked"
    begun = read_json(run / "manifest.json", _Begun, "run its command again")
    if begun["base"]["weights"] != base_weights:
        raise InputError(
            f"--continue_from {run}: its base ({printable(begun['base']['name'])}) had other weights than this "
            "run's: give the base, and --init_lora, as there"
        )
    accelerator.wait_for_everyone()  # Before the copy is there, which is what a process goes by
    if not accelerator.is_main_process:
        return
    for source, target in ((player, output_dir / START / player.name), (run / "base", output_dir / "base")):
        if source.is_dir() and not target.exists():
            shutil.rmtree(part_of(target), ignore_errors=True)
            shutil.copytree(source, part_of(target))
            commit(target)
    taken = output_dir / START / player.name
    origin: Origin = {"run": str(run), "base_weights": base_weights, "player": str(place_hash(taken))}
    write_json(output_dir / START / _FROM, origin)


def origin_of(output_dir: Path) -> Origin | None:
    """Where the run's first player comes from, for its manifest; None = it starts from the base.

    Raises:
        InputError: the player that was copied has changed.
    """
    if not (output_dir / START / _FROM).is_file():
        return None
    origin = read_json(output_dir / START / _FROM, Origin, f"delete {output_dir / START}")
    player = player_of(output_dir / START)
    if player is None or place_hash(player) != origin["player"]:
        raise InputError(f"{output_dir / START} is not the player that was copied from {origin['run']}: restore it")
    return origin


def start_of(output_dir: Path) -> Path:
    """The folder with the player that round 1 starts from; Path() = the base."""
    return output_dir / START if (output_dir / START / _FROM).is_file() else Path()


def player_of(folder: Path) -> Path | None:
    """The folder of the player of a run or of one of its rounds; None = there is none yet."""
    return next((folder / name for name in _PLAYERS if (folder / name).is_dir()), None)
