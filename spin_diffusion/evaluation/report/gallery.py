"""The gallery: which prompts and seeds the page shows of every model, with what the scorers say; the blind vote."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spin_diffusion.evaluation.records import Results
from spin_diffusion.evaluation.report.editions import Sample, SampleRow, edition_of
from spin_diffusion.evaluation.report.reading import Evaluation, Labels, Pair, differences
from spin_diffusion.evaluation.report.wording import clean, plain, shortened, signed


@dataclass(frozen=True)
class Selection:
    """A tab of the gallery."""

    key: str
    title: str
    note: str
    pairs: list[Pair]
    why: dict[Pair, str]
    """Why a pair is there, where that is a number."""


def choose(evaluation: Evaluation, random_pairs: int, ranked_pairs: int) -> list[Selection]:
    """The tabs: a random sample, which no score has chosen, then the extremes. A prompt is in each tab once.

    Pairs are ranked by the mean over the scorers of the paired difference in units of its standard deviation, so that
    no scorer counts more because its numbers are larger; a scorer of drift does not count.
    """
    results = evaluation.results
    baseline, candidate = results["baseline"], results["headline"]["model"]
    ids = sorted({(row.id, row.k) for row in evaluation.samples})
    # Drawn by the protocol: who evaluates cannot draw until he likes the sample
    drawn = _one_per_prompt(random.Random(results["protocol"]["id"]).sample(ids, len(ids)))
    num_prompts = len(drawn)
    shown = drawn[:random_pairs]
    note = f"{len(shown)} of {num_prompts} prompts, drawn by the protocol's id: no score has chosen them."
    selections = [Selection("random", "Random", note, shown, {})]
    if candidate is None or candidate == baseline:
        return selections

    judges = [s["name"] for s in results["scorers"] if s["state"] == "run" and s["role"] != "drift"]
    titles = {s["name"]: s["title"] for s in results["scorers"]}
    by_judge = {name: differences(evaluation.scores, name, baseline, candidate) for name in judges}
    by_judge = {name: _standardised(by_pair) for name, by_pair in by_judge.items() if by_pair}
    common = sorted(set.intersection(*(set(by_pair) for by_pair in by_judge.values()))) if by_judge else []
    by_pair = {pair: {name: of_judge[pair] for name, of_judge in by_judge.items()} for pair in common}
    mean = {pair: float(np.mean(list(found.values()))) for pair, found in by_pair.items()}
    spread = {pair: max(found.values()) - min(found.values()) for pair, found in by_pair.items()}
    of_mean = {pair: f"{mean[pair]:+.2f} sd" for pair in common}
    of_spread = {pair: _disagreement(found, titles) for pair, found in by_pair.items()}
    loss = {pair: -value for pair, value in mean.items()}
    unit = "mean over the scorers of the difference, in standard deviations"
    blind = "Where the scorers differ most about what changed: look here for what one of them is blind to."
    for key, title, note, size, why in (
        ("wins", "Best wins", f"Where the candidate gains most ({unit}).", mean, of_mean),
        ("losses", "Worst losses", f"Where the candidate loses most ({unit}).", loss, of_mean),
        ("torn", "Scorers disagree", blind, spread, of_spread),
    ):
        ranked = [pair for pair in sorted(common, key=size.__getitem__, reverse=True) if size[pair] > 0]
        selections.append(Selection(key, title, note, _one_per_prompt(ranked)[:ranked_pairs], why))
    return selections


def _one_per_prompt(pairs: list[Pair]) -> list[Pair]:
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair[0], pair)
    return list(first.values())


def _standardised(by_pair: dict[Pair, float]) -> dict[Pair, float]:
    deviation = float(np.std(list(by_pair.values())))
    return {pair: difference / deviation if deviation > 0 else 0.0 for pair, difference in by_pair.items()}


def _disagreement(by_judge: dict[str, float], titles: dict[str, str]) -> str:
    high, low = max(by_judge, key=by_judge.__getitem__), min(by_judge, key=by_judge.__getitem__)
    return ", ".join(f"{titles[name][:40]} {by_judge[name]:+.2f} sd" for name in (high, low))


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


def vote_pairs(tabs: list[GalleryTab]) -> list[dict[str, object]]:
    """The random pairs of which both samples are in the page, with the ids of their elements."""
    return [
        {
            "id": row.sample.id,
            "k": row.sample.k,
            "seed": row.sample.seed,
            "prompt": clean(shortened(row.sample.prompt).short),
            "baseline": row.shown[0].element,
            "candidate": row.shown[1].element,
        }
        for row in tabs[0].rows
        if len(row.shown) > 1 and all(shown.sample for shown in row.shown[:2])
    ]


def votes(results: Results, pairs: list[dict[str, object]]) -> dict[str, object]:
    """What page.js needs for the blind vote."""
    baseline, candidate = results["baseline"], results["headline"]["model"]
    assert candidate is not None, "a vote needs two models"
    labels = Labels(results)
    return {
        "title": results["title"][:1000],
        "protocol_id": results["protocol"]["id"],
        "baseline": baseline[:1000],
        "candidate": candidate[:1000],
        "labels": {"baseline": clean(labels.model(baseline)), "candidate": clean(labels.model(candidate))},
        "guidance_scale": results["headline"]["guidance_scale"],
        "pairs": pairs,
    }
