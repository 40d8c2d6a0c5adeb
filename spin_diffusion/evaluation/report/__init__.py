"""The evaluation's page: one report.html that needs nothing but itself.

    reading.py      results.json, scores.parquet, images.parquet or answers.parquet -> Evaluation, checked
    tables.py       Evaluation -> rows of text
    plots.py        numbers -> SVG
    pictures.py     which samples are shown, and each picture as a data: address
    texts.py        each answer as a passage
    training.py     training curves and measures -> charts and rows of text
    page.html.j2    sets them; style.css and page.js are inlined

Prompts, names and reasons are text that anybody may have written. The template escapes every one of them, and a policy
in the page forbids whatever is not this program's own style and script, known by their hashes.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from spin_diffusion.evaluation.protocols import guidance_scales, is_of_answers, samples_per_prompt
from spin_diffusion.evaluation.report import pictures, tables, texts, training
from spin_diffusion.evaluation.report.reading import Evaluation, read_evaluation
from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.run_dir import write_file

MAX_PAGE_BYTES = 8_000_000
_RANDOM_PAIRS, _RANKED_PAIRS = 24, 8
_SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.0)
"""What is tried in turn, of the gallery, until the page is small enough."""


@dataclass(frozen=True)
class Shown:
    """One picture or answer of the gallery with what the scorers say of it."""

    element: str
    """Its id in the page."""
    label: str
    role: str
    sample: pictures.Picture | texts.Passage | None
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
    prompt: tables.Text
    category: str
    why: str
    real: tables.Text | None
    """The real answer."""
    shown: list[Shown]


@dataclass(frozen=True)
class GalleryTab:
    """One way to choose pictures."""

    key: str
    title: str
    note: str
    rows: list[GalleryRow]


@dataclass(frozen=True)
class ModelFacts:
    """Where a model came from."""

    label: tables.Text
    role: str
    round: str
    kind: str
    source: tables.Text
    base: tables.Text
    weights_sha256: str


@dataclass(frozen=True)
class ScorerFacts:
    """What must be known of a scorer to compute its numbers again."""

    title: str
    facts: list[tuple[str, tables.Text]]


@dataclass(frozen=True)
class Page:
    """Everything that the template sets."""

    title: tables.Text
    baseline: str
    candidate: str
    """Empty: there is nothing to compare with the baseline."""
    scale: str
    verdict: tables.State | None
    reason: tables.Text
    facts: list[tuple[str, str]]
    notices: list[str]
    headline: list[tables.HeadlineRow]
    alarms: list[tables.AlarmRow]
    other_alarms: list[tables.AlarmRow]
    models: list[tables.ModelTable]
    verdicts: list[tables.VerdictRow]
    best_of_k: list[tables.ModelTable]
    best_by_average: list[tables.ModelTable]
    curves: list[tables.CurvePanel]
    training: list[training.TrainingPanel]
    training_legend: list[tuple[Markup, str]]
    events: list[training.EventRow]
    ledger: list[training.LedgerRow]
    measures: training.MeasureTable | None
    measure_curves: list[tables.CurvePanel]
    legend: list[tuple[Markup, str]]
    parts: list[tables.PartTable]
    distributions: list[tables.Distribution]
    gallery: list[GalleryTab]
    num_votes: int
    failures: list[tables.FailureRow]
    num_failures: int
    protocol: list[tuple[str, tables.Text]]
    model_facts: list[ModelFacts]
    scorer_facts: list[ScorerFacts]
    environment: list[tuple[str, tables.Text]]
    roles: dict[str, str]
    of_answers: bool
    sample: str
    """What a model makes: image or answer."""
    setting: str
    """What tells two evaluations of one model apart."""
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
        raise InputError(f"{output} is a folder: name the file that the report shall be written to")
    page = build_page(read_evaluation(directory))
    write_file(output, lambda part: part.write_bytes(page))
    return output


def build_page(evaluation: Evaluation, max_bytes: int = MAX_PAGE_BYTES) -> bytes:
    """The page, with as many pictures or answers as fit into `max_bytes`."""
    template = _template()
    of_answers = is_of_answers(evaluation.results["protocol"])
    sample_of = texts.passages(evaluation) if of_answers else pictures.thumbnails(evaluation)
    without_gallery = _page(evaluation)
    rest = "All answers are in answers.parquet." if of_answers else "All pictures lie beside results.json."
    for share in _SHARES:
        gallery = _gallery(evaluation, sample_of, round(share * _RANDOM_PAIRS), round(share * _RANKED_PAIRS))
        votes = _votes(evaluation, gallery) if without_gallery.candidate else {"pairs": []}
        notices = list(without_gallery.notices)
        if share < 1:
            notices.append(
                f"The gallery is shortened to {share:.0%} of its rows, so that the page stays below "
                f"{max_bytes / 1e6:g} MB. {rest}"
            )
        content = replace(
            without_gallery, gallery=gallery, num_votes=len(votes["pairs"]), votes=_island(votes), notices=notices
        )
        page = template.render(page=content).encode("utf-8")
        if len(page) <= max_bytes:
            break
    return page


def _page(evaluation: Evaluation) -> Page:
    """Everything but the gallery and what hangs on it."""
    results = evaluation.results
    named = tables.labels(model["name"] for model in results["models"])
    headline, protocol = results["headline"], results["protocol"]
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
    distributions, doubts = tables.distributions(evaluation)
    of_answers = is_of_answers(protocol)
    css, js = _asset("style.css"), _asset("page.js")
    return Page(
        title=tables.shortened(results["title"] or "Evaluation", 120),
        baseline=named[results["baseline"]],
        candidate="" if candidate is None else named[candidate],
        scale=tables.scale_label(results, headline["guidance_scale"]),
        verdict=tables.STATES[verdict["verdict"]] if verdict and candidate is not None else None,
        reason=tables.shortened(verdict["reason"] if verdict and candidate is not None else "", 600),
        facts=_facts(results),
        notices=doubts,
        headline=tables.headline_rows(results),
        alarms=alarms,
        other_alarms=other_alarms[: tables.MAX_LISTED],
        models=tables.model_tables(results),
        verdicts=tables.verdict_rows(results) if len(results["verdicts"]) > 1 else [],
        best_of_k=tables.aggregate_tables(results, "best_of_k"),
        best_by_average=tables.aggregate_tables(results, "best_by_average"),
        curves=tables.curve_panels(results),
        training=training.training_panels(results),
        training_legend=training.training_legend(),
        events=training.event_rows(results),
        ledger=training.ledger_rows(results),
        measures=training.measure_table(results),
        measure_curves=training.measure_curves(results),
        legend=tables.legend(results),
        parts=tables.part_tables(results),
        distributions=distributions,
        gallery=[],
        num_votes=0,
        failures=failures,
        num_failures=num_failures,
        protocol=_protocol(protocol),
        model_facts=[_model_facts(model, named) for model in results["models"][: tables.MAX_LISTED]],
        scorer_facts=[_scorer_facts(scorer) for scorer in results["scorers"]],
        environment=[(tables.shortened(k, 60).short, tables.shortened(v)) for k, v in results["environment"].items()],
        roles=tables.ROLES_OF_ANSWERS if of_answers else tables.ROLES,
        of_answers=of_answers,
        sample="answer" if of_answers else "image",
        setting="sampling" if of_answers else "guidance",
        per_prompt=samples_per_prompt(protocol),
        min_prompts=tables.MIN_PROMPTS,
        votes=Markup(),
        css=css,
        js=js,
        policy=(
            "default-src 'none'; img-src data:; "
            f"style-src '{_hash(css)}'; script-src '{_hash(js)}'; base-uri 'none'; form-action 'none'"
        ),
    )


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The banner's small print."""
    protocol = results["protocol"]
    ran = sum(scorer["state"] == "run" for scorer in results["scorers"])
    headline = (results["headline"]["model"], results["headline"]["guidance_scale"])
    states = [a["state"] for a in results["alarms"] if (a["model"], a["guidance_scale"]) == headline]
    alarms = f"{_counted(states.count('alarm'), 'alarm')}, {_counted(states.count('warn'), 'warning')}"
    return [
        ("prompts", f"{protocol['prompt_set']['num_prompts']:,}"),
        (f"{'answers' if is_of_answers(protocol) else 'images'} per prompt", str(samples_per_prompt(protocol))),
        ("scorers run", f"{ran} of {len(results['scorers'])}"),
        ("alarms", alarms if states else "none computed"),
        ("protocol", protocol["id"][:12]),
    ]


