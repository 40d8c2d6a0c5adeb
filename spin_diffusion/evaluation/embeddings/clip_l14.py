"""Image embeddings of OpenAI's CLIP ViT-L/14: what a picture shows, in the words that people write under pictures.

`clip_l14=PATH` is as for the scorer of that name, with which it shares its backbone.
"""

import math
from collections.abc import Callable

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.embeddings import About
from spin_diffusion.evaluation.scorers.clip_l14 import ABOUT as SCORER
from spin_diffusion.evaluation.scorers.clip_l14 import BESIDE as BESIDE

ABOUT = About(
    title="CLIP ViT-L/14",
    scale="768 features, the projected embedding of length sqrt(768)",
    checkpoint=SCORER.checkpoint,
    preprocessing=SCORER.preprocessing,
    licence=SCORER.licence,
    citation="arXiv 2103.00020",
)


def load(device: str, path: str | None = None) -> Callable[[list[Image.Image]], Float[Tensor, "batch width"]]:
    """The embedding; `path` is a folder, a file of weights or a hub id, default ABOUT.checkpoint."""
    from spin_diffusion.evaluation.scorers._clip import L14, load_clip

    towers = load_clip(device, ABOUT.place(path), L14)

    def embed(images: list[Image.Image]) -> Float[Tensor, "batch width"]:
        features = towers.image_features(images)
        return features * math.sqrt(features.shape[1])

    embed.checkpoint = towers.checkpoint  # type: ignore[attr-defined]
    return embed
