"""How pictures are drawn: one record for the opponent's samples, evaluations and comparisons alike."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

OWN_SIZE = "the picture's own, not cropped"
"""What pipelines tell a model by themselves that is told an image's size."""
REAL_SIZE = "the real picture's, with its crop"


@dataclass(frozen=True)
class Sampling:
    """All that decides a picture beside the model, the prompt and the seed. Versions of libraries, devices and the
    number of pictures in a batch, which change the last bits, are not in it."""

    sampler: str
    """A name of `diffusion.sampling.SAMPLERS`, or "checkpoint"."""
    num_inference_steps: int
    guidance_scale: float
    """1 or less = without guidance."""
    resolution: int | None
    """Side in px; None = the family's. Of the opponent's samples, which have the size of the real ones, that of the
    largest square."""
    eta: float = 0.0
    """Noise that each step of DDIM adds, in [0, 1]."""
    precision: str = "fp32"
    """Of the denoiser, by `precision_of`."""
    size_condition: str = OWN_SIZE
    """What a model is told that asks for an image's size."""
    prediction_scale: float = 1.0
    """Factor of the predicted noise epsilon; above 1 the sampler is colder: it takes more noise away."""

    @classmethod
    def of_protocol(cls, protocol: Mapping[str, Any], guidance_scale: float) -> "Sampling":
        """How the pictures of a protocol are drawn at one of its guidance scales."""
        shared = {field.name: protocol[field.name] for field in fields(cls) if field.name != "guidance_scale"}
        return cls(guidance_scale=guidance_scale, **shared)

    def in_protocol(self) -> dict[str, Any]:
        """The part of a protocol that has this record at all of its guidance scales."""
        return {name: value for name, value in asdict(self).items() if name != "guidance_scale"}

    @property
    def passes(self) -> int:
        """Passes of the denoiser that a picture costs: guidance takes two a step."""
        return self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)


_TF32 = " with TF32"


def precision_of(mixed_precision: str, allow_tf32: bool = False) -> str:
    """The word for a precision: "fp32", "fp16" or "bf16", and whether products may be rounded to TF32."""
    return ("fp32" if mixed_precision == "no" else mixed_precision) + (_TF32 if allow_tf32 else "")
