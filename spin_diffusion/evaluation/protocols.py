"""What is the same in the protocol of pictures and that of answers, and what tells one from the other."""

from typing import Any

Protocol = dict[str, Any]


def is_of_answers(protocol: Protocol) -> bool:
    """Whether texts were asked for, and not pictures."""
    return "sampling" in protocol


def samples_per_prompt(protocol: Protocol) -> int:
    """Images or answers of each prompt."""
    return protocol["answers_per_prompt" if is_of_answers(protocol) else "images_per_prompt"]


def guidance_scales(protocol: Protocol) -> list[float | None]:
    """Those that are compared; of answers there is one, None."""
    return [None] if is_of_answers(protocol) else protocol["guidance_scales"]
