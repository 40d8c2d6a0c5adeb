"""The modalities that are evaluated, images and answers: the words and facts in which they differ outside of the page.

Everything else of the room takes a `Modality`. What the page says and shows of each is in report/editions.py.
"""

from dataclasses import dataclass

from spin_diffusion.evaluation.records import Protocol, Scale


@dataclass(frozen=True)
class Modality:
    """What the models make; a guidance scale is part of names and tables only where samples are drawn with one."""

    plural: str
    """Name of the samples, and of their table."""
    at: str
    """Format that says where, behind a name: of the guidance scale in words."""
    at_key: str
    """Format of the same behind the name of a metric."""
    heading: str
    """Format of the heading of a column of means: of the guidance scale in words."""
    columns: tuple[str, ...]
    """Columns that tell apart the rows of one model."""
    held_out: str
    """What speaks for a held-out scorer."""


IMAGES = Modality("images", " at {}", "@{}", "{}", ("guidance",), "not trained on the same preferences")
ANSWERS = Modality("answers", "", "", "mean", (), "which is held out")


def modality_of(protocol: Protocol) -> Modality:
    """What was asked for: a protocol of answers has `sampling`."""
    return ANSWERS if "sampling" in protocol else IMAGES


def samples_per_prompt(protocol: Protocol) -> int:
    """Images or answers of each prompt."""
    return protocol["answers_per_prompt"] if "sampling" in protocol else protocol["images_per_prompt"]


def guidance_scales(protocol: Protocol) -> list[Scale]:
    """Those that are compared; where samples are drawn without one it is None."""
    return protocol["guidance_scales"] if "guidance_scales" in protocol else [None]
