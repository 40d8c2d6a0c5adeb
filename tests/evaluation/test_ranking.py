"""Who wins of three models, from comparisons that are written down."""

from itertools import combinations

import pytest

from spin_diffusion.evaluation.verdicts import rank

HPS = {"name": "hps", "title": "HPS", "role": "held-out", "state": "run"}
CLIP = {"name": "clip", "title": "", "role": "alignment", "state": "run"}
PICK = {"name": "pickscore", "title": "", "role": "in-domain", "state": "run"}
MODELS = ["base", "one", "two"]


def ranked(better: list[tuple[str, str]], scorers=(HPS,), suspects=(), by: str = "hps", more=()) -> dict | None:
    """The ranking where each pair's first beats its second by a scorer; pairs are written down one way only."""
    entries = []
    for earlier, later in combinations(MODELS, 2):
        for name in [scorer["name"] for scorer in scorers]:
            won = {(b, w) for b, w in better} if name == by else set(more)
            verdict = (
                "improved" if (later, earlier) in won else "regressed" if (earlier, later) in won else "inconclusive"
            )
            entries.append(
                {"model": later, "baseline": earlier, "scorer": name, "guidance_scale": 7.5, "verdict": verdict}
            )
    verdicts = [{"model": name, "guidance_scale": 7.5, "verdict": "suspect"} for name in suspects]
    return rank(MODELS, 7.5, entries, scorers, verdicts)


@pytest.mark.parametrize(
    ("better", "winner", "places", "words"),
    [
        ([("two", "one"), ("two", "base"), ("one", "base")], "two", [3, 2, 1], "two wins: it is better than each of"),
        ([("base", "one"), ("base", "two")], "base", [1, 2, 2], "base wins"),
        ([("one", "base"), ("two", "base")], None, [3, 1, 1], "A tie by HPS: one and two are not told apart; better"),
        ([], None, [1, 1, 1], "No winner: none of the 3 models is told apart from another by HPS."),
        ([("two", "base")], None, [2, 1, 1], "A tie by HPS: one and two are not told apart."),
        ([("one", "base"), ("two", "one")], None, [2, 2, 1], "two is worse than none, but not told apart from base;"),
        ([("one", "base"), ("two", "one"), ("base", "two")], None, [2, 2, 2], "each model is worse than some other"),
    ],
)  # fmt: skip
def test_the_winner_is_better_than_each_of_the_others(better, winner, places, words) -> None:
    found = ranked(better)
    assert found["winner"] == winner and words in found["sentence"], found["sentence"]
    assert [next(p["place"] for p in found["places"] if p["model"] == m) for m in MODELS] == places
    for place in found["places"]:
        assert place["better_than"] == [worse for worse in MODELS if (place["model"], worse) in better]
        assert place["worse_than"] == [other for other in MODELS if (other, place["model"]) in better]


def test_scorers_decide_as_in_the_verdict() -> None:
    beaten = [("two", "one"), ("two", "base")]
    # A fall of an alignment score forbids a win, a rise of an in-domain score alone makes none
    assert ranked(beaten, (HPS, CLIP), more=[("one", "two")])["winner"] is None
    assert ranked([], (HPS, PICK), more=beaten)["winner"] is None
    assert ranked(beaten, (PICK,), by="pickscore") is None, "no scorer may decide"
    oracle = {"name": "oracle", "title": "", "role": "truth", "state": "run"}
    assert ranked(beaten, (HPS, oracle))["winner"] is None and ranked(beaten, (oracle,), by="oracle")["winner"] == "two"
    not_run = oracle | {"state": "not run"}
    assert ranked(beaten, (HPS, not_run))["scorers"] == ["hps"]


def test_an_alarm_for_the_winner_is_said() -> None:
    found = ranked([("two", "one"), ("two", "base")], suspects=["two", "one"])
    assert found["winner"] == "two" and found["sentence"].endswith(
        "Alarms went off for two: read them before you believe it."
    )
