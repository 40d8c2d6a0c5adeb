"""The gallery: the same prompts and seeds by every model, with what the scorers say, and what the blind vote needs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spin_diffusion.evaluation.report.choosing import Pair, choose
from spin_diffusion.evaluation.report.editions import Sample, edition_of
from spin_diffusion.evaluation.report.reading import Evaluation
from spin_diffusion.evaluation.report.tables import scorers_run
from spin_diffusion.evaluation.report.wording import (
    Text,
    clean,
    decimals_by_scorer,
    labels,
    passage,
    plain,
    shortened,
    signed,
)


@dataclass(frozen=True)
class Shown:
    """One picture or answer of the gallery with what the scorers say of it."""

    element: str
    """Its id in the page."""
    label: str
    role: str
    sample: Sample | None
    missing: str
    """Why there is none."""
    scores: list[tuple[str, str, str]]
    """(scorer, score, difference to the baseline)."""


@dataclass(frozen=True)
class GalleryRow:
    """The same prompt and seed by every model."""

    id: str
    k: int
    seed: str
    prompt: Text
    category: str
    why: str
    real: Text | None
    """The real answer."""
    shown: list[Shown]


@dataclass(frozen=True)
class GalleryTab:
    """One way to choose pictures."""

    key: str
    title: str
    note: str
    rows: list[GalleryRow]


def sample_maker(evaluation: Evaluation) -> Callable[[str, Pair], Sample | str]:
    """(model, pair) -> its sample, or why there is none. Each is made once."""
    edition = edition_of(evaluation.results)
    rows = {(row.model, (row.id, row.k)): row for row in evaluation.samples}

    @functools.cache
    def sample_of(model: str, pair: Pair) -> Sample | str:
        row = rows.get((model, pair))
        return edition.missing if row is None else edition.show(evaluation.directory, row)

    return sample_of


def gallery(
    evaluation: Evaluation, sample_of: Callable[[str, Pair], Sample | str], random_pairs: int, ranked_pairs: int
) -> list[GalleryTab]:
    """The tabs, with at most so many pairs that were drawn at random, and so many of each kind that are ranked."""
    results = evaluation.results
    named = labels(model["name"] for model in results["models"])
    digits = decimals_by_scorer(results)
    rows = {(row.id, row.k): row for row in reversed(evaluation.samples)}
    headline = results["headline"]["model"]
    first = [m for m in results["models"] if m["name"] == results["baseline"]]
    second = [m for m in results["models"] if m["name"] == headline and m not in first]
    # The two that the page is about come first, so that a narrow screen shows them side by side
    models = [*first, *second, *(m for m in results["models"] if m not in first and m not in second)]
    roles = ["baseline", *("candidate" if model in second else model["role"] for model in models[1:])]
    tabs = []
    for choice in choose(evaluation, random_pairs, ranked_pairs):
        shown_rows = []
        for number, pair in enumerate(choice.pairs):
            shown = []
            for place, (model, role) in enumerate(zip(models, roles, strict=True)):
                sample = sample_of(model["name"], pair)
                missing = isinstance(sample, str)
                shown.append(
                    Shown(
                        f"sample-{choice.key}-{number}-{place}", named[model["name"]], role,
                        None if missing else sample, shortened(sample, 160).short if missing else "",
                        _said_of(evaluation, model["name"], pair, digits, compared=place > 0),
                    )
                )  # fmt: skip
            row = rows[pair]
            shown_rows.append(
                GalleryRow(
                    row.id, row.k, row.seed, shortened(row.prompt),
                    shortened(row.category, 60).short, choice.why.get(pair, "").replace("-", "\u2212"),
                    None if row.reference is None else passage(row.reference), shown,
                )
            )  # fmt: skip
        tabs.append(GalleryTab(choice.key, choice.title, choice.note, shown_rows))
    return tabs


def _said_of(
    evaluation: Evaluation, model: str, pair: Pair, digits: dict[str, int], compared: bool
) -> list[tuple[str, str, str]]:
    """(scorer, score, difference to the baseline) of one sample."""
    found = []
    for scorer in scorers_run(evaluation.results):
        name = scorer["name"]
        score = evaluation.scores.get((model, name, *pair))
        base = evaluation.scores.get((evaluation.results["baseline"], name, *pair))
        if score is not None:
            difference = signed(score - base, digits[name]) if compared and base is not None else ""
            found.append((shortened(scorer["title"] or name, 24).short, plain(score, digits[name]), difference))
    return found


def votes(evaluation: Evaluation, tabs: list[GalleryTab]) -> dict[str, Any]:
    """What page.js needs for the blind vote: the random pairs of which both samples are in the page."""
    results = evaluation.results
    named = {name: clean(label) for name, label in labels(m["name"] for m in results["models"]).items()}
    pairs = []
    for row in tabs[0].rows:
        baseline, candidate = row.shown[0], row.shown[1]
        if baseline.sample and candidate.sample:
            pairs.append(
                {"id": row.id, "k": row.k, "seed": row.seed, "prompt": clean(row.prompt.short),
                 "baseline": baseline.element, "candidate": candidate.element}
            )  # fmt: skip
    return {
        "title": results["title"][:1000],
        "protocol_id": results["protocol"]["id"],
        "baseline": results["baseline"][:1000],
        "candidate": results["headline"]["model"][:1000],
        "labels": {"baseline": named[results["baseline"]], "candidate": named[results["headline"]["model"]]},
        "guidance_scale": results["headline"]["guidance_scale"],
        "pairs": pairs,
    }
