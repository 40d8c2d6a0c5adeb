"""The page in a real browser: Debian's chromium, driven by Playwright. Skipped where one of the two is missing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from spin_diffusion.evaluation.report import write_report
from tests.evaluation.report.made_up import write_evaluation

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser tests")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: no browser tests")

TEXTS = [
    "body", ".lead", ".quiet", ".banner h2", ".banner .reason", ".state", ".chip", "thead th", ".interval-text",
    "caption", ".chart text", ".difference.marked", ".tablist button",
]  # fmt: skip
LOOK = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as started:
        # --no-sandbox: chromium does not start as root with one
        opened = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("page")
    write_evaluation(directory, num_prompts=32)
    return write_report(directory).as_uri()


@pytest.fixture
def open_page(browser, address: str) -> Iterator[object]:
    """(**options of the browser context) -> the page, loaded. Afterwards: nothing was said, and nothing asked for."""
    contexts, said, asked = [], [], []

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url[:100]))
        page.goto(address, wait_until="load")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [address] * len(contexts)


def test_the_page_loads_and_runs_no_prompt(open_page) -> None:
    page = open_page()
    assert page.locator("h1").inner_text() == "Toy world, SPIN after three rounds"
    assert page.evaluate("window.injected") is None
    assert page.locator("script").count() == 2
    broken = "[...document.images].filter(image => image.hasAttribute('src') && !image.naturalWidth).length"
    assert page.evaluate(broken) == 0


def test_the_policy_stops_what_would_be_injected(browser, address: str) -> None:
    # The page's own test of this would be trusting: here something is injected on purpose
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(address)
    page.evaluate("""() => {
        const box = document.createElement("div");
        box.innerHTML = "<img src=x onerror='window.injected = 1'><p style='color: red'>x</p>";
        document.body.append(box);
        const script = document.createElement("script");
        script.textContent = "window.injected = 2";
        document.body.append(script);
    }""")
    page.wait_for_timeout(100)
    assert page.evaluate("window.injected") is None
    assert any("Content Security Policy" in text for text in said)
    page.close()


def test_tabs_work_by_mouse_and_by_keyboard(open_page) -> None:
    page = open_page()
    visible = "[...document.querySelectorAll('.panel')].filter(panel => !panel.hidden).map(panel => panel.id)"
    assert page.evaluate(visible) == ["panel-random"]
    page.get_by_role("tab", name="Worst losses").click()
    assert page.evaluate(visible) == ["panel-losses"]
    assert page.get_by_role("tab", name="Worst losses").get_attribute("aria-selected") == "true"
    for key, panel in (("ArrowRight", "torn"), ("ArrowRight", "random"), ("ArrowLeft", "torn"), ("Home", "random"),
                       ("End", "torn")):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(visible) == [f"panel-{panel}"]
        assert page.evaluate("document.activeElement.id") == f"tab-{panel}"
    assert page.get_by_role("tabpanel").count() == 1


def test_votes_by_keyboard_are_counted_and_exported(open_page, tmp_path: Path) -> None:
    page = open_page(accept_downloads=True)
    page.get_by_role("button", name="Start voting").click()
    data = json.loads(page.locator("#votes-data").text_content())
    of_image = {
        page.locator(f"#{pair[role]}").get_attribute("src"): role
        for pair in data["pairs"]
        for role in ("baseline", "candidate")
    }
    expected = {"baseline": 0, "candidate": 0, None: 0}
    total = len(data["pairs"])
    for number in range(total):
        assert page.locator("#vote-progress").inner_text() == f"Pair {number + 1} of {total}"
        stage = page.locator("#vote-stage").inner_text()
        assert "round 3" not in stage and "base" not in stage
        sides = {side: of_image[page.locator(f"#vote-image-{side}").get_attribute("src")] for side in ("left", "right")}
        assert set(sides.values()) == {"baseline", "candidate"}
        if number == 1:  # a vote that is taken back
            page.keyboard.press("ArrowDown")
            page.keyboard.press("u")
        choice = ["left", "right", "tie"][number % 3]
        page.keyboard.press({"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}[choice])
        expected[sides.get(choice)] += 1
    with page.expect_download() as downloading:
        page.get_by_role("button", name="Save the votes as JSON").click()
    downloading.value.save_as(tmp_path / "votes.json")
    assert downloading.value.suggested_filename == f"votes-{data['protocol_id'][:12]}.json"
    text = (tmp_path / "votes.json").read_text()
    assert text == page.locator("#vote-json").input_value()
    votes = json.loads(text)
    assert votes["tally"] == {
        "candidate": expected["candidate"],
        "tie": expected[None],
        "baseline": expected["baseline"],
    }
    assert (
        votes["candidate"] == "round 3" and votes["protocol_id"] == data["protocol_id"] and votes["num_pairs"] == total
    )
    assert {(vote["id"], vote["k"]) for vote in votes["votes"]} == {(pair["id"], pair["k"]) for pair in data["pairs"]}
    for vote in votes["votes"]:
        right = {"baseline": "candidate", "candidate": "baseline"}[vote["left"]]
        assert vote["preferred"] == {"left": vote["left"], "right": right, "tie": None}[vote["choice"]]
    assert f"round 3 was better {expected['candidate']} times" in page.locator("#vote-tally").inner_text()


def test_sides_and_order_are_drawn_anew(open_page) -> None:
    page = open_page()
    seen = set()
    for _ in range(4):
        page.get_by_role("button", name="Start voting").click() if not seen else page.click("#vote-again")
        for _ in range(10):
            page.keyboard.press("ArrowLeft")
        page.keyboard.press("Escape")
        votes = json.loads(page.locator("#vote-json").input_value())["votes"]
        assert len(votes) == 10
        seen.add(json.dumps([(vote["id"], vote["left"]) for vote in votes]))
        assert {vote["left"] for vote in votes} <= {"baseline", "candidate"}
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("candidate", "baseline", "p"), [(9, 1, "0.021"), (5, 5, "1.000"), (0, 6, "0.031"), (20, 0, "< 0.001")]
)
def test_the_tally_has_the_exact_sign_test(open_page, candidate: int, baseline: int, p: str) -> None:
    page = open_page()
    page.get_by_role("button", name="Start voting").click()
    data = json.loads(page.locator("#votes-data").text_content())
    of_image = {page.locator(f"#{pair['baseline']}").get_attribute("src") for pair in data["pairs"]}
    for wanted in ["candidate"] * candidate + ["baseline"] * baseline:
        left = "baseline" if page.locator("#vote-image-left").get_attribute("src") in of_image else "candidate"
        page.keyboard.press("ArrowLeft" if left == wanted else "ArrowRight")
    page.get_by_role("button", name="Stop and count").click()
    assert p in page.locator("#vote-tally").inner_text()


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_does_not_scroll_sideways(open_page, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    hidden = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1).length"
    assert page.evaluate(hidden) == 0 or 400 < width < 1280, "no column of a table is out of sight on a phone"
    for name in ("Best wins", "Random"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Start voting").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_colours_follow_the_reader_and_can_be_read(open_page) -> None:
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    assert sum(_rgb(light.evaluate(LOOK))) > 700 and sum(_rgb(dark.evaluate(LOOK))) < 100
    for page in (light, dark):
        for selector in TEXTS:
            assert page.evaluate(CONTRAST, selector) >= 4.5, selector


def test_everything_but_the_vote_works_without_javascript(open_page) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("table").count() > 10
    for summary in page.locator(".fold > summary").all():
        summary.click()
    for name in ("scores", "alarms", "breakdown", "failures"):
        assert page.locator(f"section[aria-labelledby={name}] table").first.is_visible()
    for key in ("random", "wins", "losses", "torn"):
        assert page.locator(f"#panel-{key} h3").is_visible()
    assert page.locator("#panel-random img").first.is_visible()
    assert not page.locator("#tablist").is_visible() and not page.locator("#ballot").is_visible()
    assert page.get_by_text("Voting needs JavaScript").is_visible()


@pytest.mark.parametrize(("width", "most"), [(1280, 7100), (400, 13900)])
def test_the_page_is_short_and_a_link_opens_what_it_leads_to(open_page, width: int, most: int) -> None:
    # A third of what the same evaluation took when nothing was folded
    page = open_page(viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollHeight") <= most
    assert page.locator("#panel-random img").first.bounding_box()["y"] < page.locator("#scores").bounding_box()["y"]
    table = page.locator("section[aria-labelledby=breakdown] table").first
    assert not table.is_visible()
    page.get_by_role("link", name="Breakdown").click()
    assert table.is_visible()


def test_what_is_folded_is_not_printed_unless_it_was_opened(open_page) -> None:
    page = open_page(viewport={"width": 718, "height": 1000})  # A4 between its margins
    page.get_by_role("link", name="Provenance").click()
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    assert page.locator("#provenance").is_visible() and not page.locator("#breakdown").is_visible()


def test_the_printed_page_shows_every_tab(open_page) -> None:
    page = open_page(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#panel-wins").is_visible() and not page.locator("#vote-start").is_visible()
    assert sum(_rgb(page.evaluate(LOOK))) > 700


def _rgb(colour: str) -> list[float]:
    return [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]


# The smallest contrast (WCAG 2) of the elements' text with what lies behind it
CONTRAST = """selector => {
    const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    return Math.min(...[...document.querySelectorAll(selector)].map(element => {
        const style = getComputedStyle(element);
        const ink = light(parse(element instanceof SVGElement ? style.fill : style.color));
        const paper = light(behind(element));
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    }));
}"""
