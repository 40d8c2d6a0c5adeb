"""What can be set about images and the denoiser, by topic.

The libraries are not imported here: a look at `--help`, or a misspelt flag, should not wait for them.
"""

from dataclasses import dataclass
from typing import Literal

from spin_diffusion.samples.sampling import OWN_SIZE, Sampling
from spin_diffusion.selfplay.round_settings import RoundSettings
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
    random_flip: bool = False
    """Mirror both images of a pair at half of its visits; both orientations are encoded. Not where left and right
    matter, as in writing."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Codec of both sides of a pair. png is larger and leaves no trace."""
    vae_round_trip: bool = False
    """Pass the real images through the VAE's encoder and decoder once, as the opponent's images passed its decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_resolution(self.resolution)


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How the opponent draws."""

    num_inference_steps: int = setting(25, minimum=1)
    """Denoising steps per image; ddim needs about 50."""
    guidance_scale: float = setting(7.5, minimum=0)
    """Classifier-free guidance of the opponent; 1 = none, the distribution that the theory speaks of."""
    sampler: Literal["checkpoint", "ddim", "dpmpp"] = "dpmpp"
    """dpmpp = DPM-Solver++ of second order; checkpoint = the scheduler that the base checkpoint names."""
    prediction_scale: float = setting(1.0, above=0)
    """Factor of the noise that the denoiser predicts, for the opponent and for the evaluations; above 1 the sampler is
    colder: 1.04 often raises scores without any training, at some cost in diversity."""
    generation_batch_size: int = setting(8, minimum=1)
    """Images drawn at a time; guidance doubles the UNet's batch. Images are encoded as many at a time, at most 8."""

    def record(self, resolution: int | None, precision: str, size_condition: str = OWN_SIZE) -> Sampling:
        """The record of what is drawn with these settings; resolution in px, precision by `precision_of`."""
        return Sampling(
            sampler=self.sampler,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            resolution=resolution,
            precision=precision,
            size_condition=size_condition,
            prediction_scale=self.prediction_scale,
        )


@dataclass(frozen=True)
class DenoiserSettings(Settings):
    """How the denoiser is scored and run."""

    proportion_empty_prompts: float = setting(0.0, minimum=0, maximum=1)
    """Share of pairs, in [0, 1], whose caption is dropped, for both sides alike."""
    dropped_captions: Literal["both", "real"] = "both"
    """Which sides of these pairs count. real = the generated one is left out, so that the model without a prompt, which
    guidance needs, learns from real images alone."""
    winner_preserving_mu: float | None = setting(None, minimum=0, below=1)
    """Rescale the generated side's gradient so that the real side keeps this share of its descent (Diffusion-SDPO)."""
    score_weighting: Literal["epsilon", "v", "x0", "min_snr"] | None = None
    """In which space the squared errors of a score count, whatever the model predicts; beta is in its unit. Default: in
    that of the model's prediction. min_snr = x0 times min(SNR, 5)."""
    timestep_sampling: Literal["uniform", "logit_normal", "sections"] = "uniform"
    """How often each noise level is asked: all alike; the middle ones more, by SD3's density; or all alike, where each
    pair of an optimizer step has an equal section of the levels."""
    fixed_draws: int | Literal["auto"] = setting(0, minimum=0)
    """Noise each pair at this many fixed draws of (timestep, noise) alone. The opponent's errors at them are computed
    once, and it is not in memory while the player is trained. 0 = a fresh draw at every visit; auto = as many as are
    visited twice at least in every round."""
    compile: Literal["no", "blocks", "whole"] = "no"
    """torch.compile for the UNet: its transformer blocks (seconds to compile), or all of it (minutes). It pays where
    rounds are long; needs a C++ compiler on a CPU."""


@dataclass(frozen=True)
class CandidateSettings:
    """Pairs that the opponent makes by itself, from the best and the worst of several images by a scorer."""

    number: int = 0
    """Images that the opponent draws for a prompt, of which the best by the scorer plays the real side and the worst
    the generated one; the real image takes no part. 0 = off, otherwise at least 2."""
    scorer: str | None = None
    """NAME[=PATH] of a scorer (pickscore, hps_v2_1, ...), or the path of a .py file; higher must be better."""
    share: float = setting(1.0, above=0, maximum=1)
    """Share of the prompts, in (0, 1], whose pair is made so, chosen anew in each round; the others keep their real
    image against one by the opponent. SAIL (arXiv 2602.05380) mixes a quarter into its seed data, against collapse."""

    def __post_init__(self) -> None:
        if self.number == 0:
            given = f"scorer {self.scorer}" if self.scorer is not None else f"share {self.share}"
            if self.scorer is not None or self.share != 1.0:
                raise InputError(f"--candidates {given} needs a number of 2 or more")
            return
        if self.number < 2:
            raise InputError(f"--candidates number {self.number} must be at least 2, a best and a worst, or 0 for none")
        if self.scorer is None:
            raise InputError(
                f"--candidates number {self.number} needs a scorer, which tells the best from the worst: NAME[=PATH], "
                "such as pickscore, or the path of a .py file"
            )


@dataclass(frozen=True)
class ProbeSettings:
    """What is looked for in a round's images before its player is trained."""

    samples: int = 256
    """Pairs with which a linear probe asks whether traces of codec or decoder tell real from generated images; 0 = not
    asked. It costs at most four passes of the VAE for each."""
    action: Literal["warn", "stop"] = "warn"
    """When they do: warn, or stop before training."""

    def __post_init__(self) -> None:
        if self.samples != 0 and self.samples < MIN_PAIRS:
            raise InputError(f"--probe samples {self.samples} must be 0 (off) or at least {MIN_PAIRS}")


@dataclass(frozen=True)
class ImageRoundSettings(RoundSettings):
    """The game that is played. A list holds one value per round; when it is shorter, its last value repeats."""

    candidates: CandidateSettings = CandidateSettings()
    """Pairs that the opponent makes by itself, the best against the worst of several images by a scorer, and for which
    share of the prompts: "{number: 8, scorer: pickscore, share: 0.25}"."""
    probe: ProbeSettings = setting(ProbeSettings(), harmless=True)
    """Before each round is trained, a linear probe asks with so many pairs whether traces of codec or decoder tell real
    from generated images, and warns or stops: "{samples: 256, action: warn}"; 0 samples = not asked."""
