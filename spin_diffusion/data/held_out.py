"""Which examples are held out: set aside from the training data by hashes, and told from what is trained on."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Generic, Literal, TypeVar

from spin_diffusion.data.rows import Example, Message, Seen, short_hash

T = TypeVar("T")


@dataclass(frozen=True)
class Aside(Generic[T]):
    """How examples are set aside.

    Attributes:
        number: how many; 0 = all that there are.
        by: prompt = whole prompts, so that none of them is trained on; row = single examples.
        prompt_hash, row_hash: of an example's prompt, of all that is trained on of it.
    """

    number: int
    by: Literal["prompt", "row"]
    prompt_hash: Callable[[T], bytes]
    row_hash: Callable[[T], bytes]

    def choose(self, examples: Iterable[T]) -> list[T]:
        """`number` examples, whole prompts (or rows) of the smallest hashes; 0 = all of them, in their order."""
        if not self.number:
            return list(examples)
        chosen: dict[bytes, list[T]] = {}
        largest: list[int] = []  # the hashes of `chosen`, negative, as a heap
        number, seen, copies = 0, Seen(), Counter[bytes]()
        for example in examples:
            if self.by == "prompt":
                key = self.prompt_hash(example)
            else:
                row = self.row_hash(example)
                if row in seen:  # copies of a row are chosen one by one
                    copies[row] += 1
                seen.add(row)
                key = short_hash(row, str(1 + copies[row]).encode())
            if key not in chosen:
                heappush(largest, -int.from_bytes(key))
            chosen.setdefault(key, []).append(example)
            number += 1
            while number - len(chosen[(-largest[0]).to_bytes(16)]) >= self.number:
                number -= len(chosen.pop((-heappop(largest)).to_bytes(16)))
        examples = [example for key in sorted(chosen) for example in sorted(chosen[key], key=self.row_hash)]
        return examples[: self.number]

    def rule(self, held_out: Iterable[T], keeps_copies: bool = False) -> Callable[[T], bool]:
        """Whether an example of the training data is held out, to be asked of each once, in order.

        Args:
            keeps_copies: of a row that is there several times only as many are held out as were chosen.
        """
        if self.by == "prompt":
            prompts = {*map(self.prompt_hash, held_out)}
            return lambda example: self.prompt_hash(example) in prompts
        rows = Counter(map(self.row_hash, held_out))

        def is_held_out(example: T) -> bool:
            row = self.row_hash(example)
            if not rows[row]:
                return False
            if keeps_copies:
                rows[row] -= 1  # the other copies are trained on
            return True

        return is_held_out


def prompt_hash(prompt: str | list[Message]) -> bytes:
    """The hash of what is asked: system turns, white space and case do not make another prompt."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    asked = [(turn["role"], " ".join(turn["content"].split()).casefold()) for turn in turns if turn["role"] != "system"]
    return short_hash(b"prompt", as_json(asked))


def as_json(value: object) -> bytes:
    """JSON as it is hashed."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def images_aside(number: int) -> Aside[Example]:
    """How pictures are set aside: with all others of their prompts."""
    return Aside(
        number, "prompt", lambda example: prompt_hash(example.prompt), lambda example: short_hash(example.image)
    )
