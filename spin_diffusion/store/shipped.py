"""What is shipped beside the code, found from any directory: presets, accelerate's files, prompt sets, small worlds.

It lies in `training/`, `evaluation/` and `assets/` of the repository, and in a folder of the package where that was
built into a wheel (`assets/packing.py`).
"""

import os
from pathlib import Path

_PACKED = Path(__file__).parents[1] / "shipped"
ROOT = _PACKED if _PACKED.is_dir() else Path(__file__).parents[2]
"""Under which shipped files have the paths that they have in the repository."""
PRESETS = ("training/configs", "evaluation/configs")
LAUNCHERS = ("training/accelerate",)
"""Folders of settings of `accelerate launch`."""
_FOLDERS = ("training/", "evaluation/", "assets/")


def shipped(word: str, named_in: tuple[str, ...] = ()) -> str:
    """The absolute path of the shipped file or folder that `word` names by its path in the repository, if the working
    directory has no such path; any other word as it is.

    Args:
        named_in: folders whose YAML files are also known by their names alone, as `sdxl_lora_24gb` is; so is one in the
            working directory, which comes before them.
    """
    places = [word, f"{word}.yaml"] if named_in else [word]
    if word.startswith(_FOLDERS):
        places += [str(ROOT / word)]
    if "/" not in word:
        places += [str(ROOT / folder / f"{word.removesuffix('.yaml')}.yaml") for folder in named_in]
    return next(filter(os.path.isfile if named_in else os.path.exists, places), word)


def shipped_name(place: str) -> str:
    """The word by which `shipped` finds this file or folder on any machine; any other place as it is."""
    path = Path(place).absolute()
    word = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return word if word.startswith(_FOLDERS) else place


def shipped_names(named_in: tuple[str, ...]) -> list[str]:
    """The names that `shipped` knows in these folders, in alphabetical order."""
    return sorted(path.stem for folder in named_in for path in (ROOT / folder).glob("*.yaml"))


def with_shipped(value: object) -> object:
    """A setting's value in which every text is what `shipped` makes of it, of `NAME=PATH` the path, at any depth of
    lists and mappings."""
    if isinstance(value, str):
        name, equals, path = value.rpartition("=")
        return f"{name}{equals}{shipped(path)}"
    if isinstance(value, list):
        return [with_shipped(entry) for entry in value]
    if isinstance(value, dict):
        return {key: with_shipped(entry) for key, entry in value.items()}
    return value
