import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from spin_diffusion.evaluation.comparison import compare, compare_others
from spin_diffusion.evaluation.records import ComparisonEntry, Results
from spin_diffusion.evaluation.statistics import Interval, holm, mean_interval, paired_difference, sign_test_p, t_test_p
from spin_diffusion.evaluation.tables import as_markdown, print_table

EFFECTS = {"base": 0.0, "round 1": 0.5, "round 2": -0.5, "sft": 0.0}
Scores = dict[tuple[str, float, str], np.ndarray]


def made_up(scorers: tuple[str, ...] = ("pickscore",), scales: tuple[float, ...] = (1.0, 7.5)) -> Scores:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(20, 2, (40, 1))
    noise = {"base": rng.normal(0, 0.3, (40, 2))}
    # "sft" is the baseline with its prompts' noise negated in pairs: its mean difference is exactly 0.
    noise["sft"] = noise["base"] + np.tile([[0.1], [-0.1]], (20, 1))
    return {
        (model, scale, scorer): difficulty + effect + noise.get(model, noise["base"] * 0.5)
        for scorer in scorers
        for model, effect in EFFECTS.items()
        for scale in scales
    }


def compared(scores: Scores, baseline: str = "base", lost: Any = None) -> list[ComparisonEntry]:
    return compare(scores, baseline, dict.fromkeys((scorer for _, _, scorer in scores), "held-out"), lost or {})


def results_of(scores: Scores, baseline: str = "base") -> Results:
    """As far as tables need them."""
    means = [
        {"model": model, "guidance_scale": scale, "scorer": scorer, "aggregate": "mean", "num_prompts": len(values)}
        | vars(mean_interval(values))
        for (model, scale, scorer), values in scores.items()
    ]
    scales = list(dict.fromkeys(scale for _, scale, _ in scores))
    per_prompt = next(iter(scores.values())).shape[1] if scores else 1
    return {
        "protocol": {"images_per_prompt": per_prompt, "guidance_scales": scales},
        "scorers": [{"name": name, "role": "held-out"} for name in dict.fromkeys(scorer for *_, scorer in scores)],
        "results": means,
        "comparisons": compared(scores, baseline),
    }


def printed(results: Results, width: int, **options: bool) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    print_table(results, console)
    return console.file.getvalue()


def difference(entry: ComparisonEntry) -> Interval:
    return Interval(entry["difference"], entry["low"], entry["high"])


def test_every_model_is_compared_with_the_baseline_at_its_own_guidance_scale() -> None:
    scores = made_up()
    scores["base", 1.0, "pickscore"] = scores["base", 1.0, "pickscore"] + 3  # only the baseline at guidance 1 moves
    entries = compared(scores)
    assert [(c["model"], c["guidance_scale"]) for c in entries] == [key[:2] for key in scores if key[0] != "base"]
    round_1 = {c["guidance_scale"]: c for c in entries if c["model"] == "round 1"}
    assert round_1[1.0]["difference"] == pytest.approx(round_1[7.5]["difference"] - 3)


def test_the_numbers_are_those_of_statistics() -> None:
    scores = made_up(scales=(7.5,))
    base = scores["base", 7.5, "pickscore"]
    for c in compared(scores):
        ours = scores[c["model"], 7.5, "pickscore"]
        assert difference(c) == paired_difference(ours, base)
        assert c["wins"] + c["ties"] + c["losses"] == c["num_prompts"] == 40
        assert c["p"] == max(sign_test_p(c["wins"], c["losses"]), t_test_p(ours, base))


def test_p_is_adjusted_over_all_models_scorers_and_guidance_scales_of_the_tables() -> None:
    scores = made_up(("one", "two", "three"))
    family = compared(scores)
    assert [c["p_holm"] for c in family] == holm([c["p"] for c in family]).tolist() and len(family) == 3 * 3 * 2
    others = compare_others(scores, "base", dict.fromkeys(("one", "two", "three"), "held-out"), {})
    assert [c["p_holm"] for c in others] == holm([c["p"] for c in others]).tolist() and len(others) == 3 * 3 * 2


def test_all_but_the_baseline_are_compared_with_each_other() -> None:
    scores = made_up(scales=(7.5,))
    others = compare_others(scores, "base", {"pickscore": "held-out"}, {})
    assert [(c["model"], c["baseline"]) for c in others] == [
        ("round 2", "round 1"), ("sft", "round 1"), ("sft", "round 2")
    ]  # fmt: skip
    for c in others:
        ours, theirs = (scores[c[side], 7.5, "pickscore"] for side in ("model", "baseline"))
        assert difference(c) == paired_difference(ours, theirs)
    assert compare_others(dict(list(scores.items())[:2]), "base", {"pickscore": "held-out"}, {}) == []


def test_of_models_that_are_all_the_same_hardly_ever_any_is_called_better() -> None:
    """Five models at two guidance scales by three scorers: of 24 tests at 5 % each one would be expected to err."""
    found = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        tested = compared(
            {(m, g, s): rng.normal(size=(30, 1)) for m in "abcde" for g in (1.0, 7.5) for s in "xyz"}, "a"
        )
        assert len(tested) == 24
        found += any(c["verdict"] != "inconclusive" for c in tested)
    assert found <= 0.05 * 150


def test_a_drift_score_is_neither_better_nor_worse() -> None:
    entries = compare(made_up(), "base", {"pickscore": "drift"}, {})
    assert {c["verdict"] for c in entries} == {"drift"}


