"""Stored rows -> latents: encoded, or found among those that runs share, by the images, the VAE and how it is done."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from diffusers import AutoencoderKL
from torch import Tensor

from spin_diffusion.diffusion import images
from spin_diffusion.diffusion.buckets import Size, places_by_size
from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.samples.sample import Row
from spin_diffusion.store.files import Made, build, read_tensors, weights_hash
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.pictures import open_picture


def size_of(row: Row) -> Size:
    """Height and width of a stored image, px, from its frame."""
    height, width = row["frame"][4:]
    return height, width


def latents_of(
    vae: AutoencoderKL,
    rows: list[Row],
    settings: ImageSettings,
    *,
    prefix: str = "",
    round_trip: bool = False,
    mirrored: bool = False,
    codec: bool = False,
) -> list[Tensor]:
    """The latents of each row's image, (channels, height, width) fp16 on the CPU; those of one size in batches.

    Args:
        prefix: of the rows' image.
        round_trip: pass the VAE and the codec once before.
        mirrored: of the mirror images.
        codec: pass the codec once more before anything else.
    """
    most = settings.vae_encode_batch_size
    encoded: dict[int, Tensor] = {}
    by_size = places_by_size(map(size_of, rows)).values()
    for places in (all_[start : start + most] for all_ in by_size for start in range(0, len(all_), most)):
        names = [rows[place]["id"] for place in places]
        opened = [open_picture(rows[place][f"{prefix}image"]) for place in places]
        pixels = images.to_pixels(images.through_codec(opened, settings) if codec else opened)
        if round_trip:
            drawn = images.to_images(images.decode_latents(vae, images.encode_pixels(vae, pixels, names), names))
            pixels = images.to_pixels(images.through_codec(drawn, settings))
        latents = images.encode_pixels(vae, pixels.flip(-1) if mirrored else pixels, names)
        encoded |= zip(places, latents.cpu().half(), strict=True)
    return [encoded[place] for place in range(len(rows))]


def vae_hash(vae: AutoencoderKL) -> str:
    """The hash of all that decides latents: a VAE's weights and its configuration, with scale and statistics."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return key_of(weights=weights_hash(vae), config=config)


def encoded_once(
    folder: Path, vae: str, how: dict[str, object], rows: list[Row], encode: Callable[[], Tensor], prefix: str
) -> Tensor:
    """The latents of a shard's images, from `folder` if they are there and whole, else encoded and put there.

    Args:
        vae: `vae_hash`.
        how: everything else that decides the latents.
        prefix: of the rows' image.
    """
    pictures = [[hashlib.sha256(row[f"{prefix}image"]).hexdigest(), row["drawn"]] for row in rows]
    key = key_of(vae=vae, how=how, images=pictures)
    path = folder / f"{key[:32]}.safetensors"
    build(path, key, lambda: Made({"latents": encode()}), shared=True)
    return read_tensors(path)["latents"]
