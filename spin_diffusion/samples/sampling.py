"""How pictures are drawn: one record for the opponent's samples, evaluations and comparisons alike, and what of it is
free to choose without any training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any, Literal

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.settings import setting

OWN_SIZE = "the picture's own, not cropped"
"""What pipelines tell a model by themselves that is told an image's size."""
REAL_SIZE = "the real picture's, with its crop"


@dataclass(frozen=True, order=True)
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
    precision: str = "fp32"
    """The precision of the denoiser, by `precision_of`."""
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
    def in_words(self) -> str:
        """The settings that are free to choose, for tables and sentences."""
        return free_in_words(self.guidance_scale, self.num_inference_steps, self.prediction_scale)

    @property
    def passes(self) -> int:
        """Passes of the denoiser that a picture costs: guidance takes two a step."""
        return self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)


def free_in_words(guidance_scale: float, num_inference_steps: int, prediction_scale: float) -> str:
    """Settings that are free to choose, for tables and sentences."""
    scaled = "" if prediction_scale == 1 else f", prediction x {prediction_scale:g}"
    return f"guidance {guidance_scale:g}, {num_inference_steps} steps{scaled}"


_TF32 = " with TF32"


def precision_of(mixed_precision: str, allow_tf32: bool = False) -> str:
    """The word for a precision: "fp32", "fp16" or "bf16", and whether products may be rounded to TF32."""
    return ("fp32" if mixed_precision == "no" else mixed_precision) + (_TF32 if allow_tf32 else "")


@dataclass(frozen=True)
class Sweep:
    """Settings of a sampler that cost no training; each list is crossed with the others, what is not given stays."""

    guidance_scale: list[float] | None = setting(None, minimum=0)
    """Guidance scales; those above 1 cost two passes a step."""
    num_inference_steps: list[int] | None = setting(None, minimum=1)
    """Denoising steps per image."""
    prediction_scale: list[float] | None = setting(None, above=0)
    """Factors of the predicted noise, such as 1 and 1.04."""
    by: Literal["scorer", "fd"] = "scorer"
    """What chooses: the first scorer, or the Frechet distance to real pictures in --distribution_features."""

    def __post_init__(self) -> None:
        for name, values in self.given().items():
            if not values or len(set(values)) < len(values):
                raise InputError(f"--sweep {name} {values} must have at least one value, and none twice")

    def given(self) -> dict[str, list[Any]]:
        """The settings that are swept, with their values."""
        return {name: values for name, values in asdict(self).items() if isinstance(values, list)}

    def around(self, default: Sampling) -> list[Sampling]:
        """All combinations, the cheapest first; before them the default, whether it is one of them or not."""
        given = self.given()
        combined = [replace(default, **dict(zip(given, values, strict=True))) for values in product(*given.values())]
        combined.sort(key=lambda sampling: (sampling.passes, sampling.guidance_scale, sampling.prediction_scale))
        return list(dict.fromkeys([default, *combined]))
