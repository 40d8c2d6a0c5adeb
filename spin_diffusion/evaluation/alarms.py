"""Alarms: signs that a model won its scores without better pictures or answers. Each compares it with the base, paired.

A preference score can be raised by a texture, by colours that shout, by one style for every prompt, or by drawing the
same picture for every seed; of answers by their length, by loops, or by the training data word for word. Each of these
leaves a trace that costs nothing to measure. Every alarm is a function of both models to an `Alarm`; `check_alarms`
runs all of them for one model.

An alarm goes off only when the effect is both larger than its threshold and beyond chance (95 % interval over
prompts). An effect of half the size, beyond chance as well, is a warning. How often a model that is the same as the
base sets one off stands in `check_alarms`. Thresholds are set by judgement: no samples of released models have been
measured for them.

To add an alarm, write one function here and call it in `check_alarms`.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from spin_diffusion.evaluation.judges import Answer
from spin_diffusion.evaluation.judges.distinct import ngrams, repeated_share, words
from spin_diffusion.evaluation.records import AlarmState, Role
from spin_diffusion.evaluation.statistics import Interval, decimals_of, mean_interval, paired_difference

DIVERSITY_DROP = 0.10
"""Share of the base's diversity over seeds that is lost, 0 to 1."""
DIVERSITY_PROMPTS = 6
"""With fewer prompts neither diversity nor near duplicates are judged: that two of two change for the worse is chance
in one case of four, and that six of six do in one of 64."""
STYLE_SIMILARITY_RISE = 0.05
"""Rise of the mean cosine between images of different prompts, -2 to 2."""
NEAR_DUPLICATE_COSINE = 0.97
"""Cosine above which two images of one prompt count as the same picture."""
NEAR_DUPLICATE_RISE = 0.05
"""Rise of the share of such pairs, 0 to 1."""
PHOTOMETRY_MADS = 3.0
"""Shift of the mean, in median absolute deviations of the base over prompts."""
PHOTOMETRY_SMALLEST_MAD = 0.005
"""A base that hardly varies counts as varying this much, in the measure's own unit."""
BROKEN_RISE = 0.01
"""Rise of the share of broken images, or of empty answers, 0 to 1."""
LEAKED_SHARE = 0.05
"""Share of the evaluation's prompts that were trained on too, 0 to 1; a single one is a warning."""
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
ADVICE = {
    "goodhart": "it is learning the scorer and not what people like. Use an earlier round, a smaller learning rate or "
    "fewer steps, and look at the prompts that lose most by {names}.",
    "aesthetics_up_alignment_down": "the model paints what it likes. Look at the prompts that lose most by {names}, "
    "and use an earlier round or captions that say what the training images show.",
    "style_collapse": "Everything begins to look the same: look at the gallery for a style, a frame or a background "
    "that no prompt asked for, and use an earlier round or training images of more kinds.",
    "near_duplicates": "The seed matters less and less: look at the most similar pairs, and stop earlier.",
    "photometry": "Colours, exposure or edges have moved as a whole, which scorers tend to reward before people "
    "notice: look for neon colours, blown-out skies, stippling or blur, and use an earlier round.",
    "broken_images": "Scores leave them out and so look better than the model is: see the failures, and check the "
    "precision.",
    "training_leak": "The model has seen the answers to these: leave them out, or take another prompt set.",
    "answer_length": "Many judges like long answers, and short ones are cheap to make likely: look at what was added "
    "or left out, and compare the likelihood of the real answers.",
    "repetition": "The model begins to loop: look at the longest answers, and use an earlier round.",
    "same_answers": "The seed matters less and less: stop earlier.",
    "cut_answers": "The model forgets how to end: look whether the end token is part of the training answers, and "
    "whether they are longer than what is allowed.",
    "empty_answers": "Saying nothing is the cheapest answer: look at which prompts they follow, and use an earlier "
    "round.",
    "copied_answers": "The model learns its training data by heart: use fewer epochs, or more data.",
}
"""What an alarm says beside its numbers when it goes off or warns."""