def test_what_only_the_model_ahead_has_lost_counts_against_it() -> None:
    base = np.random.default_rng(3).normal(size=(20, 1))
    lost = frozenset(f"{n}" for n in range(12))

    def counts(of_model: frozenset[str], of_base: frozenset[str], sign: int) -> tuple[int, int, int]:
        scores = {("base", 1.0, "s"): base, ("m", 1.0, "s"): base + 0.1 * sign}
        (c,) = compared(scores, lost={("base", 1.0): of_base, ("m", 1.0): of_model})
        assert c["p"] == sign_test_p(c["wins"], c["losses"]) and c["num_prompts"] == 20
        return c["wins"], c["ties"], c["losses"]

    assert counts(lost, frozenset(), 1) == (20, 0, 12)
    assert counts(lost, lost, 1) == (20, 0, 0), "prompts that both lack say nothing"
    assert counts(frozenset(), lost, 1) == (20, 0, 0), "what the baseline lacks is no win"
    assert counts(frozenset(), lost, -1) == (12, 0, 20)


def test_better_is_positive_worse_is_negative() -> None:
    entries = {c["model"]: c for c in compared(made_up(scales=(7.5,)))}
    assert entries["round 1"]["low"] > 0 and entries["round 1"]["wins"] > 35
    assert entries["round 2"]["high"] < 0 and entries["round 2"]["losses"] > 35
    assert entries["sft"]["low"] < 0 < entries["sft"]["high"]


def test_a_model_that_equals_the_baseline_ties_everywhere() -> None:
    scores = np.random.default_rng(1).normal(size=(5, 1))
    both = {("base", 1.0, "s"): scores, ("twin", 1.0, "s"): scores.copy()}
    (twin,) = compared(both)
    assert difference(twin) == Interval(0.0, 0.0, 0.0)
    assert (twin["wins"], twin["ties"], twin["losses"], twin["p"]) == (0, 5, 0, 1.0)
    text = as_markdown(results_of(both))
    assert "+0.0" in text and "-0.0" not in text and "**+" not in text


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_every_model_and_number_is_printed_at_any_width(width: int) -> None:
    text = printed(results_of(made_up(("pickscore", "sharpness"))), width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    words = " ".join(text.split())
    for wanted in (*EFFECTS, "pickscore: 40 prompts x 2 images", "sharpness:", "guidance 1", "guidance 7.5", "seeds"):
        assert wanted in words
    assert "\u2026" not in text, "nothing may be cut"
    assert text.count("[+") >= 4 and text.count("[-") >= 4


def test_a_wide_console_shows_one_line_per_model() -> None:
    text = printed(results_of(made_up()), 200)
    line = next(line for line in text.splitlines() if "round 1" in line)
    assert line.count("[") == 4


def test_what_is_bold_is_what_the_verdict_calls_significant() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(size=(12, 1))
    carried = base + np.array([[3.0]] * 5 + [[-0.01]] * 7)  # a few prompts carry the mean
    results = results_of({("base", 1.0, "s"): base, ("better", 1.0, "s"): base + 1, ("carried", 1.0, "s"): carried})
    assert results["comparisons"][1]["low"] > 0
    lines = {line.split("|")[1].strip(): line for line in as_markdown(results).splitlines() if "|" in line}
    assert "**" in lines["better"] and "**" not in lines["carried"] and "**" not in lines["base"]
    # Of many models chance makes some interval exclude 0
    zero = np.zeros((12, 1))
    same = {("base", 1.0, "s"): zero} | {(f"m{n}", 1.0, "s"): rng.normal(size=(12, 1)) for n in range(60)}
    found = results_of(same)
    assert any(c["low"] > 0 or c["high"] < 0 for c in found["comparisons"])
    assert "**+" not in as_markdown(found) and "**-" not in as_markdown(found)


def test_colours_follow_the_verdict() -> None:
    text = printed(results_of(made_up(scales=(7.5,))), 200, force_terminal=True)
    green, red = "\x1b[1;32m", "\x1b[1;31m"
    lines = {name: next(line for line in text.splitlines() if name in line) for name in EFFECTS}
    assert green + "+" in lines["round 1"] and red not in lines["round 1"]
    assert red + "-" in lines["round 2"] and green not in lines["round 2"]
    assert not any(colour in lines[name] for name in ("sft", "base") for colour in (green, red))


def test_brackets_and_bars_in_names_stay_what_they_are() -> None:
    scores = np.random.default_rng(2).normal(size=(4, 1))
    results = results_of({("base", 1.0, "s"): scores, ("a [bold] | b\n", 1.0, "s"): scores + 1})
    assert "a [bold] | b" in printed(results, 200)
    assert r"| a [bold] \| b | 1 |" in as_markdown(results)


def test_markdown_tables_have_as_many_cells_as_columns() -> None:
    text = as_markdown(results_of(made_up(("pickscore", "sharpness"))))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 * (2 + len(EFFECTS) * 2)
    assert {line.count("|") for line in table} == {7}
    assert "**+0." in text and "**-0." in text and "< 0.001" in text


def test_no_comparison_prints_nothing() -> None:
    nothing = results_of({})
    assert nothing["comparisons"] == [] and as_markdown(nothing) == "" and printed(nothing, 80) == ""


@pytest.mark.parametrize(
    ("mean", "half_width", "shown"),
    [
        (20.95, 0.32, "20.95 [20.63, 21.27]"),
        (0.27512, 0.00031, "0.27512 [0.27481, 0.27543]"),
        (5200.0, 300.0, "5200 [4900, 5500]"),
    ],
)
def test_decimals_follow_the_width_of_the_intervals(mean: float, half_width: float, shown: str) -> None:
    results = results_of({("m", 1.0, "s"): np.array([[mean], [mean]])}, "m")
    results["results"][0] |= {"mean": mean, "low": mean - half_width, "high": mean + half_width}
    assert shown in as_markdown(results)
