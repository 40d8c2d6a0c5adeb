"""Files of a checkpoint, from a folder, a file or the hub; their tensors; and a module that holds exactly these.

No pickle is ever executed: safetensors, and `weights_only=True` where a published file leaves no choice.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import Tensor, nn

from spin_diffusion.store.input_error import InputError, one_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_ERRORS = (OSError, EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)
"""What the hub raises for a repository or file that is not there, and for the network."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
INDEX = ".index.json"
"""Behind a file's name: which of several files, its shards, has which key, as transformers writes it."""


@dataclass(eq=False)
class Files:
    """The files of one place: a local folder or a repository of the hub."""

    place: str
    """Folder or hub id."""
    first: Path | None = None
    """The file that the user named, if it was a file: it is taken as the weights, whatever its name."""
    read: dict[str, str] = field(default_factory=dict)
    """What was read so far: file name -> SHA-256."""

    def find(self, *names: str) -> Path | None:
        """The first of these files that exists here, or None."""
        for name in names:
            path = self._local(name) if Path(self.place).is_dir() else self._from_hub(name)
            if path is not None:
                return path
        return None

    def get(self, *names: str) -> Path:
        """The first of these files that exists.

        Raises:
            InputError: none does, or the hub cannot be reached.
        """
        path = self.find(*names)
        if path is not None:
            return path
        if Path(self.place).is_dir():
            raise InputError(f"{self.place} holds none of {', '.join(names)}")
        try:
            huggingface_hub.hf_hub_download(self.place, names[0])
        except HUB_ERRORS as error:
            raise InputError(
                f"{self.place!r} is no local file or folder, and {names[0]} cannot be had from the hub: "
                f"{one_line(error)}; check the name and the connection, or give the path of a local copy"
            ) from error
        raise InputError(f"{self.place} holds none of {', '.join(names)}")

    def weights(self, *names: str) -> tuple[str, dict[str, Tensor]]:
        """The weights, from the file that the user named, else from the first of these; what is read is recorded.

        Each of `names` may be one file, or an index and its shards.

        Returns:
            The file, or the index, for errors; and its tensors in fp32 on the CPU.

        Raises:
            InputError: there is no such file, it cannot be read, or a shard or one of its keys is missing.
        """
        path = self.first or self.find(*(either for name in names for either in (name, name + INDEX)))
        path = path or self.get(*names)
        self.record(path)
        return str(path), self._read_shards(path) if path.name.endswith(INDEX) else read_tensors(path)

    def record(self, path: Path) -> None:
        """Remember the SHA-256 of a file that was read."""
        with path.open("rb") as file:
            self.read[path.name] = hashlib.file_digest(file, "sha256").hexdigest()

    def _read_shards(self, index: Path) -> dict[str, Tensor]:
        keys_of: dict[str, list[str]] = {}
        try:
            for key, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                keys_of.setdefault(shard, []).append(key)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{index} must hold a 'weight_map' from keys to files: {one_line(error)}") from error
        tensors: dict[str, Tensor] = {}
        for shard, keys in keys_of.items():
            # A shard lies beside its index: a name that leads elsewhere is not followed.
            path = self.find(shard) if Path(str(shard)).name == shard else None
            if path is None:
                raise InputError(f"{index}: its shard {shard} is missing: put it beside the index")
            self.record(path)
            found = read_tensors(path)
            for key in keys:
                if key not in found:
                    raise InputError(f"{path}: key {key} is missing, which {index.name} says is there")
            tensors |= found
        return tensors

    def _local(self, name: str) -> Path | None:
        path = Path(self.place) / name
        return path if path.is_file() else None

    def _from_hub(self, name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(self.place, name))
        except HUB_ERRORS:
            return None


def open_place(path: str) -> Files:
    """The files at `path`: a folder, a file (and what lies beside it), or a hub id such as "org/name".

    Raises:
        InputError: it is neither.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return Files(str(local.resolve().parent), first=local.resolve())
    if local.is_dir():
        return Files(str(local.resolve()))
    if not HUB_ID.fullmatch(path):
        raise InputError(f"{path} does not exist, and a hub id is written ORG/NAME")
    return Files(path)


def load_tokenizer(kind: type[Any], files: Files, vocabulary: tuple[str, ...], elsewhere: str) -> Any:
    """The checkpoint's own tokenizer, or else that of the hub id `elsewhere`.

    Args:
        kind: transformers' class of it.
        vocabulary: files that make a tokenizer when there is no tokenizer.json, such as ("vocab.json", "merges.txt").

    Raises:
        InputError: neither place has one, or it is damaged.
    """
    for place in (files, Files(elsewhere)):
        paths = [path for path in map(place.find, (*TOKENIZER_FILES, *vocabulary)) if path is not None]
        names = {path.name for path in paths}
        if "tokenizer.json" in names or names.issuperset(vocabulary):
            for path in paths:
                place.record(path)
            files.read |= place.read
            try:
                return kind.from_pretrained(paths[0].parent, local_files_only=True)
            except Exception as error:  # the library below raises bare Exceptions
                raise InputError(f"the tokenizer in {paths[0].parent} is damaged: {one_line(error)}") from error
    raise InputError(
        f"{files.place} has no tokenizer, and that of {elsewhere} cannot be had from the hub: "
        f"put its tokenizer.json (or {' and '.join(vocabulary)}) beside the weights"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file, in fp32 on the CPU; of {"state_dict": tensors} the tensors.

    Raises:
        InputError: it cannot be read, or holds anything but tensors.
    """
    loaded: object
    try:
        if path.suffix == ".safetensors":
            loaded = safetensors.torch.load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the readers raise almost anything
        raise InputError(f"{path} is no readable file of tensors: {one_line(error)}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path} must hold a dict of tensors, or one under the key 'state_dict'")
    # In half precision a PickScore would be off by up to 0.3.
    return {name: value.float() if value.is_floating_point() else value for name, value in loaded.items()}


def take(tensors: dict[str, Tensor], name: str, where: str) -> Tensor:
    """Remove a tensor and return it. Raises InputError if it is missing."""
    if name not in tensors:
        raise InputError(f"{where}: key {name} is missing; is it another model's file?")
    return tensors.pop(name)


def count_blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks named `prefix`0., `prefix`1., and so on: 1 + the highest index."""
    indices = [name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)]
    return 1 + max((int(index) for index in indices if index.isdecimal()), default=-1)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str, in_file: Callable[[str], str] = str) -> None:
    """Give a module that was built on the meta device its weights: exactly these, without a copy.

    Args:
        where: the file, for the error.
        in_file: the file's key for a key of the module or of `tensors`, for the error as well.

    Raises:
        InputError: a key is missing, unexpected or of another shape; it is named as in the file.
    """
    expected = module.state_dict()
    # Checkpoints of older versions hold this buffer; it only counts from 0.
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    for names, problem in ((missing, "missing"), (unexpected, "not expected")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{where}: key {in_file(names[0])}{more} is {problem}; is it another model's file?")
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            raise InputError(
                f"{where}: {in_file(name)} has shape {tuple(given[name].shape)}, not {tuple(tensor.shape)}; "
                "is it another model's file?"
            )
    module.load_state_dict(given, assign=True)
    for part in module.modules():
        # Buffers that no file holds are still without data.
        for name, buffer in part.named_buffers(recurse=False):
            if name == "position_ids" and buffer.is_meta and not all(tensor.is_meta for tensor in given.values()):
                part.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    module.eval().requires_grad_(False)