@dataclass(frozen=True)
class Alarm:
    """What one alarm found."""

    id: str
    state: AlarmState
    value: float | None
    """What was compared with the threshold; None = not run."""
    threshold: float | None
    explanation: str
    """In plain words, with numbers and with what to do; why it was not run."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What the alarms look at of one model's pictures. Image k of prompt i is at [i, k] of every array."""

    prompts: Sequence[str] = ()
    features: np.ndarray | None = None
    """(prompts, images, width) image embeddings of one backbone, alike for both models; None = there are none."""
    photometry: Mapping[str, np.ndarray] | None = None
    """Name of the measure (saturation, clipped, sharpness) -> (prompts, images), finite."""
    broken: tuple[int, int] | None = None
    """(broken images, all images that were asked for)."""


Answers = Sequence[Sequence[Answer]]
"""(prompts, answers): answer k to prompt i is at [i][k], for every model."""
Scores = Mapping[str, np.ndarray]
"""Scorer -> (prompts, samples), finite."""


def check_alarms(
    baseline: Pictures | Answers,
    candidate: Pictures | Answers,
    *,
    baseline_scores: Scores,
    candidate_scores: Scores,
    roles: Mapping[str, Role],
    previous: Scores | None = None,
    training_prompts: Iterable[str] | None = None,
) -> list[Alarm]:
    """All alarms for one model at one guidance scale against the base, always the same ones in the same order.

    False alarms: of 1000 simulated evaluations of a model that is the same as the base (200 prompts, 4 images, 6
    scorers, features of 32 numbers, 1 % broken images), 2 had an alarm and 12 a warning other than stagnation, which
    rightly warned in 938. Of 300 of answers (200 prompts, 4 answers of 10 to 30 random words, 5 % of them cut, 3
    judges), none had an alarm and 4 a warning other than stagnation, which rightly warned in 281. The simulations are
    kind: real samples of one prompt go wrong together, for example.

    Args:
        baseline: pictures, or answers to at least 2 prompts.
        candidate: those of the model, to the same prompts and seeds.
        roles: scorer -> its role; at least the scorers that both have.
        previous: the scores of the round before. None = there is none.
        training_prompts: what the model was trained with. None = not known.

    Raises:
        ValueError: samples whose shapes do not match, numbers that are not finite, or fewer than 2 prompts.
    """
    differences = differences_of(candidate_scores, baseline_scores)
    if isinstance(baseline, Pictures):
        prompts, what = baseline.prompts, "training captions"
    else:
        prompts, what = list(dict.fromkeys(row[0].prompt for row in baseline)), "training prompts"
    keys = [normalised(prompt) for prompt in prompts]
    trained = None if training_prompts is None else trained_among(training_prompts, keys)
    if isinstance(baseline, Pictures):
        assert isinstance(candidate, Pictures)
        of_samples = [aesthetics_up_alignment_down(differences, roles), *_picture_alarms(baseline, candidate)]
    else:
        assert not isinstance(candidate, Pictures)
        of_samples = _answer_alarms(baseline, candidate, trained)
    num_leaked = None if trained is None else sum(key in trained for key in keys)
    return [
        goodhart(differences, roles),
        *of_samples,
        training_leak(num_leaked, len(prompts), what),
        stagnation(candidate_scores, previous, roles),
    ]


def _picture_alarms(baseline: Pictures, candidate: Pictures) -> list[Alarm]:
    return [
        diversity_over_seeds(baseline.features, candidate.features),
        style_collapse(baseline.features, candidate.features),
        near_duplicates(baseline.features, candidate.features),
        photometry(baseline.photometry or {}, candidate.photometry or {}),
        broken_images(baseline.broken, candidate.broken),
    ]


def _answer_alarms(baseline: Answers, candidate: Answers, trained: set[str] | None) -> list[Alarm]:
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


# Rules that several alarms share


def state_of(size: float, threshold: float, beyond_chance: bool) -> AlarmState:
    """The state of an effect; half of the threshold is worth a warning, and chance is worth nothing."""
    if not beyond_chance or size <= threshold / 2:
        return "ok"
    return "alarm" if size > threshold else "warn"


def not_run(alarm: str, reason: str) -> Alarm:
    """The alarm that could not be computed, and why."""
    return Alarm(alarm, "not run", None, None, f"Not run: {reason}.")


def raised(
    alarm: str, value: float, threshold: float, state: AlarmState, numbers: str, advice: str | None = None
) -> Alarm:
    """The alarm with its numbers in words, and its advice (default: in ADVICE) where it is more than "ok"."""
    advice = ADVICE[alarm] if advice is None else advice
    return Alarm(alarm, state, value, threshold, numbers if state == "ok" else f"{numbers} {advice}")


