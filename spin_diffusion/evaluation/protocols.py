"""The protocol of an evaluation: what must be equal for two results to be comparable, with its hash as `id`.

It is all that decides a sample but the model. Versions of libraries, devices and the number of samples in a batch,
which change the last bits, are not in it.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import cast

from spin_diffusion.evaluation.prompt_sets import PromptSet, prompts_hash
from spin_diffusion.evaluation.records import PromptSetEntry, Protocol
from spin_diffusion.samples.drawn import SEED_RULE, Request
from spin_diffusion.store.input_error import InputError


def protocol_of(
    prompts: PromptSet,
    *,
    images_per_prompt: int,
    seed: int,
    sampler: str,
    num_inference_steps: int | None,
    guidance_scales: Sequence[float | None],
    resolution: int | None,
    eta: float | None,
    precision: str | None,
) -> Protocol:
    """The protocol of pictures.

    Args:
        sampler, num_inference_steps, resolution, eta, precision: as `draw_batches` has them; of given pictures the
            first is "as given" and the others are None.
        precision: of the denoiser, see `precision_of`.
    """
    asked = {"images_per_prompt": images_per_prompt, "seed": seed, "seed_rule": SEED_RULE.format(sample="image")}
    sampling = {
        "sampler": sampler,
        "num_inference_steps": num_inference_steps,
        "guidance_scales": list(guidance_scales),
        "resolution": resolution,
        "eta": eta,
        "precision": precision,
        # A model that is told an image's size is told that of the whole picture, as pipelines do by themselves
        "size_condition": None if resolution is None else "the picture's own, not cropped",
    }
    prompt_set = PromptSetEntry(
        name=prompts.name,
        sha256=prompts.sha256,
        num_prompts=len(prompts.rows),
        licence=prompts.licence,
        source=prompts.source,
    )
    return _with_id(prompt_set, asked | sampling)


def answer_protocol(
    requests: Sequence[Request],
    *,
    name: str,
    seed: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    max_new_tokens: int,
    licence: str = "",
    source: str = "",
    **more: str | int | float | bool | None,
) -> Protocol:
    """The protocol of answers.

    Args:
        name: of the prompt set.
        top_k: None = all tokens.
        more: whatever else changes the answers, such as the hash of a chat template.

    Raises:
        InputError: prompts without a request for each number of answers.
    """
    ids: dict[str, list[int]] = {}
    for row in requests:
        ids.setdefault(row["id"], []).append(row["k"])
    wanted = list(range(max((len(ks) for ks in ids.values()), default=0)))
    if odd := next((id_ for id_, ks in ids.items() if sorted(ks) != wanted), None):
        raise InputError(f"the prompt {odd} is asked for the answers {sorted(ids[odd])}, others for {wanted}")
    firsts = [row for row in requests if row["k"] == 0]
    sha256 = prompts_hash([row["prompt"] for row in firsts])
    prompt_set = PromptSetEntry(name=name, sha256=sha256, num_prompts=len(firsts), licence=licence, source=source)
    asked = {
        "answers_per_prompt": len(wanted),
        "seed": seed,
        "seed_rule": SEED_RULE.format(sample="answer"),
        "references_sha256": _hash([row.get("reference") for row in firsts]),
    }
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens, **more}
    return _with_id(prompt_set, asked | {"sampling": sampling})


def _with_id(prompt_set: PromptSetEntry, rest: dict[str, object]) -> Protocol:
    # The same prompts from another place are the same prompts
    id_ = _hash(rest | {"prompt_set": prompt_set["sha256"]})
    return cast(Protocol, {"id": id_, "prompt_set": prompt_set} | rest)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def precision_of(mixed_precision: str, allow_tf32: bool = False) -> str:
    """The protocol's word for a precision: "fp32", "fp16" or "bf16", and whether products may be rounded to TF32."""
    return ("fp32" if mixed_precision == "no" else mixed_precision) + (" with TF32" if allow_tf32 else "")
