"""The evaluation's page: one report.html that needs nothing but itself.

    reading.py     results.json, scores.parquet, images.parquet or answers.parquet -> Evaluation, checked; its labels
    editions.py    what the page says and shows of images, and what of answers
    wording.py     names, numbers, verdicts and texts in the page's words
    ranking.py     results.json -> the card at the top for several models, and which alarms to look into
    tables.py      results.json -> what tables, histograms and small print say beyond its entries
    history.py     two evaluations of one protocol -> what became of the older one's model
    training.py    training curves and measures -> charts and rows of text
    plots.py       numbers -> SVG
    gallery.py     samples of all models side by side, with their scores: which ones are shown; the blind vote
    page.py        what all pages have: templates, style, policy
    page.html.j2      sets them, with images.html.j2 or answers.html.j2; style.css and page.js are inlined

Prompts, names and reasons are text that anybody may have written. The template escapes every one of them, and a policy
in the page forbids whatever is not this program's own style and script, known by their hashes.
"""

import base64
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jinja2
from markupsafe import Markup

from spin_diffusion.evaluation.records import Results, TrainingEntries, samples_per_prompt
from spin_diffusion.evaluation.report import gallery, plots, ranking, tables, training, wording
from spin_diffusion.evaluation.report.editions import edition_of
from spin_diffusion.evaluation.report.history import Past
from spin_diffusion.evaluation.report.page import dress, environment
from spin_diffusion.evaluation.report.reading import Evaluation, Labels, read_evaluation
from spin_diffusion.evaluation.table_files import table_files, write_tables
from spin_diffusion.evaluation.tables import losses_of, not_swept, sweep_tables
from spin_diffusion.store.input_error import InputError, read_bytes
from spin_diffusion.store.run_dir import write_file

MAX_PAGE_BYTES = 8_000_000
_GENERATOR = Markup('<meta name="generator" content="spin-diffusion">')
"""By which a page is known, wherever it lies: no other file is replaced."""
_RANDOM_PAIRS, _RANKED_PAIRS = 24, 8
_FIRST_ROWS = 3
"""Rows of the gallery that are seen at once."""
_SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.0)
"""What is tried in turn, of the gallery, until the page is small enough."""


def write_report(directory: Path, output: Path | None = None, past: Sequence[Past] = ()) -> Path:
    """Write the page of the evaluation in `directory` and return its path. Equal input gives equal bytes. A page in
    `directory` has the tables as files beside it.

    Args:
        directory: holds results.json, scores.parquet, and images.parquet with its pictures or answers.parquet.
        output: the page; default: report.html beside results.json.
        past: older evaluations that it is set against.

    Raises:
        InputError: a file is missing, damaged or of another schema version, or `output` is there and is no page.
    """
    in_place, output = output is None, output or directory / "report.html"
    if output.is_dir():
        raise InputError(
            f"{output} is a folder, and the report is to be written there: move it away or name another file"
        )
    if not in_place and output.exists() and _GENERATOR.encode() not in read_bytes(output, MAX_PAGE_BYTES):
        raise InputError(f"{output} is there and is no page of this program: name another file")
    evaluation = read_evaluation(directory)
    page = build_page(evaluation, past=past)
    write_file(output, lambda part: part.write_bytes(page))
    if in_place:
        write_tables(evaluation.results, directory)
    return output


def write_run_page(
    directory: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    so_far: str,
    of_answers: bool,
    training: TrainingEntries,
) -> None:
    """Write the page of a run that evaluates nothing, by the same template: what it plays with, previews, training.

    Args:
        facts: (name, value) of what the run plays with.
        so_far: how far it is, in a line.
        of_answers: whether a language model is trained.
    """
    bare: dict[str, object] = {"title": title, "models": [], "scorers": [], "results": [], "comparisons": []}
    bare["protocol"] = {"sampling": {}} if of_answers else {}
    evaluation = Evaluation(directory, cast(Results, {**bare, **training}), [], {})
    told = [(name, wording.shortened(value, 600)) for name, value in facts]
    sections = _training_sections(evaluation) | {"run": told, "so_far": so_far}
    page = _template().render(page=sections).encode("utf-8")
    write_file(directory / "report.html", lambda part: part.write_bytes(page))


def build_page(evaluation: Evaluation, max_bytes: int = MAX_PAGE_BYTES, past: Sequence[Past] = ()) -> bytes:
    """The page, with as many pictures or answers as fit into `max_bytes`."""
    sections, sample_of = _sections(evaluation), gallery.sample_maker(evaluation)
    for share in _SHARES:
        tabs = gallery.gallery(evaluation, sample_of, round(share * _RANDOM_PAIRS), round(share * _RANKED_PAIRS))
        pairs = gallery.vote_pairs(tabs)
        shown: dict[str, object] = {"gallery": tabs, "num_votes": len(pairs), "votes": Markup(), "past": past}
        if pairs:
            shown["votes"] = _island(gallery.votes(evaluation.results, pairs))
        if share < 1:
            shown["shortened"] = (
                f"The gallery is shortened to {share:.0%} of its rows, so that the page stays below "
                f"{max_bytes / 1e6:g} MB. {edition_of(evaluation.results).rest}"
            )
        page = _template().render(page=sections | shown).encode("utf-8")
        if len(page) <= max_bytes:
            break
    return page


