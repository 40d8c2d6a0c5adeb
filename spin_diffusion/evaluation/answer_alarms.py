"""Alarms for answers: signs that a model won its scores without better answers. Each compares it with the base, paired.

What goes wrong in self-play over texts is seen in the texts: answers grow or shrink because the objective favours
length, loop, become the same for every seed, do not end any more, or are the training data word for word. The rules are
those of alarms.py: an alarm goes off only when the effect is both larger than its threshold and beyond chance. The
thresholds are set by judgement: no answers of released models have been measured for them.

To add an alarm, write one function here and call it in `check_answer_alarms`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from spin_diffusion.evaluation.alarms import (
    Alarm,
    Thresholds,
    count_rises,
    differences_of,
    diversity_falls,
    goodhart,
    normalised,
    not_run,
    raised,
    share_rises,
    signed,
    stagnation,
    state_of,
    too_few_to_pair,
    trained_among,
    training_leak,
)
from spin_diffusion.evaluation.judges import Answer
from spin_diffusion.evaluation.judges.distinct import ngrams, repeated_share, words
from spin_diffusion.evaluation.records import Role
from spin_diffusion.evaluation.statistics import paired_difference

Answers = Sequence[Sequence[Answer]]
"""(prompts, answers): answer k to prompt i is at [i][k], for every model."""


@dataclass(frozen=True)
class AnswerThresholds:
    """When alarms go off. An effect of half the size, beyond chance as well, is a warning."""

    length_factor: float = 1.5
    """How many times as long, or as short, the mean answer becomes; half of it in the logarithm (1.22 times)
    is a warning."""
    repetition_rise: float = 0.05
    """Rise of the mean share of repeated runs of three words, 0 to 1."""
    diversity_drop: float = 0.10
    """Share of the base's diversity over seeds that is lost, 0 to 1."""
    diversity_prompts: int = 6
    """With fewer prompts it is not judged: that two of two fall is chance in one case of four, and that six of six do
    in one of 64."""
    same_rise: float = 0.05
    """Rise of the share of pairs of seeds that give the same answer, 0 to 1."""
    cut_rise: float = 0.05
    """Rise of the share of answers that are cut at the longest one allowed, 0 to 1."""
    empty_rise: float = 0.01
    """Rise of the share of empty answers, 0 to 1."""
    copied_rise: float = 0.05
    """Rise of the share of answers that are the real answer of a training prompt, word for word, 0 to 1."""
    min_words: int = 10
    """Answers of fewer words may well be the same, or the real one, because they are right."""


def check_answer_alarms(
    baseline: Answers,
    candidate: Answers,
    *,
    baseline_scores: Mapping[str, np.ndarray],
    candidate_scores: Mapping[str, np.ndarray],
    roles: Mapping[str, Role],
    previous: Mapping[str, np.ndarray] | None = None,
    training_prompts: Iterable[str] | None = None,
    thresholds: AnswerThresholds | None = None,
) -> list[Alarm]:
    """All alarms for one model against the base, always the same ones in the same order.

    False alarms: of 300 simulated evaluations of a model that is the same as the base (200 prompts, 4 answers of 10 to
    30 random words, 5 % of them cut, 3 judges), none had an alarm and 4 a warning other than stagnation, which rightly
    warned in 281. The simulation is kind: real answers to one prompt are cut together, for example.

    Args:
        baseline: (prompts, answers), at least 2 prompts.
        candidate: the same prompts and seeds.
        baseline_scores: judge -> (prompts, answers), finite.
        candidate_scores: the same of the model.
        roles: judge -> its role; at least the judges that both have.
        previous: the scores of the round before. None = there is none.
        training_prompts: what the model was trained with. None = not known.
        thresholds: default: `AnswerThresholds()`.

    Raises:
        ValueError: answers or scores whose shapes do not match, or fewer than 2 prompts.
    """
    if [len(row) for row in baseline] != [len(row) for row in candidate]:
        raise ValueError("baseline and candidate must have the same numbers of answers to the same prompts")
    limits = thresholds or AnswerThresholds()
    prompts = list(dict.fromkeys(row[0].prompt for row in baseline))
    keys = [normalised(prompt) for prompt in prompts]
    trained = None if training_prompts is None else trained_among(training_prompts, keys)
    num_leaked = None if trained is None else sum(key in trained for key in keys)
    return [
        goodhart(differences_of(candidate_scores, baseline_scores), roles),
        answer_length(baseline, candidate, limits),
        repetition(baseline, candidate, limits),
        diversity_over_seeds(baseline, candidate, limits),
        same_answers(baseline, candidate, limits),
        cut_answers(baseline, candidate, limits),
        empty_answers(baseline, candidate, limits),
        copied_answers(baseline, candidate, trained, limits),
        training_leak(num_leaked, len(prompts), Thresholds(), "training prompts"),
        stagnation(candidate_scores, previous, roles),
    ]


