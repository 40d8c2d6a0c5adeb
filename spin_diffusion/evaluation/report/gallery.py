"""The gallery: the same prompts and seeds by every model, with what the scorers say, and what the blind vote needs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from spin_diffusion.evaluation.records import Results
from spin_diffusion.evaluation.report.choosing import Pair, choose
from spin_diffusion.evaluation.report.editions import Sample, edition_of
from spin_diffusion.evaluation.report.labels import Labels
from spin_diffusion.evaluation.report.reading import Evaluation
from spin_diffusion.evaluation.report.rows import SampleRow
from spin_diffusion.evaluation.report.wording import clean, plain, shortened, signed


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

    sample: SampleRow
    """One of the samples: its prompt and seed are those of all."""
    why: str
    """Why the row is there, where that is a number."""
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
    rows = {(row.id, row.k): row for row in reversed(evaluation.samples)}
    headline = results["headline"]["model"]
    first = [m for m in results["models"] if m["name"] == results["baseline"]]
    second = [m for m in results["models"] if m["name"] == headline and m not in first]
    # The two that the page is about come first, so that a narrow screen shows them side by side
    models = [*first, *second, *(m for m in results["models"] if m not in first and m not in second)]
    roles = ["baseline", *("candidate" if model in second else model["role"] for model in models[1:])]
    labels, tabs = Labels(results), []
    for selection in choose(evaluation, random_pairs, ranked_pairs):
        shown_rows = []
        for number, pair in enumerate(selection.pairs):
            shown = []
            for place, (model, role) in enumerate(zip(models, roles, strict=True)):
                sample = sample_of(model["name"], pair)
                missing = shortened(sample, 160).short if isinstance(sample, str) else ""
                scores = _scores_of(evaluation, labels, model["name"], pair, compared=place > 0)
                element, label = f"sample-{selection.key}-{number}-{place}", labels.model(model["name"])
                shown.append(Shown(element, label, role, None if isinstance(sample, str) else sample, missing, scores))
            why = selection.why.get(pair, "").replace("-", "\u2212")
            shown_rows.append(GalleryRow(rows[pair], why, shown))
        tabs.append(GalleryTab(selection.key, selection.title, selection.note, shown_rows))
    return tabs


def _scores_of(
    evaluation: Evaluation, labels: Labels, model: str, pair: Pair, compared: bool
) -> list[tuple[str, str, str]]:
    """(scorer, score, difference to the baseline) of one sample."""
    rows = []
    for scorer in labels.ran:
        name, digits = scorer["name"], labels.decimals[scorer["name"]]
        score = evaluation.scores.get((model, name, *pair))
        base = evaluation.scores.get((evaluation.results["baseline"], name, *pair))
        if score is not None:
            difference = signed(score - base, digits) if compared and base is not None else ""
            rows.append((labels.title(name, 24), plain(score, digits), difference))
    return rows


class VotePair(TypedDict):
    """A pair of the blind vote; both are ids of elements of the page."""

    id: str
    k: int
    seed: str
    prompt: str
    baseline: str
    candidate: str


def vote_pairs(tabs: list[GalleryTab]) -> list[VotePair]:
    """The random pairs of which both samples are in the page."""
    pairs: list[VotePair] = []
    for row in tabs[0].rows:
        samples = row.shown[:2]
        if len(samples) == 2 and all(shown.sample for shown in samples):
            baseline, candidate = (shown.element for shown in samples)
            sample, prompt = row.sample, clean(shortened(row.sample.prompt).short)
            pairs.append(
                {
                    "id": sample.id,
                    "k": sample.k,
                    "seed": sample.seed,
                    "prompt": prompt,
                    "baseline": baseline,
                    "candidate": candidate,
                }
            )
    return pairs


def votes(results: Results, pairs: list[VotePair]) -> dict[str, object]:
    """What page.js needs for the blind vote."""
    baseline, candidate = results["baseline"], results["headline"]["model"]
    assert candidate is not None, "a vote needs two models"
    labels = Labels(results)
    return {
        "title": results["title"][:1000],
        "protocol_id": results["protocol"]["id"],
        "baseline": baseline[:1000],
        "candidate": candidate[:1000],
        "labels": {
            "baseline": clean(labels.model(baseline)),
            "candidate": clean(labels.model(candidate)),
        },
        "guidance_scale": results["headline"]["guidance_scale"],
        "pairs": pairs,
    }
