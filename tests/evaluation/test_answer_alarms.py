import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from spin_diffusion.evaluation.alarms import check_alarms
from spin_diffusion.evaluation.answer_alarms import (
    answer_diversity,
    answer_length,
    copied_answers,
    cut_answers,
    empty_answers,
    repetition,
    same_answers,
)
from spin_diffusion.evaluation.judges import Answer
from tests.evaluation.made_up_answers import answer, sentence

PROMPTS, ANSWERS = 100, 4
ROLES = {"log_likelihood": "held-out", "reward": "in-domain", "length": "drift"}
Grid = list[list[Answer]]


def grid(seed: int, num_words: Callable[[random.Random], int] = lambda rng: rng.randint(10, 30)) -> Grid:
    """Every `seed` is another model that is the same as the others."""
    return [
        [
            answer(sentence(rng, num_words(rng)), str(i), k, reference=sentence(random.Random(i), 20),
                   finish="length" if rng.random() < 0.05 else "stop")
            for k in range(ANSWERS)
            for rng in [random.Random(f"{seed} {i} {k}")]
        ]
        for i in range(PROMPTS)
    ]  # fmt: skip


def each(answers: Grid, **changed: Callable[[Answer], object]) -> Grid:
    return [[replace(a, **{name: change(a) for name, change in changed.items()}) for a in row] for row in answers]


def some(answers: Grid, one_in: int, **changed: Callable[[Answer], object]) -> Grid:
    """The same with every so manieth answer changed."""
    return [
        [each([[a]], **changed)[0][0] if (ANSWERS * i + k) % one_in == 0 else a for k, a in enumerate(row)]
        for i, row in enumerate(answers)
    ]


