"""The page of an evaluation of answers, as text and in a real browser."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin_diffusion.evaluation.records import ANSWERS, IMAGES
from spin_diffusion.evaluation.report import MAX_PAGE_BYTES, _template, build_page, training, wording, write_report
from spin_diffusion.evaluation.report.editions import _EDITIONS
from spin_diffusion.evaluation.report.reading import read_evaluation
from spin_diffusion.store.input_error import InputError
from tests.evaluation.made_up_answers import SCRIPT, answers_by, babble, evaluate, prompts, sentence
from tests.evaluation.report.made_up import write_evaluation
from tests.evaluation.report.test_report import Parsed, change, count, said

NASTY = [
    SCRIPT + "\n\n- one\n- two",
    "\u202eright to left override and no end, \u05e9\u05dc\u05d5\u05dd",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "an astronaut \U0001f468\u200d\U0001f680 and \U0001f984",
    "x" * 10_000,
    "line\n" * 100,
    "",
    "{{ 7 * 7 }} <img src=x onerror='window.injected = 2'> & ]]> --> \x00",
]


def nasty(model: int) -> Any:
    """Answers the first prompts nastily, the others in random words."""

    def text(row: dict[str, Any]) -> str:
        place = int(row["id"])
        return NASTY[place] if place < len(NASTY) else sentence(random.Random(f"{row['seed']} {model}"), 12 + 4 * model)

    return answers_by(text)


def curves(*models: tuple[str, int], again: bool = True) -> list[dict[str, Any]]:
    """r that rises for real and falls for generated samples; steps count anew in each round, if `again`."""
    return [
        {"model": model, "round": round_, "step": step + (0 if again else 10 * (round_ - 1)), "r_real": step / 10,
         "r_generated": -step / 20, "loss": 1.0}
        for model, round_ in models
        for step in range(1, 11)
    ]  # fmt: skip


def measure(model: str, round_: int | None, value: float | None, **more: Any) -> dict[str, Any]:
    name = {"model": model, "round": round_, "name": "gap", "title": "Held-out <b>gap</b>"}
    return name | {"value": value, "low": None, "high": None, "better": "higher"} | more


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole evaluation with its page; do not write into it."""
    root = tmp_path_factory.mktemp("answers")
    rows = prompts(24)
    for row, text in zip(rows, NASTY, strict=False):
        row["reference"] = text
    rows[0]["prompt"] = SCRIPT
    evaluate(
        root, [("base", "baseline", 0, nasty(0), 0.0), ("round 1", "round", 1, nasty(1), 1.0),
               ("round 2", "round", 2, nasty(2), 3.0), ("SFT <rival>", "rival", None, nasty(3), -1.0)],
        rows=rows, specs=["log_likelihood", "length", "distinct", "reward_model"],
        curves=curves(("round 1", 1), ("round 2", 2), ("SFT <rival>", 1)),
        measures=[measure("base", 0, 0.0), measure("round 1", 1, 0.25, low=0.2, high=0.3), measure("round 2", 2, 0.4)],
    )  # fmt: skip
    write_report(root)
    return root


@pytest.fixture(scope="module")
def page(whole: Path) -> Parsed:
    return Parsed((whole / "report.html").read_text(encoding="utf-8"))


def test_answers_are_text_and_no_pictures_are_there(page: Parsed) -> None:
    text = page.text
    assert not count(page, "img")
    assert "</script><script>window.injected = 1</script>\n\n- one\n- two" in text, "line breaks are kept"
    assert "\U0001f468\u200d\U0001f680" in text and "\u0645\u0631\u062d\u0628\u0627" in text
    assert "x" * 10_000 in text and "all 10,000 characters" in text and "x" * 899 + "\u2026" in text
    assert "(empty answer)" in text and "{{ 7 * 7 }} <img src=x" in text and "\u2400" in text
    assert [attrs.get("type") for tag, attrs, _ in page.raw if tag == "script"] == ["application/json", None]
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "srcdoc")], (tag, attrs)


