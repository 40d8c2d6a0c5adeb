"""The samples of the models that are compared, pictures or answers, with their scores: what is concluded from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spin_diffusion.evaluation.scoring import ScoredFolder

Key = tuple[str, int]
"""(id of the prompt, number of the sample)."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model whose samples were drawn and scored."""

    name: str
    role: Literal["baseline", "round", "rival", "candidate"]
    folder: ScoredFolder | Path
    """Of pictures; a Path is the folder of a model's answers and their scores."""
    round_: int | None = None
    """0 for the base of a run."""
    source: str = ""
    kind: Literal["pipeline", "model", "round", "images"] = "pipeline"
    base: str | None = None
    weights_sha256: str | None = None

    @property
    def picture_folder(self) -> ScoredFolder:
        """The folder of a model that drew pictures."""
        assert isinstance(self.folder, ScoredFolder), "a model that drew pictures"
        return self.folder

    @property
    def answer_folder(self) -> Path:
        """The folder of a model that gave answers."""
        assert isinstance(self.folder, Path), "a model that gave answers"
        return self.folder


@dataclass(frozen=True)
class Samples:
    """The samples of one model at one guidance scale."""

    rows: dict[Key, dict[str, Any]]
    """Each with id, k, prompt, category, seed, sha256, state ("ok" or what is wrong with it) and `there`: whether there
    is a sample at all."""
    scores: dict[str, dict[Key, dict[str, Any]]]
    """Scorer -> rows with score and truncated; only those that belong to the samples."""

    @property
    def per_prompt(self) -> int:
        """Samples of each prompt."""
        return 1 + max(k for _, k in self.rows)


BySample = dict[tuple[str, float | None], Samples]
"""(model, guidance scale) -> its samples."""
Scores = dict[str, np.ndarray]
"""Scorer -> (prompts, samples)."""


@dataclass(frozen=True, eq=False)
class Watched:
    """What the alarms of one model at one guidance scale may look at."""

    baseline: Samples
    candidate: Samples
    ids: list[str]
    """The prompts that count, in order."""
    baseline_scores: Scores
    candidate_scores: Scores
    previous_scores: Scores | None
    """Of the round before; None = there is none."""
    roles: dict[str, Any]


Arrays = dict[tuple[str, float | None, str], np.ndarray]
"""(model, guidance scale, scorer) -> (prompts, samples) scores, of the prompts that count."""
