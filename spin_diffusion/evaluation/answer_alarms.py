"""Alarms of answers: their length, loops, one answer for every seed, cut and empty ones, the training data by heart.

Each compares a model's answers with the base's, paired by prompt.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from spin_diffusion.evaluation.alarm_rules import (
    BROKEN_RISE,
    DIVERSITY_PROMPTS,
    Alarm,
    count_rises,
    diversity_falls,
    normalised,
    not_run,
    raised,
    share_rises,
    signed,
    state_of,
    too_few_to_pair,
)
from spin_diffusion.evaluation.judges import Answer
from spin_diffusion.evaluation.statistics import paired_difference
from spin_diffusion.evaluation.words import ngrams, repeated_share, words

Answers = Sequence[Sequence[Answer]]
"""(prompts, answers): answer k to prompt i is at [i][k], for every model."""
LENGTH_FACTOR = 1.5
"""How many times as long, or as short, the mean answer becomes; half of it in the logarithm (1.22 times) is a
warning."""
REPETITION_RISE = 0.05
"""Rise of the mean share of repeated runs of three words, 0 to 1."""
SAME_RISE = 0.05
"""Rise of the share of pairs of seeds that give the same answer, 0 to 1."""
CUT_RISE = 0.05
"""Rise of the share of answers that are cut at the longest one allowed, 0 to 1."""
COPIED_RISE = 0.05
"""Rise of the share of answers that are the real answer of a training prompt, word for word, 0 to 1."""
MIN_WORDS = 10
"""Answers of fewer words may well be the same, or the real one, because they are right."""


def answer_alarms(baseline: Answers, candidate: Answers, trained: set[str] | None) -> list[Alarm]:
    """All alarms that look at the answers themselves. `trained`: as of `copied_answers`."""
    if [len(row) for row in baseline] != [len(row) for row in candidate]:
        raise ValueError("baseline and candidate must have the same numbers of answers to the same prompts")
    return [
        answer_length(baseline, candidate),
        repetition(baseline, candidate),
        answer_diversity(baseline, candidate),
        same_answers(baseline, candidate),
        cut_answers(baseline, candidate),
        empty_answers(baseline, candidate),
        copied_answers(baseline, candidate, trained),
    ]


def answer_length(baseline: Answers, candidate: Answers) -> Alarm:
    """Answers become much longer or shorter, and not because the real ones are.

    The value is how many times as long, or as short, the mean answer is. A model that comes closer to the length of the
    real answers (in characters, of which the real ones have no tokens) does what it is trained for.
    """
    before, after = (_of_each(answers, lambda answer: answer.num_tokens) for answers in (baseline, candidate))
    difference = paired_difference(after, before)
    # Half a token, so that no answers at all are very short and not a division by 0
    ratio = max(float(after.mean()), 0.5) / max(float(before.mean()), 0.5)
    value = max(ratio, 1 / ratio)
    state = state_of(math.log(value), math.log(LENGTH_FACTOR), difference.low > 0 or difference.high < 0)
    text = f"Tokens per answer go from {before.mean():.1f} to {after.mean():.1f}, {signed(difference)}."
    references = [len(row[0].reference) for row in baseline if row[0].reference is not None]
    real = float(np.mean(references)) if references else 0.0
    if state != "ok" and real:
        far, near = (abs(math.log(max(_characters(answers), 0.5) / real)) for answers in (baseline, candidate))
        if near < far:
            towards = f" This is towards the real answers: {_characters(baseline):.0f} characters become "
            towards += f"{_characters(candidate):.0f}, and the real ones have {real:.0f}."
            return Alarm("answer_length", "ok", value, LENGTH_FACTOR, text + towards)
    advice = (
        "Many judges like long answers, and short ones are cheap to make likely: look at what was added or left out, "
        "and compare the likelihood of the real answers."
    )
    return raised("answer_length", value, LENGTH_FACTOR, state, text, advice)


def repetition(baseline: Answers, candidate: Answers) -> Alarm:
    """Answers loop: the share of their runs of three words that occurred before rises."""
    before, after = (_of_each(answers, lambda answer: repeated_share(answer.text)) for answers in (baseline, candidate))
    advice = "The model begins to loop: look at the longest answers, and use an earlier round."
    return share_rises("repetition", before, after, REPETITION_RISE, "Repeated runs of three words", advice)


def answer_diversity(baseline: Answers, candidate: Answers) -> Alarm:
    """The answers to one prompt become alike: the share of pairs of words that two of them do not share falls."""
    per_prompt = min(len(row) for row in baseline)
    if problem := too_few_to_pair(per_prompt, len(baseline), DIVERSITY_PROMPTS, "answer"):
        return not_run("diversity_over_seeds", problem)
    distinct_before, distinct_after = (
        np.mean([len({_plain(answer) for answer in row}) for row in answers]) for answers in (baseline, candidate)
    )
    before, after = (np.array([_mean_distance(row) for row in answers]) for answers in (baseline, candidate))
    return diversity_falls(
        before,
        after,
        measure="pairs of words that two answers do not share",
        beside=f"different answers per prompt from {distinct_before:.2f} to {distinct_after:.2f} of {len(baseline[0])}",
        sample="gives the same answer",
        what="The model gives ever the same answer"
        if distinct_after < distinct_before
        else "Answers differ in fewer words",
    )


def same_answers(baseline: Answers, candidate: Answers) -> Alarm:
    """More pairs of seeds give the same answer, of at least MIN_WORDS words."""
    if problem := too_few_to_pair(min(len(row) for row in baseline), len(baseline), 0, "answer"):
        return not_run("same_answers", problem)

    def share(row: Sequence[Answer]) -> float:
        pairs = list(combinations(row, 2))
        return sum(_plain(a) == _plain(b) and len(words(a.text)) >= MIN_WORDS for a, b in pairs) / len(pairs)

    before, after = (np.array([share(row) for row in answers]) for answers in (baseline, candidate))
    what = f"Pairs of seeds that give the same answer of {MIN_WORDS} words or more"
    return share_rises("same_answers", before, after, SAME_RISE, what, "The seed matters less and less: stop earlier.")


def cut_answers(baseline: Answers, candidate: Answers) -> Alarm:
    """More answers do not end by themselves."""
    before, after = (_of_each(answers, lambda answer: answer.finish == "length") for answers in (baseline, candidate))
    advice = (
        "The model forgets how to end: look whether the end token is part of the training answers, and whether they "
        "are longer than what is allowed."
    )
    return share_rises("cut_answers", before, after, CUT_RISE, "Answers cut at the longest one allowed", advice)


def empty_answers(baseline: Answers, candidate: Answers) -> Alarm:
    """More answers are empty or white space."""
    before, after = (_count(answers, lambda answer: not answer.text.strip()) for answers in (baseline, candidate))
    advice = "Saying nothing is the cheapest answer: look at which prompts they follow, and use an earlier round."
    return count_rises("empty_answers", before, after, BROKEN_RISE, "Empty answers", advice)


def copied_answers(baseline: Answers, candidate: Answers, trained: set[str] | None) -> Alarm:
    """Answers to prompts of training are the training data word for word: the model has learnt it by heart.

    Args:
        trained: the `normalised` prompts of training. None = not known.
    """
    alarm = "copied_answers"
    if trained is None:
        return not_run(alarm, "the training prompts are not known")
    places = [
        place
        for place, row in enumerate(baseline)
        if normalised(row[0].prompt) in trained and len(words(row[0].reference or "")) >= MIN_WORDS
    ]
    if not places:
        why = f"no prompt with a real answer of {MIN_WORDS} words or more was trained on, as it should be"
        return not_run(alarm, why)
    before, after = (
        _count([answers[place] for place in places], lambda answer: words(answer.text) == words(answer.reference or ""))
        for answers in (baseline, candidate)
    )
    what = "Answers to training prompts that are the real answer word for word"
    advice = "The model learns its training data by heart: use fewer epochs, or more data."
    return count_rises(alarm, before, after, COPIED_RISE, what, advice)


def _of_each(answers: Answers, value: Callable[[Answer], float]) -> np.ndarray:
    """(prompts, answers) of a number of each."""
    return np.array([[float(value(answer)) for answer in row] for row in answers])


def _characters(answers: Answers) -> float:
    return float(np.mean([len(answer.text) for row in answers for answer in row]))


def _count(answers: Answers, holds: Callable[[Answer], bool]) -> tuple[int, int]:
    """(answers of which it holds, all answers)."""
    held = [holds(answer) for row in answers for answer in row]
    return sum(held), len(held)


def _plain(answer: Answer) -> str:
    return " ".join(answer.text.split())


def _mean_distance(row: Sequence[Answer]) -> float:
    """Mean over pairs of answers of 1 - Jaccard index of their pairs of words: 0 = the same, 1 = nothing in common."""
    found = [set(ngrams(answer.text, 2)) or {tuple(words(answer.text))} for answer in row]
    return float(np.mean([1 - len(a & b) / len(a | b) for a, b in combinations(found, 2)]))
