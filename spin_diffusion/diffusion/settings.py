"""What can be set about images and the denoiser, by topic.

The libraries are not imported here: a look at `--help`, or a misspelt flag, should not wait for them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from spin_diffusion.store.input_error import InputError

MIN_PAIRS = 32
"""Of the probe."""
MAX_RESOLUTION = 10_000
"""Pixels; larger pictures are not read either (`store.pictures`)."""


def check_resolution(resolution: int | None) -> None:
    """InputError for a resolution that no checkpoint draws in; None = its own."""
    if resolution is not None and (not 8 <= resolution <= MAX_RESOLUTION or resolution % 8):
        raise InputError(f"--resolution {resolution} must be a multiple of 8, and at most {MAX_RESOLUTION:,}")


@dataclass(frozen=True)
class ImageSettings:
    """How images are cropped and stored before they are encoded."""

    resolution: int | None = None
    """Training size in px, both sides; default: the family's (512 for SD, 1024 for SDXL)."""
    max_aspect_ratio: float = 1.0
    """1 = every image is cropped to a square. Above: to the nearest in shape of some sizes with about as many pixels,
    whose long side is up to so many times the short one; the opponent draws each of its images in the size of the real
    one. SDXL was trained up to 4."""
    size_conditioning: Literal["real", "target"] = "real"
    """What SDXL is told of size and crop, for both images of a pair and while the opponent draws: real = those of the
    real image; target = those that pipelines tell by default, the size that is drawn and no crop."""
    center_crop: bool = True
    """Crop the middle; otherwise a place that is drawn from the image's hash."""
    random_flip: bool = False
    """Mirror both images of a pair at half of its visits; both orientations are encoded. Not where left and right
    matter, as in writing."""
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear"] = "lanczos"
    """How images are resized."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Codec of both sides of a pair. png is larger and leaves no trace."""
    jpeg_quality: int = 95
    """Quality of the jpeg codec, 1 to 100 (4:4:4, no chroma subsampling)."""
    vae_round_trip: bool = False
    """Pass the real images through the VAE's encoder and decoder once, as the opponent's images passed its decoder."""
    vae_encode_batch_size: int = 8
    """Images encoded at a time."""

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        if not self.max_aspect_ratio >= 1:
            raise InputError(f"--max_aspect_ratio {self.max_aspect_ratio} must be at least 1, which means squares")
        if not 1 <= self.jpeg_quality <= 100:
            raise InputError(f"--jpeg_quality {self.jpeg_quality} must be between 1 and 100")


@dataclass(frozen=True)
class CurationSettings:
    """Which real images are played with, by a scorer. The rules combine: one per prompt, then threshold, then top."""

    curation_scorer: str | None = None
    """NAME[=PATH] of the scorer that chooses, or a .py file with a `load(device)`. It is in-domain for the evaluation
    afterwards."""
    curation_top: int | None = None
    """Keep this many images, those with the highest scores."""
    curation_threshold: float | None = None
    """Keep the images with at least this score, on the scorer's own scale."""
    one_per_prompt: bool = False
    """Keep the image with the highest score of each prompt."""

    def __post_init__(self) -> None:
        rules = {
            "--curation_top": self.curation_top is not None,
            "--curation_threshold": self.curation_threshold is not None,
            "--one_per_prompt": self.one_per_prompt,
        }
        given = [flag for flag, is_given in rules.items() if is_given]
        if self.curation_scorer is None and given:
            hint = " (--one_image_per_prompt keeps the first without one)" if given == ["--one_per_prompt"] else ""
            raise InputError(
                f"{' and '.join(given)} need{'s' if len(given) == 1 else ''} --curation_scorer, NAME[=PATH] such as "
                f"pickscore, or a .py file{hint}"
            )
        if self.curation_scorer is not None and not given:
            raise InputError(
                f"--curation_scorer {self.curation_scorer} has no rule to choose by: give --curation_top, "
                "--curation_threshold or --one_per_prompt"
            )
        if self.curation_top is not None and self.curation_top < 1:
            raise InputError(f"--curation_top {self.curation_top} must be at least 1")
        if self.curation_threshold is not None and not math.isfinite(self.curation_threshold):
            raise InputError(f"--curation_threshold {self.curation_threshold} must be a finite number")


@dataclass(frozen=True)
class CacheSettings:
    """What is computed once and kept."""

    cache_text_embeddings: bool = True
    """Encode each distinct prompt once and take the text encoders off the device while a player is trained."""
    encodings_dir: str | None = None
    """A folder where runs share latents and text embeddings, each found by its content, VAE and text encoders.
    Default: each run has its own."""


