"""What every model is asked for, and the samples that it draws: pictures and answers to the same prompts and seeds.

A folder of one model holds shards of rows, each drawn whole by one process and written last:

    guidance-3/00000-of-00002.jsonl     pictures: its rows name the PNG files beside it, 00012-0.png (prompt 12, k 0)
    00000-of-00002.parquet              answers: the texts are in its rows

What belongs to another protocol, other requests or another model is drawn anew.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NotRequired, TypedDict, cast

from accelerate import Accelerator
from PIL import Image

from spin_diffusion.samples.photometry import measure_image
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.files import Made, Piece, Tell, build_together, read_if_whole, read_json_lines, write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import key_of, known_hash
from spin_diffusion.store.pictures import open_picture
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import AGAIN, is_shard, seed_from, shard_name, write_file

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


class GivenRow(TypedDict):
    """A row of an index, as far as a folder of pictures that somebody else gives needs it."""

    prompt: str
    file: str | None
    """None = there is no picture."""


class PictureRow(Request, GivenRow):
    """What was asked for, and the file that it made; `state` says why there is none."""

    sha256: str | None
    state: str


class Sample(Request):
    """A stored sample: what was asked for, and what a model made of it, a picture or an answer."""

    sha256: str | None
    """Hash of the picture's file, or of the text; None = there is none."""
    state: NotRequired[str]
    """"ok", or what is wrong with a picture."""
    file: NotRequired[str | None]
    saturation: NotRequired[float | None]
    clipped: NotRequired[float | None]
    sharpness: NotRequired[float | None]
    text: NotRequired[str]
    finish: NotRequired[str]
    num_tokens: NotRequired[int]


class DrawnAnswer(TypedDict):
    """An answer as a model gives it."""

    text: str
    finish: Literal["stop", "length"]
    num_tokens: int


Draw = Callable[[list[str], list[int], Sampling, Callable[[int], None]], list[Image.Image]]
"""(prompts, seeds, how they are drawn, told the number drawn so far) -> images by the model."""
DrawAnswers = Callable[[list[Request], Callable[[int], None]], list[DrawnAnswer]]
"""(requests, told the number drawn so far) -> the answer to each."""
Shards = dict[float | None, list[Piece]]
"""Guidance scale (None where samples are drawn without one) -> the files of one model's samples."""


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


def storable(text: str) -> str:
    """The text with a question mark for half of a surrogate pair, which JSON can hold and parquet cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _in_shards(wanted: Sequence[Request], rows: int = ROWS_PER_SHARD) -> list[tuple[str, list[Request]]]:
    """The name of each shard, and what is asked for in it."""
    starts = range(0, len(wanted), rows)
    return [
        (shard_name(number, len(starts)), list(wanted[start : start + rows])) for number, start in enumerate(starts)
    ]


def draw_samples(shards: Shards, accelerator: Accelerator, bar: Callable[[float | None, int], Tell]) -> None:
    """Draw what is missing of a model's samples; what this very model drew by this protocol stays as it is.

    Args:
        shards: of `picture_shards` or `answer_shards`.
        bar: (guidance scale, number of samples) -> the function that is told how many are done.
    """
    for scale, pieces in shards.items():
        build_together(pieces, lambda piece: piece, accelerator, bar(scale, sum(piece.size for piece in pieces)))
        if accelerator.is_main_process:
            paths = {piece.path for piece in pieces}
            for path in {other for folder in {path.parent for path in paths} for other in folder.iterdir()} - paths:
                if is_shard(path.name):
                    path.unlink()  # of a protocol with more or fewer requests
        accelerator.wait_for_everyone()


def are_drawn(shards: Shards) -> bool:
    """Whether `draw_samples` would find nothing to do."""
    return all(piece.is_built for pieces in shards.values() for piece in pieces)


def sample_files(folder: Path) -> list[Path]:
    """The shards of samples in a folder, in order; InputError when some are missing."""
    found = sorted(path for path in folder.glob("*-of-*") if path.suffix in (".jsonl", ".parquet"))
    if not found or len(found) != int(found[0].stem.split("-of-")[1]):
        raise InputError(f"{folder} is incomplete: {AGAIN}")
    return found


# Pictures


def folder_of(scale: float | None) -> str:
    """The folder's name of one guidance scale."""
    return "given" if scale is None else f"guidance-{scale:g}"


def picture_shards(
    wanted: list[Request],
    directory: Path,
    protocol: Mapping[str, Any],
    drawn_by: str,
    draw: Draw,
    per_shard: int = ROWS_PER_SHARD,
) -> Shards:
    """The index files of a model's pictures at every guidance scale of the protocol; the pictures are drawn with them.

    Args:
        drawn_by: hash of the model, with all of its parts.
        per_shard: pictures that one process draws before it takes more; in batches that do not go beyond them.
    """

    def piece_of(sampling: Sampling, folder: Path, name: str, rows: list[Request]) -> Piece:
        def make(tell: Callable[[int], None]) -> Made:
            pictures = _draw_all(draw, rows, sampling, tell)
            return Made([save_picture(row, image, folder) for row, image in zip(rows, pictures, strict=True)])

        key = key_of(sampling=asdict(sampling), drawn_by=drawn_by)
        return index_piece(folder / f"{name}.jsonl", key, rows, make)

    samplings = {scale: Sampling.of_protocol(protocol, scale) for scale in protocol["guidance_scales"]}
    return {
        scale: [
            piece_of(sampling, directory / folder_of(scale), name, rows) for name, rows in _in_shards(wanted, per_shard)
        ]
        for scale, sampling in samplings.items()
    }


