"""What a pipeline is: hashes of the parts that decide a picture beside the denoiser."""

import json
from typing import Any

from torch import nn

from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.weights import config_of


def words_of(tokenizer: Any) -> list[Any]:
    """What decides the tokens of a prompt."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for name in ("truncation", "padding"):  # those of the last call, whatever it was for
        rules.pop(name, None)
    words = sorted(tokenizer.get_vocab().items())
    return [words, tokenizer.model_max_length, str(tokenizer.special_tokens_map), rules]


def parts_hash(pipeline: Any) -> str:
    """Hash of all parts of a pipeline but its UNet: weights, configurations, vocabularies, noise process, switches."""
    parts: dict[str, object] = {"switches": config_of(pipeline)}
    for name, part in pipeline.components.items():
        if name == "unet" or part is None:
            continue
        if isinstance(part, nn.Module):
            parts[name] = [weights_hash(part), config_of(part)]
        elif hasattr(part, "get_vocab"):
            parts[name] = words_of(part)
        else:
            parts[name] = [type(part).__name__, config_of(part) if hasattr(part, "config") else None]
    return key_of(**parts)