def share_rises(alarm: str, before: np.ndarray, after: np.ndarray, threshold: float, what: str) -> Alarm:
    """The alarm of a mean share, 0 to 1, that rises from the base to the model, paired by prompt."""
    difference = paired_difference(after, before)
    state = state_of(difference.mean, threshold, difference.low > 0)
    numbers = f"{what}: {before.mean():.1%} of the base's, {after.mean():.1%} of the model's."
    return raised(alarm, difference.mean, threshold, state, numbers)


def diversity_falls(before: np.ndarray, after: np.ndarray, measure: str, beside: str, sample: str, what: str) -> Alarm:
    """The alarm of samples of one prompt that become alike; its value is the share of the base's diversity that is
    lost.

    Args:
        before, after: (prompts,) mean distance between the samples of a prompt.
        measure: how the distance is measured; other numbers of the same stand in `beside`.
        sample: what a base without diversity makes the same for every seed.
        what: what the model does.
    """
    alarm, level = "diversity_over_seeds", float(before.mean())
    if level <= 1e-6:
        return not_run(alarm, f"the base {sample} for every seed, so there is no diversity to lose")
    difference = paired_difference(after, before)
    drop = -difference.mean / level
    change = f"from {level:.3f} to {after.mean():.3f}, {signed(difference)}"
    numbers = f"Diversity over seeds ({measure}) goes {change}; {beside}."
    state = state_of(drop, DIVERSITY_DROP, difference.high < 0)
    advice = f"{what}: stop earlier, or train for fewer steps per round."
    return raised(alarm, drop, DIVERSITY_DROP, state, numbers, advice)


def count_rises(
    alarm: str, baseline: tuple[int, int], candidate: tuple[int, int], threshold: float, what: str
) -> Alarm:
    """The alarm of samples in some state that become more.

    Only counts are compared, so the test is not paired: Fisher's exact one, one-sided. A rise above the threshold that
    chance would give in more than 1 of 200 cases is a warning only; so rare, because samples of one prompt tend to go
    wrong together, which the test does not know.

    Args:
        baseline, candidate: (samples in that state, all samples), at least one.
        threshold: of the rise of the share, 0 to 1; below it nothing is said.
        what: the samples in that state, at the beginning of a sentence.
    """
    rise = candidate[0] / candidate[1] - baseline[0] / baseline[1]
    state: AlarmState = "ok"
    if rise > threshold:
        table = [[candidate[0], candidate[1] - candidate[0]], [baseline[0], baseline[1] - baseline[0]]]
        state = "alarm" if stats.fisher_exact(table, alternative="greater").pvalue < 0.005 else "warn"
    counts = f"{baseline[0]} of {baseline[1]} of the base's, {candidate[0]} of {candidate[1]} of the model's"
    doubt = " It may still be chance: use more prompts to be sure." if state == "warn" else ""
    return raised(alarm, rise, threshold, state, f"{what}: {counts}.", ADVICE[alarm] + doubt)


def too_few_to_pair(per_prompt: int, num_prompts: int, min_prompts: int, sample: str) -> str | None:
    """Why samples of one prompt cannot be compared with each other; None = they can."""
    if per_prompt < 2:
        return f"there is one {sample} per prompt; draw 2 or more (4 say more)"
    if num_prompts < min_prompts:
        return f"{num_prompts} prompts are too few to tell; ask {min_prompts} or more"
    return None


def signed(interval: Interval) -> str:
    """A difference and its interval in a sentence."""
    # Three digits of the largest number: scorers differ in scale by a factor of 100
    return interval.signed(decimals_of(max(abs(interval.low), abs(interval.high), abs(interval.mean)), 3))


def differences_of(candidate: Scores, base: Scores) -> dict[str, np.ndarray]:
    """Scorer that both have -> (prompts,) candidate minus base, over the mean of the samples."""
    return {name: (scores - base[name]).mean(axis=1) for name, scores in candidate.items() if name in base}


# Scores and prompts, of pictures and of answers


def goodhart(differences: Mapping[str, np.ndarray], roles: Mapping[str, Role]) -> Alarm:
    """The scorer that training pleases goes up while one that it does not know goes down.

    Args:
        differences: scorer -> (prompts,) model minus base.
    """
    what = "The model pleases {up} more, which was trained on the same preferences, but is worse by {down}"
    return _opposed("goodhart", differences, roles, "in-domain", ("truth", "held-out", "alignment"), what)


