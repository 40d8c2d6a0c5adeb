"""Families: how a prompt becomes the denoiser's inputs, and nothing else.

To add one, put a file here with

    PIPELINE                  the diffusers class whose name stands in the checkpoint's model_index.json
    FLAGS                     settings that model_index.json must say
    RESOLUTION                its usual image size, px
    ENCODERS                  its text encoders' classes by their names; "tokenizer" stands in the name of each one's
    ADDED_EMBEDDING           addition_embed_type of its UNet: what `condition` gives beside the tokens
    SCALING_FACTOR            of a VAE whose file does not say it; None = the file must
    STANDARDISED_LATENTS      whether the class applies a VAE's latents_mean and latents_std
    ORIGINAL_NAMES            whether sd-scripts calls its UNet's layers as the code that it was published with does
    architecture(config, prediction_type)  what Stability AI's ModelSpec and sd-scripts call it, by its UNet's config
    ENCODER_PREFIXES          how a single file's names of each text encoder's tensors begin, by its hidden_act
    CONFIGURED_AS             hub id of the configuration of single files, by such a beginning; none = there are several
    embed(pipeline, texts)    what its text encoders make of prompts, one row each: all that is kept of a prompt
    unconditional(pipeline)   the same of the sampler's unconditional half; training must drop captions to it
    condition(embedded, frames) -> Conditioning

`base.load_checkpoint` finds the file by the class name in model_index.json; a family is never guessed from a path.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from types import ModuleType

from jaxtyping import Float, Int
from torch import Tensor

Frames = Int[Tensor, "batch 6"]
"""Per image: original height and width, top and left of the crop, height and width of the target, px."""

Embedded = dict[str, Tensor]
"""By name, first axis = prompt; always with `tokens` (prompts, length, width)."""


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside x_t and t.

    Attributes:
        tokens: one vector per text token.
        added: SDXL's `text_embeds` (batch, width) and `time_ids` (batch, 6); empty for SD.
    """

    tokens: Float[Tensor, "batch length width"]
    added: dict[str, Tensor] = field(default_factory=dict)


def families() -> dict[str, ModuleType]:
    """The families by the name of their pipeline class."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.PIPELINE.__name__: module for module in modules}