def _counted(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"


def _gallery(
    evaluation: Evaluation,
    sample_of: Callable[[str, pictures.Pair], pictures.Picture | texts.Passage | str],
    random_pairs: int,
    ranked_pairs: int,
) -> list[GalleryTab]:
    results = evaluation.results
    named = tables.labels(model["name"] for model in results["models"])
    digits = tables.decimals_by_scorer(results)
    rows = {(row.id, row.k): row for row in reversed(evaluation.samples)}
    ran = [scorer for scorer in results["scorers"] if scorer["state"] == "run"]
    headline = results["headline"]["model"]
    first = [m for m in results["models"] if m["name"] == results["baseline"]]
    second = [m for m in results["models"] if m["name"] == headline and m not in first]
    # The two that the page is about come first, so that a narrow screen shows them side by side
    models = [*first, *second, *(m for m in results["models"] if m not in first and m not in second)]
    tabs = []
    for choice in pictures.choose(evaluation, random_pairs, ranked_pairs):
        shown_rows = []
        for number, pair in enumerate(choice.pairs):
            shown = []
            for place, model in enumerate(models):
                sample = sample_of(model["name"], pair)
                scores = []
                for scorer in ran:
                    score = evaluation.scores.get((model["name"], scorer["name"], *pair))
                    base = evaluation.scores.get((results["baseline"], scorer["name"], *pair))
                    if score is None:
                        continue
                    compared = place > 0 and base is not None
                    scores.append(
                        (
                            tables.shortened(scorer["title"] or scorer["name"], 24).short,
                            tables.plain(score, digits[scorer["name"]]),
                            tables.signed(score - base, digits[scorer["name"]]) if compared else "",
                        )
                    )
                role = "baseline" if place == 0 else "candidate" if model in second else model["role"]
                missing = isinstance(sample, str)
                shown.append(
                    Shown(
                        f"sample-{choice.key}-{number}-{place}", named[model["name"]], role,
                        None if missing else sample, tables.shortened(sample, 160).short if missing else "", scores,
                    )
                )  # fmt: skip
            row = rows[pair]
            reference = getattr(row, "reference", None)
            shown_rows.append(
                GalleryRow(
                    row.id, row.k, row.seed, tables.shortened(row.prompt),
                    tables.shortened(row.category, 60).short, choice.why.get(pair, "").replace("-", "\u2212"),
                    None if reference is None else tables.passage(reference), shown,
                )
            )  # fmt: skip
        tabs.append(GalleryTab(choice.key, choice.title, choice.note, shown_rows))
    return tabs


def _votes(evaluation: Evaluation, gallery: list[GalleryTab]) -> dict[str, Any]:
    """What page.js needs for the blind vote: the random pairs of which both samples are in the page."""
    results = evaluation.results
    named = {name: tables.clean(label) for name, label in tables.labels(m["name"] for m in results["models"]).items()}
    pairs = []
    for row in gallery[0].rows:
        baseline, candidate = row.shown[0], row.shown[1]
        if baseline.sample and candidate.sample:
            pairs.append(
                {"id": row.id, "k": row.k, "seed": row.seed, "prompt": tables.clean(row.prompt.short),
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


def _protocol(protocol: dict[str, Any]) -> list[tuple[str, tables.Text]]:
    prompts = protocol["prompt_set"]
    given = "as the pictures were given"
    if is_of_answers(protocol):
        names = {"top_p": "top-p", "top_k": "top-k", "max_new_tokens": "longest answer, tokens"}
        sampling = [
            (names.get(key, key.replace("_", " ")), "none" if value is None else str(value))
            for key, value in protocol["sampling"].items()
        ]
        how = [*sampling, ("real answers: SHA-256", protocol.get("references_sha256", ""))]
    else:
        steps = protocol["num_inference_steps"]
        how = [
            ("sampler", protocol["sampler"]),
            ("denoising steps", given if steps is None else str(steps)),
            ("guidance scales", ", ".join("as given" if s is None else f"{s:g}" for s in guidance_scales(protocol))),
            ("resolution", given if protocol["resolution"] is None else f"{protocol['resolution']} px"),
        ]
    facts = [
        ("protocol id", protocol["id"]),
        ("prompts", f"{prompts['name']}, {prompts['num_prompts']:,}"),
        ("prompts: SHA-256", prompts["sha256"]),
        ("prompts: licence", prompts["licence"]),
        ("prompts: source", prompts["source"]),
        (f"{'answers' if is_of_answers(protocol) else 'images'} per prompt", str(samples_per_prompt(protocol))),
        ("seed", str(protocol["seed"])),
        ("rule for seeds", protocol["seed_rule"]),
        *how,
    ]
    return [(tables.shortened(name, 60).short, tables.shortened(value)) for name, value in facts]


def _model_facts(model: dict[str, Any], named: dict[str, str]) -> ModelFacts:
    short = named[model["name"]]
    whole = tables.shortened(model["name"], 48)
    return ModelFacts(
        tables.Text(short, whole.full, whole.note), model["role"],
        "" if model["round"] is None else str(model["round"]), model["kind"],
        tables.shortened(model["source"]), tables.shortened(model["base"] or ""),
        tables.shortened(model["weights_sha256"] or "", 64).short,
    )  # fmt: skip


def _scorer_facts(scorer: dict[str, Any]) -> ScorerFacts:
    facts = [
        ("name", scorer["name"]),
        ("state", scorer["state"] + (f": {scorer['reason']}" if scorer["reason"] else "")),
        ("role", scorer["role"]),
        ("scale", scorer["scale"]),
        ("weights from", scorer["source"]),
        *((f"SHA-256 of {file}", value) for file, value in scorer["checkpoint"].items()),
        ("pixels", scorer["preprocessing"]),
        ("text", scorer["text"]),
        ("licence", scorer["licence"]),
        ("citation", scorer["citation"]),
    ]
    title = tables.shortened(scorer["title"] or scorer["name"], 60).short
    return ScorerFacts(
        title, [(tables.shortened(name, 60).short, tables.shortened(value, 300)) for name, value in facts if value]
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # The one place through which all text goes; what is Markup is this program's own
        finalize=lambda value: tables.clean(value) if type(value) is str else value,
    )
    return environment.from_string(_asset("page.html.j2"))


def _asset(name: str) -> Markup:
    return Markup(resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _island(content: dict[str, Any]) -> Markup:
    """JSON that cannot end its script element, whatever is in it."""
    text = json.dumps(content, ensure_ascii=True, sort_keys=True)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
