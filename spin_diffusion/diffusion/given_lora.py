"""An adapter that was trained elsewhere, fused into the base that a run starts from: `--init_lora PATH[@STRENGTH]`.

diffusers reads its form, kohya's sd-scripts' or diffusers' own of any age. It leaves out what it has no place for, so
every tensor of the file is looked for among those that it has put on the networks.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spin_diffusion.diffusion.lora import WEIGHTS
from spin_diffusion.store.files import tensors_hash
from spin_diffusion.store.input_error import InputError, one_line, open_regular, printable

_NOT_LORA = re.compile(
    r"hada_|lokr_|oft_|dora_scale|lora_mid|lora_magnitude|w_norm|b_norm|\.diff(_b)?$|\.[ab][12]\.weight"
)
"""What tensors are called that change weights otherwise than by a product of two matrices."""
_OTHER_FAMILY = re.compile(
    r"double_blocks|single_blocks|joint_blocks|lora_transformer|^transformer\.|^diffusion_model\."
)
"""What they are called in adapters of Flux, SD 3 and other transformers."""


def split_strength(text: str) -> tuple[str, float]:
    """PATH and STRENGTH of PATH@STRENGTH; 1 where none is given.

    Raises:
        InputError: the strength is not finite.
    """
    path, _, number = text.rpartition("@")
    try:
        strength = float(number)
    except ValueError:
        return text, 1.0
    if not path or Path(text).exists():
        return text, 1.0
    if not math.isfinite(strength):
        raise InputError(f"{printable(text)}: the strength {number} must be a number, such as 0.7")
    return path, strength


def fuse_given(pipeline: Any, given: str, parts: Sequence[str]) -> None:
    """Add an adapter to the weights of a pipeline's networks.

    Args:
        given: PATH or PATH@STRENGTH of a file, or of a folder with diffusers' name of it in it.
        parts: the networks to change, by name; the others stay as they are.

    Raises:
        InputError: it is no safetensors file or damaged, no LoRA, of another family, or not all of it has a place here.
    """
    path, strength = split_strength(given)
    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    where = f"--init_lora {printable(file)}"
    if not file.exists():
        raise InputError(f"{where} is not there: give the .safetensors file of an adapter, or its folder, on this disk")
    stored = _read(file, where)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    except Exception as error:  # peft and diffusers raise dozens of kinds
        raise InputError(f"{where} does not fit this base: {one_line(error)}") from error
    (name,) = pipeline.get_active_adapters()
    put = [
        tensor
        for network in pipeline.components.values()
        if name in getattr(network, "peft_config", {})
        for tensor in get_peft_model_state_dict(network, adapter_name=name).values()
    ]
    lacking = _counted(stored.values()) - _counted(put)
    if lacking or len(put) != len(stored):
        raise InputError(
            f"{where}: {lacking.total() or abs(len(put) - len(stored))} of its {len(stored)} tensors have no place in "
            "this base: it was trained for another family, or for parts that are not supported"
        )
    pipeline.fuse_lora(components=[*parts], lora_scale=strength)
    pipeline.unload_lora_weights()


def _read(file: Path, where: str) -> Mapping[str, Tensor]:
    """The matrices in the file of an adapter."""
    if file.suffix != ".safetensors":
        raise InputError(f"{where} is not a .safetensors file, and others may run code when they are read: convert it")
    open_regular(file).close()
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{where} is damaged, or not a safetensors file ({one_line(error)}): get it again") from error
    if odd := next((name for name in tensors if _OTHER_FAMILY.search(name)), None):
        raise InputError(
            f"{where} is of a transformer such as Flux, by {printable(odd)}: give one of SD 1.x, 2.x, SDXL"
        )
    if odd := next((name for name in tensors if _NOT_LORA.search(name)), None):
        raise InputError(
            f"{where} is no plain LoRA (LyCORIS or DoRA, by {printable(odd)}), which alone is read: merge it into a "
            "checkpoint and start from that"
        )
    matrices = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    if odd := next((name for name in matrices if "lora" not in name), None if matrices else "no tensors"):
        raise InputError(f"{where} is no LoRA (it has {printable(odd)}): give the file of one")
    if odd := next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None):
        raise InputError(f"{where}: {printable(odd)} has numbers that are not finite (NaN or infinity): get it again")
    return matrices


def _counted(tensors: Iterable[Tensor]) -> Counter[str]:
    """How often each tensor is there, whatever its name."""
    return Counter(tensors_hash({"": tensor.float()}) for tensor in tensors)
