"""In which features the distribution of pictures is measured: put one file here with `ABOUT` and `load`; its name is
the embedding's name.

    ABOUT: About                                          what a reader of the distances must know
    load(device: str, path: str | None) -> Embedding      path: local file or folder, or hub id; None = ABOUT.checkpoint

An embedding takes `images: list[PIL.Image.Image]` and returns `Float[Tensor, "batch width"]`, one row per image, of the
same width for all. Distances weigh all features alike and know no unit: their squares should be about 1 on average.
`checkpoint`, `BESIDE`, `places`, `PACKAGES` and files outside of this folder are as in `scorers`, and features are kept
for as long as a scorer's scores.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from spin_diffusion.evaluation.scorers import PicturePart, load_picture_part
from spin_diffusion.evaluation.specs import About, guarded
from spin_diffusion.store.input_error import InputError

__all__ = ["About", "LoadedEmbedding", "load_embedding"]


@dataclass(eq=False)
class LoadedEmbedding(PicturePart):
    """An embedding that checks what it returns and runs without gradients."""

    kind = "embedding"

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Float[np.ndarray, "batch width"]:
        """One row of fp32 features per image.

        Raises:
            InputError: it failed, gave anything but finite rows of one width, or no memory holds a single image.
        """
        return guarded(self.who, self._in_batches, self._checked, images).numpy()

    def _checked(self, images: list[Image.Image]) -> Float[Tensor, "batch width"]:
        features = self.score(images)
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            raise InputError(f"{self.who} must return a tensor of shape ({len(images)}, width), got {shape}")
        if not features.isfinite().all():
            raise InputError(f"{self.who} returned features that are not finite")
        return features.detach().float().cpu()


def load_embedding(spec: str, device: str) -> LoadedEmbedding:
    """The embedding of a `NAME[=PATH]`: name of a file in this folder, or path of a .py file.

    Raises:
        InputError: there is no such embedding, or its weights cannot be used.
    """
    return load_picture_part(LoadedEmbedding, __name__, spec, device)
