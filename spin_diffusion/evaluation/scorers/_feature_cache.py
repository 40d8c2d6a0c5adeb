"""Features of the last inputs: an image of several scorers, or a prompt of several images, is embedded once."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


class FeatureCache:
    """The features of the last `size` inputs."""

    def __init__(self, size: int = 8192) -> None:
        self.size = size
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(
        self, keys: list[Hashable], compute: Callable[[list[int]], Float[Tensor, "missing width"]]
    ) -> Float[Tensor, "batch width"]:
        """One row per key, computed where it is not yet known.

        Args:
            compute: rows of the inputs at these positions; called once, or not at all.
        """
        known = {key: self._features[key] for key in keys if key in self._features}
        # The first position of each key that is missing, so that equal inputs are computed once.
        missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}
        if missing:
            known |= zip(missing, compute(list(missing.values())), strict=True)
        for key in keys:
            self._features[key] = known[key]
            self._features.move_to_end(key)
        while len(self._features) > self.size:
            self._features.popitem(last=False)
        return torch.stack([known[key] for key in keys])


def pixels_key(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    """Size and hash of an RGB image's pixels."""
    return image.size, hashlib.sha256(image.tobytes()).digest()
