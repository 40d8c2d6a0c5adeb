"""Prompts as the denoiser's inputs: encoded on the spot, or each distinct one once, kept in memory-mapped files."""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open

from spin_diffusion.data.rows import Example, short_hash
from spin_diffusion.diffusion.families import Conditioning, Embedded, Frames
from spin_diffusion.evaluation.specs import shortened
from spin_diffusion.selfplay.device import sent
from spin_diffusion.store.files import Made, Piece, build_together, weights_hash
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.progress import Progress
from spin_diffusion.store.weights import config_of

PER_FILE, PER_BATCH, FILES_OPEN = 256, 32, 64
TOKENISED_AT_ONCE = 512
TOKENIZERS = ("tokenizer", "tokenizer_2")


class CutPrompts:
    """The ends of prompts that the text encoders do not read: counted as the prompts pass, and said before anything is
    drawn or trained."""

    def __init__(self, pipeline: Any) -> None:
        self.tokenizers = _those_of(pipeline, *TOKENIZERS)
        self.prompts = self.cut = self.longest = 0
        self._waiting: list[str] = []
        self._first: tuple[str, str] | None = None
        # Hash of the tokens that are read -> hashes of the prompts that begin with them and fill a text encoder
        self._alike: dict[bytes, set[bytes]] = {}

    def add(self, texts: Iterable[str]) -> "CutPrompts":
        """Count these too."""
        for text in texts:
            self._waiting.append(text)
            if len(self._waiting) == TOKENISED_AT_ONCE:
                self._count()
        return self

    def passing(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The same examples; their captions are counted as they are taken."""
        for example in examples:
            self.add([example.prompt])
            yield example

    def line(self, what: str) -> str | None:
        """A warning for people; None when none is cut. `what`: the prompts' name in the plural."""
        self._count()
        if self._first is None:
            return None
        limits = " and ".join(dict.fromkeys(str(tokenizer.model_max_length) for tokenizer in self.tokenizers))
        caption, lost = self._first
        alike = sum(len(prompts) for prompts in self._alike.values() if len(prompts) > 1)
        return (
            f"Warning: {self.cut} of {self.prompts} {what} have more than the {limits} tokens that the text encoders "
            f"read (the longest has {self.longest}), and what is behind those is not seen: {shortened(caption)} loses "
            f"{shortened(lost)}" + (f"; {alike} different {what} are equal to another after that" if alike else "")
        )

    def _count(self) -> None:
        texts, self._waiting = self._waiting, []
        if not texts:
            return
        of_each = [tokenizer(texts, verbose=False)["input_ids"] for tokenizer in self.tokenizers]
        self.prompts += len(texts)
        limits = [tokenizer.model_max_length for tokenizer in self.tokenizers]
        for text, *ids in zip(texts, *of_each, strict=True):
            self.longest = max(self.longest, *map(len, ids))
            if all(len(each) < limit for each, limit in zip(ids, limits, strict=True)):
                continue
            # The last token that is read is the end token, whatever stands there
            read = [each[: limit - 1] for each, limit in zip(ids, limits, strict=True)]
            key = short_hash(json.dumps(read).encode())
            self._alike.setdefault(key, set()).add(short_hash(text.encode("utf-8", "surrogatepass")))
            over = [place for place, limit in enumerate(limits) if len(ids[place]) > limit]
            if over:
                self.cut += 1
                lost = ids[over[0]][limits[over[0]] - 1 : -1]
                self._first = self._first or (text, self.tokenizers[over[0]].decode(lost))


class Prompts:
    """A pipeline's text encoders, and what is kept of their work.

    Nobody needs the encoders while a player is trained on kept prompts: `put_away` takes them off the device.
    """

    def __init__(self, family: ModuleType, pipeline: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.family, self.pipeline, self.autocast = family, pipeline, autocast
        self.device = pipeline.text_encoder.device
        with torch.no_grad(), autocast():
            self._unconditional: Embedded = family.unconditional(pipeline)
        # The hash of each stored prompt, sorted, and its place: 12 bytes, however long it is
        self._hashes, self._places = np.zeros(0, np.uint64), np.zeros(0, np.int32)
        self._file: Callable[[int], Any] = lambda number: None

    def conditioning(self, prompts: list[str], dropped: list[bool], frames: Frames) -> Conditioning:
        """What the denoiser is told; where `dropped`, that of the sampler's unconditional half. `frames`: one per
        prompt."""
        places = self._find(prompts)
        embedded = self._kept(places) if places is not None else self.family.embed(self.pipeline, prompts)
        drop = sent(torch.tensor(dropped), self.device)
        for name, empty in self._unconditional.items():
            where = drop.view(-1, *[1] * (empty.ndim - 1))
            # A kept embedding has the dtype in which autocast would hand it to the denoiser
            embedded[name] = torch.where(where, empty.to(embedded[name].dtype), embedded[name])
        return self.family.condition(embedded, frames)

    def keep(
        self,
        folder: Path,
        prompts: Sequence[str],
        accelerator: Accelerator,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> None:
        """Encode every distinct prompt once, all processes together; whole files that the same encoders left in
        `folder` stay.

        Args:
            prompts: gone through several times, and never held as a whole.
            dtype: in which embeddings are kept: the one that autocast hands to the denoiser.
        """
        every = np.fromiter((_number(prompt) for prompt in prompts), np.uint64)
        hashes, first = np.unique(every, return_index=True)
        is_first = np.zeros(len(every), bool)
        is_first[first] = True

        def parts() -> Iterator[list[str]]:
            distinct = (prompt for prompt, new in zip(prompts, is_first, strict=True) if new)
            while part := list(itertools.islice(distinct, PER_FILE)):
                yield part

        encoders = self._encoders_hash(dtype)
        keys = [key_of(encoders=encoders, prompts=part) for part in parts()]
        paths = [folder / f"{key[:32]}.safetensors" for key in keys]
        walk = enumerate(parts())

        def piece_of(number: int) -> Piece:
            part = next(part for place, part in walk if place == number)
            return Piece(paths[number], keys[number], len(part), lambda tell: Made(self._encode(part, dtype)))

        bar = (progress or Progress()).phase("encode the prompts", len(hashes))
        build_together(range(len(paths)), piece_of, accelerator, bar)
        self._file = functools.lru_cache(maxsize=FILES_OPEN)(lambda number: safe_open(paths[number], framework="pt"))
        self._hashes = hashes
        self._places = np.argsort(np.argsort(first)).astype(np.int32)  # in the order in which they came first

    def put_away(self) -> bool:
        """Free the device of the encoders if their work is kept; whether it is."""
        if len(self._hashes):
            move(*self._encoders(), device=torch.device("cpu"))
        return len(self._hashes) > 0

    def bring_back(self) -> None:
        """Put the encoders where they were."""
        move(*self._encoders(), device=self.device)

    def _encoders(self) -> list[Any]:
        return _those_of(self.pipeline, "text_encoder", "text_encoder_2")

    def _encoders_hash(self, dtype: torch.dtype) -> str:
        """The hash of all that decides an embedding, but the prompt."""
        words = [words_of(tokenizer) for tokenizer in _those_of(self.pipeline, *TOKENIZERS)]
        content = [*((weights_hash(encoder), config_of(encoder)) for encoder in self._encoders()), words, str(dtype)]
        return key_of(content=content)

    def _encode(self, prompts: list[str], dtype: torch.dtype) -> Embedded:
        batches = [prompts[start : start + PER_BATCH] for start in range(0, len(prompts), PER_BATCH)]
        with torch.no_grad(), self.autocast():
            embedded = [self.family.embed(self.pipeline, batch) for batch in batches]
        return {name: torch.cat([each[name].to(dtype).cpu() for each in embedded]) for name in embedded[0]}

    def _find(self, prompts: list[str]) -> list[int] | None:
        """Where they are kept; None when one is not."""
        wanted = np.array([_number(prompt) for prompt in prompts], np.uint64)
        places = np.searchsorted(self._hashes, wanted)
        if not len(self._hashes) or (places == len(self._hashes)).any() or (self._hashes[places] != wanted).any():
            return None
        return self._places[places].tolist()

    def _kept(self, places: list[int]) -> Embedded:
        return {
            name: sent(
                torch.stack([self._file(place // PER_FILE).get_slice(name)[place % PER_FILE] for place in places]),
                self.device,
            )
            for name in self._unconditional
        }


def move(*networks: Any, device: torch.device) -> None:
    """Put networks on a device, where the first of them is not yet: to look through all weights takes a twentieth of a
    small step."""
    if networks[0].device != device:
        for network in networks:
            network.to(device)


def _those_of(pipeline: Any, *names: str) -> list[Any]:
    return [part for name in names if (part := getattr(pipeline, name, None)) is not None]


def words_of(tokenizer: Any) -> list[Any]:
    """What decides the tokens of a prompt."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for name in ("truncation", "padding"):  # those of the last call, whatever it was for
        rules.pop(name, None)
    words = sorted(tokenizer.get_vocab().items())
    return [words, tokenizer.model_max_length, str(tokenizer.special_tokens_map), rules]


def _number(prompt: str) -> int:
    """64 bits of a prompt's hash: of a million prompts two are alike with a probability of 3e-8."""
    return int.from_bytes(short_hash(prompt.encode("utf-8", "surrogatepass"))[:8], "big")