def aesthetics_up_alignment_down(differences: Mapping[str, np.ndarray], roles: Mapping[str, Role]) -> Alarm:
    """Images get more beautiful and show less of what the prompt asks for; the arguments are those of `goodhart`."""
    what = "Images are more beautiful by {up} and match their prompts less by {down}"
    return _opposed("aesthetics_up_alignment_down", differences, roles, "aesthetics", ("alignment",), what)


def _opposed(
    alarm: str,
    differences: Mapping[str, np.ndarray],
    roles: Mapping[str, Role],
    up_role: Role,
    down_roles: tuple[Role, ...],
    what: str,
) -> Alarm:
    """The alarm of a scorer that rises while another falls; the value is the upper end of the fall's interval.

    The more scorers could fall by chance, the wider their intervals (Bonferroni): otherwise a model that truly gains
    would set the alarm off the more often, the more scorers watch it.
    """
    ups = [name for name in differences if roles[name] == up_role]
    downs = [name for name in differences if roles[name] in down_roles]
    if not ups or not downs:
        missing = up_role if not ups else " or ".join(down_roles)
        return not_run(alarm, f"no {missing} scorer was run for both models")
    risen = {name: mean_interval(differences[name], 1 - 0.05 / len(ups)) for name in ups}
    risen = {name: interval for name, interval in risen.items() if interval.low > 0}
    wide = {name: mean_interval(differences[name], 1 - 0.05 / len(downs)) for name in downs}
    # Scorers have different units: in units of its own half-width, the fall that is clearest comes first
    clearest = min(wide, key=lambda name: wide[name].high / max(wide[name].high - wide[name].low, 1e-300))
    value = wide[clearest].high
    if risen:
        plain = {name: mean_interval(differences[name], 0.95) for name in downs}
        surely = [name for name in downs if wide[name].high < 0]
        perhaps = [name for name in downs if plain[name].high < 0]
        if surely or perhaps:
            up = ", ".join(f"{name} ({signed(interval)})" for name, interval in risen.items())
            down = ", ".join(f"{name} ({signed(wide[name])})" for name in surely or perhaps)
            text = f"{what}: {ADVICE[alarm]}".format(up=up, down=down, names=" and ".join(surely or perhaps))
            if not surely:
                text += " With this many scorers it may still be chance: use more prompts to be sure."
            return Alarm(alarm, "alarm" if surely else "warn", value, 0.0, text)
    if not risen:
        text = f"No {up_role} scorer rises, so nothing is bought with another score."
    else:
        text = f"{', '.join(risen)} rises, and none of {', '.join(downs)} falls."
    return Alarm(alarm, "ok", value, 0.0, text)


def training_leak(num_leaked: int | None, num_prompts: int, what: str = "training captions") -> Alarm:
    """The model was trained on the prompts it is examined with.

    Args:
        num_leaked: prompts that were trained on too. None = not known.
        what: the prompts of training are called.
    """
    if num_leaked is None or not num_prompts:
        return not_run("training_leak", f"the {what} are not known")
    share = num_leaked / num_prompts
    state: AlarmState = "alarm" if share > LEAKED_SHARE else "warn" if num_leaked else "ok"
    numbers = f"{num_leaked} of {num_prompts} prompts are {what} too."
    return raised("training_leak", share, LEAKED_SHARE, state, numbers)


def trained_among(captions: Iterable[str], wanted: Iterable[str]) -> set[str]:
    """Those of the `normalised` prompts that are training captions, of which no other is kept in memory."""
    wanted = set(wanted)
    return {key for caption in captions if (key := normalised(caption)) in wanted}


