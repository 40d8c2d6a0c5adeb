"""Answers that are asked for: every model answers the same prompts with the same seeds.

A folder of one model holds

    answers/00000-of-00002.parquet         id, k, prompt, category, seed, reference, text, finish, num_tokens, sha256

A file is written whole by one process. Beside the rows it says what they belong to (protocol, requests and weights),
and what belongs to something else is made again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.samples.requests import Request, in_shards, storable
from spin_diffusion.store.files import Made, Piece, build_together, read_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.progress import Progress
from spin_diffusion.store.run_dir import AGAIN, is_shard

DrawAnswers = Callable[[list[Request], Callable[[int], None]], list[dict[str, Any]]]
"""(requests, told the number drawn so far) -> {"text", "finish": "stop" or "length", "num_tokens"} of each."""


def draw_answers(
    requests: Sequence[Request],
    folder: Path,
    protocol: Mapping[str, Any],
    draw: DrawAnswers,
    accelerator: Accelerator,
    progress: Progress,
    *,
    weights_sha256: str = "",
    model: str = "",
) -> None:
    """Let a model answer what is asked into `folder`/answers; what is there already stays.

    Args:
        requests: rows {id, k, prompt, category, seed, reference}, the same for every model.
        draw: answers a whole shard at a time, so that no answer depends on the number of processes.
        weights_sha256: of the model; answers of other weights are drawn again.
        model: its name, for the progress.

    Raises:
        ValueError: `draw` returns anything but one answer per request.
    """
    pieces = _pieces(requests, folder, protocol, weights_sha256, draw)
    bar = progress.phase(f"{model}: answer" if model else "answer", len(requests))
    build_together(pieces, lambda piece: piece, accelerator, bar)
    if accelerator.is_main_process:
        for path in set((folder / "answers").glob("*-of-*.parquet")) - {piece.path for piece in pieces}:
            if is_shard(path.name):
                path.unlink()  # of a protocol with more or fewer requests
    accelerator.wait_for_everyone()


def are_answered(requests: Sequence[Request], folder: Path, protocol: Mapping[str, Any], weights_sha256: str) -> bool:
    """Whether `draw_answers` would find nothing to do."""
    return all(piece.is_built for piece in _pieces(requests, folder, protocol, weights_sha256, None))


def _pieces(
    requests: Sequence[Request],
    folder: Path,
    protocol: Mapping[str, Any],
    weights_sha256: str,
    draw: DrawAnswers | None,
) -> list[Piece]:
    """The files of a model's answers."""

    def piece_of(path: Path, asked: list[Request]) -> Piece:
        def make(tell: Callable[[int], None]) -> Made:
            assert draw is not None
            answered = _answered(asked, draw(asked, tell))
            texts = _texts_hash([row["sha256"] for row in answered])
            return Made(answered, {"protocol": protocol["id"], "weights": weights_sha256, "texts": texts})

        return Piece(path, answer_key(protocol, asked, weights_sha256), len(asked), make)

    shards = in_shards([Request(**{"reference": None} | row) for row in requests])
    return [piece_of(folder / "answers" / f"{name}.parquet", asked) for name, asked in shards]


def answer_key(protocol: Mapping[str, Any], requests: list[Request], weights_sha256: str) -> str:
    """What a file of answers depends on."""
    return key_of(protocol=protocol["id"], requests=requests, weights=weights_sha256)


def _answered(requests: list[Request], drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(drawn) != len(requests):
        raise ValueError(f"{len(drawn)} answers do not match {len(requests)} requests")
    for row in drawn:
        if row["finish"] not in ("stop", "length"):
            raise ValueError(f'finish must be "stop" or "length", got {row["finish"]!r}')
    texts = [storable(row["text"]) for row in drawn]
    return [
        request
        | {
            "text": text,
            "finish": row["finish"],
            "num_tokens": int(row["num_tokens"]),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        for request, row, text in zip(requests, drawn, texts, strict=True)
    ]


def _texts_hash(digests: list[str]) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def answer_files(folder: Path) -> list[Path]:
    """The files of a model's answers, in order; InputError when some are missing."""
    found = sorted((folder / "answers").glob("*-of-*.parquet"))
    if not found or len(found) != int(found[0].stem.split("-of-")[1]):
        raise InputError(f"{folder / 'answers'} is incomplete: {AGAIN}")
    return found


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of one file of answers; InputError when it is damaged."""
    return read_rows(path)