def _sections(evaluation: Evaluation) -> dict[str, object]:
    """What the template sets beside the entries of results.json, but for the gallery and what hangs on it."""
    results = evaluation.results
    labels, headline = Labels(results), results["headline"]
    candidate = None if headline["model"] == results["baseline"] else headline["model"]
    of_headline = [
        verdict
        for verdict in results["verdicts"]
        if (verdict["model"], verdict["guidance_scale"]) == (candidate, headline["guidance_scale"])
    ]
    alarms, other_alarms = tables.alarm_rows(results)
    card = ranking.ranking_card(results)
    return {
        **_training_sections(evaluation),
        "baseline": labels.model(results["baseline"]),
        "candidate": "" if candidate is None else labels.model(candidate),
        "scale": labels.scale(headline["guidance_scale"]),
        "verdict": next(iter(of_headline), None),
        "card": card,
        "to_do": ranking.to_do(results, card),
        "first_rows": _FIRST_ROWS,
        "facts": tables.banner_facts(results),
        "notices": [*losses_of(results, headline["guidance_scale"]), *not_swept(results)],
        "shortened": "",
        "downloads": {name: _address(text) for name, text in table_files(results).items()},
        "headline": tables.headline_rows(results),
        "distances": tables.distance_tables(results),
        "alarms": alarms,
        "other_alarms": other_alarms[: wording.MAX_LISTED],
        "models": tables.model_tables(results),
        "verdicts": results["verdicts"][: wording.MAX_LISTED] if len(results["verdicts"]) > 1 else [],
        "rankings": ranking.rankings(results),
        "best_of_k": tables.aggregate_tables(results, "best_of_k"),
        "best_by_average": tables.aggregate_tables(results, "best_by_average"),
        "curves": [
            ("rounds", "Over the rounds", tables.curve_panels(results)),
            ("strengths", "Over the strength", tables.strength_panels(results)),
        ],
        "legend": [(plots.legend_key(style), labels.scale(scale)) for style, scale in enumerate(labels.scales)],
        "sweeps": sweep_tables(results),
        "parts": tables.part_tables(results),
        "distributions": tables.distributions(evaluation),
        "protocol": tables.protocol_facts(results),
        "per_prompt": samples_per_prompt(results["protocol"]),
    }


def _training_sections(evaluation: Evaluation) -> dict[str, object]:
    """What the template needs of every page, evaluated or not: its dress, and what is told of training."""
    results = evaluation.results
    told: dict[str, object] = {
        "training": training.training_panels(results),
        "selection": training.selection_panels(results),
        "events": results.get("training_events", [])[: wording.MAX_LISTED],
        "ledger": results.get("ledger", [])[: wording.MAX_LISTED],
        "measures": training.measure_table(results),
    }
    return {
        "results": results,
        "labels": Labels(results),
        "edition": edition_of(results),
        **dress("page.js"),
        "generator": _GENERATOR,
        "run": [],
        **told,
        "has_training": any(told.values()),
        "training_legend": training.LEGEND,
        "previews": training.preview_sheets(evaluation),
        "disk": training.disk_line(results),
        "measure_curves": training.measure_curves(results),
    }


@functools.cache
def _template() -> jinja2.Template:
    made = environment(__name__)
    made.filters |= {
        "shortened": wording.shortened,
        "short": lambda text, length=wording.PROMPT_CHARACTERS: wording.shortened(text, length).short,
        "passage": wording.passage,
        "direction": wording.direction,
        "significant": wording.significant,
        "p_value": wording.p_value,
        "known": wording.known,
        "difference": wording.difference_number,
        "mark": tables.mark,
        "own_bar": tables.own_bar,
        "win_rate": tables.win_rate,
        "outcome": training.outcome,
        "memory": training.memory,
        "scorer_facts": tables.scorer_facts,
    }
    made.globals |= {
        "states": wording.STATES,
        "phases": training.PHASES,
        "metrics": wording.METRICS,
        "min_prompts": tables.MIN_PROMPTS,
        "max_parts": tables.MAX_PARTS,
        "max_listed": wording.MAX_LISTED,
        "max_failures": 100,
    }
    return made.get_template("page.html.j2")


def _address(text: str) -> str:
    """A text as a data: address, which a link saves under a name."""
    return f"data:text/plain;base64,{base64.b64encode(text.encode('utf-8', 'replace')).decode('ascii')}"


def _island(content: dict[str, object]) -> Markup:
    """JSON that cannot end its script element, whatever is in it."""
    text = json.dumps(content, ensure_ascii=True, sort_keys=True)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
