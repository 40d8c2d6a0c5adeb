"""The parts of a pipeline as their files have them, or not at all: see `store.configuration` and `store.weights`.

Keys that came after the first published Stable Diffusion may be missing: their defaults are what was computed before
there was a choice.
"""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

from spin_diffusion.diffusion.base import Base
from spin_diffusion.diffusion.noising import check_complete, check_scheduler
from spin_diffusion.store.configuration import (
    Choice,
    Configuration,
    Keys,
    check_keys,
    is_number,
    read_configuration,
    refuse_missing,
)
from spin_diffusion.store.input_error import InputError, one_line
from spin_diffusion.store.weights import check_stored, load_whole

CONFIG = "config.json"
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.safetensors"
)
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that are not loaded: they draw nothing of a prompt, or would blacken training samples."""
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


def _keys(kind: type, needed: str, harmless: str = "", **choices: Choice) -> Keys:
    """The keys of a class of diffusers: those that it is made with, and harmless ones."""
    parameters = inspect.signature(kind).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return Keys(tuple(needed.split()), frozenset({*defaults, *harmless.split()}), choices, defaults)


# All needed keys stand in the first published files
_UNET = _keys(
    UNet2DConditionModel,
    "act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim down_block_types "
    "downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor norm_eps "
    "norm_num_groups out_channels up_block_types",
    # diffusers' moving average of weights writes its own settings among the UNet's
    "decay inv_gamma min_decay min_value optimization_step power update_after_step use_ema_warmup",
    class_embed_type=Choice((None,), "a class label of each image"),
    num_class_embeds=Choice((None,), "a class label of each image"),
    time_cond_proj_dim=Choice((None,), "the guidance scale as an embedding (LCM)"),
    encoder_hid_dim=Choice((None,), "another encoder's embeddings"),
    encoder_hid_dim_type=Choice((None,), "another encoder's embeddings (IP-Adapter, Kolors)"),
    attention_type=Choice(("default",), "the objects' places (GLIGEN)"),
    dual_cross_attention=Choice((False,), "two conditions at a time"),
)
_VAE = _keys(
    AutoencoderKL,
    "act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block out_channels "
    "up_block_types",
)
_ENCODER = Keys(
    (
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_norm_eps",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    ),
    # Older versions of transformers wrote the last ones, which change nothing that is computed here
    frozenset(
        {
            *CLIPTextConfig().to_dict(),
            "dropout",
            "torch_dtype",
            "gradient_checkpointing",
            "attn_implementation",
            "use_cache",
        }
    ),
)


@dataclass(frozen=True)
class _Part:
    """A network's folder in a checkpoint."""

    folder: Path
    where: str
    """What the user gave, and the part of it; it begins messages."""
    variant: str | None = None

    def config(self, class_name: str | None = None) -> Configuration:
        """Its configuration.

        Args:
            class_name: the only class that is supported, where the file says one.

        Raises:
            InputError: there is none, or it is of another class; the weights are an adapter.
        """
        if not self.folder.is_dir():
            raise InputError(f"{self.where}: the folder {self.folder} is missing: get the whole checkpoint")
        config = read_configuration(self.folder / CONFIG, self.where)
        if class_name is not None and config.get("_class_name") != class_name:
            raise InputError(f"{self.where} is {config.get('_class_name')} by its {CONFIG}, {class_name} is supported")
        if (self.folder / "adapter_config.json").is_file():
            raise InputError(
                f"{self.where}: {self.folder} holds an adapter, not a whole model: merge it into its base, save and "
                "give that"
            )
        return config

    def checked_config(self, kind: type, keys: Keys) -> Configuration:
        """The configuration of a class of diffusers. Raises InputError as `config` and `check_keys`."""
        config, where = self.config(kind.__name__), f"{self.where}: {CONFIG}"
        check_complete(config, kind, where)
        check_keys(config, keys, where)
        return config

    def load(self, kind: Any, config: Configuration) -> Any:
        """The network: the weights of the variant if there are any, else the plain ones, as diffusers takes them."""
        variants = _variants(self.folder)
        chosen = self.variant if self.variant in variants else None
        if chosen not in variants:
            if variants:
                names = sorted(map(str, variants))
                raise InputError(
                    f"{self.where}: its weights are of the variant {' and '.join(names)} alone: give --variant "
                    f"{names[0]}"
                )
            raise InputError(
                f"{self.where}: {self.folder} has no weights in safetensors files (pickled ones, .bin, are not "
                "loaded): save it with save_pretrained(FOLDER, safe_serialization=True) and give FOLDER"
            )
        check_stored(variants[chosen], config, where=self.where)
        try:
            return load_whole(kind, str(self.folder), where=self.where, variant=chosen)
        except InputError:
            raise
        except Exception as error:  # diffusers, transformers and safetensors raise dozens of kinds
            raise InputError(f"{self.where} cannot be loaded ({one_line(error)}): get its files again") from error


