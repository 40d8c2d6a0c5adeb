"""What the user named -> Source, by looking at what is there: files, a folder of files, else the hub."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from spin_diffusion.data.files import JSON_SUFFIXES, TAR_SUFFIXES, no_files, open_json, open_parquet, open_webdataset
from spin_diffusion.data.hub import open_hub, open_saved
from spin_diffusion.data.image_folder import METADATA_SUFFIXES, SEEN_SUFFIXES, is_image, is_metadata, open_image_folder
from spin_diffusion.data.rows import Bad, Expected, LeftOut, Row, Source
from spin_diffusion.data.settings import DataSettings, SourceSettings
from spin_diffusion.store.input_error import InputError, is_local, printable

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that the hub takes for a split."""
LIBRARY_FILES = ("dataset_info.json", "dataset_infos.json")
"""What the datasets library writes beside the data."""


@dataclass(frozen=True)
class FileKind:
    """Files that are told by the ends of their names, and what opens them."""

    called: str
    suffixes: tuple[str, ...]
    open: Callable[[str, Sequence[Path]], Source]

    def matches(self, path: Path) -> bool:
        """Whether a file is one of these by its name."""
        return path.name.lower().endswith(self.suffixes)


PARQUET = FileKind("parquet files", (".parquet",), open_parquet)
TARS = FileKind("tars", TAR_SUFFIXES, open_webdataset)
JSON = FileKind("JSON files", JSON_SUFFIXES, open_json)
_READ_SUFFIXES = (*SEEN_SUFFIXES, ".txt", *METADATA_SUFFIXES, *PARQUET.suffixes, *TARS.suffixes, *JSON.suffixes)
"""Files that are opened, so that a link to nothing is noticed there."""


def open_source(settings: DataSettings) -> Source:
    """Open the images that the settings name. Raises InputError if there are none, or they cannot be read."""
    if settings.train_data_dir is not None:
        folder = Path(settings.train_data_dir).expanduser()
        if not folder.is_dir():
            raise InputError(f"--train_data_dir {settings.train_data_dir} is not a folder; give a folder of images")
        return _open_folder(folder, settings, TARS)
    if settings.dataset_name is None:
        raise InputError(
            "no data set is given: give --dataset_name (hub id, folder, parquet, tars) or --train_data_dir"
        )
    return _open_named(settings, TARS)


def open_text_source(settings: SourceSettings) -> Source:
    """Open the text that the settings name. Raises InputError if there is none, or it cannot be read."""
    if settings.dataset_name is None:
        raise InputError("no data set is given: give --dataset_name (hub id, folder, .jsonl, .json or parquet file)")
    return _open_named(settings, JSON)


@dataclass(frozen=True)
class Listing:
    """What lies in a folder and its subfolders."""

    files: tuple[Path, ...]
    """Every file, sorted by path; hidden ones are passed over."""
    left_out: tuple[Row, ...]
    """Links and subfolders that nothing is read from."""

    def with_left_out(self, source: Source) -> Source:
        """The source, after what was left out while its folder was listed."""
        if not self.left_out:
            return source
        return replace(source, rows=lambda wanted: chain(self.left_out, source.rows(wanted)))

    def note(self) -> str:
        """What was left out, for an error; empty if nothing was."""
        if not self.left_out:
            return ""
        first = self.left_out[0]
        return (
            f"; {len(self.left_out)} links or folders in it were left out, the first is {first.where}: {first.left_out}"
        )


def _open_named(settings: SourceSettings, other: FileKind) -> Source:
    """Open parquet files, or those of the other kind: TARS for images, JSON for text."""
    assert settings.dataset_name is not None
    name = os.path.expanduser(settings.dataset_name)
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, settings, other)
    if path.exists():
        return open_files(settings.dataset_name, [path], other)
    if is_pattern(name):
        return open_files(settings.dataset_name, expand(name), other)
    if "://" in name:
        raise InputError(f"--dataset_name {name} is an address: give the hub id, or download it and give its path")
    if looks_like_a_path(name):
        raise InputError(
            f"--dataset_name {settings.dataset_name} does not exist: give a path that does, or a hub id like user/name"
        )
    return open_hub(name, settings)


def _open_folder(folder: Path, settings: SourceSettings, other: FileKind) -> Source:
    """Open the split of a folder. Raises InputError if it has nothing that can be read, or no such split."""
    if settings.dataset_config_name is not None:
        if not (folder / settings.dataset_config_name).is_dir():
            raise InputError(f"{folder} has no subfolder {settings.dataset_config_name!r} (--dataset_config_name)")
        folder = folder / settings.dataset_config_name
    split = settings.dataset_split
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return open_saved(folder, split)
    listing = list_files(folder)
    loose = [path for path in listing.files if is_metadata(path) or is_image(path)] if other is TARS else []
    metadata = [path for path in loose if is_metadata(path)]
    files = [path for path in listing.files if path not in metadata and path.name not in LIBRARY_FILES]
    by_kind = {kind: matching for kind in (PARQUET, other) if (matching := [*filter(kind.matches, files)])}
    if metadata or loose and not by_kind:
        return _open_loose_images(folder, listing, split)
    if len(by_kind) == 2:
        example = f"{folder}/*{other.suffixes[0]}"
        raise InputError(f"{folder} has parquet files and {other.called}: name one kind, as in {example}")
    if not by_kind:
        images, suffixes = "images, " if other is TARS else "", ", ".join(other.suffixes)
        raise InputError(f"{folder} has no {images}parquet files or {other.called} ({suffixes}){listing.note()}")
    ((kind, matching),) = by_kind.items()
    return listing.with_left_out(kind.open(str(folder), files_of_split(folder, matching, split)))