def answer_length(baseline: Answers, candidate: Answers, thresholds: AnswerThresholds) -> Alarm:
    """Answers become much longer or shorter, and not because the real ones are.

    The value is how many times as long, or as short, the mean answer is. A model that comes closer to the length of the
    real answers (in characters, of which the real ones have no tokens) does what it is trained for.
    """
    before, after = (_of_each(answers, lambda answer: answer.num_tokens) for answers in (baseline, candidate))
    difference, threshold = paired_difference(after, before), thresholds.length_factor
    # Half a token, so that no answers at all are very short and not a division by 0
    ratio = max(float(after.mean()), 0.5) / max(float(before.mean()), 0.5)
    value = max(ratio, 1 / ratio)
    state = state_of(math.log(value), math.log(threshold), difference.low > 0 or difference.high < 0)
    text = f"Tokens per answer go from {before.mean():.1f} to {after.mean():.1f}, {signed(difference)}."
    references = [len(row[0].reference) for row in baseline if row[0].reference is not None]
    real = float(np.mean(references)) if references else 0.0
    if state != "ok" and real:
        far, near = (abs(math.log(max(_characters(answers), 0.5) / real)) for answers in (baseline, candidate))
        if near < far:
            towards = f" This is towards the real answers: {_characters(baseline):.0f} characters become "
            towards += f"{_characters(candidate):.0f}, and the real ones have {real:.0f}."
            return Alarm("answer_length", "ok", value, threshold, text + towards)
    return raised("answer_length", value, threshold, state, text)


def repetition(baseline: Answers, candidate: Answers, thresholds: AnswerThresholds) -> Alarm:
    """Answers loop: the share of their runs of three words that occurred before rises."""
    before, after = (_of_each(answers, lambda answer: repeated_share(answer.text)) for answers in (baseline, candidate))
    return share_rises("repetition", before, after, thresholds.repetition_rise, "Repeated runs of three words")


def diversity_over_seeds(baseline: Answers, candidate: Answers, thresholds: AnswerThresholds) -> Alarm:
    """The answers to one prompt become alike: the share of pairs of words that two of them do not share falls."""
    per_prompt = min(len(row) for row in baseline)
    if problem := too_few_to_pair(per_prompt, len(baseline), thresholds.diversity_prompts, "answer"):
        return not_run("diversity_over_seeds", problem)
    distinct_before, distinct_after = (
        np.mean([len({_plain(answer) for answer in row}) for row in answers]) for answers in (baseline, candidate)
    )
    before, after = (np.array([_mean_distance(row) for row in answers]) for answers in (baseline, candidate))
    return diversity_falls(
        before,
        after,
        thresholds.diversity_drop,
        measure="pairs of words that two answers do not share",
        beside=f"different answers per prompt from {distinct_before:.2f} to {distinct_after:.2f} of {len(baseline[0])}",
        sample="gives the same answer",
        what="The model gives ever the same answer"
        if distinct_after < distinct_before
        else "Answers differ in fewer words",
    )


def same_answers(baseline: Answers, candidate: Answers, thresholds: AnswerThresholds) -> Alarm:
    """More pairs of seeds give the same answer, of at least `min_words` words."""
    if problem := too_few_to_pair(min(len(row) for row in baseline), len(baseline), 0, "answer"):
        return not_run("same_answers", problem)

    def share(row: Sequence[Answer]) -> float:
        pairs = list(combinations(row, 2))
        return sum(_plain(a) == _plain(b) and len(words(a.text)) >= thresholds.min_words for a, b in pairs) / len(pairs)

    before, after = (np.array([share(row) for row in answers]) for answers in (baseline, candidate))
    what = f"Pairs of seeds that give the same answer of {thresholds.min_words} words or more"
    return share_rises("same_answers", before, after, thresholds.same_rise, what)


def cut_answers(baseline: Answers, candidate: Answers, thresholds: AnswerThresholds) -> Alarm:
    """More answers do not end by themselves."""
    before, after = (_of_each(answers, lambda answer: answer.finish == "length") for answers in (baseline, candidate))
    return share_rises("cut_answers", before, after, thresholds.cut_rise, "Answers cut at the longest one allowed")


def empty_answers(baseline: Answers, candidate: Answers, thresholds: AnswerThresholds) -> Alarm:
    """More answers are empty or white space."""
    before, after = (_count(answers, lambda answer: not answer.text.strip()) for answers in (baseline, candidate))
    return count_rises("empty_answers", before, after, thresholds.empty_rise, "Empty answers")


def copied_answers(
    baseline: Answers, candidate: Answers, trained: set[str] | None, thresholds: AnswerThresholds
) -> Alarm:
    """Answers to prompts of training are the training data word for word: the model has learnt it by heart.

    Args:
        trained: the `normalised` prompts of training. None = not known.
    """
    alarm, min_words = "copied_answers", thresholds.min_words
    if trained is None:
        return not_run(alarm, "the training prompts are not known")
    places = [
        place
        for place, row in enumerate(baseline)
        if normalised(row[0].prompt) in trained and len(words(row[0].reference or "")) >= min_words
    ]
    if not places:
        why = f"no prompt with a real answer of {min_words} words or more was trained on, as it should be"
        return not_run(alarm, why)
    before, after = (
        _count([answers[place] for place in places], lambda answer: words(answer.text) == words(answer.reference or ""))
        for answers in (baseline, candidate)
    )
    what = "Answers to training prompts that are the real answer word for word"
    return count_rises(alarm, before, after, thresholds.copied_rise, what)


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
