"""What a run starts from: a base checkpoint, its family, its parts that fit each other, and what it is known by.

Whoever goes on with a run must load the same base again.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from spin_diffusion.diffusion.families import families
from spin_diffusion.diffusion.given_lora import fuse_given, split_strength
from spin_diffusion.diffusion.noising import check_scheduler
from spin_diffusion.diffusion.parts import CONFIG, TOKENIZERS, Part, load_encoder, load_unet, load_vae, weight_files
from spin_diffusion.diffusion.prompts import words_of
from spin_diffusion.diffusion.single_file import CheckpointFile, open_checkpoint
from spin_diffusion.store.configuration import Configuration, Keys, check_keys, read_configuration
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.input_error import InputError, is_local, one_line
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.weights import config_of

_IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that are not loaded: they draw nothing of a prompt, or would blacken training samples."""


_FLAG = "--pretrained_model_name_or_path"


@dataclass(frozen=True)
class Base:
    """A base checkpoint, by what it is loaded from.

    Attributes:
        name: local folder, single file or hub id.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, such as fp16.
        vae: local folder or hub id of a VAE in place of the checkpoint's own.
        config: local folder or hub id of the checkpoint whose configuration and tokenizers a single file goes with.
        lora: file of an adapter that is fused into it, with @STRENGTH if that is not 1.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    config: str | None = None
    lora: str | None = None

    @classmethod
    def of(cls, base: "Base | str") -> "Base":
        """Itself; or the base of this name without options."""
        return base if isinstance(base, Base) else cls(base)

    @classmethod
    def of_settings(cls, flat: Mapping[str, Any]) -> "Base":
        """The base that a run's settings name, by their flags."""
        name, vae = str(flat.get("pretrained_model_name_or_path")), flat.get("pretrained_vae_model_name_or_path")
        return cls(name, flat.get("revision"), flat.get("variant"), vae, flat.get("base_config"), flat.get("init_lora"))

    def as_dict(self) -> dict[str, str | None]:
        """For a manifest and for keys, in which configuration and adapter stand where they were given alone."""
        return {key: value for key, value in asdict(self).items() if key not in ("config", "lora") or value is not None}

    @property
    def places(self) -> list[str | None]:
        """Where its files are: those of the checkpoint, of the VAE, and of what else was given."""
        lora = split_strength(self.lora)[0] if self.lora is not None else None
        return [self.name, self.vae, *(place for place in (self.config, lora) if place is not None)]

    def placed(self, name: Callable[[str], str]) -> "Base":
        """The same, with another name for each place on this disk."""

        def renamed(place: str | None) -> str | None:
            return name(place) if place is not None and is_local(place) else place

        lora = None
        if self.lora is not None:
            path, _ = split_strength(self.lora)
            lora = f"{renamed(path)}{self.lora.removeprefix(path)}"
        return replace(
            self, name=renamed(self.name) or "", vae=renamed(self.vae), config=renamed(self.config), lora=lora
        )

    @property
    def file(self) -> CheckpointFile | None:
        """The single file that it is loaded from. Raises InputError: as `open_checkpoint`."""
        path = Path(self.name)
        return open_checkpoint(path, f"{_FLAG} {self.name}") if path.is_file() else None

    def part(self, folder: Path, what: str, file: CheckpointFile | None) -> Part:
        """A part of it, whose configuration is in a folder; `what` it is, for messages."""
        return Part(folder, f"{self.name}: its {what}", self.variant, file)

    def __str__(self) -> str:
        """The name, and in brackets what it is loaded with."""
        given = {"revision": self.revision, "variant": self.variant, "VAE": self.vae, "configuration": self.config}
        given["LoRA"] = self.lora
        options = ", ".join(f"{option} {value}" for option, value in given.items() if value is not None)
        return f"{self.name} ({options})" if options else self.name


def python_arguments(name: str, **options: str | bool | None) -> str:
    """The arguments of a call in Python that loads something by its name; options that are None or False are left
    out."""
    given = [f"{option}={_quoted(value)}" for option, value in options.items() if value]
    return ", ".join([_quoted(name), *given])


