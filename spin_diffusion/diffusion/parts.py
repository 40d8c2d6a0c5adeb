"""The parts of a pipeline as their files have them, or not at all.

diffusers and transformers take their own default for a key that a configuration lacks, and leave out one that they do
not know; either way another model is run than the one that was given. So of every configuration the keys that change
what is computed must be there, and each key must be one that the part's class reads. Keys that came after the first
published Stable Diffusion may be missing: their defaults are what was computed before there was a choice.
"""

import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.noising import check_complete, check_scheduler
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.opening import read_bytes
from spin_diffusion.store.text import printable
from spin_diffusion.store.weights import check_stored, load_whole

CONFIG = "config.json"
_LONGEST_CONFIG = 2**24
"""Bytes."""
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.safetensors"
)
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that are not loaded: they draw nothing of a prompt, or would blacken training samples."""

_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

# Keys that decide what is computed and that no tensor's shape shows, all of them in the first published files
_UNET_KEYS = (
    "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample", "cross_attention_dim",
    "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block",
    "mid_block_scale_factor", "norm_eps", "norm_num_groups", "out_channels", "up_block_types",
)  # fmt: skip
_VAE_KEYS = (
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "out_channels", "up_block_types",
)  # fmt: skip
_ENCODER_KEYS = (
    "hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "vocab_size",
)  # fmt: skip
# Keys of inputs that are not given here, with the only value that needs none
_UNET_INPUTS = {
    "class_embed_type": (None, "a class label of each image"),
    "num_class_embeds": (None, "a class label of each image"),
    "time_cond_proj_dim": (None, "the guidance scale as an embedding (LCM)"),
    "encoder_hid_dim": (None, "another encoder's embeddings"),
    "encoder_hid_dim_type": (None, "another encoder's embeddings (IP-Adapter, Kolors)"),
    "attention_type": ("default", "the objects' places (GLIGEN)"),
    "dual_cross_attention": (False, "two conditions at a time"),
}
_LEFT_BY_TRAINING = {
    "decay", "inv_gamma", "min_decay", "min_value", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
"""Of diffusers' moving average of weights, which writes its own settings among the UNet's."""
_OLD_ENCODER_KEYS = {"dropout", "torch_dtype", "gradient_checkpointing", "attn_implementation", "use_cache"}
"""Which older versions of transformers wrote, and which change nothing that is computed here."""


def read_json_object(path: Path, where: str) -> dict[str, Any]:
    """A configuration file.

    Args:
        where: what the user gave, and the part of it; it begins the message.

    Raises:
        InputError: it is missing, too long, or not a JSON object.
    """
    if not path.exists():
        raise InputError(f"{where}: {path.name} is missing: get the whole checkpoint")
    try:
        found = json.loads(read_bytes(path, _LONGEST_CONFIG))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, InputError) else "it is not JSON"
        raise InputError(f"{where}: {path.name} cannot be read ({reason}): get it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: {path.name} is not a JSON object: get it again")
    return found


def load_parts(
    family: ModuleType, index: Mapping[str, Any], folder: Path, base: Base, cache_dir: str | None
) -> dict[str, Any]:
    """The networks and tokenizers of a family's pipeline, and None for parts that are not loaded.

    Args:
        index: the pipeline's model_index.json.
        folder: of the checkpoint.
        cache_dir: of the hub's client, where the base names a VAE on the hub.

    Raises:
        InputError: a part that is missing, of another class than the family's, or not what its files say.
    """
    where = base.name
    _check_index(family, index, where)
    check_scheduler(
        read_json_object(folder / "scheduler" / "scheduler_config.json", f"{where}: its scheduler"),
        f"{where}: its scheduler", _class_in(index, "scheduler"),
    )  # fmt: skip
    variant = base.variant
    names = ["unet", *family.ENCODERS, *(["vae"] if base.vae is None else [])]
    if variant and not any(variant in _variants(folder / name) for name in names):
        raise InputError(f"{where}: no part has weights of --variant {variant}: {_present(folder, names)}")
    parts: dict[str, Any] = {name: None for name in _IGNORED if name in index}
    parts["unet"] = load_unet(folder / "unet", f"{where}: its UNet", variant)
    for name, kind in family.ENCODERS.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        parts[name], parts[tokenizer] = _load_encoder(kind, folder, name, tokenizer, variant, where)
    if base.vae is not None:
        parts["vae"] = _load_given_vae(family, base, cache_dir)
    else:
        parts["vae"] = _load_vae(family, folder / "vae", f"{where}: its VAE", variant)
    _check_together(family, parts, where)
    return parts


# Of each part


def load_unet(folder: Path, where: str, variant: str | None = None) -> UNet2DConditionModel:
    """The UNet in a folder, in fp32.

    Raises:
        InputError: it is not a UNet2DConditionModel of the kind that is told a prompt and a timestep alone, or not
            what its files say.
    """
    config = _read_config(folder, where, "UNet2DConditionModel")
    check_complete(config, UNet2DConditionModel, where, CONFIG)
    _check_keys(config, _UNET_KEYS, _parameters(UNet2DConditionModel).keys() | _LEFT_BY_TRAINING, where)
    _check_types(config, UNet2DConditionModel, where)
    for key, (value, needs) in _UNET_INPUTS.items():
        if config.get(key, value) != value:
            raise InputError(
                f"{where}: {key} is {config[key]!r}: it needs {needs}, which is not supported ({key} {value!r} is)"
            )
    return _load(UNet2DConditionModel, folder, where, variant)


def _load_vae(family: ModuleType, folder: Path, where: str, variant: str | None) -> AutoencoderKL:
    config = _read_config(folder, where, "AutoencoderKL")
    check_complete(config, AutoencoderKL, where, CONFIG)
    _check_keys(config, _VAE_KEYS, {*_parameters(AutoencoderKL)}, where)
    _check_types(config, AutoencoderKL, where)
    channels = config["latent_channels"]
    scale = config.get("scaling_factor", family.SCALING_FACTOR)
    if not _is_number(scale) or not scale > 0:
        raise InputError(
            f"{where}: scaling_factor is {'missing' if scale is None else repr(scale)}: {CONFIG} must name the number "
            "that latents are multiplied with, 0.13025 for SDXL's own VAE"
        )
    if config.get("shift_factor"):
        raise InputError(
            f"{where}: shift_factor is {config['shift_factor']!r}, which {family.PIPELINE.__name__} does not apply: "
            "give a VAE without it"
        )
    given = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    for key in given:
        numbers = config[key]
        if not isinstance(numbers, list) or len(numbers) != channels or not all(map(_is_number, numbers)):
            raise InputError(f"{where}: {key} must have one number for each of {channels} channels, got {numbers!r}")
    if len(given) == 1:
        raise InputError(f"{where}: it has {given[0]} alone: latents_mean and latents_std belong together")
    if given and min(config["latents_std"]) <= 0:
        raise InputError(f"{where}: latents_std {config['latents_std']!r} must be above 0")
    if given and not family.STANDARDISED_LATENTS:
        raise InputError(
            f"{where}: it has latents_mean and latents_std, which {family.PIPELINE.__name__} does not apply: give a "
            "VAE without them"
        )
    return _load(AutoencoderKL, folder, where, variant)


def _load_given_vae(family: ModuleType, base: Base, cache_dir: str | None) -> AutoencoderKL:
    """The VAE that stands in for the checkpoint's own."""
    flag = f"--pretrained_vae_model_name_or_path {base.vae}"
    folder = Path(str(base.vae))
    if folder.is_file():
        raise InputError(
            f"{flag} is a single file: convert it once with diffusers, "
            f"AutoencoderKL.from_single_file({str(folder)!r}).save_pretrained(FOLDER), and give FOLDER"
        )
    if not folder.is_dir():
        if is_local(str(base.vae)):
            raise InputError(f"{flag}: the folder does not exist: give the folder of a VAE, or a hub id")
        folder = _downloaded_vae(str(base.vae), flag, cache_dir)
    if (folder / "model_index.json").is_file():
        raise InputError(f"{flag} is a whole pipeline: give its VAE, {folder / 'vae'}")
    found = _variants(folder)
    if found and None not in found:
        load = f"AutoencoderKL.from_pretrained({str(base.vae)!r}, variant={min(map(str, found))!r})"
        raise InputError(
            f"{flag}: it has variants of its weights alone, and is taken without one: save it plainly with diffusers, "
            f"{load}.save_pretrained(FOLDER), and give FOLDER"
        )
    return _load_vae(family, folder, flag, None)


