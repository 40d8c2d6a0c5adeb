"""Images on their way to latents: crop, codec, VAE. Both sides of a pair take the same way.

A codec's or a decoder's fingerprint that only one side carries would let the player win without learning anything about
content. So a real image is cropped to a size that the opponent draws, is stored in the very format in which the
opponent's images are, and on request (`vae_round_trip`) also passes the decoder that drew the opponent's.
"""

import io
import math

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.diffusion.buckets import Size
from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.store.pictures import open_picture

Pixels = Float[Tensor, "batch 3 height width"]
"""RGB in [-1, 1]."""
MAX_RESIZED = 4
"""An image is resized as a whole and then cropped, as SDXL was trained, up to so many times the target's pixels; of a
strip of 32 x 20000 px the whole would be gigabytes."""


def crop(image: Image.Image, target: Size, place: float, settings: ImageSettings) -> tuple[Image.Image, list[int]]:
    """The image, resized until it just covers the target and cropped to it; and its frame.

    Args:
        target: height and width, px.
        place: where along the side that is too long the crop lies, in [0, 1]; 0.5 is the middle.

    Returns:
        The crop, and [original height, original width, top, left, target height, target width] in px (SDXL's
        micro-conditioning; top and left are counted in the resized image, as SDXL was trained).
    """
    width, height = image.size
    covering = _covering(height, width, target)
    top, left = (round((side - wanted) * place) for side, wanted in zip(covering, target, strict=True))
    box = (left, top, left + target[1], top + target[0])
    how = Image.Resampling[settings.image_interpolation_mode.upper()]
    if math.prod(covering) > MAX_RESIZED * math.prod(target):
        # The part of a long strip that is cropped to, alone: its place in px of the source, not rounded
        x_scale, y_scale = width / covering[1], height / covering[0]
        part = (box[0] * x_scale, box[1] * y_scale, min(box[2] * x_scale, width), min(box[3] * y_scale, height))
        return image.resize((target[1], target[0]), how, part), [height, width, top, left, *target]
    if covering != (height, width):
        image = image.resize((covering[1], covering[0]), how)
    return image.crop(box), [height, width, top, left, *target]


def target_frame(size: Size) -> list[int]:
    """The frame of an image that was made in this size: what diffusers' pipelines tell of the one they draw."""
    return [*size, 0, 0, *size]


def _covering(height: int, width: int, target: Size) -> Size:
    """The smallest size of the same shape that covers the target."""
    scale = max(target[0] / height, target[1] / width)
    return max(target[0], round(height * scale)), max(target[1], round(width * scale))


def mirrored_frame(frame: list[int]) -> list[int]:
    """The frame of the mirror image of what `crop` returned: the crop's left is counted from the other side."""
    height, width, top, left, *target = frame
    _, resized = _covering(height, width, (target[0], target[1]))
    return [height, width, top, resized - target[1] - left, *target]


JPEG_QUALITY = 95
"""Without chroma subsampling."""


def to_bytes(image: Image.Image, settings: ImageSettings) -> bytes:
    """The image in the codec that both sides of a pair share."""
    buffer = io.BytesIO()
    if settings.image_format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def through_codec(images: list[Image.Image], settings: ImageSettings) -> list[Image.Image]:
    """The images as they come back when they are stored."""
    return [open_picture(to_bytes(image, settings)) for image in images]


def to_pixels(images: list[Image.Image]) -> Pixels:
    """RGB images of one size, in [-1, 1]."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0


def to_images(pixels: Pixels) -> list[Image.Image]:
    """A tensor in [-1, 1] as RGB images; values outside are clipped."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(values) for values in array]


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Pixels, names: list[str]) -> Float[Tensor, "batch channels h w"]:
    """Scaled latents, as the denoiser knows them: the mean of the VAE's posterior, fp32.

    The mean, not a sample: the posterior's spread is far below the noise of any timestep that is trained on, and a
    fixed value can be stored.

    Raises:
        FloatingPointError: a latent that is not finite (a half-precision VAE overflows, say), naming the images.
    """
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    mean, std = _statistics(vae)
    return _finite(((latents - mean) * vae.config.scaling_factor / std).contiguous(), names, "encoded")


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Float[Tensor, "batch channels h w"], names: list[str]) -> Pixels:
    """Scaled latents back to pixels in [-1, 1], fp32; in parts where the device's memory does not hold them at once.

    Raises:
        FloatingPointError: a pixel that is not finite, naming the images.
    """
    mean, std = _statistics(vae)
    unscaled = latents.to(vae.device, vae.dtype) * std / vae.config.scaling_factor + mean
    size = len(unscaled)
    while True:
        try:
            return _finite(
                torch.cat([vae.decode(part).sample.float() for part in unscaled.split(size)]), names, "decoded"
            )
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = math.ceil(size / 2)


def _statistics(vae: AutoencoderKL) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation of a VAE's latents by which it has them standardised, (1, channels, 1, 1) each; its
    one shift and 1 where it has none. Scaled latents are (z - mean) * scaling_factor / std."""
    if vae.config.latents_mean is None:
        return vae.config.shift_factor or 0.0, 1.0
    numbers = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device).to(vae.dtype)
    mean, std = numbers.view(2, 1, -1, 1, 1)
    return mean, std


def _finite(values: Tensor, names: list[str], what: str) -> Tensor:
    bad = [name for name, ok in zip(names, values.flatten(1).isfinite().all(dim=1).tolist(), strict=True) if not ok]
    if bad:
        raise FloatingPointError(
            f"the VAE {what} {', '.join(bad[:5])} to values that are not finite: use a VAE that is stable in this "
            "precision (--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix)"
        )
    return values