def _quoted(value: str | bool) -> str:
    """As Python reads it: in the quotes of formatted code where nothing in it needs an escape."""
    if isinstance(value, bool):
        return str(value)
    return f'"{value}"' if value.isprintable() and '"' not in value and "\\" not in value else ascii(value)


# Loading


def load_checkpoint(base: Base | str) -> tuple[ModuleType, Any]:
    """A pipeline in fp32, from a local folder or a hub id, and its family. Raises InputError: no such folder or hub id,
    an unsupported family or denoiser, a part that is not what its files say."""
    base = Base.of(base)
    file = base.file
    folder = _folder_of(base) if file is None else _configuration_of(base, file)
    index = read_configuration(folder / "model_index.json", base.name)
    name, known = index.get("_class_name"), families()
    if not isinstance(name, str) or name not in known:
        raise InputError(f"{base.name} is a {name}, which is not supported (supported: {', '.join(sorted(known))})")
    family = known[name]
    if file is not None and family is not file.family:
        theirs = file.family.PIPELINE.__name__
        raise InputError(f"--base_config {folder} is a {name}, and {base.name} a {theirs}: give the folder of one")
    parts = load_parts(family, index, folder, base, file)
    try:
        pipeline = family.PIPELINE.from_pretrained(str(folder), **parts)
    except Exception as error:  # diffusers raises dozens of kinds
        raise InputError(f"cannot load the model {base.name!r}: {one_line(error)}") from error
    if file is not None:
        pipeline.scheduler = _with_noise(pipeline.scheduler, file, base)
    if base.lora is not None:
        fuse_given(pipeline, base.lora, ["unet", *family.ENCODERS])
    return family, pipeline


def _folder_of(base: Base) -> Path:
    """Where a checkpoint's files lie; those of one on the hub are downloaded."""
    flag, folder = f"{_FLAG} {base.name}", Path(base.name)
    if base.config is not None:
        raise InputError(f"--base_config {base.config}: {base.name} is no single file, and has its own: leave it out")
    if is_local(base.name):
        if not (folder / "model_index.json").is_file():
            what = "has no model_index.json" if folder.is_dir() else "does not exist"
            raise InputError(
                f"{flag}: the folder {what}; give a folder in diffusers' layout or a hub id such as "
                "stabilityai/stable-diffusion-xl-base-1.0"
            )
        return folder
    options = {"revision": base.revision, "variant": base.variant, "use_safetensors": True, "safety_checker": None}
    return _downloaded(flag, DiffusionPipeline.download, base.name, **options)


def _downloaded(flag: str, download: Callable[..., Any], name: str, **options: Any) -> Path:
    try:
        return Path(download(name, **options))
    except Exception as error:  # the hub's client raises dozens of kinds
        raise InputError(
            f"{flag}: neither a local folder nor a hub id that can be reached ({one_line(error)})"
        ) from error


def _configuration_of(base: Base, file: CheckpointFile) -> Path:
    """The folder of the configuration and the tokenizers of a single file; those on the hub are downloaded."""
    for flag, given in (("--revision", base.revision), ("--variant", base.variant)):
        if given is not None:
            raise InputError(f"{flag} {given}: {base.name} is a single file, which has none: leave it out")
    name = base.config or file.configured_as
    remedy = "give --base_config with the folder, or hub id, of a checkpoint in diffusers' layout that has them"
    if name is None:
        raise InputError(
            f"{_FLAG} {base.name} has neither configuration nor tokenizer, and by its tensors may predict noise or v: "
            f"{remedy}"
        )
    if is_local(name):
        if not (Path(name) / "model_index.json").is_file():
            raise InputError(f"--base_config {name}: the folder has no model_index.json: {remedy}")
        return Path(name)
    flag = f"{_FLAG} {base.name} has neither configuration nor tokenizer ({remedy}); --base_config {name}"
    return _downloaded(flag, snapshot_download, name, allow_patterns=["*.json", "*.txt"])


