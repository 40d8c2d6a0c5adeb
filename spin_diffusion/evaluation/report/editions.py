"""The page's editions, one for each modality: what it says and shows differently, and where that comes from.

What the template itself says of a modality, and how it sets a sample, is in the edition's own template. To add to
either: the same name in both editions or both templates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_diffusion.evaluation.modalities import ANSWERS, IMAGES, guidance_scales, modality_of
from spin_diffusion.evaluation.records import Protocol, Results, Scale
from spin_diffusion.evaluation.report.pictures import ImageRow, Picture, thumbnail
from spin_diffusion.evaluation.report.rows import SampleRow
from spin_diffusion.evaluation.report.texts import AnswerRow, Passage, passage

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
    given, steps = "as the pictures were given", protocol["num_inference_steps"]
    return [
        ("sampler", protocol["sampler"]),
        ("denoising steps", given if steps is None else str(steps)),
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
