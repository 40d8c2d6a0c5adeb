"""The parts of a pipeline as their files have them, or not at all: see `store.configuration` and `store.weights`.

Keys that came after the first published Stable Diffusion may be missing: their defaults are what was computed before
there was a choice.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

from spin_diffusion.diffusion.noising import check_complete
from spin_diffusion.diffusion.single_file import CheckpointFile
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
from spin_diffusion.store.weights import check_stored, load_whole, read_headers

CONFIG = "config.json"
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.safetensors"
)
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


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
_NEEDED = (
    "hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings num_attention_heads "
    "num_hidden_layers vocab_size"
)
# Older versions of transformers wrote these, which change nothing that is computed here
_OLD = "dropout torch_dtype gradient_checkpointing attn_implementation use_cache"
_ENCODER = Keys(tuple(_NEEDED.split()), frozenset({*CLIPTextConfig().to_dict(), *_OLD.split()}))


@dataclass(frozen=True)
class Part:
    """A network's folder in a checkpoint. All methods raise InputError for what is missing or not supported."""

    folder: Path
    where: str
    """What the user gave, and the part of it; it begins messages."""
    variant: str | None = None
    file: CheckpointFile | None = None
    """Where its weights are, if they are not in the folder."""

    def config(self, class_name: str | None = None) -> Configuration:
        """Its configuration; `class_name` is the only class that is supported, where the file says one."""
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
        """The configuration of a class of diffusers, complete and with no unknown key."""
        config, where = self.config(kind.__name__), f"{self.where}: {CONFIG}"
        check_complete(config, kind, where)
        check_keys(config, keys, where)
        return config

    def load(self, kind: Any, config: Configuration) -> Any:
        """The network: the weights of the variant if there are any, else the plain ones, as diffusers takes them."""
        if self.file is not None:
            named = config | {"_name_or_path": str(self.folder)}  # as from_pretrained does
            return self.file.load(self.folder.name, kind, named, self.where)
        variants = weight_files(self.folder)
        chosen = self.variant if self.variant in variants else None
        if not variants:
            raise InputError(
                f"{self.where}: {self.folder} has no weights in safetensors files (pickled ones, .bin, are not "
                "loaded): save it with save_pretrained(FOLDER, safe_serialization=True) and give FOLDER"
            )
        if chosen not in variants:
            names = sorted(map(str, variants))
            alone = f"its weights are of the variant {' and '.join(names)} alone"
            raise InputError(f"{self.where}: {alone}: give --variant {names[0]}")
        check_stored(read_headers(variants[chosen]), config, where=self.where)
        try:
            return load_whole(kind, str(self.folder), where=self.where, variant=chosen)
        except InputError:
            raise
        except Exception as error:  # diffusers, transformers and safetensors raise dozens of kinds
            raise InputError(f"{self.where} cannot be loaded ({one_line(error)}): get its files again") from error


def load_unet(part: Part) -> UNet2DConditionModel:
    """A UNet in fp32. Raises InputError: it is not a UNet2DConditionModel of the kind that is told a prompt and a
    timestep alone, or not what its files say."""
    return part.load(UNet2DConditionModel, part.checked_config(UNet2DConditionModel, _UNET))


def load_vae(family: ModuleType, part: Part) -> AutoencoderKL:
    """The VAE in a folder, in fp32; InputError: its configuration does not say how its latents are scaled."""
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


def load_encoder(kind: Any, part: Part, folder: Path, where: str) -> tuple[PreTrainedModel, CLIPTokenizer]:
    """A text encoder of this class, and its tokenizer in another folder."""
    config = part.config()
    if config.get("model_type") != "clip_text_model":
        raise InputError(
            f"{part.where} is of the type {config.get('model_type')!r}, {kind.__name__} (clip_text_model) is supported"
        )
    if "Projection" in kind.__name__ and "projection_dim" not in config:
        refuse_missing(["projection_dim"], f"{part.where}: {CONFIG}")
    check_keys(config, _ENCODER, f"{part.where}: {CONFIG}")
    tokenizer = _load_tokenizer(folder, config, where)  # first: it is small
    return part.load(kind, config), tokenizer


def _load_tokenizer(folder: Path, encoder: Configuration, where: str) -> CLIPTokenizer:
    config = read_configuration(folder / "tokenizer_config.json", where)
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise InputError(f"{where}: {name} is missing, and so is tokenizer.json: get the whole checkpoint")
    special = folder / "special_tokens_map.json"
    given = config | (read_configuration(special, where) if special.is_file() else {})
    missing = [key for key in ("model_max_length", "pad_token") if given.get(key) is None]
    refuse_missing(missing, f"{where}: tokenizer_config.json")
    if config.get("tokenizer_class", "CLIPTokenizer") not in TOKENIZERS:
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


def weight_files(folder: Path) -> dict[str | None, list[Path]]:
    """The weight files in a folder by their variant; None = without one."""
    files: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _WEIGHTS.fullmatch(path.name):
            files.setdefault(match["variant"], []).append(path)
    return files
