import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from spin_diffusion.evaluation.comparison import Comparison, Row, compare, compare_others
from spin_diffusion.evaluation.statistics import Interval, holm, mean_interval, paired_difference, sign_test_p, t_test_p
from spin_diffusion.evaluation.tables import as_markdown, print_table
from spin_diffusion.evaluation.verdicts import verdict

EFFECTS = {"base": 0.0, "round 1": 0.5, "round 2": -0.5, "sft": 0.0}


def make_rows(scorers: tuple[str, ...] = ("pickscore",), scales: tuple[float, ...] = (1.0, 7.5)) -> list[Row]:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(20, 2, (40, 1))
    noise = {"base": rng.normal(0, 0.3, (40, 2))}
    # "sft" is the baseline with its prompts' noise negated in pairs: its mean difference is exactly 0.
    noise["sft"] = noise["base"] + np.tile([[0.1], [-0.1]], (20, 1))
    return [
        Row(model, scale, scorer, difficulty + effect + noise.get(model, noise["base"] * 0.5))
        for scorer in scorers
        for model, effect in EFFECTS.items()
        for scale in scales
    ]


def printed(comparisons: list[Comparison], width: int, **options: bool) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    print_table(comparisons, console)
    return console.file.getvalue()


def test_every_row_is_compared_with_the_baseline_at_its_own_guidance_scale() -> None:
    rows = make_rows()
    rows[0] = Row("base", 1.0, "pickscore", rows[0].scores + 3)  # only the baseline at guidance 1 moves
    comparisons = compare(rows, "base")
    assert [(c.model, c.guidance_scale) for c in comparisons] == [(r.model, r.guidance_scale) for r in rows]
    round_1 = {c.guidance_scale: c for c in comparisons if c.model == "round 1"}
    assert round_1[1.0].difference.mean == pytest.approx(round_1[7.5].difference.mean - 3)
    assert round_1[1.0].mean == round_1[7.5].mean


def test_the_numbers_are_those_of_statistics() -> None:
    rows = make_rows(scales=(7.5,))
    comparisons = compare(rows, "base")
    base, round_1 = rows[0], rows[1]
    assert comparisons[1].mean == mean_interval(round_1.scores)
    assert comparisons[1].difference == paired_difference(round_1.scores, base.scores)
    assert comparisons[1].wins + comparisons[1].ties + comparisons[1].losses == comparisons[1].num_prompts == 40
    assert comparisons[1].num_images == 2
    for row, c in zip(rows[1:], comparisons[1:], strict=True):
        assert c.p == max(sign_test_p(c.wins, c.losses), t_test_p(row.scores, base.scores))


def test_p_is_adjusted_over_all_models_scorers_and_guidance_scales_of_the_tables() -> None:
    rows = [replace(row, scorer=name) for name in ("one", "two", "three") for row in make_rows(scales=(1.0, 7.5))]
    family = [c for c in compare(rows, "base") if c.p is not None]
    assert [c.p_holm for c in family] == holm([c.p for c in family]).tolist() and len(family) == 3 * 3 * 2
    others = compare_others(rows, "base")
    assert [c.p_holm for c in others] == holm([c.p for c in others]).tolist() and len(others) == 3 * 3 * 2


def test_all_but_the_baseline_are_compared_with_each_other() -> None:
    rows = make_rows(scales=(7.5,))
    scores = {row.model: row.scores for row in rows}
    others = compare_others(rows, "base")
    assert [(c.model, c.other) for c in others] == [("round 2", "round 1"), ("sft", "round 1"), ("sft", "round 2")]
    for c in others:
        assert c.difference == paired_difference(scores[c.model], scores[c.other])
    assert compare_others(rows[:2], "base") == []


def test_of_models_that_are_all_the_same_hardly_ever_any_is_called_better() -> None:
    """Five models at two guidance scales by three scorers: of 24 tests at 5 % each one would be expected to err."""
    found = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        rows = [Row(m, g, s, rng.normal(size=(30, 1))) for m in "abcde" for g in (1.0, 7.5) for s in ("x", "y", "z")]
        tested = [c for c in compare(rows, "a") if c.p_holm is not None]
        assert len(tested) == 24
        found += any(verdict(c.difference, c.p_holm, c.wins - c.losses, False) != "inconclusive" for c in tested)
    assert found <= 0.05 * 150


def test_what_only_the_model_ahead_has_lost_counts_against_it() -> None:
    base = np.random.default_rng(3).normal(size=(20, 1))
    lost = frozenset(f"{n}" for n in range(12))

    def counts(of_model: frozenset[str], of_base: frozenset[str], sign: int) -> tuple[int, int, int]:
        scores = base + 0.1 * sign
        c = compare([Row("base", 1.0, "s", base, lost=of_base), Row("m", 1.0, "s", scores, lost=of_model)], "base")[1]
        assert c.p == sign_test_p(c.wins, c.losses) and c.num_prompts == 20
        return c.wins, c.ties, c.losses

    assert counts(lost, frozenset(), 1) == (20, 0, 12)
    assert counts(lost, lost, 1) == (20, 0, 0), "prompts that both lack say nothing"
    assert counts(frozenset(), lost, 1) == (20, 0, 0), "what the baseline lacks is no win"
    assert counts(frozenset(), lost, -1) == (12, 0, 20)


