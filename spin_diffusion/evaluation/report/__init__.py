"""The evaluation's page: one report.html that needs nothing but itself.

    wording.py        names, numbers, verdicts and texts in the page's words
    pictures.py       each picture as a data: address
    texts.py          each answer as a passage; rows.py: what a row of both has
    editions.py       what the page says and shows of images, and what of answers
    reading.py        results.json, scores.parquet, images.parquet or answers.parquet -> Evaluation, checked
    tables.py         results.json -> rows of text
    distributions.py  scores.parquet -> histograms of the differences
    training.py       training curves and measures -> charts and rows of text
    plots.py          numbers -> SVG
    choosing.py       which samples are shown
    gallery.py        the samples of all models side by side, with their scores; the blind vote
    facts.py          where the models came from, how samples were made, what each scorer is
    page.html.j2      sets them, with images.html.j2 or answers.html.j2; style.css and page.js are inlined

Prompts, names and reasons are text that anybody may have written. The template escapes every one of them, and a policy
in the page forbids whatever is not this program's own style and script, known by their hashes.
"""

import base64
import functools
import hashlib
import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from spin_diffusion.evaluation.closing import losses_of
from spin_diffusion.evaluation.modalities import samples_per_prompt
from spin_diffusion.evaluation.report import distributions, facts, gallery, tables, training, wording
from spin_diffusion.evaluation.report.editions import edition_of, scale_label
from spin_diffusion.evaluation.report.reading import Evaluation, read_evaluation
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import write_file

MAX_PAGE_BYTES = 8_000_000
_RANDOM_PAIRS, _RANKED_PAIRS = 24, 8
_SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.0)
"""What is tried in turn, of the gallery, until the page is small enough."""


@dataclass(frozen=True)
class Page:
    """Everything that the template sets."""

    title: wording.Text
    baseline: str
    candidate: str
    """Empty: there is nothing to compare with the baseline."""
    scale: str
    verdict: wording.State | None
    reason: wording.Text
    facts: list[tuple[str, str]]
    notices: list[str]
    headline: list[tables.HeadlineRow]
    alarms: list[tables.AlarmRow]
    other_alarms: list[tables.AlarmRow]
    models: list[tables.ModelTable]
    verdicts: list[tables.VerdictRow]
    rankings: list[tables.Ranking]
    best_of_k: list[tables.ModelTable]
    best_by_average: list[tables.ModelTable]
    curves: list[tables.CurvePanel]
    training: list[training.TrainingPanel]
    training_legend: list[tuple[Markup, str]]
    events: list[training.EventRow]
    ledger: list[training.LedgerRow]
    disk: str
    measures: training.MeasureTable | None
    measure_curves: list[tables.CurvePanel]
    legend: list[tuple[Markup, str]]
    parts: list[tables.PartTable]
    distributions: list[distributions.Distribution]
    gallery: list[gallery.GalleryTab]
    num_votes: int
    failures: list[tables.FailureRow]
    num_failures: int
    protocol: list[tuple[str, wording.Text]]
    model_facts: list[facts.ModelFacts]
    scorer_facts: list[facts.ScorerFacts]
    environment: list[tuple[str, wording.Text]]
    roles: dict[str, str]
    edition: str
    """Template of the modality."""
    per_prompt: int
    min_prompts: int
    votes: Markup
    """JSON for page.js."""
    css: Markup
    js: Markup
    policy: str


def write_report(directory: Path, output: Path | None = None) -> Path:
    """Write the page of the evaluation in `directory` and return its path. Equal input gives equal bytes.

    Args:
        directory: holds results.json, scores.parquet, and images.parquet with its pictures or answers.parquet.
        output: the page; default: report.html beside results.json.

    Raises:
        InputError: a file is missing, damaged or of another schema version, or `output` is a folder.
    """
    output = directory / "report.html" if output is None else output
    if output.is_dir():
        raise InputError(
            f"{output} is a folder, and the report is to be written there: move it away or name another file"
        )
    page = build_page(read_evaluation(directory))
    write_file(output, lambda part: part.write_bytes(page))
    return output