def test_every_answer_is_isolated_from_the_text_around_it(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    places = [m.start() for m in re.finditer("\u202e", text)]
    assert places and all("<bdi>" in text[max(0, place - 60) : place] for place in places)


def test_the_gallery_has_every_models_answer_and_the_real_one_side_by_side(whole: Path, page: Parsed) -> None:
    rows = count(page, "article", class_="pair")
    assert count(page, "figure", class_="cell") == 5 * rows == 5 * count(page, "figure", class_="role-real")
    text = said(page)
    assert "13 tokens, ended by itself" in text and "cut at the longest answer allowed" in text
    data = json.loads(page.raw[1][2])
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert len(data["pairs"]) == 24 and all({pair["baseline"], pair["candidate"]} <= ids for pair in data["pairs"])
    assert data["candidate"] == "round 2"


def test_the_page_speaks_of_answers(page: Parsed) -> None:
    # What the reader finds in the sections that are the program's own words
    text = said(page)
    assert "answered by every model, temperature 1" in text and "answers per prompt2" in text
    assert "round 2 against base, temperature 1" in text and "longest answer, tokens" in text
    for word in ("picture", "image", "guidance", "pixels", "denoising", "SPIN-Diffusion", "None"):
        assert word not in text.replace("<img", ""), word
    headings = {attrs["id"] for tag, attrs in page.elements if tag == "h2"}
    assert headings == {
        "verdict", "scores", "alarms", "models", "rounds", "training", "breakdown", "distributions", "vote", "gallery",
        "failures", "provenance", "ranking", "reading",
    }  # fmt: skip
    assert "which reward model?" in text and "empty answer" in text


def test_the_section_on_training_has_a_panel_per_run_and_the_measures(whole: Path, page: Parsed) -> None:
    results = json.loads((whole / "results.json").read_text())
    panels = training.training_panels(results)
    assert [panel.title for panel in panels] == ["rounds of this run", "SFT <rival>"]
    assert panels[0].caption.startswith("2 rounds, 20 steps; at the end r of real 1, of generated \u22120.5")
    assert panels[0].chart.count("round ") == 2 and "r, nats" in panels[0].chart
    table = training.measure_table(results)
    assert table.labels == ["base", "round 1", "round 2"]
    assert [cell.value for cell in table.rows[0].cells] == ["0.000", "0.250", "0.400"]
    assert [cell.interval for cell in table.rows[0].cells] == ["", "[0.200, 0.300]", ""]
    assert len(training.measure_curves(results)) == 1
    text = said(page)
    assert "Held-out <b>gap</b>" in text and "SFT <rival>" in text and "where both lines fall" in text
    # Scores over rounds, their distributions, two runs of training, one measure
    assert count(page, "svg", class_="chart") == 3 + 3 + 2 + 1


def test_steps_go_on_whether_or_not_they_count_anew() -> None:
    again, on = (training._one_after_the_other(curves(("m", 1), ("m", 2), again=a)) for a in (True, False))
    assert again == on
    points, starts = again
    assert starts == [(0, 1), (10, 2)] and points[-1] == (20, 1.0, -0.5)
    assert points[10] == (10, None, None), "no line from the end of a round to the start of the next"


def test_rounds_of_two_runs_are_two_panels_and_runs_without_numbers_none(tmp_path: Path) -> None:
    models = [("base", "baseline", 0, babble(0), 0.0), ("a 1", "round", 1, babble(1), 0.0)]
    models += [("b 1", "round", 1, babble(2), 0.0)]
    nothing = [row | {"r_real": float("nan"), "r_generated": None} for row in curves(("sft", 1))]
    results = evaluate(
        tmp_path, models, rows=prompts(20), curves=[*curves(("a 1", 1), ("b 1", 1)), *nothing],
        measures=[measure("a 1", 1, 0.1), measure("b 1", 1, None), measure("run c", 1, 1.0), measure("run c", 2, 2.0)],
    )  # fmt: skip
    assert [panel.title for panel in training.training_panels(results)] == ["a 1", "b 1"]
    assert training.measure_table(results).labels == ["a 1", "b 1", "run c, round 1", "run c, round 2"]
    assert training.measure_table(results).rows[0].cells[1] is None
    assert [panel.title for panel in training.measure_curves(results)] == ["Held-out <b>gap</b>, run c"]
    assert write_report(tmp_path).is_file()


def test_the_page_of_pictures_has_training_too(tmp_path: Path) -> None:
    write_evaluation(tmp_path, num_prompts=10, scales=(3.0,))
    plain = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    change(
        tmp_path, training_curves=curves(("round 1", 1), ("round 2", 2)),
        measures=[measure("round 1", 1, 1), measure("round 2", 2, 2)],
    )  # fmt: skip
    page = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    assert count(page, "svg", class_="chart") == count(plain, "svg", class_="chart") + 2
    assert "2 rounds, 20 steps" in said(page) and "in nats" not in said(page)
    assert count(page, "a", href="#training") == 1 and not count(plain, "a", href="#training")


@pytest.mark.parametrize("flops", [None, 5 * 10**12])
def test_work_that_nobody_counted_has_no_columns(tmp_path: Path, flops: int | None) -> None:
    write_evaluation(tmp_path, num_prompts=10, scales=(3.0,))
    entry = {"model": "round 1", "round": 1, "phase": "trained", "seconds": 12.5, "predicted_seconds": None}
    entry |= {"samples": 8, "samples_per_second": 0.64, "flops": flops, "matrix_share": flops and 0.25}
    change(tmp_path, ledger=[entry | {"peak_memory_bytes": None}])
    page = said(Parsed(write_report(tmp_path).read_text(encoding="utf-8")))
    assert "Time and work" in page and "12.5" in page
    assert [word in page for word in ("TFLOP", "25%", "floating-point operations")] == [flops is not None] * 3


def test_what_the_rules_of_health_said_is_on_the_page(tmp_path: Path) -> None:
    def event(rule: str, action: str, weights: int | None) -> dict[str, Any]:
        found = {"model": "space", "round": 2, "step": 1234, "rule": rule, "action": action}
        return found | {"sentence": f"{rule} <b>says</b> so", "weights_from_step": weights}

    write_evaluation(tmp_path, num_prompts=10, scales=(3.0,))
    plain = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    events = [event("spike", "warn", None), event("saturation", "stop", 1234)]
    events += [event("forgetting", "roll_back", 1200), event("distance", "roll_back", 0)]
    change(tmp_path, training_events=events)
    page = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    text = said(page)
    for part in ("spike <b>says</b> so", "training went on", "the round ended here", "rolled back to step 1,200",
                 "rolled back to the round's beginning", "1,234"):  # fmt: skip
        assert part in text, part
    assert count(page, "a", href="#training") == 1 and not count(plain, "a", href="#training")
    assert "rules of health" not in said(plain)


def test_results_carry_what_the_rules_of_health_said(tmp_path: Path) -> None:
    event = {"model": "space", "round": 1, "step": 3, "rule": "spike", "action": "warn", "sentence": "it jumped"}
    models = [("base", "baseline", 0, babble(0), 0.0)]
    results = evaluate(
        tmp_path, models, rows=prompts(5), specs=["length"], events=[event | {"weights_from_step": None}]
    )
    assert results["training_events"] == [event | {"weights_from_step": None}]


def test_a_passage_keeps_its_lines_and_says_how_long_it_is() -> None:
    assert wording.passage(" a\r\n\r\n b \n") == wording.Text("a\n\n b", None, "")
    many = wording.passage("line\n" * 100)
    assert many.short.count("\n") == 23 and many.short.endswith("\u2026") and many.note == "all 499 characters"
    long = wording.passage("x" * 30_000)
    assert len(long.short) == 900 and len(long.full) == 20_000 and long.note == "the first 20,000 of 30,000 characters"


def test_a_page_of_very_long_answers_stays_small(tmp_path: Path) -> None:
    long = answers_by(lambda row: "\u732b" * 30_000 + row["id"])
    models = [(name, role, None, long, 0.0) for name, role in (("a", "baseline"), ("b", "candidate"), ("c", "rival"))]
    evaluate(tmp_path, models, rows=prompts(24), answers_per_prompt=1, specs=["length"])
    evaluation = read_evaluation(tmp_path)
    assert len(build_page(evaluation)) <= MAX_PAGE_BYTES
    small = build_page(evaluation, 1_500_000)
    assert len(small) <= 1_500_000 and "All answers are in answers.parquet" in small.decode()
    assert Parsed(small.decode()).open == []


def test_no_references_one_model_and_one_answer_are_enough(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}"} for i in range(5)]
    evaluate(tmp_path, [("base", "baseline", None, babble(), 0.0)], rows=rows, answers_per_prompt=1, specs=["length"])
    page = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Nothing to compare" in said(page) and not count(page, "figure", class_="role-real")
    assert count(page, "figure", class_="cell") == 5 and not count(page, "button")


@pytest.mark.parametrize("damage", ["missing", "broken", "column"])
def test_damaged_answers_are_refused_in_one_line(whole: Path, tmp_path: Path, damage: str) -> None:
    for name in ("results.json", "scores.parquet", "answers.parquet"):
        shutil.copy(whole / name, tmp_path / name)
    table = tmp_path / "answers.parquet"
    if damage == "missing":
        table.unlink()
    else:
        table.write_bytes(b"PAR1" if damage == "broken" else (tmp_path / "scores.parquet").read_bytes())
    with pytest.raises(InputError, match="answers.parquet") as raised:
        write_report(tmp_path)
    assert "\n" not in str(raised.value)


def test_what_a_row_lacks_is_empty_on_the_page(whole: Path, tmp_path: Path) -> None:
    for name in ("results.json", "scores.parquet"):
        shutil.copy(whole / name, tmp_path / name)
    table = pq.read_table(whole / "answers.parquet")
    for name in ("prompt", "category", "text", "reference", "finish", "num_tokens"):
        nothing = pa.nulls(len(table), table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), name, nothing)
    pq.write_table(table, tmp_path / "answers.parquet")
    page = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    text = said(page)
    assert "(empty prompt)" in text and "(empty answer)" in text and "0 tokens," in text and "None" not in text
    assert not count(page, "figure", class_="role-real")


