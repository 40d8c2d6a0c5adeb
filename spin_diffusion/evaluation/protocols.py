"""The protocol of an evaluation: what must be equal for two results to be comparable, with its hash as `id`.

It is all that decides a sample but the model.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import cast

from spin_diffusion.evaluation.prompt_sets import PromptSet, prompts_hash
from spin_diffusion.evaluation.records import FreeSettings, PromptSetEntry, Protocol
from spin_diffusion.samples.drawn import SEED_RULE, Request
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.input_error import InputError

AS_GIVEN = dict.fromkeys(field.name for field in fields(Sampling) if field.name != "guidance_scale") | {
    "sampler": "as given"
}
"""What the protocol of given pictures has in place of a `Sampling`."""


def protocol_of(
    prompts: PromptSet,
    *,
    images_per_prompt: int,
    seed: int,
    sampling: Sampling | None,
    guidance_scales: Sequence[float | None],
) -> Protocol:
    """The protocol of pictures.

    Args:
        sampling: how they are drawn at each of the guidance scales, which stand for its own; None = as they are given.
    """
    how = AS_GIVEN if sampling is None else sampling.in_protocol()
    asked = {
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "seed_rule": SEED_RULE.format(sample="image"),
        "guidance_scales": list(guidance_scales),
    }
    prompt_set = PromptSetEntry(
        name=prompts.name,
        sha256=prompts.sha256,
        num_prompts=len(prompts.rows),
        licence=prompts.licence,
        source=prompts.source,
    )
    return _with_id(prompt_set, asked | how)


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


def free_settings(sampling: Sampling) -> FreeSettings:
    """The part of a sampling that is free to choose, and its passes."""
    return {
        "guidance_scale": sampling.guidance_scale,
        "num_inference_steps": sampling.num_inference_steps,
        "prediction_scale": sampling.prediction_scale,
        "passes": sampling.passes,
    }


def _with_id(prompt_set: PromptSetEntry, rest: dict[str, object]) -> Protocol:
    # The same prompts from another place are the same prompts
    id_ = _hash(rest | {"prompt_set": prompt_set["sha256"]})
    return cast(Protocol, {"id": id_, "prompt_set": prompt_set} | rest)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
