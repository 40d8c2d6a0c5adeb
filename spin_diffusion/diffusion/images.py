"""Images on their way to latents: sizes of buckets, crop, codec, VAE. Both sides of a pair take the same way.

A codec's or a decoder's fingerprint that only one side carries would let the player win without learning anything about
content. So a real image is cropped to a size that the opponent draws, is stored in the very format in which the
opponent's images are, and on request (`vae_round_trip`) also passes the decoder that drew the opponent's.
"""

import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.samples.sample import Row
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.pictures import open_picture

Size = tuple[int, int]
"""Height and width, px."""
Pixels = Float[Tensor, "batch 3 height width"]
"""RGB in [-1, 1]."""
MAX_RESIZED = 4
"""An image is resized as a whole and then cropped, as SDXL was trained, up to so many times the target's pixels; of a
strip of 32 x 20000 px the whole would be gigabytes."""
JPEG_QUALITY = 95
"""Without chroma subsampling."""


# Aspect-ratio buckets: images keep about their own shape, cropped to one of a few sizes of about the same area.
# SDXL was trained so (arXiv 2307.01952, section 2.3), with sizes of up to 4 : 1 that are multiples of 64 px.


def bucket_sizes(resolution: int, multiple: int, max_aspect_ratio: float) -> list[Size]:
    """The square first, then the wide sizes and the tall ones, none with more pixels than the square.

    For every long side, in steps of about a sixteenth of the square's, the longest short side that fits.

    Args:
        resolution: sides of the square, px; a multiple of `multiple`.
        multiple: of the sides that the networks take, px.
        max_aspect_ratio: of the long side to the short one; 1 = the square alone.
    """
    step = multiple * math.ceil(resolution / 16 / multiple)
    if resolution % step:
        step = multiple
    wide = []
    for long in itertools.count(resolution + step, step):
        short = resolution**2 // long // step * step
        if short < step or long / short > max_aspect_ratio:
            break
        wide.append((short, long))
    return [(resolution, resolution), *wide, *((long, short) for short, long in wide)]


