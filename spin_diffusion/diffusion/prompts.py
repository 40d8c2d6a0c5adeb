"""Prompts as the denoiser's inputs: encoded on the spot, or each distinct one once, kept in memory-mapped files."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open

from spin_diffusion.diffusion.families import Conditioning, Embedded, Frames
from spin_diffusion.selfplay.run_dir import weights_hash, write_shared_tensors
from spin_diffusion.selfplay.sharing import shared_out

PER_FILE, PER_BATCH = 256, 32


class Prompts:
    """A pipeline's text encoders, and what is kept of their work.

    Nobody needs the encoders while a player is trained on kept prompts: `put_away` takes them off the device.
    """

    def __init__(self, family: ModuleType, pipeline: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.family, self.pipeline, self.autocast = family, pipeline, autocast
        self.device = pipeline.text_encoder.device
        with torch.no_grad(), autocast():
            self._unconditional: Embedded = family.unconditional(pipeline)
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[Any] = []

    def conditioning(self, prompts: list[str], dropped: list[bool], frames: Frames) -> Conditioning:
        """What the denoiser is told; where `dropped`, that of the sampler's unconditional half.

        Args:
            frames: one or several per prompt, all prompts in order each time.
        """
        kept = bool(self._places) and all(prompt in self._places for prompt in prompts)
        embedded = self._kept(prompts) if kept else self.family.embed(self.pipeline, prompts)
        drop = torch.tensor(dropped, device=self.device)
        copies = len(frames) // len(prompts)
        for name, empty in self._unconditional.items():
            where = drop.view(-1, *[1] * (empty.ndim - 1))
            # A kept embedding has the dtype in which autocast would hand it to the denoiser
            chosen = torch.where(where, empty.to(embedded[name].dtype), embedded[name])
            embedded[name] = chosen.repeat(copies, *[1] * (empty.ndim - 1))
        return self.family.condition(embedded, frames)

    def keep(
        self,
        folder: Path,
        prompts: list[str],
        accelerator: Accelerator,
        dtype: torch.dtype,
        progress: Callable[[int, str], None] = lambda done, text: None,
    ) -> None:
        """Encode every distinct prompt once, all processes together; what `folder` has of the same encoders stays.

        Args:
            dtype: in which embeddings are kept: the one that autocast hands to the denoiser.
        """
        distinct = list(dict.fromkeys(prompts))
        parts = [distinct[start : start + PER_FILE] for start in range(0, len(distinct), PER_FILE)]
        encoders = self._encoders_hash(dtype)
        paths = [folder / f"{_key(encoders, part)}.safetensors" for part in parts]
        world, done = accelerator.num_processes, 0
        for part, path in shared_out(list(zip(parts, paths, strict=True)), accelerator):
            if not path.is_file():
                write_shared_tensors(path, self._encode(part, dtype))
            done += len(part)
            progress(min(done * world, len(distinct)), "")
        accelerator.wait_for_everyone()
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._places = {
            prompt: (number, place) for number, part in enumerate(parts) for place, prompt in enumerate(part)
        }

    def put_away(self) -> bool:
        """Free the device of the encoders if their work is kept; whether it is."""
        if self._places:
            self._move(torch.device("cpu"))
        return bool(self._places)

    def bring_back(self) -> None:
        """Put the encoders where they were."""
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.pipeline.text_encoder.device != device:
            for encoder in self._encoders():
                encoder.to(device)

    def _encoders(self) -> list[Any]:
        names = ("text_encoder", "text_encoder_2")
        return [getattr(self.pipeline, name) for name in names if getattr(self.pipeline, name, None) is not None]

    def _encoders_hash(self, dtype: torch.dtype) -> str:
        """Of all that decides an embedding, but the prompt."""
        tokenizers = [getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
        words = [(sorted(found.get_vocab().items()), found.model_max_length) for found in tokenizers if found]
        content = [*(weights_hash(encoder) for encoder in self._encoders()), words, str(dtype)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _encode(self, prompts: list[str], dtype: torch.dtype) -> Embedded:
        batches = [prompts[start : start + PER_BATCH] for start in range(0, len(prompts), PER_BATCH)]
        with torch.no_grad(), self.autocast():
            found = [self.family.embed(self.pipeline, batch) for batch in batches]
        return {name: torch.cat([each[name].to(dtype).cpu() for each in found]) for name in found[0]}

    def _kept(self, prompts: list[str]) -> Embedded:
        places = [self._places[prompt] for prompt in prompts]
        return {
            name: torch.stack([self._files[file].get_slice(name)[place] for file, place in places]).to(self.device)
            for name in self._unconditional
        }


def _key(encoders: str, prompts: list[str]) -> str:
    return hashlib.sha256(json.dumps([encoders, prompts]).encode()).hexdigest()[:32]
