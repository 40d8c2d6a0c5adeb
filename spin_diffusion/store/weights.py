"""Weights as their files have them, or not at all.

diffusers and transformers fill a tensor that a file lacks, or has in another shape, with random numbers, and leave out
one that they have no place for; either way the model that is run is not the one that was given.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import save
from torch import Tensor, nn

from spin_diffusion.store.configuration import QUANTISED
from spin_diffusion.store.input_error import InputError, open_regular, printable

_TRAINED_IN = {"F64", "F32", "F16", "BF16"}
"""How safetensors names the number types of weights that are not quantised."""
_FULL = "the checkpoint in float32, float16 or bfloat16"
_BUFFERS = ("position_ids", "attn.bias", "attention.bias")
"""Whole numbers that old checkpoints keep beside weights: those of the positions, and attention's masks."""
_LONGEST_HEADER = 2**27
"""Bytes; the header of the largest models has a hundredth of it."""


class LoadReport(TypedDict):
    """What a library says of the weights that it loaded."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[tuple[str, Sequence[int], Sequence[int]]]
    """Name, shape in the file, shape in the model."""


class StoredTensor(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]


def load_whole(kind: Any, source: Any, *, where: str, **options: Any) -> Any:
    """`kind.from_pretrained(source, ...)` in fp32 from safetensors, with every tensor of the files in its place.

    What the library itself knows to be harmless (a tied head that is stored once, buffers that older versions saved) is
    neither missing nor foreign.

    Args:
        kind: a class of diffusers' or transformers' models, or an Auto class.
        where: what the user gave, and the part of it; it begins the message.
        options: subfolder, revision, variant and whatever else `from_pretrained` takes.

    Raises:
        InputError: a tensor is missing, foreign, of another shape, or not finite. What `from_pretrained` raises passes.
    """
    model, report = kind.from_pretrained(
        source,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    check_whole(model, report, where)
    return _named_outputs(model)


def fill(model: Any, tensors: Mapping[str, Tensor], report: LoadReport, *, where: str) -> Any:
    """A model without weights, which it gets, to be used and not trained.

    Args:
        tensors: in fp32, each in its shape.
        report: what is known of tensors beside these.

    Raises:
        InputError: as `load_whole`.
    """
    model.load_state_dict(tensors, strict=False, assign=True)
    check_whole(model, report, where)
    return _named_outputs(model.eval())


def _named_outputs(model: Any) -> Any:
    if getattr(model.config, "return_dict", True) is False:
        model.config.return_dict = True  # how transformers hands over what it computed, which is read by name
    return model


def check_whole(model: nn.Module, report: LoadReport, where: str) -> None:
    """Raises InputError as `load_whole`.

    Args:
        report: as diffusers and transformers return it.
    """
    reader = type(model).__name__
    if missing := report["missing_keys"]:
        raise InputError(
            f"{where}: its weights lack {_some(missing)}, which {reader} needs and would fill with random numbers: "
            "get the files again, or give a checkpoint that was saved whole (save_pretrained)"
        )
    if misshapen := sorted(report["mismatched_keys"]):
        name, stored, wanted = misshapen[0]
        raise InputError(
            f"{where}: {printable(name)} has the shape {tuple(stored)} in its weights and {tuple(wanted)} by its "
            f"config.json{_more(misshapen)}: weights and configuration are not of one model, get both again"
        )
    if foreign := report["unexpected_keys"]:
        raise InputError(
            f"{where}: its weights have {_some(foreign)}, for which {reader} has no place: give the class's own "
            "checkpoint; if the model is right without them, load it once and save_pretrained() it elsewhere"
        )
    if odd := [name for name, tensor in _tensors(model) if not bool(torch.isfinite(tensor).all())]:
        raise InputError(
            f"{where}: {_some(odd)} {'has' if len(odd) == 1 else 'have'} numbers that are not finite (NaN or "
            "infinity): get the files again, or give another checkpoint"
        )


_ABOUT_THE_FILE = ("architectures", "dtype", "torch_dtype", "transformers_version")


def config_of(part: Any) -> dict[str, object]:
    """A part's configuration, which decides what its weights do not show: how it computes with them.

    Args:
        part: a model of diffusers' or transformers', or a pipeline.
    """
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    kept = {name: value for name, value in config.items() if name[0] != "_" and name not in _ABOUT_THE_FILE}
    return json.loads(json.dumps(kept, default=str))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, each with `dtype` and `shape`; no weights are read.

    Raises:
        InputError: it cannot be opened, or is no safetensors file.
    """
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size)) if size <= _LONGEST_HEADER else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise InputError(f"{printable(path)} is damaged, or not a safetensors file: get it again")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def read_headers(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of all files of one model; Raises as `read_header`."""
    return {name: tensor for path in paths for name, tensor in read_header(path).items()}


def weights_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file in which other programs read the metadata. The same tensors and metadata have the same bytes,
    which the library does not promise: it writes metadata in an order of its own. Of the tensors' bytes the file says
    the SHA-256, by the names that the ModelSpec and sd-scripts have for it.
    """
    stored = save(dict(tensors))
    start = 8 + int.from_bytes(stored[:8], "little")
    digest = hashlib.sha256(memoryview(stored)[start:]).hexdigest()
    hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    said = {"__metadata__": dict(sorted({"format": "pt", **metadata, **hashes}.items()))}
    header = json.dumps(said | json.loads(stored[8:start])).encode()
    header += b" " * (-len(header) % 8)  # the tensors are aligned
    return len(header).to_bytes(8, "little") + header + stored[start:]


def check_stored(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], *, where: str, remedy: str = f"give {_FULL}"
) -> None:
    """Refuse before a model is made of them what the headers of the weights' files show.

    Args:
        tensors: of one model, by `read_headers`.
        config: the model's configuration.
        remedy: what to do about quantised weights.

    Raises:
        InputError: the configuration says that weights are quantised; a tensor is stored in whole numbers or 8 bits,
            which are codes of weights that the libraries would take for the weights themselves; the configuration has
            more layers than there are tensors, which could take for ever to make.
    """
    if key := next((key for key in QUANTISED if config.get(key)), None):
        method = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
        raise InputError(
            f"{where}: its weights are quantised ({method or key} in config.json), and cannot be trained from: {remedy}"
        )
    for name, tensor in tensors.items():
        if tensor.get("dtype") not in _TRAINED_IN and not name.endswith(_BUFFERS):
            raise InputError(
                f"{where}: {printable(name)} is stored as {tensor.get('dtype')}: quantised weights cannot be "
                f"trained from; {remedy}"
            )
    for key, value in _layers(config) if tensors else ():
        if value > len(tensors):
            raise InputError(
                f"{where}: {printable(key)} is {value} by its config.json, and its weights are {len(tensors)} tensors: "
                "weights and configuration are not of one model, get both again"
            )


def _layers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers of a configuration whose keys name layers, also of its parts and by block."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _layers(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _layers(part, key)
    elif "layer" in key and isinstance(value, int):
        yield key, value


def _tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point())


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return printable(ordered[0]) + _more(ordered)


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