def nearest(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The size whose aspect ratio is the nearest; of equally near ones the first."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def places_by_size(sizes: Iterable[Size]) -> dict[Size, list[int]]:
    """Where each size occurs, in order."""
    places: dict[Size, list[int]] = {}
    for place, size in enumerate(sizes):
        places.setdefault(size, []).append(place)
    return places


def packed(rows: list[Tensor], cells: int) -> Tensor:
    """Rows of (channels, height, width) that differ in size as one (rows, channels, cells), filled up with 0."""
    together = rows[0].new_zeros(len(rows), len(rows[0]), cells)
    for row, values in zip(together, rows, strict=True):
        row[:, : values[0].numel()] = values.flatten(1)
    return together


def unpacked(rows: Tensor, height: int, width: int) -> Tensor:
    """Rows of one size out of `packed`: (rows, channels, height, width)."""
    return rows[:, :, : height * width].unflatten(2, (height, width))


def area_share(sizes: Sequence[Size], which: Tensor) -> float:
    """Mean area of the images of these sizes, given by their places in `sizes`, in parts of the square's."""
    areas = torch.tensor(sizes, dtype=torch.float64).prod(dim=1)
    return float(areas[which.long()].mean() / areas[0])


def sizes_in_words(sizes: Sequence[Size], which: Tensor) -> str:
    """How many images have which size, for people: the four most frequent ones by name."""
    counts = Counter(which.tolist()).most_common()
    named = ", ".join(f"{sizes[place][1]} x {sizes[place][0]} ({count:,})" for place, count in counts[:4])
    rest = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
    return f"{named}{rest}, width x height in px"


def fitting_lines(frames: np.ndarray) -> list[str]:
    """How many images were cropped or enlarged to their sizes, and how much, for people; no line where none was.

    Args:
        frames: (images, 6), what `crop` returned. Less than a hundredth is not counted.
    """
    height, width, _, _, *target = frames.astype(np.float64).T
    scale = np.maximum(target[0] / height, target[1] / width)
    lost = 1 - target[0] * target[1] / (height * width * scale**2)
    lines = []
    if len(cropped := lost[lost > 0.01]):
        lines.append(
            f"Cropped    {len(cropped):,} of {len(frames):,} images, by {np.median(cropped):.0%} of their area in the "
            f"median and {cropped.max():.0%} at most (--max_aspect_ratio)"
        )
    if len(enlarged := scale[scale > 1.01]):
        lines.append(
            f"Enlarged   {len(enlarged):,} of {len(frames):,} images, {np.median(enlarged):.2g} times in the median "
            f"and {enlarged.max():.2g} at most, so that they look soft (--resolution)"
        )
    return lines


# From an image to its stored bytes and pixels


def crop(image: Image.Image, target: Size) -> tuple[Image.Image, list[int]]:
    """The image, resized until it just covers the target and cropped to its middle; and its frame.

    Args:
        target: height and width, px.

    Returns:
        The crop, and [original height, original width, top, left, target height, target width] in px (SDXL's
        micro-conditioning; top and left are counted in the resized image, as SDXL was trained).
    """
    width, height = image.size
    covering = _covering(height, width, target)
    top, left = (round((side - wanted) / 2) for side, wanted in zip(covering, target, strict=True))
    box = (left, top, left + target[1], top + target[0])
    if math.prod(covering) > MAX_RESIZED * math.prod(target):
        # The part of a long strip that is cropped to, alone: its place in px of the source, not rounded
        x_scale, y_scale = width / covering[1], height / covering[0]
        part = (box[0] * x_scale, box[1] * y_scale, min(box[2] * x_scale, width), min(box[3] * y_scale, height))
        return image.resize((target[1], target[0]), Image.Resampling.LANCZOS, part), [height, width, top, left, *target]
    if covering != (height, width):
        image = image.resize((covering[1], covering[0]), Image.Resampling.LANCZOS)
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


def to_bytes(image: Image.Image, settings: ImageSettings) -> bytes:
    """The image in the codec that both sides of a pair share."""
    buffer = io.BytesIO()
    options = {"quality": JPEG_QUALITY, "subsampling": 0} if settings.image_format == "jpeg" else {}
    image.save(buffer, settings.image_format, **options)
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


# Latents


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
    Raises FloatingPointError: a pixel that is not finite, naming the images."""
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


def size_of(row: Row) -> Size:
    """Height and width of a stored image, px, from its frame."""
    height, width = row["frame"][4:]
    return height, width


MOST_ENCODED = 8
"""Images that pass the encoder at a time; with more it gets no faster."""


def latents_of(
    vae: AutoencoderKL,
    rows: list[Row],
    settings: ImageSettings,
    batch_size: int = MOST_ENCODED,
    *,
    prefix: str = "",
    round_trip: bool = False,
    mirrored: bool = False,
    codec: bool = False,
) -> list[Tensor]:
    """The latents of each row's image, (channels, height, width) fp16 on the CPU; those of one size in batches.

    Args:
        batch_size: images that are drawn at a time; as many are encoded, at most MOST_ENCODED.
        prefix: of the rows' image.
        round_trip: pass the VAE and the codec once before.
        mirrored: of the mirror images.
        codec: pass the codec once more before anything else.
    """
    most = min(batch_size, MOST_ENCODED)
    encoded: dict[int, Tensor] = {}
    by_size = places_by_size(map(size_of, rows)).values()
    for places in (all_[start : start + most] for all_ in by_size for start in range(0, len(all_), most)):
        names = [rows[place]["id"] for place in places]
        opened = [open_picture(rows[place][f"{prefix}image"]) for place in places]
        pixels = to_pixels(through_codec(opened, settings) if codec else opened)
        if round_trip:
            drawn = to_images(decode_latents(vae, encode_pixels(vae, pixels, names), names))
            pixels = to_pixels(through_codec(drawn, settings))
        latents = encode_pixels(vae, pixels.flip(-1) if mirrored else pixels, names)
        encoded |= zip(places, latents.cpu().half(), strict=True)
    return [encoded[place] for place in range(len(rows))]


def vae_hash(vae: AutoencoderKL) -> str:
    """The hash of all that decides latents: a VAE's weights and its configuration, with scale and statistics."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return key_of(weights=weights_hash(vae), config=config)
