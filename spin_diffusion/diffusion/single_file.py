"""Checkpoints in one file, as they are shared: the tensors of a whole pipeline, or of its UNet alone, under their
original names."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spin_diffusion.diffusion.families import families
from spin_diffusion.diffusion.original import UNET, VAE, origins_of
from spin_diffusion.store.configuration import Configuration
from spin_diffusion.store.input_error import InputError, one_line, printable
from spin_diffusion.store.run_dir import write_file
from spin_diffusion.store.weights import LoadReport, StoredTensor, check_stored, fill, read_header

PREDICTION = "modelspec.prediction_type"
"""Key of a file's metadata: epsilon or v (Stability AI's ModelSpec 1.0)."""
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Names of empty tensors by which ComfyUI and Forge know a model that predicts v, and one of zero terminal SNR."""
_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
_UNUSED = re.compile(
    r"model_ema\..*|denoiser\.sigmas|scale_factor|logvar|betas|\w*alphas_cumprod(_prev)?|posterior_\w*|v_pred|ztsnr|"
    r".*\.(position_ids|logit_scale|attn_mask)"
)
"""Names of what a training program left in a file beside the weights: a moving average, which nobody draws with, and
numbers that the configuration says."""
_ADAPTER = re.compile(r"(^|[._])(lora|hada|lokr|oft|glora)_|\.(diff|alpha)$")
_UNET = re.compile(r"input_blocks\.\d|down_blocks\.\d+\.resnets")


@dataclass(frozen=True)
class CheckpointFile:
    """A whole checkpoint in a safetensors file.

    Attributes:
        stored: its tensors, of which no numbers were read.
        metadata: what it says of itself.
        configured_as: hub id of the checkpoint whose configuration and tokenizers it goes with; None = there are
            several.
    """

    path: Path
    stored: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    family: ModuleType
    configured_as: str | None

    @property
    def noise(self) -> dict[str, object]:
        """What it says of its noise, as keys of a scheduler's configuration; empty where it says nothing."""
        said = self.metadata.get(PREDICTION, self.metadata.get("modelspec.predict_key", ""))
        predicts = "v_prediction" if V_PREDICTION in self.stored else _PREDICTIONS.get(said)
        noise: dict[str, object] = {"prediction_type": predicts} if predicts is not None else {}
        # Sampling begins at the level without signal
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return noise | (zero if ZERO_SNR in self.stored else {})

    def load(self, part: str, kind: Any, config: Configuration, where: str) -> Any:
        """A part of its pipeline in fp32, every tensor of which is in the file, as every tensor of the part in the file
        is in its place.

        Args:
            part: its name in the pipeline.
            where: what the user gave, and the part of it; it begins messages.

        Raises:
            InputError: as `load_whole`.
        """
        prefixes = {"unet": [UNET], "vae": [VAE]}.get(part) or [*self.family.ENCODER_PREFIXES[part].values()]
        stored = {name: tensor for name, tensor in self.stored.items() if name.startswith(tuple(prefixes))}
        unused = {name for name in stored if _UNUSED.fullmatch(name)} | _not_run(part, config, stored)
        stored = {name: tensor for name, tensor in stored.items() if name not in unused}
        check_stored(stored, config, where=where)
        with init_empty_weights(include_buffers=False):
            if issubclass(kind, ModelMixin):
                model = kind.from_config(config)
            else:
                model = kind(kind.config_class.from_dict(config))
        own, origins = model.state_dict(), origins_of(self.family, part, model)
        report = LoadReport(missing_keys=[], unexpected_keys=sorted(stored.keys() - origins.keys()), mismatched_keys=[])
        tensors: dict[str, Tensor] = {}
        with safe_open(self.path, "pt") as file:
            for name, origin in origins.items():
                if name not in stored:
                    report["missing_keys"].append(name)
                    continue
                shape, wanted = stored[name]["shape"], list(origin.tensor(own).shape)
                if shape not in (wanted, wanted[:2] if origin.form == "kernel" else wanted):
                    report["mismatched_keys"].append((name, shape, wanted))
                    continue
                # A copy: the file is mapped into memory
                read = origin.tensors(file.get_tensor(name).to(torch.float32, copy=True))
                tensors |= {key: tensor.contiguous() for key, tensor in read.items()}
        return fill(model, tensors, report, where=where)


