"""What can be set about images and the denoiser, by topic.

The libraries are not imported here: a look at `--help`, or a misspelt flag, should not wait for them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.settings import Settings, setting

MIN_PAIRS = 32
"""Fewest pairs that the probe looks at: with fewer, chance alone reaches an AUC of 0.6."""
MAX_RESOLUTION = 10_000
"""Pixels; larger pictures are not read either (`store.pictures`)."""


def check_resolution(resolution: int | None) -> None:
    """InputError for a resolution that no checkpoint draws in; None = its own."""
    if resolution is not None and (not 8 <= resolution <= MAX_RESOLUTION or resolution % 8):
        raise InputError(f"--resolution {resolution} must be a multiple of 8, and at most {MAX_RESOLUTION:,}")


@dataclass(frozen=True)
class ImageSettings(Settings):
    """How images are cropped and stored before they are encoded."""

    resolution: int | None = None
    """Training size in px, both sides; default: the family's (512 for SD, 1024 for SDXL)."""
    max_aspect_ratio: float = setting(1.0, minimum=1)
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
    vae_round_trip: bool = False
    """Pass the real images through the VAE's encoder and decoder once, as the opponent's images passed its decoder."""
    vae_encode_batch_size: int = setting(8, minimum=1, harmless=True)
    """Images encoded at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_resolution(self.resolution)


@dataclass(frozen=True)
class CurationSettings(Settings):
    """Which real images are played with, by a scorer. The rules combine: one per prompt, then threshold, then top."""

    curation_scorer: str | None = None
    """NAME[=PATH] of the scorer that chooses, or a .py file with a `load(device)`. It is in-domain for the evaluation
    afterwards."""
    curation_top: int | None = setting(None, minimum=1)
    """Keep this many images, those with the highest scores."""
    curation_threshold: float | None = None
    """Keep the images with at least this score, on the scorer's own scale."""
    one_per_prompt: bool = False
    """Keep the image with the highest score of each prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.curation_threshold is not None and not math.isfinite(self.curation_threshold):
            raise InputError(f"--curation_threshold {self.curation_threshold} must be a finite number")


@dataclass(frozen=True)
class CacheSettings(Settings):
    """What is computed once and kept."""

    cache_text_embeddings: bool = True
    """Encode each distinct prompt once and take the text encoders off the device while a player is trained."""
    encodings_dir: str | None = setting(None, harmless=True)
    """A folder where runs share latents and text embeddings, each found by its content, VAE and text encoders.
    Default: each run has its own."""


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How the opponent draws."""

    num_inference_steps: int = setting(25, minimum=1)
    """Denoising steps per image; ddim needs about 50."""
    guidance_scale: float = setting(7.5, minimum=0)
    """Classifier-free guidance of the opponent; 1 = none, the distribution that the theory speaks of."""
    sampler: Literal["checkpoint", "ddim", "dpmpp"] = "dpmpp"
    """dpmpp = DPM-Solver++ of second order; checkpoint = the scheduler that the base checkpoint names."""
    eta: float = setting(0.0, minimum=0, maximum=1)
    """Noise that each step of ddim adds, in [0, 1]: 0 = none, 1 = as much as DDPM."""
    generation_batch_size: int = setting(8, minimum=1)
    """Images drawn at a time; guidance doubles the UNet's batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta > 0 and self.sampler != "ddim":
            raise InputError(
                f"--eta {self.eta} is a setting of --sampler ddim, not of {self.sampler}: give --sampler ddim"
            )


@dataclass(frozen=True)
class TrajectorySettings(Settings):
    """What a score is taken on."""

    trajectory: Literal["forward", "steps", "exact"] = "forward"
    """forward = both images noised by the forward process. steps = the opponent's own denoising steps, one at random
    for each pair. exact = all steps of a pair in one logit, at the cost of as many passes."""


@dataclass(frozen=True)
class DenoiserSettings(Settings):
    """How the denoiser is scored and run."""

    proportion_empty_prompts: float = setting(0.0, minimum=0, maximum=1)
    """Share of pairs, in [0, 1], whose caption is dropped, for both sides alike."""
    winner_preserving_mu: float | None = setting(None, minimum=0, below=1)
    """Rescale the generated side's gradient so that the real side keeps this share of its descent (Diffusion-SDPO)."""
    snr_gamma: float | None = setting(None, above=0)
    """Weigh scores by min-SNR with this gamma; 5 is its paper's."""
    timestep_weights: list[float] | None = None
    """Weigh scores by these, one for each of equal sections of the noise schedule, the cleanest first."""
    fixed_draws: int | Literal["auto"] = setting(0, minimum=0)
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
        super().__post_init__()
        if self.timestep_weights is not None and not (
            self.timestep_weights and min(self.timestep_weights) >= 0 and max(self.timestep_weights) > 0
        ):
            raise InputError(f"--timestep_weights {self.timestep_weights} must be numbers of at least 0, not all 0")


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Train a low-rank adapter in place of all weights."""

    use_lora: bool = setting(False, first=True)
    """Train an adapter; the base's weights stay as they are, in the dtype of --mixed_precision."""
    rank: int = setting(16, minimum=1)
    """Of the adapter's matrices."""
    lora_alpha: float | None = setting(None, above=0)
    """The adapter's change is scaled by this over the rank; default: the rank."""
    lora_dropout: float = setting(0.0, minimum=0, below=1)
    """Dropout before the adapter's matrices, in [0, 1), while training; player and opponent drop the same."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get an adapter; default: all attentions' projections, to_k, to_q, to_v, to_out.0."""

    def __post_init__(self) -> None:
        super().__post_init__()

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """What is looked for in a round's images before its player is trained."""

    probe_samples: int = setting(256, harmless=True)
    """Pairs with which a linear probe asks, before each round is trained, whether traces of codec or decoder tell real
    from generated images; 0 = not asked. It costs at most four passes of the VAE for each."""
    on_shortcut: Literal["warn", "stop"] = setting("warn", harmless=True)
    """When they do: warn, or stop before training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe_samples != 0 and self.probe_samples < MIN_PAIRS:
            raise InputError(f"--probe_samples {self.probe_samples} must be 0 (off) or at least {MIN_PAIRS}")