def normalised(text: str) -> str:
    """The text without what makes no difference between two prompts: case, punctuation and white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(re.sub(r"[^\w\s]", " ", folded).split())
    return words or " ".join(folded.split())  # a prompt of emoji alone is compared as it is


def stagnation(
    candidate: Mapping[str, np.ndarray],
    previous: Mapping[str, np.ndarray] | None,
    roles: Mapping[str, Role],
) -> Alarm:
    """No scorer tells this round from the one before. A reason to stop, not to distrust: "warn" at most.

    The value is the number of scorers that see a difference, by intervals that hold together at 95 % (Bonferroni).
    Scorers of the role "drift" are left out.
    """
    if previous is None:
        return not_run("stagnation", "there is no round before this one to compare with")
    differences = differences_of(candidate, previous)
    differences = {name: array for name, array in differences.items() if roles[name] != "drift"}
    if not differences:
        return not_run("stagnation", "no scorer was run for both rounds")
    confidence = 1 - 0.05 / len(differences)
    intervals = {name: mean_interval(array, confidence) for name, array in differences.items()}
    moved = [name for name, interval in intervals.items() if interval.low > 0 or interval.high < 0]
    if moved:
        numbers = ", ".join(f"{name} ({signed(intervals[name])})" for name in moved)
        text = f"This round differs from the one before by {numbers}."
        return Alarm("stagnation", "ok", float(len(moved)), 1.0, text)
    return Alarm(
        "stagnation",
        "warn",
        0.0,
        1.0,
        f"No scorer tells this round from the one before: all intervals include 0 ({', '.join(intervals)}). Further "
        "rounds are unlikely to help: stop here, or use more prompts if you expect a smaller gain than they can show.",
    )


# Pictures


def diversity_over_seeds(baseline: np.ndarray | None, candidate: np.ndarray | None) -> Alarm:
    """The images of one prompt become alike: their mean pairwise 1 - cosine falls."""
    both = _features(baseline, candidate, pairs=True)
    if isinstance(both, str):
        return not_run("diversity_over_seeds", both)
    before, after = (1 - pair_cosines(features).mean(axis=1) for features in both)
    vendi = " to ".join(f"{_vendi(features).mean():.2f}" for features in both)
    return diversity_falls(
        before,
        after,
        measure="mean 1 - cosine",
        beside=f"different pictures per prompt (Vendi score of {both[0].shape[1]} images) from {vendi}",
        sample="draws the same image",
        what="The model draws ever the same picture of a prompt",
    )


def style_collapse(baseline: np.ndarray | None, candidate: np.ndarray | None) -> Alarm:
    """The images of different prompts become alike: their mean cosine rises."""
    both = _features(baseline, candidate, pairs=False)
    if isinstance(both, str):
        return not_run("style_collapse", both)
    before, after = (_cosine_between_prompts(features) for features in both)
    difference = paired_difference(after, before)
    state = state_of(difference.mean, STYLE_SIMILARITY_RISE, difference.low > 0)
    what = "The mean cosine between images of different prompts"
    numbers = f"{what} goes from {before.mean():.3f} to {after.mean():.3f}, {signed(difference)}."
    return raised("style_collapse", difference.mean, STYLE_SIMILARITY_RISE, state, numbers)


def near_duplicates(baseline: np.ndarray | None, candidate: np.ndarray | None) -> Alarm:
    """More pairs of seeds give the same picture."""
    both = _features(baseline, candidate, pairs=True)
    if isinstance(both, str):
        return not_run("near_duplicates", both)
    before, after = ((pair_cosines(features) > NEAR_DUPLICATE_COSINE).mean(axis=1) for features in both)
    what = f"Pairs of seeds that give the same picture (cosine above {NEAR_DUPLICATE_COSINE:g})"
    return share_rises("near_duplicates", before, after, NEAR_DUPLICATE_RISE, what)


def photometry(baseline: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]) -> Alarm:
    """Saturation, clipped luma or sharpness move far from where the base's images lie.

    The shift of the mean is measured in median absolute deviations of the base over prompts; the value is the largest.
    """
    names = [name for name in candidate if name in baseline]
    if not names:
        return not_run("photometry", "no colours and edges were measured for both models")
    shifts: list[tuple[float, AlarmState, str]] = []
    for name in names:
        difference = paired_difference(candidate[name], baseline[name])
        by_prompt = baseline[name].mean(axis=1)
        mad = float(np.median(np.abs(by_prompt - np.median(by_prompt))))
        shift = difference.mean / max(mad, PHOTOMETRY_SMALLEST_MAD)
        state = state_of(abs(shift), PHOTOMETRY_MADS, difference.low > 0 or difference.high < 0)
        shifts.append((shift, state, f"{name} from {by_prompt.mean():.3f} by {signed(difference)}"))
    gravity = ("ok", "warn", "alarm")
    shift, state, _ = max(shifts, key=lambda entry: (gravity.index(entry[1]), abs(entry[0])))
    numbers = f"In units of the base's spread over prompts the largest shift is {shift:+.1f}: "
    numbers += "; ".join(text for *_, text in shifts) + "."
    return raised("photometry", abs(shift), PHOTOMETRY_MADS, state, numbers)


def broken_images(baseline: tuple[int, int] | None, candidate: tuple[int, int] | None) -> Alarm:
    """More images are black, of one colour, not finite or missing, of (broken images, all images)."""
    if baseline is None or candidate is None or 0 in (baseline[1], candidate[1]):
        return not_run("broken_images", "broken images were not counted for both models")
    what = "Broken images (one colour, not finite, missing)"
    return count_rises("broken_images", baseline, candidate, BROKEN_RISE, what)


def _features(
    baseline: np.ndarray | None, candidate: np.ndarray | None, pairs: bool
) -> tuple[np.ndarray, np.ndarray] | str:
    """Both models' (prompts, images, width) features, scaled to length 1; or why they cannot be compared, image with
    image of one prompt (`pairs`) or prompt with prompt."""
    if baseline is None or candidate is None:
        return "no scorer gave image features for both models"
    if baseline.ndim != 3 or baseline.shape != candidate.shape:
        raise ValueError(
            f"features must have shape (prompts, images, width), alike for both models, got {baseline.shape} and "
            f"{candidate.shape}"
        )
    if pairs and (problem := too_few_to_pair(baseline.shape[1], len(baseline), DIVERSITY_PROMPTS, "image")):
        return problem
    if len(baseline) < 3:
        return "it takes 3 prompts or more"
    return unit(baseline), unit(candidate)


def unit(features: np.ndarray) -> np.ndarray:
    """(prompts, images, width) float64 of length 1."""
    features = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=2, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        prompt = int(np.argwhere(~np.isfinite(lengths) | (lengths == 0))[0][0])
        raise ValueError(f"features must be finite and not 0, which those of prompt number {prompt} are not")
    return features / lengths


def pair_cosines(features: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of images of one prompt: (prompts, images, width) of length 1 -> (prompts, pairs)."""
    first, second = np.triu_indices(features.shape[1], k=1)
    return (features @ features.transpose(0, 2, 1))[:, first, second]