def _downloaded_vae(name: str, flag: str, cache_dir: str | None) -> Path:
    """Where the hub's client has put the files."""
    try:
        patterns = [CONFIG, "model_index.json", "diffusion_pytorch_model*"]
        found = snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns=["*.bin"])
    except Exception as error:  # the hub's client raises dozens of kinds
        raise InputError(
            f"{flag}: neither a local folder nor a hub id that can be reached ({reason_of(error)})"
        ) from error
    return Path(found)


def _load_encoder(
    kind: Any, folder: Path, name: str, tokenizer: str, variant: str | None, where: str
) -> tuple[PreTrainedModel, CLIPTokenizer]:
    """A text encoder and its tokenizer."""
    of_part = f"{where}: its {name}"
    config = _read_config(folder / name, of_part, None)
    if config.get("model_type") != "clip_text_model":
        raise InputError(
            f"{of_part} is of the type {config.get('model_type')!r}, {kind.__name__} (clip_text_model) is supported"
        )
    needed = (*_ENCODER_KEYS, *(("projection_dim",) if "Projection" in kind.__name__ else ()))
    _check_keys(config, needed, set(CLIPTextConfig().to_dict()) | _OLD_ENCODER_KEYS, of_part)
    of_prompts = _load_tokenizer(folder / tokenizer, config, f"{where}: its {tokenizer}")
    return _load(kind, folder / name, of_part, variant), of_prompts


