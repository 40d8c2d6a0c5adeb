import base64
import csv
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spin_diffusion.evaluation.report import (
    MAX_PAGE_BYTES,
    build_page,
    editions,
    gallery,
    plots,
    ranking,
    tables,
    wording,
    write_report,
)
from spin_diffusion.evaluation.report.reading import read_evaluation
from spin_diffusion.store.input_error import InputError
from tests.evaluation.report.made_up import NASTY_PROMPTS, SCRIPT, write_evaluation

VOID = {"meta", "img", "br", "link", "input", "hr", "area", "base", "col", "embed", "source", "track", "wbr"}


class Parsed(HTMLParser):
    """Every element with its attributes, the text of scripts and styles, and everything that is read."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            tag, attrs, text = self.raw[-1]
            self.raw[-1] = (tag, attrs, text + data)
        else:
            self.text += data


def said(page: Parsed) -> str:
    return " ".join(page.text.split())


def count(page: Parsed, tag: str, **wanted: str) -> int:
    wanted = {name.rstrip("_"): value for name, value in wanted.items()}
    return sum(
        t == tag and all(value in (attrs.get(name) or "").split() for name, value in wanted.items())
        for t, attrs in page.elements
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole evaluation with its page; do not write into it."""
    directory = tmp_path_factory.mktemp("whole")
    write_evaluation(directory)
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def page(whole: Path) -> Parsed:
    return Parsed((whole / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The folder of a small evaluation, to be damaged."""
    write_evaluation(
        tmp_path / "small", num_prompts=6, scorers=("hps_v2_1",), scales=(3.0,), nasty=False, images_per_prompt=1,
        models=(("base", "baseline", 0), ("round 1", "round", 1)), headline="round 1",
    )  # fmt: skip
    return tmp_path / "small"


def change(directory: Path, **changed: object) -> None:
    path = directory / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def parsed(directory: Path) -> Parsed:
    return Parsed(write_report(directory).read_text(encoding="utf-8"))


# What is read


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_another_schema_version_is_refused(small: Path, version: object) -> None:
    change(small, schema_version=version)
    with pytest.raises(InputError, match="schema_version .* reads 1") as raised:
        write_report(small)
    assert "\n" not in str(raised.value)
    assert not (small / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"), ("[]", "schema_version null"), ("{", "not JSON"), ('{"schema_version": NaN}', "not JSON"),
        ("\xff", "JSON"), ("[" * 100_000, "not JSON"), ('{"schema_version": 1e999}', "not JSON"),
        ('{"schema_version": 1}', "not what an evaluation writes: alarms is missing"),
    ],
)  # fmt: skip
def test_damaged_results_are_refused_in_one_line(small: Path, content: str, message: str) -> None:
    (small / "results.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message) as raised:
        write_report(small)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_invalid_results_are_refused_with_the_place(small: Path) -> None:
    models = json.loads((small / "results.json").read_text())["models"]
    models[1]["role"] = "x" * 5000
    change(small, models=models)
    with pytest.raises(InputError, match=r"models\[1\]\.role: expected one of baseline") as raised:
        write_report(small)
    assert len(str(raised.value)) < 600


def test_names_that_explain_nothing_are_refused(small: Path) -> None:
    results = json.loads((small / "results.json").read_text())
    change(small, headline={"model": "round 9", "guidance_scale": 3.0})
    with pytest.raises(InputError, match="headline 'round 9' is not among the models"):
        write_report(small)
    change(small, headline=results["headline"], models=[results["models"][0]] * 2)
    with pytest.raises(InputError, match="model 'base' twice"):
        write_report(small)


@pytest.mark.parametrize("name", ["results.json", "scores.parquet", "images.parquet"])
def test_a_missing_file_is_named(small: Path, name: str) -> None:
    (small / name).unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(small)


@pytest.mark.parametrize("name", ["scores.parquet", "images.parquet"])
def test_a_damaged_table_is_refused(small: Path, name: str) -> None:
    (small / name).write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match="damaged"):
        write_report(small)


def test_a_missing_column_is_named(small: Path) -> None:
    table = pq.read_table(small / "images.parquet")
    pq.write_table(table.drop_columns(["seed"]), small / "images.parquet")
    with pytest.raises(InputError, match="lacks the column seed"):
        write_report(small)


def test_nothing_but_a_page_is_replaced_by_the_page(small: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write_report(small, tmp_path / "precious")
    (tmp_path / "index.html").write_text("<!doctype html>mine")
    with pytest.raises(InputError, match="is there and is no page of this program"):
        write_report(small, tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text() == "<!doctype html>mine"
    assert write_report(small, write_report(small, tmp_path / "page.html")).is_file()


def test_whole_numbers_are_numbers(small: Path) -> None:
    text = (small / "results.json").read_text()
    (small / "results.json").write_text(
        re.sub(r'"(low|high|mean|difference|guidance_scale|value)": [-\d.e]+', r'"\1": 3', text)
    )
    assert "guidance 3" in said(parsed(small))


# What is written


def test_equal_input_gives_equal_bytes_wherever_it_lies(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "report.html").unlink()
    other = write_report(tmp_path / "elsewhere", tmp_path / "deeper" / "page.html")
    assert other == tmp_path / "deeper" / "page.html"
    assert other.read_bytes() == (whole / "report.html").read_bytes()
    assert not list((tmp_path / "deeper").glob("*.spin-part"))


def test_the_page_runs_nothing_but_its_own_script(page: Parsed) -> None:
    scripts = [(attrs, text) for tag, attrs, text in page.raw if tag == "script"]
    assert [attrs.get("type") for attrs, _ in scripts] == ["application/json", None]
    assert scripts[1][1] == _asset("page.js")
    assert [text for tag, _, text in page.raw if tag == "style"] == [_asset("style.css")]
    for tag, attrs in page.elements:
        assert tag not in ("iframe", "object", "embed", "link", "base", "form"), tag
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "srcdoc")], (tag, attrs)


def test_the_page_asks_for_nothing_from_elsewhere(page: Parsed) -> None:
    for tag, attrs in page.elements:
        for name in ("src", "href", "action", "poster", "data", "srcset"):
            if (address := attrs.get(name)) is not None:
                allowed = (
                    "data:image/webp;base64," if name == "src" else "data:text/plain" if "download" in attrs else "#"
                )
                assert address.startswith(allowed), (tag, name, address[:80])
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    links = [attrs["href"] for _, attrs in page.elements if "href" in attrs and "download" not in attrs]
    assert links and all(link[1:] in ids for link in links)
    assert not re.search(r"@import|url\(", _asset("style.css"))


def test_the_policy_allows_the_two_blocks_by_their_hashes(page: Parsed) -> None:
    policies = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    hashes = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, attrs, text in page.raw
        if "type" not in attrs
    }
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "style-src": hashes["style"], "script-src": hashes["script"],
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    # It governs what comes after it
    first = [t for t, _ in page.elements].index("style")
    assert first > [a.get("http-equiv") for _, a in page.elements].index("Content-Security-Policy")


def test_the_tables_lie_beside_the_page_and_in_it(whole: Path, page: Parsed) -> None:
    results = json.loads((whole / "results.json").read_text())
    rows = list(csv.DictReader((whole / "results.csv").open(encoding="utf-8")))
    assert len(rows) == 5 * 2 * 3, "models, guidance scales, scorers"
    compared = {(c["model"], c["guidance_scale"], c["scorer"]): c for c in results["comparisons"]}
    for row in rows:
        entry = compared.get((row["model"], float(row["guidance_scale"]), row["scorer"]))
        assert (entry is None) == (row["model"] == "base") == (row["difference"] == "")
        assert entry is None or (float(row["difference_low"]), row["verdict"]) == (entry["low"], entry["verdict"])
    latex = (whole / "table.tex").read_text(encoding="utf-8").splitlines()
    assert [line.count(" & ") for line in latex if line.endswith(r"\\")] == [3] * (1 + 5 * 2)
    assert any(line.startswith(r"SFT \textless{}rival\textgreater{} \& co, guidance 3 & $") for line in latex)
    bold = [line for line in latex if r"$\mathbf{" in line]
    assert bold and not any(line.startswith("base") for line in bold)
    for tag, attrs in page.elements:
        if tag == "a" and (name := attrs.get("download")):
            saved = base64.b64decode((attrs["href"] or "").partition("base64,")[2])
            assert saved == (whole / name).read_bytes()
    assert {attrs.get("download") for _, attrs in page.elements} == {None, "results.csv", "table.tex", "table.md"}


def test_ids_are_there_once(page: Parsed) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_nasty_text_is_text(page: Parsed) -> None:
    text = said(page)
    assert SCRIPT in text and "{{ 7 * 7 }} {% raw %}" in text and "\U0001f984" in text
    assert "SFT <rival> & co" in text and 'give imagereward=PATH <b>"now"</b>' in text
    assert "(empty prompt)" in text
    assert "all 10,020 characters" in text and "x" * 10_000 in text
    assert "\u2400 \u2407 \u241b[31m \u2421 ? \ufffd" in text
    raw = page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", raw)


def test_every_prompt_is_isolated_from_the_text_around_it(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    places = [m.start() for m in re.finditer("\u202e", text)]
    assert places
    for place in places:
        before = text[max(0, place - 60) : place]
        assert "<bdi>" in before or 'alt="' in before or '"prompt": "' in before


def test_the_words_for_a_picture_are_its_model_and_its_prompt(tmp_path: Path) -> None:
    write_evaluation(tmp_path, num_prompts=len(NASTY_PROMPTS), scales=(3.0,), scorers=("hps_v2_1",))
    page = parsed(tmp_path)
    alts = {attrs["alt"] for tag, attrs in page.elements if tag == "img" and attrs.get("src")}
    for prompt in (SCRIPT, NASTY_PROMPTS[1], "empty prompt"):
        assert {f"base: {prompt}", f"SFT <rival> & co: {prompt}"} <= alts, prompt
    assert "base: control \u2400 \u2407 \u241b[31m \u2421 ? \ufffd characters" in alts


def test_a_sample_without_a_row_was_not_drawn(small: Path) -> None:
    table = pq.read_table(small / "images.parquet")
    pq.write_table(table.slice(0, len(table) - 1), small / "images.parquet")
    page = parsed(small)
    missing = count(page, "p", class_="missing")
    assert missing and said(page).count("was not drawn") == missing


def test_a_title_cannot_leave_the_island(small: Path) -> None:
    change(small, title=SCRIPT + "&amp;")
    titled = parsed(small)
    assert [attrs.get("type") for tag, attrs, _ in titled.raw if tag == "script"] == ["application/json", None]
    assert not set("<>&") & set(titled.raw[1][2])
    assert json.loads(titled.raw[1][2])["title"] == SCRIPT + "&amp;"


def test_the_island_cannot_be_left(page: Parsed) -> None:
    text = page.raw[[a.get("type") for _, a, _ in page.raw].index("application/json")][2]
    assert not set("<>&") & set(text)
    data = json.loads(text)
    assert data["candidate"] == "round 3" and data["baseline"] == "base" and len(data["pairs"]) == 24
    assert all(isinstance(pair["seed"], str) for pair in data["pairs"])


def test_the_headline_says_what_results_json_says(whole: Path, page: Parsed) -> None:
    results = json.loads((whole / "results.json").read_text())
    row = next(
        c for c in results["comparisons"]
        if (c["model"], c["scorer"], c["guidance_scale"]) == ("round 3", "hps_v2_1", 3.0)
    )  # fmt: skip
    rows = {r.scorer["name"]: r for r in tables.headline_rows(results)}
    shown, text = rows["hps_v2_1"], said(page)
    assert float(shown.difference.value.replace("\u2212", "-")) == pytest.approx(row["difference"], abs=0.006)
    assert shown.difference.value in text and wording.p_value(row["p_holm"]) in text
    assert f"{100 * row['win_rate']:.1f} %{row['wins']} / {row['ties']} / {row['losses']}" in text
    assert shown.verdict.word == row["verdict"]
    assert rows["sharpness"].verdict.tone == "drift" and "Sharpnessdrift neither way is better" in text
    assert "not run: its weights are not here" in text and not rows["imagereward"].baseline


def test_drift_is_never_coloured_as_good(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    marks = {
        table.scorer["role"]: {cell.mark.tone for _, cells in table.rows for cell in cells if cell.mark}
        for table in tables.model_tables(results)
    }
    assert marks["drift"] == {"drift"} and "good" in marks["held-out"]
    chart = plots.histogram("h", "label", [1.0, -1.0], is_drift=True)
    assert "--drift" in chart and "--good" not in chart and "--bad" not in chart


@pytest.mark.parametrize(
    ("verdict", "low", "is_bold"),
    [("improved", 0.1, True), ("inconclusive", 0.1, False), ("drift", 0.1, True), ("drift", -0.1, False)],
)
def test_only_a_significant_difference_is_bold(verdict: str, low: float, is_bold: bool, small: Path) -> None:
    # "inconclusive" above 0: the sign test does not confirm the interval
    comparisons = json.loads((small / "results.json").read_text())["comparisons"]
    change(small, comparisons=[row | {"low": low, "high": 0.3, "verdict": verdict} for row in comparisons])
    rows = [row for row in tables.headline_rows(read_evaluation(small).results) if row.verdict]
    assert rows and all((row.mark is not None) == is_bold for row in rows)
    assert {row.verdict.word for row in rows} == {verdict if is_bold else "inconclusive"}
    page = parsed(small)
    assert count(page, "td", class_="strong") == (len(rows) if is_bold else 0)


def test_all_sections_are_there(page: Parsed) -> None:
    headings = {attrs["id"] for tag, attrs in page.elements if tag == "h2"}
    assert headings == {
        "verdict", "scores", "alarms", "models", "rounds", "breakdown", "distributions", "vote", "gallery", "failures",
        "provenance", "ranking", "reading",
    }  # fmt: skip
    text = said(page)
    for words in (
        "not of training runs",
        "Compare only equal protocol ids",
        "too few",
        "best_of_k",
        "over all models, guidance scales, and scorers of this page",
    ):
        assert words in text
    assert count(page, "svg", class_="chart") == 3 + 3
    rows = count(page, "article", class_="pair")
    assert 24 + 2 * 8 <= rows <= 24 + 3 * 8
    assert count(page, "figure", class_="cell") == 5 * rows == count(page, "img", class_="pixelated")
    assert all(attrs.get("alt") for tag, attrs in page.elements if tag == "img")


def test_numbers_do_not_show_a_negative_zero() -> None:
    assert wording.signed(-0.0001, 2) == "+0.00" and wording.plain(-0.0001, 2) == "0.00"
    assert wording.signed(-1.5, 1) == "\u22121.5"


def test_labels_are_short_and_differ() -> None:
    names = ["a" * 1000, "a" * 1001, "", " ", "b"]
    found = wording.labels(names)
    assert len(set(found.values())) == len(names) and max(map(len, found.values())) < 60


def test_control_characters_become_visible() -> None:
    assert (
        wording.clean("a\x00b\x1b\x7f\x85\ud800\ufffe\U0001fffe\n\u202e")
        == "a\u2400b\u241b\u2421\ufffd\ufffd\ufffd\ufffd\n\u202e"
    )


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 2.0], [-1.0, 0.0, 0.0, 1e-9, 1.0], [5e-324], [1e300, -1e300]])
def test_bars_of_a_histogram_never_mix_gains_and_losses(values: list[float]) -> None:
    edges, counts = plots._bins(np.array(values))
    assert counts.sum() == len(values)
    middle = (edges[:-1] + edges[1:]) / 2
    sides = np.array(values)
    assert counts[middle > 1e-300].sum() >= (sides > 1e-300).sum()
    assert counts[(edges[:-1] < 0) & (edges[1:] > 0)].sum() == (sides == 0).sum()


def test_charts_bring_no_styles_and_no_text_but_their_own(page: Parsed) -> None:
    chart = plots.round_curves("c", 'a "label" <b>', [plots.Line(0, [0, 1], [0.0, 1.0], [0.0, 0.5], [0.0, 1.5])])
    assert "style" not in chart and "http" not in chart and "<b>" not in chart and "#0" not in chart
    assert "var(--series-1)" in chart


# Odd evaluations


def test_a_single_model_is_shown_without_a_verdict(tmp_path: Path) -> None:
    write_evaluation(tmp_path, models=(("base", "baseline", 0),), headline=None, scales=(None,), num_prompts=9)
    single = parsed(tmp_path)
    text = said(single)
    assert "Nothing to compare" in text and "as given" in text
    assert not count(single, "button") and "Blind vote" not in text
    assert count(single, "figure", class_="cell") == 9


def test_of_several_models_the_top_says_who_wins_by_how_much_and_whether_to_believe_it(tmp_path: Path) -> None:
    write_evaluation(tmp_path, num_prompts=40, scales=(3.0,), nasty=False)
    results = json.loads((tmp_path / "results.json").read_text())
    for alarm in results["alarms"]:  # of the rounds only the second has one
        if alarm["state"] != "ok" and alarm["model"] != "round 2":
            alarm["state"] = "ok"
    change(tmp_path, alarms=results["alarms"])
    card = ranking.ranking_card(read_evaluation(tmp_path).results)
    assert card is not None and [row.model for row in card.rows] == [
        p["model"] for p in results["ranking"][0]["places"]
    ]
    believed = {row.model: row.believed for row in card.rows}
    assert believed["base"] == "" and believed["round 3"] == "yes: no alarm"
    assert believed["round 2"] == "not before you have looked: photometry"
    text = said(parsed(tmp_path))
    top = text[text.index("can it be believed") : text.index("prompts compared")]
    row = next(c for c in results["comparisons"] if (c["model"], c["scorer"]) == ("round 1", "hps_v2_1"))
    assert wording.signed(row["difference"], 2) in top and "What to do" not in top, "the first has no alarm"
    for alarm in results["alarms"]:
        alarm["state"] = "alarm"
    change(tmp_path, alarms=results["alarms"])
    assert "What to do" in said(parsed(tmp_path))


def test_equal_models_are_all_ties(tmp_path: Path) -> None:
    write_evaluation(tmp_path, ties=True, images_per_prompt=1, num_prompts=10, scales=(3.0,))
    text = said(parsed(tmp_path))
    assert "0 / 10 / 0" in text and "No winner" in text and "50.0 %" in text
    assert text.count("No such pair.") == 3


def test_one_image_per_prompt_is_enough(small: Path) -> None:
    assert "images per prompt" in said(parsed(small))


def test_no_picture_at_all(tmp_path: Path) -> None:
    write_evaluation(tmp_path, with_pictures=False, num_prompts=6)
    bare = parsed(tmp_path)
    text = said(bare)
    assert "no picture: not finite" in text and "Blind vote" not in text
    assert not count(bare, "img")


def test_no_scorer_at_all(small: Path) -> None:
    change(small, scorers=[], results=[], comparisons=[], breakdowns=[])
    table = pq.read_table(small / "scores.parquet")
    pq.write_table(table.slice(0, 0), small / "scores.parquet")
    assert "No scorer was asked for" in said(parsed(small)) and "look at the pictures below" not in said(parsed(small))
    change(small, verdicts=[])
    assert "nothing is concluded: look at the pictures below" in said(parsed(small))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "its file is missing"),
        (lambda path: path.write_bytes(b"no picture"), "its file is not the one that was scored"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), "outside of the evaluation's folder"),
        (lambda path: (path.unlink(), path.symlink_to(path.name)), "missing|cannot be read"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_said_so(small: Path, damage, words: str) -> None:
    damage(small / "models/0/guidance-3/00002-0.png")
    damaged = parsed(small)
    assert re.search(words, said(damaged))
    island = json.loads(damaged.raw[1][2])
    assert "00002" not in {pair["id"] for pair in island["pairs"]} and len(island["pairs"]) == 5


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["results.json", "images.parquet", "scores.parquet"])
def test_a_pipe_in_the_place_of_a_table_is_not_waited_for(small: Path, name: str) -> None:
    (small / name).unlink()
    os.mkfifo(small / name)
    with pytest.raises(InputError, match=f"{name} is a named pipe, not a file"):
        read_evaluation(small)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_in_the_place_of_a_picture_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "a.png"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](place)
    said = editions.thumbnail(tmp_path, editions.ImageRow("base", "0", 0, "", "", "1", "a.png", None, "ok"))
    assert isinstance(said, str) and said.isprintable()


@pytest.mark.parametrize("file", ["../outside.png", "/etc/passwd", "models/\x00", "x" * 5000, "", "."])
def test_a_path_that_leaves_the_folder_is_not_read(small: Path, file: str) -> None:
    shutil.copy(small / "models/0/guidance-3/00000-0.png", small.parent / "outside.png")
    row = editions.ImageRow("base", "00000", 0, "", "", "1", file, None, "ok")
    assert isinstance(editions.thumbnail(small, row), str)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\x89PNG\r\n\x1a\n" + b"\x00" * 64, b"<svg onload='x'/>"])
def test_what_cannot_be_decoded_is_said_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    row = editions.ImageRow("base", "0", 0, "", "", "1", "a.png", None, "ok")
    assert editions.thumbnail(tmp_path, row) == "its file cannot be decoded"


def test_a_picture_that_no_other_part_reads_is_not_shown_either(tmp_path: Path) -> None:
    Image.new("F", (30, 10), 0.5).save(tmp_path / "a.tif")
    row = editions.ImageRow("base", "0", 0, "", "", "1", "a.tif", None, "ok")
    assert editions.thumbnail(tmp_path, row) == "its file cannot be decoded"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "LA"])
def test_pictures_of_every_mode_are_shown(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new("L", (300, 100), 90).convert("I" if mode == "I;16" else mode).convert(mode).save(tmp_path / name)
    shown = editions.thumbnail(tmp_path, editions.ImageRow("base", "0", 0, "", "", "1", name, None, "ok"))
    assert isinstance(shown, editions.Picture) and (shown.width, shown.height) == (256, 85) and not shown.pixelated


def test_bytes_are_told_in_the_unit_that_shows_them():
    told = {4_419_179: "4.4 MB", 99_000_000: "99.0 MB", 100_000_000: "0.10 GB", 1_234_000_000_000: "1,234.00 GB"}
    assert {size: wording.size(size) for size in told} == told


def test_the_gallery_shrinks_until_the_page_fits(small: Path) -> None:
    evaluation = read_evaluation(small)
    whole_page = build_page(evaluation)
    assert len(whole_page) < MAX_PAGE_BYTES
    limit = len(whole_page) - 3000
    shrunk = build_page(evaluation, limit)
    assert len(shrunk) <= limit and "The gallery is shortened" in shrunk.decode()
    assert "The gallery is shortened" not in whole_page.decode()


def test_the_made_up_tables_agree_with_results_json(page: Parsed) -> None:
    assert "may be of another evaluation" not in said(page)


def test_many_failures_are_capped(small: Path) -> None:
    failure = {"model": "base", "guidance_scale": 3.0, "id": "1", "prompt": SCRIPT * 1000, "what": "black"}
    change(small, failures=[failure] * 500)
    failed = parsed(small)
    assert "The first 100 of 500" in said(failed)
    assert len((small / "report.html").read_bytes()) < 1_000_000


def test_the_random_sample_depends_on_the_protocol_alone(small: Path) -> None:
    def drawn() -> list[gallery.Pair]:
        return gallery.choose(read_evaluation(small), 4, 2)[0].pairs

    first = drawn()
    change(small, title="another")
    assert drawn() == first
    protocol = json.loads((small / "results.json").read_text())["protocol"]
    change(small, protocol=protocol | {"id": "0" * 64})
    assert drawn() != first


def test_wins_and_losses_are_ranked_by_the_paired_difference(small: Path) -> None:
    evaluation = read_evaluation(small)
    by_pair = gallery.differences(evaluation.scores, "hps_v2_1", "base", "round 1")
    _, wins, losses, torn = gallery.choose(evaluation, 4, 2)
    ranked = sorted(by_pair, key=by_pair.get)
    assert wins.pairs == [pair for pair in ranked[::-1][:2] if by_pair[pair] > 0]
    assert losses.pairs == [pair for pair in ranked[:2] if by_pair[pair] < 0]
    assert torn.pairs == []


def test_rounds_of_two_runs_are_not_joined_by_a_line(tmp_path: Path) -> None:
    results = write_evaluation(
        tmp_path, models=(("base", "baseline", 0), ("a 1", "round", 1), ("b 1", "round", 1)), headline="a 1",
        num_prompts=8, with_pictures=False,
    )  # fmt: skip
    assert tables.curve_panels(results) == []


def _asset(name: str) -> str:
    return resources.files("spin_diffusion.evaluation.report").joinpath(name).read_text(encoding="utf-8")