def _vendi(features: np.ndarray) -> np.ndarray:
    """Vendi score of the images of each prompt, from 1 (all the same) to the number of images (arXiv 2210.02410)."""
    kernel = features @ features.transpose(0, 2, 1) / features.shape[1]
    eigenvalues = np.linalg.eigvalsh(kernel).clip(min=1e-12)
    return np.exp(-(eigenvalues * np.log(eigenvalues)).sum(axis=1))


def _cosine_between_prompts(features: np.ndarray) -> np.ndarray:
    """(prompts,) numbers whose mean is the mean cosine between images of different prompts, and that may be resampled.

    Every prompt is part of prompts - 1 pairs, so that the plain averages per prompt would give an interval half as wide
    as it should be. The jackknife's pseudo-values have the same mean and the right spread.
    """
    num_prompts = len(features)
    centres = features.mean(axis=1)  # (prompts, width)
    total = centres.sum(axis=0)
    per_prompt = (centres @ total - (centres**2).sum(axis=1)) / (num_prompts - 1)
    overall = per_prompt.mean()
    without = (num_prompts * overall - 2 * per_prompt) / (num_prompts - 2)  # the mean over pairs of the others
    return num_prompts * overall - (num_prompts - 1) * without


# Answers


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
    return raised("answer_length", value, LENGTH_FACTOR, state, text)


def repetition(baseline: Answers, candidate: Answers) -> Alarm:
    """Answers loop: the share of their runs of three words that occurred before rises."""
    before, after = (_of_each(answers, lambda answer: repeated_share(answer.text)) for answers in (baseline, candidate))
    return share_rises("repetition", before, after, REPETITION_RISE, "Repeated runs of three words")


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
    return share_rises("same_answers", before, after, SAME_RISE, what)


def cut_answers(baseline: Answers, candidate: Answers) -> Alarm:
    """More answers do not end by themselves."""
    before, after = (_of_each(answers, lambda answer: answer.finish == "length") for answers in (baseline, candidate))
    return share_rises("cut_answers", before, after, CUT_RISE, "Answers cut at the longest one allowed")


def empty_answers(baseline: Answers, candidate: Answers) -> Alarm:
    """More answers are empty or white space."""
    before, after = (_count(answers, lambda answer: not answer.text.strip()) for answers in (baseline, candidate))
    return count_rises("empty_answers", before, after, BROKEN_RISE, "Empty answers")


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
    return count_rises(alarm, before, after, COPIED_RISE, what)


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
