"""LAION's aesthetic predictor v2: how beautiful people would call an image, whatever the prompt.

A linear head on the embedding of OpenAI's ViT-L/14, of length 1: features of another length would give scores beyond
20, so they are normalised here. It rises with saturation and detail; a round that only raises it has learned a style.

`aesthetics=PATH`: the head's file (.pth or .safetensors), a folder that holds it, or a hub id. The backbone is the one
that lies beside the head in transformers' layout (model.safetensors, config.json), else OpenAI's from the hub; the
scorer clip_l14 shares it if it names the same place. The published head is sac+logos+ava1-l14-linearMSE.pth.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.scorers import About, Scorer
from spin_diffusion.store.input_error import InputError

if TYPE_CHECKING:
    from spin_diffusion.evaluation.scorers._clip import ClipTowers
    from spin_diffusion.evaluation.scorers._linear_head import LinearHead

ABOUT = About(
    title="LAION aesthetics v2",
    scale="rating from about 1 to 10; usually 5 to 6.5",
    role="aesthetics",
    checkpoint="trl-lib/ddpo-aesthetic-predictor",
    preprocessing="RGB, short side to 224 px (Pillow bicubic), middle square (offset floored as in transformers; "
    "LAION's own script rounds it and computes features in half precision on a GPU), CLIP's mean and std",
    text="prompts are not read",
    licence="Apache-2.0 (head), MIT (backbone)",
    citation="https://github.com/christophschuhmann/improved-aesthetic-predictor",
)
HEAD_FILES = (
    "sac+logos+ava1-l14-linearMSE.pth",
    "sac+logos+ava1-l14-linearMSE.safetensors",
    "aesthetic-model.pth",
)
BESIDE = ("openai/clip-vit-large-patch14",)
SCORE_OF_ZERO = 5.236645845
"""What the published head says of no feature at all. Its siblings have the same shapes and say something else."""


def load(device: str, path: str | None = None) -> Scorer:
    """The scorer; `path` is the head's file, its folder or a hub id, default ABOUT.checkpoint.

    Raises:
        InputError: head or backbone cannot be had, or are another model's.
    """
    from spin_diffusion.evaluation.scorers._checkpoints import open_place
    from spin_diffusion.evaluation.scorers._clip import L14, load_clip
    from spin_diffusion.evaluation.scorers._linear_head import WIDTH, build_head

    files = open_place(ABOUT.place(path))
    where, tensors = files.weights(*HEAD_FILES)
    head = build_head(tensors, where)
    of_zero = head(torch.zeros(1, WIDTH)).item()
    if abs(of_zero - SCORE_OF_ZERO) > 1e-3:
        raise InputError(
            f"{where} is not LAION's head v2 (linearMSE): it scores a feature of zeros {of_zero:.4f}, "
            f"the published one {SCORE_OF_ZERO:.4f}"
        )
    has_backbone = Path(files.place).is_dir() and files.find("config.json") is not None
    towers = load_clip(device, files.place if has_backbone else L14.tokenizer, L14)
    if towers.model.config.projection_dim != WIDTH:
        raise InputError(
            f"{files.place}: the backbone's features have {towers.model.config.projection_dim} numbers, "
            f"the head reads the {WIDTH} of OpenAI's ViT-L/14"
        )
    return Aesthetics(head, towers, files.read | towers.checkpoint)


@dataclass(frozen=True, eq=False)
class Aesthetics:
    """The head's rating of an image's embedding."""

    head: "LinearHead"
    towers: "ClipTowers"
    checkpoint: dict[str, str]

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " batch"]:
        """One rating per image; the prompts are not read."""
        return self.rate(self.towers.image_features(images))

    def rate(self, features: Float[Tensor, "batch 768"]) -> Float[Tensor, " batch"]:
        """Ratings of embeddings of any length: only their direction counts."""
        return self.head(torch.nn.functional.normalize(features.float(), dim=1))