def build_page(evaluation: Evaluation, max_bytes: int = MAX_PAGE_BYTES) -> bytes:
    """The page, with as many pictures or answers as fit into `max_bytes`."""
    template = _template()
    sample_of = gallery.sample_maker(evaluation)
    without_gallery = _page(evaluation)
    for share in _SHARES:
        tabs = gallery.gallery(evaluation, sample_of, round(share * _RANDOM_PAIRS), round(share * _RANKED_PAIRS))
        votes = gallery.votes(evaluation, tabs) if without_gallery.candidate else {"pairs": []}
        notices = list(without_gallery.notices)
        if share < 1:
            notices.append(
                f"The gallery is shortened to {share:.0%} of its rows, so that the page stays below "
                f"{max_bytes / 1e6:g} MB. {edition_of(evaluation.results).rest}"
            )
        content = replace(
            without_gallery, gallery=tabs, num_votes=len(votes["pairs"]), votes=_island(votes), notices=notices
        )
        page = template.render(page=content).encode("utf-8")
        if len(page) <= max_bytes:
            break
    return page


def _page(evaluation: Evaluation) -> Page:
    """Everything but the gallery and what hangs on it."""
    results = evaluation.results
    named = wording.labels(model["name"] for model in results["models"])
    headline, edition = results["headline"], edition_of(results)
    candidate = None if headline["model"] == results["baseline"] else headline["model"]
    verdict = next(
        (
            v
            for v in results["verdicts"]
            if (v["model"], v["guidance_scale"]) == (headline["model"], headline["guidance_scale"])
        ),
        None,
    )
    alarms, other_alarms = tables.alarm_rows(results)
    failures, num_failures = tables.failure_rows(results)
    histograms, doubts = distributions.distributions(evaluation)
    css, js = _asset("style.css"), _asset("page.js")
    return Page(
        title=wording.shortened(results["title"] or "Evaluation", 120),
        baseline=named[results["baseline"]],
        candidate="" if candidate is None else named[candidate],
        scale=scale_label(results, headline["guidance_scale"]),
        verdict=wording.STATES[verdict["verdict"]] if verdict and candidate is not None else None,
        reason=wording.shortened(verdict["reason"] if verdict and candidate is not None else "", 600),
        facts=facts.banner_facts(results),
        notices=[*losses_of(results, headline["guidance_scale"]), *doubts],
        headline=tables.headline_rows(results),
        alarms=alarms,
        other_alarms=other_alarms[: tables.MAX_LISTED],
        models=tables.model_tables(results),
        verdicts=tables.verdict_rows(results) if len(results["verdicts"]) > 1 else [],
        rankings=tables.rankings(results),
        best_of_k=tables.aggregate_tables(results, "best_of_k"),
        best_by_average=tables.aggregate_tables(results, "best_by_average"),
        curves=tables.curve_panels(results),
        training=training.training_panels(results),
        training_legend=training.training_legend(),
        events=training.event_rows(results),
        ledger=training.ledger_rows(results),
        disk=training.disk_line(results),
        measures=training.measure_table(results),
        measure_curves=training.measure_curves(results),
        legend=tables.legend(results),
        parts=tables.part_tables(results),
        distributions=histograms,
        gallery=[],
        num_votes=0,
        failures=failures,
        num_failures=num_failures,
        protocol=facts.protocol_facts(results),
        model_facts=[facts.model_facts(model, named) for model in results["models"][: tables.MAX_LISTED]],
        scorer_facts=[facts.scorer_facts(scorer) for scorer in results["scorers"]],
        environment=[(wording.shortened(k, 60).short, wording.shortened(v)) for k, v in results["environment"].items()],
        roles=edition.roles,
        edition=edition.template,
        per_prompt=samples_per_prompt(results["protocol"]),
        min_prompts=tables.MIN_PROMPTS,
        votes=Markup(),
        css=css,
        js=js,
        policy=(
            "default-src 'none'; img-src data:; "
            f"style-src '{_hash(css)}'; script-src '{_hash(js)}'; base-uri 'none'; form-action 'none'"
        ),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(_asset),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # The one place through which all text goes; what is Markup is this program's own
        finalize=lambda value: wording.clean(value) if type(value) is str else value,
    )
    return environment.get_template("page.html.j2")


def _asset(name: str) -> Markup:
    return Markup(resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _island(content: dict[str, Any]) -> Markup:
    """JSON that cannot end its script element, whatever is in it."""
    text = json.dumps(content, ensure_ascii=True, sort_keys=True)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