@dataclass(frozen=True)
class SamplingSettings:
    """How the opponent draws."""

    num_inference_steps: int = 25
    """Denoising steps per image; ddim needs about 50."""
    guidance_scale: float = 7.5
    """Classifier-free guidance of the opponent; 1 = none, the distribution that the theory speaks of."""
    sampler: Literal["checkpoint", "ddim", "dpmpp"] = "dpmpp"
    """dpmpp = DPM-Solver++ of second order; checkpoint = the scheduler that the base checkpoint names."""
    eta: float = 0.0
    """Noise that each step of ddim adds, in [0, 1]: 0 = none, 1 = as much as DDPM."""
    generation_batch_size: int = 8
    """Images drawn at a time; guidance doubles the UNet's batch."""

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise InputError(f"--num_inference_steps {self.num_inference_steps} must be at least 1")
        if self.generation_batch_size < 1:
            raise InputError(f"--generation_batch_size {self.generation_batch_size} must be at least 1")
        if not 0 <= self.eta <= 1:
            raise InputError(f"--eta {self.eta} must be between 0 and 1")
        if self.eta > 0 and self.sampler != "ddim":
            raise InputError(
                f"--eta {self.eta} is a setting of --sampler ddim, not of {self.sampler}: give --sampler ddim"
            )
        if self.guidance_scale < 0:
            raise InputError(f"--guidance_scale {self.guidance_scale} must not be negative")


@dataclass(frozen=True)
class TrajectorySettings:
    """What a score is taken on."""

    trajectory: Literal["forward", "steps", "exact"] = "forward"
    """forward = both images noised by the forward process. steps = the opponent's own denoising steps, one at random
    for each pair. exact = all steps of a pair in one logit, at the cost of as many passes."""


@dataclass(frozen=True)
class DenoiserSettings:
    """How the denoiser is scored and run."""

    proportion_empty_prompts: float = 0.0
    """Share of pairs, in [0, 1], whose caption is dropped, for both sides alike."""
    winner_preserving_mu: float | None = None
    """Rescale the generated side's gradient so that the real side keeps this share of its descent (Diffusion-SDPO)."""
    snr_gamma: float | None = None
    """Weigh scores by min-SNR with this gamma; 5 is its paper's."""
    timestep_weights: list[float] | None = None
    """Weigh scores by these, one for each of equal sections of the noise schedule, the cleanest first."""
    fixed_draws: int | Literal["auto"] = 0
    """Noise each pair at this many fixed draws of (timestep, noise) alone. The opponent's errors at them are computed
    once, and it is not in memory while the player is trained. 0 = a fresh draw at every visit; auto = as many as are
    visited twice at least in every round."""
    channels_last: bool = True
    """Memory layout of the UNet; faster convolutions on most hardware."""
    compile: Literal["no", "blocks", "whole"] = "no"
    """torch.compile for the UNet: its transformer blocks (seconds to compile), or all of it (minutes). It pays where
    rounds are long; needs a C++ compiler on a CPU."""
    enable_xformers_memory_efficient_attention: bool = False
    """xformers' attention instead of torch's; needs the extra `xformers` and a CUDA device."""

    def __post_init__(self) -> None:
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise InputError(f"--proportion_empty_prompts {self.proportion_empty_prompts} must be between 0 and 1")
        if self.fixed_draws != "auto" and self.fixed_draws < 0:
            raise InputError(f"--fixed_draws {self.fixed_draws} must be at least 0")
        if self.winner_preserving_mu is not None and not 0 <= self.winner_preserving_mu < 1:
            raise InputError(f"--winner_preserving_mu {self.winner_preserving_mu} must be at least 0 and below 1")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise InputError(f"--snr_gamma {self.snr_gamma} must be above 0")
        if self.timestep_weights is not None and not (
            self.timestep_weights and min(self.timestep_weights) >= 0 and max(self.timestep_weights) > 0
        ):
            raise InputError(f"--timestep_weights {self.timestep_weights} must be numbers of at least 0, not all 0")


@dataclass(frozen=True)
class LoraSettings:
    """Train a low-rank adapter in place of all weights."""

    use_lora: bool = False
    """Train an adapter; the base's weights stay as they are, in the dtype of --mixed_precision."""
    rank: int = 16
    """Of the adapter's matrices."""
    lora_alpha: float | None = None
    """The adapter's change is scaled by this over the rank; default: the rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapter's matrices, in [0, 1), while training; player and opponent drop the same."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get an adapter; default: all attentions' projections, to_k, to_q, to_v, to_out.0."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"--rank {self.rank} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout {self.lora_dropout} must be at least 0 and below 1")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise InputError(f"--lora_alpha {self.lora_alpha} must be above 0")

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True)
class ProbeSettings:
    """What is looked for in a round's images before its player is trained."""

    probe_samples: int = 256
    """Pairs with which a linear probe asks, before each round is trained, whether traces of codec or decoder tell real
    from generated images; 0 = not asked. It costs at most four passes of the VAE for each."""
    on_shortcut: Literal["warn", "stop"] = "warn"
    """When they do: warn, or stop before training."""

    def __post_init__(self) -> None:
        if self.probe_samples != 0 and self.probe_samples < MIN_PAIRS:
            raise InputError(f"--probe_samples {self.probe_samples} must be 0 (off) or at least {MIN_PAIRS}")