def test_the_templates_of_both_editions_have_the_same_words() -> None:
    words = [
        {name for name in vars(_template().environment.get_template(edition.template).module) if name[0] != "_"}
        for edition in (_EDITIONS[IMAGES], _EDITIONS[ANSWERS])
    ]
    assert words[0] == words[1] - {"real", "passage"}


# In a browser


def test_the_vote_shows_whole_texts_and_counts(whole: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: no browser tests")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, headless=True, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((whole / "report.html").as_uri())
        page.get_by_role("button", name="Start voting").click()
        data = json.loads(page.locator("#votes-data").text_content())
        answers: dict[str, dict[str, str]] = {}
        for row in read_evaluation(whole).samples:
            answers.setdefault(f"{row.id} {row.k}", {})[row.model] = row.text
        seen, expected = set(), {"candidate": 0, "baseline": 0}
        for _ in data["pairs"]:
            texts = {side: page.locator(f"#vote-text-{side}").text_content() for side in ("left", "right")}
            seen |= set(texts.values())
            stage = page.locator("#vote-stage").inner_text()
            assert "round 2" not in stage and "base" not in stage
            # The longer answer is the better one
            side = max(texts, key=lambda side: len(texts[side]))
            page.locator(f"#vote-{side}").click()
            if texts["left"] != texts["right"]:
                model = next(of["round 2"] == texts[side] for of in answers.values() if texts[side] in of.values())
                expected["candidate" if model else "baseline"] += 1
        assert NASTY[4] in seen and NASTY[0] in seen and "(empty answer)" in seen
        tally = json.loads(page.locator("#vote-json").input_value())["tally"]
        assert tally["candidate"] >= expected["candidate"] > 10 and sum(tally.values()) == 24
        assert page.evaluate("window.injected") is None
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        right_to_left = page.locator("#panel-random .answer > bdi", has_text=NASTY[2][:5]).first
        assert right_to_left.evaluate("element => getComputedStyle(element).unicodeBidi") == "plaintext"
        page.close()
        silent = browser.new_context(java_script_enabled=False).new_page()
        silent.goto((whole / "report.html").as_uri())
        assert silent.locator("#panel-losses .answer").first.is_visible()
        assert not silent.locator("#ballot").is_visible()
        browser.close()
    assert problems == []