def test_better_is_positive_worse_is_negative() -> None:
    comparisons = {c.model: c for c in compare(make_rows(scales=(7.5,)), "base")}
    assert comparisons["round 1"].difference.low > 0 and comparisons["round 1"].wins > 35
    assert comparisons["round 2"].difference.high < 0 and comparisons["round 2"].losses > 35
    assert comparisons["sft"].difference.low < 0 < comparisons["sft"].difference.high


def test_the_baseline_has_no_difference_to_itself() -> None:
    base = compare(make_rows(), "base")[0]
    assert (base.difference, base.wins, base.ties, base.losses, base.p) == (None, None, None, None, None)


def test_a_model_that_equals_the_baseline_ties_everywhere() -> None:
    scores = np.random.default_rng(1).normal(size=(5, 1))
    twin = compare([Row("base", 1.0, "s", scores), Row("twin", 1.0, "s", scores.copy())], "base")[1]
    assert twin.difference == Interval(0.0, 0.0, 0.0) and (twin.wins, twin.ties, twin.losses, twin.p) == (0, 5, 0, 1.0)
    assert "+0.0" in as_markdown([twin]) and "-0.0" not in as_markdown([twin]) and "**+" not in as_markdown([twin])


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_every_model_and_number_is_printed_at_any_width(width: int) -> None:
    text = printed(compare(make_rows(("pickscore", "sharpness")), "base"), width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    words = " ".join(text.split())
    for wanted in (*EFFECTS, "pickscore: 40 prompts x 2 images", "sharpness:", "guidance 1", "guidance 7.5", "seeds"):
        assert wanted in words
    assert "\u2026" not in text, "nothing may be cut"
    assert text.count("[+") >= 4 and text.count("[-") >= 4


def test_a_wide_console_shows_one_line_per_model() -> None:
    text = printed(compare(make_rows(), "base"), 200)
    line = next(line for line in text.splitlines() if "round 1" in line)
    assert line.count("[") == 4


def test_what_is_bold_is_what_the_verdict_calls_significant() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(size=(12, 1))
    carried = base + np.array([[3.0]] * 5 + [[-0.01]] * 7)  # a few prompts carry the mean
    one = [Row("base", 1.0, "s", base), Row("better", 1.0, "s", base + 1), Row("carried", 1.0, "s", carried)]
    comparisons = compare(one, "base")
    assert comparisons[2].difference.low > 0
    lines = {line.split("|")[1].strip(): line for line in as_markdown(comparisons).splitlines() if "|" in line}
    assert "**" in lines["better"] and "**" not in lines["carried"] and "**" not in lines["base"]
    # Of many models chance makes some interval exclude 0
    zero = np.zeros((12, 1))
    same = [Row("base", 1.0, "s", zero), *(Row(f"m{n}", 1.0, "s", rng.normal(size=(12, 1))) for n in range(60))]
    found = compare(same, "base")
    assert any(c.difference and (c.difference.low > 0 or c.difference.high < 0) for c in found)
    assert "**+" not in as_markdown(found) and "**-" not in as_markdown(found)


def test_colours_follow_the_verdict() -> None:
    text = printed(compare(make_rows(scales=(7.5,)), "base"), 200, force_terminal=True)
    green, red = "\x1b[1;32m", "\x1b[1;31m"
    lines = {name: next(line for line in text.splitlines() if name in line) for name in EFFECTS}
    assert green + "+" in lines["round 1"] and red not in lines["round 1"]
    assert red + "-" in lines["round 2"] and green not in lines["round 2"]
    assert not any(colour in lines[name] for name in ("sft", "base") for colour in (green, red))


def test_brackets_and_bars_in_names_stay_what_they_are() -> None:
    scores = np.random.default_rng(2).normal(size=(4, 1))
    comparisons = compare([Row("base", 1.0, "s", scores), Row("a [bold] | b\n", 1.0, "s", scores + 1)], "base")
    assert "a [bold] | b" in printed(comparisons, 200)
    assert r"| a [bold] \| b | 1 |" in as_markdown(comparisons)


def test_markdown_tables_have_as_many_cells_as_columns() -> None:
    text = as_markdown(compare(make_rows(("pickscore", "sharpness")), "base"))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 * (2 + len(EFFECTS) * 2)
    assert {line.count("|") for line in table} == {7}
    assert "**+0." in text and "**-0." in text and "< 0.001" in text


def test_no_comparison_prints_nothing() -> None:
    assert compare([], "base") == [] and as_markdown([]) == "" and printed([], 80) == ""


def test_decimals_follow_the_width_of_the_intervals() -> None:
    def row(mean: float, half_width: float) -> Comparison:
        interval = Interval(mean, mean - half_width, mean + half_width)
        return Comparison("m", 1.0, "s", 9, 1, interval, None, None, None, None, None)

    assert "20.95 [20.63, 21.27]" in as_markdown([row(20.95, 0.32)])
    assert "0.27512 [0.27481, 0.27543]" in as_markdown([row(0.27512, 0.00031)])
    assert "5200 [4900, 5500]" in as_markdown([row(5200.0, 300.0)])