def load_parts(
    family: ModuleType, index: Configuration, folder: Path, base: Base, cache_dir: str | None
) -> dict[str, Any]:
    """The networks and tokenizers of a family's pipeline, and None for parts that are not loaded.

    Args:
        index: the pipeline's model_index.json.
        folder: of the checkpoint.
        cache_dir: of the hub's client, where the base names a VAE on the hub.

    Raises:
        InputError: a part that is missing, of another class than the family's, or not what its files say.
    """
    _check_index(family, index, base.name)
    scheduler = f"{base.name}: its scheduler"
    check_scheduler(
        read_configuration(folder / "scheduler" / "scheduler_config.json", scheduler),
        scheduler,
        _class_in(index, "scheduler"),
    )
    names = ["unet", *family.ENCODERS, *(["vae"] if base.vae is None else [])]
    if base.variant and not any(base.variant in _variants(folder / name) for name in names):
        present = sorted({str(variant) for name in names for variant in _variants(folder / name) if variant})
        remedy = f"give --variant {' or '.join(present)}" if present else "leave --variant out"
        raise InputError(f"{base.name}: no part has weights of --variant {base.variant}: {remedy}")
    parts: dict[str, Any] = {name: None for name in _IGNORED if name in index}
    parts["unet"] = load_unet(folder / "unet", f"{base.name}: its UNet", base.variant)
    for name, kind in family.ENCODERS.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        part = _Part(folder / name, f"{base.name}: its {name}", base.variant)
        parts[name], parts[tokenizer] = _load_encoder(kind, part, folder / tokenizer, f"{base.name}: its {tokenizer}")
    if base.vae is not None:
        parts["vae"] = _load_given_vae(family, base.vae, cache_dir)
    else:
        parts["vae"] = _load_vae(family, _Part(folder / "vae", f"{base.name}: its VAE", base.variant))
    _check_together(family, parts, base.name)
    return parts


def load_unet(folder: Path, where: str, variant: str | None = None) -> UNet2DConditionModel:
    """The UNet in a folder, in fp32.

    Raises:
        InputError: it is not a UNet2DConditionModel of the kind that is told a prompt and a timestep alone, or not
            what its files say.
    """
    part = _Part(folder, where, variant)
    return part.load(UNet2DConditionModel, part.checked_config(UNet2DConditionModel, _UNET))


def _load_vae(family: ModuleType, part: _Part) -> AutoencoderKL:
    config, where = part.checked_config(AutoencoderKL, _VAE), part.where
    scale = config.get("scaling_factor", family.SCALING_FACTOR)
    if not is_number(scale) or not scale > 0:
        raise InputError(
            f"{where}: scaling_factor is {'missing' if scale is None else repr(scale)}: {CONFIG} must name the number "
            "that latents are multiplied with, 0.13025 for SDXL's own VAE"
        )
    statistics = {key: config[key] for key in ("latents_mean", "latents_std") if config.get(key) is not None}
    unused = ["shift_factor"] if config.get("shift_factor") else []
    unused += [] if family.STANDARDISED_LATENTS else list(statistics)
    if unused:
        raise InputError(
            f"{where}: it has {' and '.join(unused)}, which {family.PIPELINE.__name__} does not apply: give a VAE "
            "without"
        )
    for key, numbers in statistics.items():
        channels = config["latent_channels"]
        if not isinstance(numbers, list) or len(numbers) != channels or not all(map(is_number, numbers)):
            raise InputError(f"{where}: {key} must have one number for each of {channels} channels, got {numbers!r}")
        if len(statistics) == 1:
            raise InputError(f"{where}: it has {key} alone: latents_mean and latents_std belong together")
        if key == "latents_std" and min(numbers) <= 0:
            raise InputError(f"{where}: latents_std {numbers!r} must be above 0")
    return part.load(AutoencoderKL, config)