def _load_tokenizer(folder: Path, encoder: Mapping[str, Any], where: str) -> CLIPTokenizer:
    """A tokenizer that makes the ids which an encoder of this configuration reads."""
    config = read_json_object(folder / "tokenizer_config.json", where)
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise InputError(f"{where}: {name} is missing, and so is tokenizer.json: get the whole checkpoint")
    special = folder / "special_tokens_map.json"
    said = config | (read_json_object(special, where) if special.is_file() else {})
    for key in ("model_max_length", "pad_token"):
        if said.get(key) is None:
            raise InputError(f"{where}: {key} is missing in tokenizer_config.json: get the checkpoint's own file")
    if config.get("tokenizer_class", "CLIPTokenizer") not in _TOKENIZERS:
        raise InputError(
            f"{where} is {config['tokenizer_class']} by its tokenizer_config.json, CLIPTokenizer is supported"
        )
    longest, positions = config.get("model_max_length"), encoder["max_position_embeddings"]
    if longest != positions:
        raise InputError(
            f"{where}: model_max_length is {longest!r} in tokenizer_config.json, its text encoder has {positions} "
            "positions: the two must agree"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises dozens of kinds
        raise InputError(f"{where} cannot be loaded ({reason_of(error)}): get its files again") from error
    highest, rows = max(tokenizer.get_vocab().values()), encoder["vocab_size"]
    if highest >= rows:
        raise InputError(
            f"{where} has ids up to {highest}, and its text encoder {rows} embeddings: give the tokenizer that it was "
            "trained with"
        )
    end = encoder.get("eos_token_id", CLIPTextConfig().eos_token_id)
    # 2 is what old files say where the end token is the one of the highest id
    if end != tokenizer.eos_token_id and not (end == 2 and tokenizer.eos_token_id == highest):
        raise InputError(
            f"{where} ends prompts with the id {tokenizer.eos_token_id}, its text encoder reads them up to {end} "
            "(eos_token_id): give the tokenizer that it was trained with"
        )
    return tokenizer


# What they have in common


def _check_index(family: ModuleType, index: Mapping[str, Any], where: str) -> None:
    """The classes that a pipeline names are those of its family, and each of its settings is there and known."""
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in family.ENCODERS]
    expected: dict[str, tuple[str, ...]] = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",)}
    expected |= {name: (kind.__name__,) for name, kind in family.ENCODERS.items()}
    expected |= dict.fromkeys(tokenizers, _TOKENIZERS)
    for name, kinds in expected.items():
        found = _class_in(index, name)
        if found not in kinds:
            raise InputError(
                f"{where}: model_index.json has {found or 'nothing'} as its {name}, {kinds[0]} is supported"
            )
    known = {*expected, *_IGNORED, "scheduler", *inspect.signature(family.PIPELINE.__init__).parameters}
    if foreign := sorted(key for key in index if key not in known and not key.startswith("_")):
        raise InputError(
            f"{where}: model_index.json has {printable(foreign[0])}, which {family.PIPELINE.__name__} does not have"
        )
    for key in family.FLAGS:
        if not isinstance(index.get(key), bool):
            raise InputError(f"{where}: model_index.json must say {key}, true or false: get the checkpoint's own file")


def _class_in(index: Mapping[str, Any], name: str) -> str | None:
    """The class that a model_index.json names for a part."""
    said = index.get(name)
    return said[1] if isinstance(said, list) and len(said) == 2 and isinstance(said[1], str) else None


def _read_config(folder: Path, where: str, kind: str | None) -> dict[str, Any]:
    """A part's configuration.

    Args:
        kind: name of the only class that is supported, where the file says one.
    """
    if not folder.is_dir():
        raise InputError(f"{where}: the folder {folder} is missing: get the whole checkpoint")
    config = read_json_object(folder / CONFIG, where)
    if kind is not None and config.get("_class_name") != kind:
        raise InputError(f"{where} is {config.get('_class_name')} by its {CONFIG}, {kind} is supported")
    if config.get("quantization_config"):
        raise InputError(
            f"{where}: its weights are quantised (quantization_config), which cannot be trained from: give the "
            "checkpoint in float32, float16 or bfloat16"
        )
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{where}: {folder} holds an adapter, not a whole model: merge it into its base, save and give that"
        )
    return config


