"""The page's editions, one for each modality: what it says and shows differently, and where that comes from.

What the template itself says of a modality, and how it sets a sample, is in the edition's own template. To add to
either: the same name in both editions or both templates.
"""

import base64
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from spin_diffusion.evaluation.records import ANSWERS, IMAGES, Protocol, Results, Scale, guidance_scales, modality_of
from spin_diffusion.evaluation.report import wording
from spin_diffusion.store.input_error import MAX_PICTURE_BYTES, InputError, read_bytes
from spin_diffusion.store.pictures import open_picture

MAX_SIDE_PX = 256
_EXACT_SIDE_PX = 128  # up to here a picture is kept without loss: the page shows its pixels enlarged
_QUALITY = 82
_FINISH = {"stop": "ended by itself", "length": "cut at the longest answer allowed"}


@dataclass(frozen=True)
class SampleRow:
    """One sample that a model was asked for: what the tables of both modalities have."""

    model: str
    id: str
    k: int
    prompt: str
    category: str
    seed: str
    """As text: a seed of 63 bits does not survive JavaScript's numbers."""


@dataclass(frozen=True)
class ImageRow(SampleRow):
    """One picture that a model was asked for at the headline's guidance scale."""

    file: str | None
    """Relative to the evaluation's folder; None = there is no picture."""
    sha256: str | None
    state: str
    reference: ClassVar[None] = None
    """The real image is not kept."""


@dataclass(frozen=True)
class Picture:
    """A picture inside of the page."""

    data: str
    """A data: address."""
    width: int
    """px"""
    height: int
    pixelated: bool
    """Enlarge it by whole pixels."""


def thumbnail(directory: Path, row: ImageRow) -> Picture | str:
    """The picture of a row at no more than MAX_SIDE_PX, or in words why there is none."""
    if row.file is None:
        return f"no picture: {row.state}" if row.state else "no picture"
    return picture_at(directory, row.file, MAX_SIDE_PX, row.sha256)


def picture_at(directory: Path, file: str, max_side_px: int, sha256: str | None = None) -> Picture | str:
    """A picture of an evaluation, no larger than that, or in words why there is none.

    Args:
        file: relative to the evaluation's folder.
        sha256: what it must be.
    """
    root = directory.resolve()
    try:
        path = (root / file).resolve()
        if not path.is_relative_to(root):
            return "not shown: its file lies outside of the evaluation's folder"
        if not path.is_file():
            return "its file is missing"
        data = read_bytes(path, MAX_PICTURE_BYTES)
    except (OSError, ValueError, RuntimeError):  # a path may hold a NUL, be too long, or go round in links
        return "its file cannot be read"
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        return "not shown: its file is not the one that was scored"
    try:
        image = open_picture(data)
    except InputError:
        return "its file cannot be decoded"
    exact = max(image.size) <= _EXACT_SIDE_PX
    image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # method: how hard the encoder tries, not the quality
    image.save(buffer, "WEBP", lossless=exact, quality=_QUALITY, method=4)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/webp;base64,{encoded}", image.width, image.height, exact)


@dataclass(frozen=True)
class AnswerRow(SampleRow):
    """One answer that a model gave."""

    text: str
    reference: str | None
    """The real answer."""
    finish: str
    num_tokens: int
    state: str


@dataclass(frozen=True)
class Passage:
    """An answer inside of the page."""

    text: wording.Text
    """Its short form is empty where the answer is empty."""
    note: str
    """How long it is and how it ended."""


def passage(directory: Path, row: AnswerRow) -> Passage:
    """The answer of a row, which holds all of it."""
    tokens = f"{row.num_tokens:,} token{'' if row.num_tokens == 1 else 's'}"
    return Passage(wording.passage(row.text), f"{tokens}, {_FINISH.get(row.finish, row.finish)}")


Sample = Picture | Passage
"""An image or an answer, inside of the page."""


