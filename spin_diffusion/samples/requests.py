"""What is asked for: prompts, each with seeds of its own that all models share, in shards that are drawn whole."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, TypeVar

from spin_diffusion.store.run_dir import seed_from, shard_name

T = TypeVar("T")
SEED_RULE = "SHA-256 of (seed, 'evaluation', prompt, number of the {sample}), the same for every model"
ROWS_PER_SHARD = 64


class Request(TypedDict):
    """One sample that every model is asked for."""

    id: str
    """The id of the prompt."""
    k: int
    """Number of the sample among those of its prompt."""
    prompt: str
    category: str
    seed: int
    reference: NotRequired[str | None]
    """The real answer, where answers are asked for and it is known."""


def requests_of(prompts: Sequence[Mapping[str, Any]], per_prompt: int, seed: int) -> list[Request]:
    """Each prompt `per_prompt` times, each time with a seed of its own.

    Args:
        prompts: {"prompt"}, and where they are known "id", "category" and "reference".
    """
    requests = []
    for place, row in enumerate(prompts):
        for k in range(per_prompt):
            request = Request(
                id=str(row.get("id", f"{place:05d}")),
                k=k,
                prompt=storable(row["prompt"]),
                category=storable(row.get("category") or ""),
                seed=seed_from(seed, "evaluation", row["prompt"], k),
            )
            if "reference" in row:
                request["reference"] = row["reference"] and storable(row["reference"])
            requests.append(request)
    return requests


def in_shards(wanted: Sequence[T]) -> list[tuple[str, list[T]]]:
    """What is asked for in parts: the name of each shard, and what is asked for in it."""
    starts = range(0, len(wanted), ROWS_PER_SHARD)
    return [
        (shard_name(number, len(starts)), list(wanted[start : start + ROWS_PER_SHARD]))
        for number, start in enumerate(starts)
    ]


def storable(text: str) -> str:
    """The text with a question mark for half of a surrogate pair, which JSON can hold and parquet cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")