def _with_noise(scheduler: Any, file: CheckpointFile, base: Base) -> Any:
    """The scheduler with what a single file says of its noise."""
    noise = {key: value for key, value in file.noise.items() if scheduler.config.get(key) != value}
    if unknown := sorted(noise.keys() - inspect.signature(type(scheduler)).parameters.keys()):
        raise InputError(
            f"{base.name} says {unknown[0]} {noise[unknown[0]]}, which a {type(scheduler).__name__} has not: give "
            "--base_config with a scheduler that has, such as DDIMScheduler"
        )
    return type(scheduler).from_config(scheduler.config, **noise) if noise else scheduler


def load_parts(
    family: ModuleType, index: Configuration, folder: Path, base: Base, file: CheckpointFile | None
) -> dict[str, object]:
    """The networks and tokenizers of a family's pipeline in a folder, and None for parts that are not loaded.

    Args:
        index: the pipeline's model_index.json.
        file: where the weights are, if not in the folder.

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
    if base.variant and not any(base.variant in weight_files(folder / name) for name in names):
        present = sorted({str(variant) for name in names for variant in weight_files(folder / name) if variant})
        remedy = f"give --variant {' or '.join(present)}" if present else "leave --variant out"
        raise InputError(f"{base.name}: no part has weights of --variant {base.variant}: {remedy}")
    parts: dict[str, object] = {name: None for name in _IGNORED if name in index}
    parts["unet"] = load_unet(base.part(folder / "unet", "UNet", file))
    for name, kind in family.ENCODERS.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        part = base.part(folder / name, name, file)
        parts[name], parts[tokenizer] = load_encoder(kind, part, folder / tokenizer, f"{base.name}: its {tokenizer}")
    if base.vae is not None:
        parts["vae"] = _load_given_vae(family, base.vae)
    else:
        parts["vae"] = load_vae(family, base.part(folder / "vae", "VAE", file))
    _check_together(family, parts, base.name)
    return parts


def _load_given_vae(family: ModuleType, name: str) -> AutoencoderKL:
    """The VAE that stands in for the checkpoint's own, from a local folder or a hub id."""
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
        folder = _downloaded(flag, snapshot_download, name, allow_patterns=patterns, ignore_patterns="*.bin")
    if (folder / "model_index.json").is_file():
        raise InputError(f"{flag} is a whole pipeline: give its VAE, {folder / 'vae'}")
    variants = weight_files(folder)
    if variants and None not in variants:
        load = f"AutoencoderKL.from_pretrained({name!r}, variant={min(map(str, variants))!r})"
        raise InputError(
            f"{flag}: it has variants of its weights alone, and is taken without one: save it plainly with diffusers, "
            f"{load}.save_pretrained(FOLDER), and give FOLDER"
        )
    return load_vae(family, Part(folder, flag))


def _check_index(family: ModuleType, index: Configuration, where: str) -> None:
    """The classes that a pipeline names are those of its family, and each of its settings is there and known."""
    classes: dict[str, tuple[str, ...]] = {"unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",)}
    for name, kind in family.ENCODERS.items():
        classes |= {name: (kind.__name__,), name.replace("text_encoder", "tokenizer"): TOKENIZERS}
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


def load_to_draw(base: Base, device: torch.device | str) -> tuple[Any, Any]:
    """The family and the pipeline of a base, on a device and not to be trained."""
    family, pipeline = load_checkpoint(base)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval().to(device)
    pipeline.unet.to(memory_format=torch.channels_last)
    return family, pipeline


# What a pipeline is: hashes of the parts that decide a picture beside the denoiser


def parts_hash(pipeline: Any) -> str:
    """Hash of all parts of a pipeline but its UNet: weights, configurations, vocabularies, noise process, switches."""
    parts: dict[str, object] = {"switches": config_of(pipeline)}
    for name, part in pipeline.components.items():
        if name == "unet" or part is None:
            continue
        if isinstance(part, nn.Module):
            parts[name] = [weights_hash(part), config_of(part)]
        elif hasattr(part, "get_vocab"):
            parts[name] = words_of(part)
        else:
            parts[name] = [type(part).__name__, config_of(part) if hasattr(part, "config") else None]
    return key_of(**parts)