def scores(seed: int, **by: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    level = np.random.default_rng(99).normal(size=(PROMPTS, 1))
    return {name: level + by.get(name, 0.0) + rng.normal(size=(PROMPTS, ANSWERS)) for name in ROLES}


def check(baseline: Grid, candidate: Grid, **options) -> list:
    given = {"baseline_scores": scores(0), "candidate_scores": scores(1), "roles": ROLES} | options
    return check_alarms(baseline, candidate, **given)


def test_the_same_model_with_other_seeds_seldom_sets_off_anything() -> None:
    alarms = warnings = 0
    for seed in range(30):
        found = check(
            grid(2 * seed), grid(2 * seed + 1), baseline_scores=scores(2 * seed), candidate_scores=scores(2 * seed + 1),
            training_prompts=["another"], previous=scores(1000 + seed),
        )  # fmt: skip
        alarms += any(alarm.state == "alarm" for alarm in found)
        warnings += any(alarm.state == "warn" and alarm.id != "stagnation" for alarm in found)
    assert alarms == 0 and warnings <= 2


def test_the_alarms_are_always_the_same_ones_and_speak_in_one_line() -> None:
    full = check(grid(0), grid(1), training_prompts=["prompt 0"], previous=scores(2))
    bare = check([row[:1] for row in grid(0)], [row[:1] for row in grid(1)], baseline_scores={}, candidate_scores={})
    assert [alarm.id for alarm in full] == [alarm.id for alarm in bare] == [
        "goodhart", "answer_length", "repetition", "diversity_over_seeds", "same_answers", "cut_answers",
        "empty_answers", "copied_answers", "training_leak", "stagnation",
    ]  # fmt: skip
    assert not [alarm.id for alarm in full if alarm.state == "not run"]
    assert [alarm.id for alarm in bare if alarm.state == "not run"] == [
        "goodhart", "diversity_over_seeds", "same_answers", "copied_answers", "training_leak", "stagnation"
    ]  # fmt: skip
    for alarm in full + bare:
        assert alarm.explanation.endswith(".") and "\n" not in alarm.explanation
        assert (alarm.value is None) == (alarm.threshold is None) == (alarm.state == "not run")


@pytest.mark.parametrize(("words", "state"), [(40, "alarm"), (11, "alarm"), (26, "warn"), (20, "ok"), (21, "ok")])
def test_much_longer_and_much_shorter_answers_are_an_alarm(words: int, state: str) -> None:
    base, other = grid(0, lambda rng: rng.randint(18, 22)), grid(1, lambda rng: words)
    fired = answer_length(each(base, reference=lambda a: None), each(other, reference=lambda a: None))
    assert fired.state == state
    assert fired.value == pytest.approx(max(words / 20, 20 / words), rel=0.02) and fired.threshold == 1.5
    assert f"to {words:.1f}" in fired.explanation


def test_answers_that_come_closer_to_the_length_of_the_real_ones_are_what_was_asked_for() -> None:
    base, long, short = grid(0, lambda rng: 8), grid(1, lambda rng: 20), grid(1, lambda rng: 4)
    fired = answer_length(base, long)
    assert fired.state == "ok" and "towards the real answers" in fired.explanation and fired.value == pytest.approx(2.5)
    assert answer_length(base, short).state == "alarm"
    assert answer_length(base, grid(1, lambda rng: 90)).state == "alarm", "far beyond them"


def test_no_answers_at_all_are_short_and_not_a_division_by_zero() -> None:
    nothing = each(grid(0), text=lambda a: "", num_tokens=lambda a: 0)
    assert answer_length(grid(1), nothing).state == "alarm"
    assert answer_length(nothing, nothing).state == "ok"
    assert answer_length(nothing, grid(1)).value == pytest.approx(40, rel=0.1)


def test_loops_are_an_alarm() -> None:
    base = grid(0)
    looping = some(grid(1), 5, text=lambda a: "the fox sleeps and " * 10)
    fired = repetition(base, looping)
    assert fired.state == "alarm" and fired.value == pytest.approx(0.2 * (1 - 4 / 38), abs=0.04)
    assert repetition(base, some(grid(1), 20, text=lambda a: "the fox sleeps and " * 10)).state == "warn"
    assert repetition(base, grid(1)).state == "ok"
    assert repetition(looping, base).state == "ok"


def test_the_same_answer_for_every_seed_is_an_alarm() -> None:
    base = grid(0)
    alike = [[replace(row[0], k=k) if k < 2 else a for k, a in enumerate(row)] for row in grid(1)]
    fired = answer_diversity(base, alike)
    assert fired.state == "alarm" and fired.value == pytest.approx(1 / 6, abs=0.02)
    assert "different answers per prompt from 4.00 to 3.00 of 4" in fired.explanation
    assert answer_diversity(base, grid(1)).state == "ok"
    assert answer_diversity(alike, base).state == "ok"
    same = [[replace(row[0], k=k) for k in range(ANSWERS)] for row in grid(1)]
    assert answer_diversity(base, same).value == pytest.approx(1.0)
    assert answer_diversity(same, same).state == "not run"
    # One word of twenty differs: not one answer is the same as another, and still they are alike
    nearly = [[replace(a, text=a.text + f" {k}") for k, a in enumerate(row)] for row in same]
    assert answer_diversity(base, nearly).state == "alarm" and same_answers(base, nearly).state == "ok"
    # and nothing is said of the same answer where their number has not fallen
    assert "ever the same answer" in fired.explanation
    said = answer_diversity(base, nearly).explanation
    assert "from 4.00 to 4.00 of 4" in said and "the same answer" not in said and "fewer words" in said
    few = answer_diversity(base[:5], nearly[:5])
    assert few.state == "not run" and "5 prompts are too few" in few.explanation
    assert answer_diversity(base[:6], nearly[:6]).state == "alarm"


def test_equal_answers_count_from_ten_words_on() -> None:
    base = grid(0)
    alike = [[replace(row[0], k=k) if k < 2 else a for k, a in enumerate(row)] for row in grid(1)]
    fired = same_answers(base, alike)
    assert fired.state == "alarm" and fired.value == pytest.approx(1 / 6)
    assert same_answers(base, grid(1)).state == "ok"
    assert same_answers(base, each(base, text=lambda a: "yes, it is")).state == "ok"


def test_answers_that_no_longer_end_are_an_alarm() -> None:
    base, other = (each(grid(seed), finish=lambda a: "stop") for seed in (0, 1))
    assert cut_answers(base, some(other, 3, finish=lambda a: "length")).state == "alarm"
    assert cut_answers(base, some(other, 25, finish=lambda a: "length")).state == "warn"
    assert cut_answers(base, some(other, 50, finish=lambda a: "length")).state == "ok"
    assert cut_answers(some(other, 3, finish=lambda a: "length"), base).state == "ok"


def test_empty_answers_are_an_alarm_and_a_few_by_chance_a_warning() -> None:
    base = grid(0)
    assert empty_answers(base, some(grid(1), 10, text=lambda a: " \n")).state == "alarm"
    few = grid(1)
    for i in range(5):
        few[i][0] = replace(few[i][0], text="")
    fired = empty_answers(base, few)
    assert fired.state == "warn" and "5 of 400 of the model's" in fired.explanation and "chance" in fired.explanation
    assert empty_answers(base, grid(1)).state == "ok"


def test_real_answers_of_training_prompts_word_for_word_are_an_alarm() -> None:
    base = grid(0)
    copying = some(grid(1), 3, text=lambda a: a.reference.upper() + "  ")
    trained = {f"prompt {i}" for i in range(60)}
    fired = copied_answers(base, copying, trained)
    assert fired.state == "alarm" and "0 of 240 of the base's" in fired.explanation
    assert copied_answers(base, grid(1), trained).state == "ok"
    assert copied_answers(copying, copying, trained).state == "ok", "the base did as well"
    assert copied_answers(base, copying, {"prompt x"}).state == "not run", "it may be right, if it was not seen"
    assert copied_answers(base, copying, None).state == "not run"
    short = [each(answers, reference=lambda a: "four") for answers in (base, each(base, text=lambda a: "four"))]
    assert copied_answers(*short, trained).state == "not run", "there may be one right answer"


def test_training_prompts_among_those_of_the_evaluation_are_found() -> None:
    def leak(*trained: str) -> tuple[str, float]:
        found = next(a for a in check(grid(0), grid(1), training_prompts=trained) if a.id == "training_leak")
        return found.state, found.value

    assert leak("another") == ("ok", 0.0)
    assert leak("PROMPT 3!") == ("warn", 0.01)
    assert leak(*(f"prompt {i}" for i in range(6))) == ("alarm", 0.06)


def test_a_reward_that_rises_at_the_cost_of_the_likelihood_is_an_alarm() -> None:
    found = check(grid(0), grid(1), candidate_scores=scores(1, reward=1.0, log_likelihood=-0.7))
    assert found[0].id == "goodhart" and found[0].state == "alarm" and "log_likelihood" in found[0].explanation
    assert check(grid(0), grid(1), candidate_scores=scores(1, reward=1.0))[0].state == "ok"


def test_a_round_that_changes_nothing_is_advice_to_stop() -> None:
    assert check(grid(0), grid(1), previous=scores(2))[-1].state == "warn"
    assert check(grid(0), grid(1), previous=scores(2, log_likelihood=1.0))[-1].state == "ok"


def test_answers_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="same numbers of answers"):
        check(grid(0), grid(1)[:-1])
    with pytest.raises(ValueError, match="at least 2 prompts"):
        check(grid(0)[:1], grid(1)[:1])