def _load_given_vae(family: ModuleType, name: str, cache_dir: str | None) -> AutoencoderKL:
    """The VAE that stands in for the checkpoint's own.

    Args:
        name: local folder or hub id.
    """
    flag, folder = f"--pretrained_vae_model_name_or_path {name}", Path(name)
    if folder.is_file():
        raise InputError(
            f"{flag} is a single file: convert it once with diffusers, "
            f"AutoencoderKL.from_single_file({name!r}).save_pretrained(FOLDER), and give FOLDER"
        )
    if not folder.is_dir():
        if is_local(name):
            raise InputError(f"{flag}: the folder does not exist: give the folder of a VAE, or a hub id")
        patterns = [CONFIG, "model_index.json", "diffusion_pytorch_model*"]
        try:
            folder = Path(
                snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns="*.bin")
            )
        except Exception as error:  # the hub's client raises dozens of kinds
            raise InputError(
                f"{flag}: neither a local folder nor a hub id that can be reached ({one_line(error)})"
            ) from error
    if (folder / "model_index.json").is_file():
        raise InputError(f"{flag} is a whole pipeline: give its VAE, {folder / 'vae'}")
    variants = _variants(folder)
    if variants and None not in variants:
        load = f"AutoencoderKL.from_pretrained({name!r}, variant={min(map(str, variants))!r})"
        raise InputError(
            f"{flag}: it has variants of its weights alone, and is taken without one: save it plainly with diffusers, "
            f"{load}.save_pretrained(FOLDER), and give FOLDER"
        )
    return _load_vae(family, _Part(folder, flag))


def _load_encoder(kind: Any, part: _Part, folder: Path, where: str) -> tuple[PreTrainedModel, CLIPTokenizer]:
    """A text encoder and its tokenizer.

    Args:
        kind: class of the encoder.
        folder, where: of the tokenizer.
    """
    config = part.config()
    if config.get("model_type") != "clip_text_model":
        raise InputError(
            f"{part.where} is of the type {config.get('model_type')!r}, {kind.__name__} (clip_text_model) is supported"
        )
    if "Projection" in kind.__name__ and "projection_dim" not in config:
        refuse_missing(["projection_dim"], f"{part.where}: {CONFIG}")
    check_keys(config, _ENCODER, f"{part.where}: {CONFIG}")
    tokenizer = _load_tokenizer(folder, config, where)
    return part.load(kind, config), tokenizer


def _load_tokenizer(folder: Path, encoder: Configuration, where: str) -> CLIPTokenizer:
    """A tokenizer that makes the ids which an encoder of this configuration reads."""
    config = read_configuration(folder / "tokenizer_config.json", where)
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise InputError(f"{where}: {name} is missing, and so is tokenizer.json: get the whole checkpoint")
    special = folder / "special_tokens_map.json"
    given = config | (read_configuration(special, where) if special.is_file() else {})
    missing = [key for key in ("model_max_length", "pad_token") if given.get(key) is None]
    refuse_missing(missing, f"{where}: tokenizer_config.json")
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
        raise InputError(f"{where} cannot be loaded ({one_line(error)}): get its files again") from error
    highest, embeddings = max(tokenizer.get_vocab().values()), encoder["vocab_size"]
    if highest >= embeddings:
        raise InputError(
            f"{where} has ids up to {highest}, and its text encoder {embeddings} embeddings: give the tokenizer that "
            "it was trained with"
        )
    end = encoder.get("eos_token_id", CLIPTextConfig().eos_token_id)
    # 2 is what old files say where the end token is the one of the highest id
    if end != tokenizer.eos_token_id and not (end == 2 and tokenizer.eos_token_id == highest):
        raise InputError(
            f"{where} ends prompts with the id {tokenizer.eos_token_id}, its text encoder reads them up to {end} "
            "(eos_token_id): give the tokenizer that it was trained with"
        )
    return tokenizer


def _check_index(family: ModuleType, index: Configuration, where: str) -> None:
    """The classes that a pipeline names are those of its family, and each of its settings is there and known."""
    classes: dict[str, tuple[str, ...]] = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",)}
    for name, kind in family.ENCODERS.items():
        classes |= {name: (kind.__name__,), name.replace("text_encoder", "tokenizer"): _TOKENIZERS}
    for name, supported in classes.items():
        if (given := _class_in(index, name)) not in supported:
            raise InputError(
                f"{where}: model_index.json has {given or 'nothing'} as its {name}, {supported[0]} is supported"
            )
    known = {*classes, *_IGNORED, "scheduler", *inspect.signature(family.PIPELINE).parameters}
    pipeline = Keys((), frozenset(known), foreign=f"{family.PIPELINE.__name__} does not have")
    check_keys(index, pipeline, f"{where}: model_index.json")
    for key in family.FLAGS:
        if not isinstance(index.get(key), bool):
            raise InputError(f"{where}: model_index.json must say {key}, true or false: get the checkpoint's own file")


def _class_in(index: Configuration, name: str) -> str | None:
    """The class that a model_index.json names for a part."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


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


def _variants(folder: Path) -> dict[str | None, list[Path]]:
    """The weight files in a folder by their variant; None = without one."""
    files: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _WEIGHTS.fullmatch(path.name):
            files.setdefault(match["variant"], []).append(path)
    return files


def is_local(name: str) -> bool:
    """Whether a name is meant as a path rather than as a hub id, OWNER/NAME."""
    return Path(name).exists() or name.startswith((".", os.sep, "~")) or name.count("/") > 1