def _open_loose_images(folder: Path, listing: Listing, split: str) -> Source:
    if (folder / split).is_dir():
        folder = folder / split
        listing = list_files(folder)
    elif split != "train":
        raise InputError(f"{folder} has no subfolder {split!r} (--dataset_split)")
    return listing.with_left_out(open_image_folder(folder, listing.files))


def is_pattern(name: str) -> bool:
    """Whether this names files by a pattern, see `expand`."""
    return any(character in name for character in "*?[{")


def looks_like_a_path(name: str) -> bool:
    """Whether `name` cannot be a hub id, or is that of a file that is read."""
    return is_local(name) or name.lower().endswith((*TAR_SUFFIXES, *JSON_SUFFIXES, ".parquet", ".csv", ".arrow"))


def expand(pattern: str) -> list[Path]:
    """The files that a pattern with * ? [..] {0000..0009} {a,b} names, sorted within each alternative of the braces.

    Raises InputError if one of the alternatives names no file.
    """
    files: dict[Path, None] = {}
    for name in expand_braces(pattern):
        names = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        # What is no file either is refused where it is opened
        matching = [Path(path) for path in names if not os.path.isdir(path)]
        if not matching:
            raise InputError(f"--dataset_name {pattern}: no file matches {name}")
        files.update(dict.fromkeys(matching))
    return list(files)


def expand_braces(pattern: str) -> list[str]:
    """Every alternative of {0000..0009} and {a,b} in a pattern, in order; leading zeros are kept."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
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


def open_files(name: str, files: Sequence[Path], other: FileKind) -> Source:
    """Open parquet files, or those of the other kind. Raises InputError if they are neither, or both."""
    for kind in (PARQUET, other):
        if all(kind.matches(path) for path in files):
            return kind.open(name, files)
    odd = next((path for path in files if not PARQUET.matches(path) and not other.matches(path)), None)
    if odd is not None:
        raise InputError(f"--dataset_name {name}: {odd.name} is neither .parquet nor {', '.join(other.suffixes)}")
    raise InputError(f"--dataset_name {name} matches parquet files and {other.called}: name one kind")


def list_files(folder: Path) -> Listing:
    """What lies in the folder and its subfolders.

    A link to a folder is followed wherever it leads, as it is the owner's; but not back to a folder around it, nor
    into one that is read already. Raises InputError if the folder itself cannot be listed.
    """
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise InputError(f"{printable(folder)} cannot be listed ({error.strerror})") from error
    root, seen = folder.resolve(), set[Path]()
    files: list[Path] = []
    left_out: list[Row] = []

    def leave_out(path: Path, reason: Bad | Expected, detail: str) -> None:
        where = path.relative_to(folder).as_posix()
        left_out.append(Row(where, {}, no_files(str(folder)), LeftOut(reason, detail)))

    def unreadable(error: OSError) -> None:
        leave_out(Path(error.filename), Bad.UNREADABLE_FOLDER, error.strerror or "")

    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        seen.add(Path(place).resolve())
        inside, folders[:] = sorted(name for name in folders if not name.startswith(".")), []
        for path in (Path(place, name) for name in inside):
            true = path.resolve()
            if true in seen or path.is_symlink() and (true in (root, *root.parents) or root in true.parents):
                leave_out(path, Expected.READ_ALREADY, f"it leads to {true}")
            else:
                seen.add(true)
                folders.append(path.name)
        for path in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_symlink() and not path.exists() and not path.name.lower().endswith(_READ_SUFFIXES):
                leave_out(path, Bad.DANGLING_LINK, f"it leads to {os.readlink(path)}, which does not exist")
            else:
                files.append(path)
    return Listing(tuple(sorted(files)), tuple(left_out))


def files_of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    """The files of a split by the hub's rules; in a folder where no name speaks of a split, all are train.

    Raises InputError if no file is of this split.
    """
    splits = {path: split_of(path.relative_to(folder)) for path in files}
    chosen = [path for path in files if splits[path] == split]
    if not chosen and split == "train" and not any(splits.values()):
        chosen = list(files)
    if not chosen:
        names = sorted({name or "(no split in the name)" for name in splits.values()})
        raise InputError(f"{folder} has no files of split {split!r} (--dataset_split); it has {', '.join(names)}")
    return chosen


def split_of(path: Path) -> str | None:
    """The split that a file's path speaks of: data/NAME-00000-of-00009.parquet, or a word such as train, val, test."""
    shard = re.match(r"(.+?)-\d{5}-of-\d{5}", path.name)
    if shard is not None and path.parent.name == "data":
        return shard[1]
    words = {*re.findall(r"[a-z]+", path.as_posix().lower())}
    return next((split for split, aliases in SPLIT_WORDS.items() if words & {*aliases}), None)