def _check_keys(config: Mapping[str, Any], needed: tuple[str, ...], known: set[str], where: str) -> None:
    missing = [key for key in needed if key not in config]
    if missing:
        raise InputError(
            f"{where}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing in {CONFIG}, and the "
            "library's default may be another: get the checkpoint's own file"
        )
    foreign = sorted(key for key in config if key not in known and not key.startswith("_"))
    if foreign:
        raise InputError(
            f"{where}: {CONFIG} has {', '.join(map(printable, foreign[:5]))}, which the installed version does not "
            f"know and would leave out: if it changes nothing remove it from {CONFIG}, else update diffusers"
        )


def _check_types(config: Mapping[str, Any], kind: type, where: str) -> None:
    """Where a class has a text as its default a text is given, and none where it has a number or a switch: diffusers
    checks neither, and a text is true."""
    for key, parameter in _parameters(kind).items():
        value, default = config.get(key), parameter.default
        if isinstance(value, bool | int | float | str) and isinstance(default, bool | int | float | str):
            if isinstance(value, str) != isinstance(default, str):
                raise InputError(
                    f"{where}: {key} is {printable(repr(value))} in {CONFIG}, where {kind.__name__} has "
                    f"{default!r} by default: get the checkpoint's own file"
                )


def _check_together(family: ModuleType, parts: Mapping[str, Any], where: str) -> None:
    """The parts fit each other."""
    unet, vae = parts["unet"].config, parts["vae"].config
    if unet.in_channels != vae.latent_channels or unet.out_channels != unet.in_channels:
        raise InputError(
            f"{where}: its UNet takes {unet.in_channels} channels and returns {unet.out_channels} where the VAE has "
            f"{vae.latent_channels}: inpainting, depth and refiner models, and learned variances, are not supported"
        )
    if unet.addition_embed_type != family.ADDED_EMBEDDING:
        raise InputError(
            f"{where}: its UNet has addition_embed_type {unet.addition_embed_type!r}, that of a "
            f"{family.PIPELINE.__name__} is {family.ADDED_EMBEDDING!r}"
        )
    added, size = unet.projection_class_embeddings_input_dim, unet.addition_time_embed_dim or 0
    pooled = parts[[*family.ENCODERS][-1]].config.projection_dim
    if family.ADDED_EMBEDDING is not None and added != 6 * size + pooled:
        raise InputError(
            f"{where}: its UNet takes an added embedding of width {added}, and it is given six numbers in {size} each "
            f"and a pooled prompt of {pooled}: they are not of one model"
        )
    widths = [parts[name].config.hidden_size for name in family.ENCODERS]
    taken = unet.cross_attention_dim
    if any(width != sum(widths) for width in (taken if isinstance(taken, list | tuple) else [taken])):
        raise InputError(
            f"{where}: its UNet reads tokens of width {taken}, and its text encoders make "
            f"{' + '.join(map(str, widths))}: they are not of one model"
        )


def _load(kind: Any, folder: Path, where: str, variant: str | None) -> Any:
    """A part's weights: those of the variant if it has them, else the plain ones, as diffusers takes them."""
    found = _variants(folder)
    chosen = variant if variant in found else None
    if chosen not in found:
        if found:
            raise InputError(f"{where}: its weights are of the variant {' and '.join(map(str, found))} alone: give "
                             f"--variant {sorted(map(str, found))[0]}")  # fmt: skip
        raise InputError(
            f"{where}: {folder} has no weights in safetensors files (pickled ones, .bin, are not loaded): save it with "
            "save_pretrained(FOLDER, safe_serialization=True) and give FOLDER"
        )
    check_stored(found[chosen], read_json_object(folder / CONFIG, where), where=where)
    try:
        return load_whole(kind, str(folder), where=where, variant=chosen)
    except InputError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise dozens of kinds
        raise InputError(f"{where} cannot be loaded ({reason_of(error)}): get its files again") from error


def _variants(folder: Path) -> dict[str | None, list[Path]]:
    """The weight files in a folder by their variant; None = without one."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _WEIGHTS.fullmatch(path.name):
            found.setdefault(match["variant"], []).append(path)
    return found


def _present(folder: Path, names: list[str]) -> str:
    """Of the parts' weights the variants that there are, in words."""
    found = sorted({variant for name in names for variant in _variants(folder / name) if variant})
    return f"give --variant {' or '.join(found)}" if found else "leave --variant out"


def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.__init__).parameters


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_local(name: str) -> bool:
    """Whether a name is meant as a path rather than as a hub id, OWNER/NAME."""
    return Path(name).exists() or name.startswith((".", os.sep, "~")) or name.count("/") > 1


def reason_of(error: Exception) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:300])