def index_piece(index: Path, key: str, wanted: list[Request], make: Callable[[Callable[[int], None]], Made]) -> Piece:
    """An index file with the pictures beside it, which `make` writes.

    Args:
        key: what all of its pictures depend on, beside what was asked for.
    """
    return Piece(index, key, len(wanted), make, lambda: _has_pictures(index, wanted))


def _has_pictures(index: Path, wanted: list[Request]) -> bool:
    """Whether an index lists what is wanted, and its pictures are as they were drawn; what is lost or damaged is said
    in a line."""
    try:
        rows = read_index(index)
        asked = [{name: row.get(name) for name in request} for row, request in zip(rows, wanted, strict=False)]
        paths = [(index.parent / row["file"], row["sha256"]) for row in rows if row["file"] is not None]
        lost = [path for path, digest in paths if not path.is_file() or known_hash(path) != digest]
    except InputError as error:
        tell(f"{index} is damaged ({str(error)[:100]}): its pictures are made anew")
        return False
    if asked == wanted and lost:
        tell(f"{lost[0]} is lost or damaged: it and the other pictures of {index.name} are made anew")
    return asked == wanted and not lost


class _Claimed(TypedDict):
    """What a protocol.json holds at least."""

    id: str


def claim(directory: Path, protocol: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Mark the folder as one of this protocol; InputError when it is one of another."""
    path = directory / "protocol.json"
    if (old := read_if_whole(path, _Claimed)) is not None:
        if old != protocol:
            differing = [key for key in protocol if key != "id" and old.get(key) != protocol[key]]
            raise InputError(
                f"{directory} holds pictures of another protocol ({', '.join(differing)}): give another --output_dir"
            )
    elif accelerator.is_main_process:
        write_json(path, protocol)
    accelerator.wait_for_everyone()


def _draw_all(
    draw: Draw, rows: list[Request], sampling: Sampling, told: Callable[[int], None]
) -> list[Image.Image | None]:
    """The pictures of a shard; None for one that is not finite."""
    try:
        return list(draw([row["prompt"] for row in rows], [row["seed"] for row in rows], sampling, told))
    except FloatingPointError:
        pictures: list[Image.Image | None] = []
        for row in rows:  # one by one, to lose no more than what is broken
            try:
                pictures += draw([row["prompt"]], [row["seed"]], sampling, lambda images: None)
            except FloatingPointError:
                pictures.append(None)
            told(len(pictures))
        return pictures


def save_picture(row: Request, image: Image.Image | None, folder: Path) -> Sample:
    """Write the PNG file of a request and return the request with its file, hash and photometry."""
    if image is None:
        return without_picture(row, "not finite")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return save_bytes(row, buffer.getvalue(), folder / f"{row['id']}-{row['k']}.png")


def save_bytes(row: Request, data: bytes, path: Path) -> Sample:
    """Write an encoded picture as it is and return the request with its file, hash and photometry.

    A picture that cannot be shown is kept out: its row has no file, and a state that says why.
    """
    digest = hashlib.sha256(data).hexdigest()
    try:
        measured = measure_image(open_picture(data))
    except InputError as error:
        return without_picture(row, f"cannot be shown: {error}", digest)
    write_file(path, lambda part: part.write_bytes(data))
    return cast(
        Sample,
        row
        | {
            "file": path.name,
            "sha256": digest,
            "state": measured.state,
            "saturation": measured.saturation,
            "clipped": measured.clipped,
            "sharpness": measured.sharpness,
        },
    )


def without_picture(row: Request, state: str, sha256: str | None = None) -> Sample:
    """The request of a picture that there is not, and why."""
    nothing = dict.fromkeys(("file", "saturation", "clipped", "sharpness"))
    return cast(Sample, row | nothing | {"sha256": sha256, "state": state})


def read_index(path: Path, kind: type = PictureRow, remedy: str = AGAIN) -> list[Any]:
    """The rows of one index file; Damaged when it is not what was written, InputError when it names a file that is not
    beside it."""
    rows = read_json_lines(path, kind, remedy)
    folder = path.parent.resolve()
    for row in rows:
        # An index of somebody else's must not show any file of this machine, not through a link either
        name = row["file"]
        if name is not None and not (PureWindowsPath(name).name == name and (folder / name).resolve().parent == folder):
            raise InputError(f"{path} names {name!r}, which does not lie beside it: nothing of it is read")
    return rows


# Answers


def answer_shards(
    requests: Sequence[Request], folder: Path, protocol: Mapping[str, Any], weights: str, draw: DrawAnswers
) -> Shards:
    """The files of a model's answers.

    Args:
        weights: hash of the model's weights.
        draw: answers a whole shard at a time, so that no answer depends on the number of processes.
    """

    def piece_of(name: str, asked: list[Request]) -> Piece:
        def make(tell: Callable[[int], None]) -> Made:
            answered = _answered(asked, draw(asked, tell))
            texts = hashlib.sha256(json.dumps([row["sha256"] for row in answered]).encode()).hexdigest()
            return Made(answered, {"protocol": protocol["id"], "weights": weights, "texts": texts})

        key = key_of(protocol=protocol["id"], requests=asked, weights=weights)
        return Piece(folder / f"{name}.parquet", key, len(asked), make)

    wanted = [Request(**{"reference": None} | row) for row in requests]
    return {None: [piece_of(name, asked) for name, asked in _in_shards(wanted)]}


def _answered(requests: list[Request], drawn: list[DrawnAnswer]) -> list[Sample]:
    """The answers as they are stored."""
    texts = [storable(row["text"]) for row in drawn]
    return [
        Sample(
            **request,
            text=text,
            finish=row["finish"],
            num_tokens=int(row["num_tokens"]),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        )
        for request, row, text in zip(requests, drawn, texts, strict=True)
    ]
