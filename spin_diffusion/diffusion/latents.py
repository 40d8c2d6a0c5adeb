"""Latents that runs share: found again by the content of the images, the VAE, and how images are encoded."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from spin_diffusion.selfplay.game import Row
from spin_diffusion.selfplay.run_dir import write_shared_tensors


@dataclass(frozen=True)
class CacheSettings:
    """What is computed once and kept."""

    cache_text_embeddings: bool = True
    """Encode each distinct prompt once and take the text encoders off the device while a player is trained."""
    encodings_dir: str | None = None
    """A folder where runs share latents and text embeddings, each found by its content, VAE and text encoders.
    Default: each run has its own."""


def encoded_once(folder: Path, vae: str, how: dict[str, object], rows: list[Row], encode: Callable[[], Tensor],
                 prefix: str) -> Tensor:  # fmt: skip
    """The latents of a shard's images, from `folder` if they are there, else encoded and put there.

    Args:
        vae: hash of its weights.
        how: everything else that decides the latents.
        prefix: of the rows' image.
    """
    digest = hashlib.sha256(json.dumps([vae, how], sort_keys=True).encode())
    for row in rows:
        digest.update(hashlib.sha256(row[f"{prefix}image"]).digest() + bytes([row["drawn"]]))
    path = folder / f"{digest.hexdigest()[:32]}.safetensors"
    if not path.is_file():
        write_shared_tensors(path, {"latents": encode()})
    return load_file(path)["latents"]