def _not_run(part: str, config: Configuration, stored: Iterable[str]) -> set[str]:
    """What open_clip has of a text encoder that Stable Diffusion 2.x does not run: its last layer and projection."""
    if part != "text_encoder":
        return set()
    last = f".model.transformer.resblocks.{config['num_hidden_layers']}."
    return {name for name in stored if last in name or name.endswith(".model.text_projection")}


def open_checkpoint(path: Path, where: str) -> CheckpointFile:
    """A whole checkpoint in a file.

    Args:
        where: what the user gave; it begins messages.

    Raises:
        InputError: it is not safetensors, not whole, or no checkpoint of a family.
    """
    if path.suffix != ".safetensors":
        raise InputError(
            f"{where} is a single file that is not safetensors, and may run code when it is read: get the .safetensors "
            "file of the same model, or a folder in diffusers' layout"
        )
    stored = read_header(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{where} is cut short or damaged ({one_line(error)}): get it again") from error
    for family in families().values():
        encoders = [[*prefixes.values()] for prefixes in family.ENCODER_PREFIXES.values()]
        found = [prefix for prefixes in encoders for prefix in prefixes if any(map(_starts(prefix), stored))]
        if len(found) == len(encoders) and any(map(_starts(UNET), stored)):
            known = (*found, UNET, VAE)
            odd = sorted(name for name in stored if not name.startswith(known) and not _UNUSED.fullmatch(name))
            if odd:
                raise InputError(
                    f"{where} has {printable(odd[0])}{f' (and {len(odd) - 1} more)' if odd[1:] else ''}, for which "
                    f"{family.PIPELINE.__name__} has no place: it is a model of another kind"
                )
            return CheckpointFile(path, stored, metadata, family, family.CONFIGURED_AS.get(found[-1]))
    raise InputError(f"{where} {_what_else(stored)}")


def _starts(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


def _what_else(stored: Iterable[str]) -> str:
    """What a file is by its tensors that is no whole checkpoint, and what to give."""
    if any(_ADAPTER.search(name) for name in stored):
        return (
            "is an adapter, such as a LoRA, and no model: give the checkpoint that it was made for (training takes the "
            "adapter, too, by --init_lora)"
        )
    if any(_UNET.search(name) for name in stored):
        return "is only a part of a pipeline: give a whole checkpoint, with UNet, VAE and text encoders"
    first = printable(min(stored, default="no tensors"))
    return f"is no checkpoint of Stable Diffusion 1.x, 2.x or SDXL (it has {first}): other families are not supported"


def write_single_file(path: Path, pipeline: Any, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write a whole checkpoint of UNet, VAE and text encoders, as A1111, Forge and ComfyUI load it.

    Args:
        metadata: what the file says of itself beside its kind of prediction.

    Raises:
        InputError: the original layout has no place for a part.
    """
    encoders = families()[type(pipeline).__name__].ENCODERS
    _write(path, pipeline, ("unet", "vae", *encoders), "", dtype, metadata)


def write_unet_file(path: Path, pipeline: Any, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write a pipeline's UNet alone, as ComfyUI loads it from its folder diffusion_models. Args and Raises as of
    `write_single_file`."""
    _write(path, pipeline, ("unet",), UNET, dtype, metadata)


def _write(
    path: Path, pipeline: Any, parts: Iterable[str], markers: str, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Args: markers: prefix of the names of the empty tensors; ComfyUI reads nothing of a UNet's file without its."""
    family, scheduler = families()[type(pipeline).__name__], pipeline.scheduler.config
    tensors: dict[str, Tensor] = {}
    for part in parts:
        model = getattr(pipeline, part)
        own = model.state_dict()
        for name, origin in origins_of(family, part, model).items():
            tensors[name] = origin.tensor(own).to(dtype).cpu().contiguous()
    predicts_v = scheduler.get("prediction_type") == "v_prediction"
    said = {V_PREDICTION: predicts_v, ZERO_SNR: scheduler.get("rescale_betas_zero_snr")}
    tensors |= {markers + name: torch.zeros(0) for name, is_so in said.items() if is_so}
    about = {"format": "pt", PREDICTION: "v" if predicts_v else "epsilon", **metadata}
    write_file(path, lambda part: save_file(tensors, part, about))
