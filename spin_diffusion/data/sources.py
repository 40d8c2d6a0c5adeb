"""What the user named -> Source, by looking at what is there: files, a folder of files, else the hub."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from spin_diffusion.data.hub import open_hub, open_saved
from spin_diffusion.data.image_folder import is_image, is_metadata, open_image_folder
from spin_diffusion.data.parquet_files import open_parquet
from spin_diffusion.data.rows import Source
from spin_diffusion.data.settings import DataSettings
from spin_diffusion.data.webdataset import TAR_SUFFIXES, open_webdataset
from spin_diffusion.input_error import InputError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that the hub takes for a split."""


def open_source(settings: DataSettings) -> Source:
    """Open the data set that the settings name. Raises InputError if there is none, or it cannot be read."""
    if settings.train_data_dir is not None:
        folder = Path(settings.train_data_dir).expanduser()
        if not folder.is_dir():
            raise InputError(f"--train_data_dir {settings.train_data_dir} is not a folder; give a folder of images")
        return open_folder(folder, settings)
    if settings.dataset_name is None:
        raise InputError(
            "no data set is given: give --dataset_name (hub id, folder, parquet, tars) or --train_data_dir"
        )
    name = os.path.expanduser(settings.dataset_name)
    path = Path(name)
    if path.is_dir():
        return open_folder(path, settings)
    if path.exists():
        return open_files(settings.dataset_name, [path])
    if any(character in name for character in "*?[{"):
        return open_files(settings.dataset_name, expand(name))
    if "://" in name:
        raise InputError(f"--dataset_name {name} is an address: give the hub id, or download it and give its path")
    if looks_like_a_path(name):
        raise InputError(
            f"--dataset_name {settings.dataset_name} does not exist: give a path that does, or a hub id like user/name"
        )
    return open_hub(name, settings)


def looks_like_a_path(name: str) -> bool:
    """Whether `name` cannot be a hub id (name or user/name)."""
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
    return not is_id or name.lower().endswith((*TAR_SUFFIXES, ".parquet", ".jsonl", ".json", ".csv", ".arrow"))


def expand(pattern: str) -> list[Path]:
    """The files that a pattern with * ? [..] {0000..0009} {a,b} names, sorted within each alternative of the braces.

    Raises InputError if one of the alternatives names no file.
    """
    files: dict[Path, None] = {}
    for name in expand_braces(pattern):
        found = (
            [Path(name)] if os.path.exists(name) else [Path(path) for path in sorted(glob.glob(name, recursive=True))]
        )
        found = [path for path in found if path.is_file()]
        if not found:
            raise InputError(f"--dataset_name {pattern}: no file matches {name}")
        files.update(dict.fromkeys(found))
    return list(files)


def expand_braces(pattern: str) -> list[str]:
    """Every alternative of {0000..0009} and {a,b} in a pattern, in order; leading zeros are kept."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span is not None:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise InputError(f"--dataset_name {pattern}: {braces[0]} counts backwards; put the smaller number first")
        alternatives = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    elif "," in braces[1]:
        alternatives = braces[1].split(",")
    else:
        raise InputError(
            f"--dataset_name {pattern}: {braces[0]} is neither a range like {{0000..0009}} nor a list like {{a,b}}"
        )
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for middle in alternatives for name in expand_braces(before + middle + after)]


def open_files(name: str, files: Sequence[Path]) -> Source:
    """Open parquet files or tars. Raises InputError if they are neither, or both."""
    kinds = {_kind(path) for path in files}
    if kinds == {"parquet"}:
        return open_parquet(name, files)
    if kinds == {"tar"}:
        return open_webdataset(name, files)
    odd = next((path for path in files if _kind(path) == "other"), None)
    if odd is not None:
        raise InputError(f"--dataset_name {name}: {odd.name} is neither .parquet nor {', '.join(TAR_SUFFIXES)}")
    raise InputError(f"--dataset_name {name} matches parquet files and tars: name one kind")


def open_folder(folder: Path, settings: DataSettings) -> Source:
    """Open the split of a local folder. Raises InputError if it holds nothing that can be read, or no such split."""
    if settings.dataset_config_name is not None:
        if not (folder / settings.dataset_config_name).is_dir():
            raise InputError(f"{folder} has no subfolder {settings.dataset_config_name!r} (--dataset_config_name)")
        folder = folder / settings.dataset_config_name
    split = settings.dataset_split
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return open_saved(folder, split)
    files = list_files(folder)
    tars = [path for path in files if _kind(path) == "tar"]
    parquets = [path for path in files if _kind(path) == "parquet" and not is_metadata(path)]
    if any(is_metadata(path) for path in files) or not (tars or parquets):
        if not any(is_metadata(path) or is_image(path) for path in files):
            raise InputError(f"{folder} has no images, parquet files or tars")
        if (folder / split).is_dir():
            folder = folder / split
            files = list_files(folder)
        elif split != "train":
            raise InputError(f"{folder} has no subfolder {split!r} (--dataset_split)")
        return open_image_folder(folder, files)
    if tars and parquets:
        raise InputError(f"{folder} has parquet files and tars: name one kind, as in {folder}/*.parquet")
    chosen = files_of_split(folder, tars or parquets, split)
    return open_parquet(str(folder), chosen) if parquets else open_webdataset(str(folder), chosen)


def list_files(folder: Path) -> list[Path]:
    """Every file in the folder and its subfolders, sorted by path; hidden ones are passed over."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def files_of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    """The files of a split by the hub's rules; in a folder where no name speaks of a split, all are train.

    Raises InputError if no file is of this split.
    """
    splits = {path: split_of(path.relative_to(folder)) for path in files}
    chosen = [path for path in files if splits[path] == split]
    if not chosen and split == "train" and not any(splits.values()):
        chosen = list(files)
    if not chosen:
        found = sorted({name or "(no split in the name)" for name in splits.values()})
        raise InputError(f"{folder} has no files of split {split!r} (--dataset_split); it has {', '.join(found)}")
    return chosen


def split_of(path: Path) -> str | None:
    """The split that a file's path speaks of: data/NAME-00000-of-00009.parquet, or a word such as train, val, test."""
    shard = re.match(r"(.+?)-\d{5}-of-\d{5}", path.name)
    if shard is not None and path.parent.name == "data":
        return shard[1]
    words = re.findall(r"[a-z]+", path.as_posix().lower())
    for split, aliases in SPLIT_WORDS.items():
        if any(alias in words for alias in aliases):
            return split
    return None


def _kind(path: Path) -> str:
    if path.suffix.lower() == ".parquet":
        return "parquet"
    return "tar" if path.name.lower().endswith(TAR_SUFFIXES) else "other"