@dataclass(frozen=True)
class Edition:
    """What the page says and shows of one modality."""

    template: str
    """File of the template's words, and of what sets a sample, the real one beside it, and two in the vote."""
    row: type[SampleRow]
    """A row of the samples' table."""
    show: Callable[[Path, Any], Sample | str]
    """(the evaluation's folder, row) -> the sample, or in words why there is none."""
    missing: str
    """Why there is no row."""
    rest: str
    """Where the samples are that the page has no room for."""
    label: Callable[[Protocol, Scale], str]
    """(protocol, guidance scale) -> how the samples were drawn, in words."""
    how: Callable[[Protocol], list[tuple[str, str]]]
    """The protocol's small print that only this modality has."""
    unit_of_r: str
    roles: dict[str, str]
    """What each role of a scorer means."""


def edition_of(results: Results) -> Edition:
    """The edition of an evaluation's page."""
    return _EDITIONS[modality_of(results["protocol"])]


def _guidance(protocol: Protocol, scale: Scale) -> str:
    """None stands for pictures that were given, not drawn."""
    return "as given" if scale is None else f"guidance {scale:g}"


def _temperature(protocol: Protocol, scale: Scale) -> str:
    temperature = protocol["sampling"]["temperature"]
    return f"temperature {temperature:g}" if temperature else "greedy"


def _how_drawn(protocol: Protocol) -> list[tuple[str, str]]:
    given, steps, scale = "as given", protocol["num_inference_steps"], protocol.get("prediction_scale")
    return [
        ("sampler", protocol["sampler"]),
        ("denoising steps", given if steps is None else str(steps)),
        ("prediction times", given if scale is None else f"{scale:g}"),
        ("guidance scales", ", ".join("as given" if s is None else f"{s:g}" for s in guidance_scales(protocol))),
        ("resolution", given if protocol["resolution"] is None else f"{protocol['resolution']} px"),
    ]


def _how_answered(protocol: Protocol) -> list[tuple[str, str]]:
    names = {"top_p": "top-p", "top_k": "top-k", "max_new_tokens": "longest answer, tokens"}
    sampling = [
        (names.get(key, key.replace("_", " ")), "none" if value is None else str(value))
        for key, value in protocol["sampling"].items()
    ]
    return [*sampling, ("real answers: SHA-256", protocol.get("references_sha256", ""))]


_ROLES = {
    "truth": "Knows the right answer, as the oracle of a drawn world does.",
    "in-domain": "A preference model trained on the kind of data that the player learns from. It is easy to please: a "
    "gain here alone is not evidence of better images.",
    "held-out": "A preference model trained on other data. The gain that counts.",
    "alignment": "Agreement of the image with its prompt. It guards against images that please but do not obey.",
    "aesthetics": "Beauty whatever the prompt. It can rise while the image drifts from what was asked.",
    "drift": "A measure that is good neither up nor down. It shows that something changed, and is never called a gain.",
}

_ROLES_OF_ANSWERS = _ROLES | {
    "truth": "Knows the right answer.",
    "in-domain": "A preference model trained on the kind of data that the player learns from. It is easy to please: a "
    "gain here alone is not evidence of better answers.",
    "held-out": "A preference model trained on other data, or the likelihood of real answers that were not trained on. "
    "The gain that counts.",
    "alignment": "Agreement of the answer with its prompt. It guards against answers that please but do not obey.",
    "aesthetics": "Style whatever the prompt. It can rise while the answer drifts from what was asked.",
}

_EDITIONS = {
    IMAGES: Edition(
        template="images.html.j2",
        row=ImageRow,
        show=thumbnail,
        missing="was not drawn",
        rest="All pictures lie beside results.json.",
        label=_guidance,
        how=_how_drawn,
        unit_of_r="r",
        roles=_ROLES,
    ),
    ANSWERS: Edition(
        template="answers.html.j2",
        row=AnswerRow,
        show=passage,
        missing="did not answer",
        rest="All answers are in answers.parquet.",
        label=_temperature,
        how=_how_answered,
        unit_of_r="r, nats",
        roles=_ROLES_OF_ANSWERS,
    ),
}
