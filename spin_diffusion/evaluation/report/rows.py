"""What the samples' tables of all modalities have in a row."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleRow:
    """One sample that a model was asked for."""

    model: str
    id: str
    k: int
    prompt: str
    category: str
    seed: str
    """As text: a seed of 63 bits does not survive JavaScript's numbers."""
