"""Alarms: signs that a model won its scores without drawing better images. Each compares it with the base, paired.

A preference score can be raised by a texture, by colours that shout, by one style for every prompt, or by drawing the
same picture for every seed. Each of these leaves a trace that costs nothing to measure once the images are scored.
Every alarm is a function of arrays to an `Alarm`; `check_alarms` runs all of them for one model. Those of answers are
in answer_alarms.py.

An alarm goes off only when the effect is both larger than its threshold and beyond chance (95 % interval over
prompts). How often a model that is the same as the base sets one off stands in `check_alarms`. Thresholds are set by
judgement: no images of released models have been measured for them.

To add an alarm, write one function here and call it in `check_alarms`.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from spin_diffusion.evaluation.digits import decimals_of
from spin_diffusion.evaluation.records import AlarmState, Role
from spin_diffusion.evaluation.statistics import Interval, mean_interval, paired_difference

Features = np.ndarray | None
"""(prompts, images, width) image embeddings of one backbone, alike for both models; None = there are none."""
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
class Thresholds:
    """When alarms go off. An effect of half the size, beyond chance as well, is a warning."""

    diversity_drop: float = 0.10
    """Share of the base's diversity over seeds that is lost, 0 to 1."""
    diversity_prompts: int = 6
    """With fewer prompts neither diversity nor near duplicates are judged: that two of two change for the worse is
    chance in one case of four, and that six of six do in one of 64."""
    style_similarity_rise: float = 0.05
    """Rise of the mean cosine between images of different prompts, -2 to 2."""
    near_duplicate_cosine: float = 0.97
    """Cosine above which two images of one prompt count as the same picture."""
    near_duplicate_rise: float = 0.05
    """Rise of the share of such pairs, 0 to 1."""
    photometry_mads: float = 3.0
    """Shift of the mean, in median absolute deviations of the base over prompts."""
    photometry_smallest_mad: float = 0.005
    """A base that hardly varies counts as varying this much, in the measure's own unit."""
    broken_rise: float = 0.01
    """Rise of the share of broken images, 0 to 1."""
    leaked_share: float = 0.05
    """Share of the evaluation's prompts that are training captions too, 0 to 1; a single one is a warning."""


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


def count_leaked(captions: Iterable[str], prompts: Sequence[str]) -> int:
    """How many of the evaluation's prompts are training captions: equal but for case, punctuation and white space."""
    keys = [normalised(prompt) for prompt in prompts]
    trained = trained_among(captions, keys)
    return sum(key in trained for key in keys)


def trained_among(captions: Iterable[str], wanted: Iterable[str]) -> set[str]:
    """Those of the `normalised` prompts that are training captions, of which no other is kept in memory."""
    wanted = set(wanted)
    return {key for caption in captions if (key := normalised(caption)) in wanted}


def normalised(text: str) -> str:
    """The text without what makes no difference between two prompts: case, punctuation and white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(re.sub(r"[^\w\s]", " ", folded).split())
    return words or " ".join(folded.split())  # a prompt of emoji alone is compared as it is


def check_alarms(
    baseline_scores: Mapping[str, np.ndarray],
    candidate_scores: Mapping[str, np.ndarray],
    *,
    roles: Mapping[str, Role],
    baseline_features: np.ndarray | None = None,
    candidate_features: np.ndarray | None = None,
    baseline_photometry: Mapping[str, np.ndarray] | None = None,
    candidate_photometry: Mapping[str, np.ndarray] | None = None,
    baseline_broken: tuple[int, int] | None = None,
    candidate_broken: tuple[int, int] | None = None,
    previous: Mapping[str, np.ndarray] | None = None,
    prompts: Sequence[str] = (),
    training_captions: Iterable[str] | None = None,
    thresholds: Thresholds | None = None,
) -> list[Alarm]:
    """All alarms for one model at one guidance scale against the base, always the same ones in the same order.

    Image k of prompt i is at [i, k] of every array, for both models and the round before.

    False alarms: of 1000 simulated evaluations of a model that is the same as the base (200 prompts, 4 images, 6
    scorers, features of 32 numbers, 1 % broken images), 2 had an alarm and 12 a warning other than stagnation, which
    rightly warned in 938. The simulation is kind: real images of one prompt are broken together, for example.

    Args:
        baseline_scores: scorer -> (prompts, images), finite.
        candidate_scores: the same of the model.
        roles: scorer -> its role; at least the scorers that both have.
        baseline_features: (prompts, images, width) image embeddings of one backbone; they are scaled to length 1 here.
        candidate_features: the same shape.
        baseline_photometry: name of the measure (saturation, clipped, sharpness) -> (prompts, images), finite.
        candidate_photometry: the same shapes.
        baseline_broken: (broken images, all images that were asked for).
        candidate_broken: likewise.
        previous: the scores of the round before. None = there is none.
        prompts: of the evaluation.
        training_captions: what the model was trained with. None = not known.
        thresholds: default: `Thresholds()`.

    Raises:
        ValueError: arrays whose shapes do not match, numbers that are not finite, or fewer than 2 prompts.
    """
    limits = thresholds or Thresholds()
    differences = differences_of(candidate_scores, baseline_scores)
    num_leaked = None if training_captions is None else count_leaked(training_captions, prompts)
    return [
        goodhart(differences, roles),
        aesthetics_up_alignment_down(differences, roles),
        diversity_over_seeds(baseline_features, candidate_features, limits),
        style_collapse(baseline_features, candidate_features, limits),
        near_duplicates(baseline_features, candidate_features, limits),
        photometry(baseline_photometry or {}, candidate_photometry or {}, limits),
        broken_images(baseline_broken, candidate_broken, limits),
        training_leak(num_leaked, len(prompts), limits),
        stagnation(candidate_scores, previous, roles),
    ]


def goodhart(differences: Mapping[str, np.ndarray], roles: Mapping[str, Role]) -> Alarm:
    """The scorer that training pleases goes up while one that it does not know goes down.

    Args:
        differences: scorer -> (prompts,) model minus base.
        roles: scorer -> its role. Judged against "in-domain" are "truth", "held-out" and "alignment".
    """
    what = "The model pleases {up} more, which was trained on the same preferences, but is worse by {down}"
    return _opposed("goodhart", differences, roles, "in-domain", ("truth", "held-out", "alignment"), what)


def aesthetics_up_alignment_down(differences: Mapping[str, np.ndarray], roles: Mapping[str, Role]) -> Alarm:
    """Images get more beautiful and show less of what the prompt asks for.

    Args:
        differences: scorer -> (prompts,) model minus base.
        roles: scorer -> its role.
    """
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


def diversity_over_seeds(baseline: Features, candidate: Features, thresholds: Thresholds) -> Alarm:
    """The images of one prompt become alike: their mean pairwise 1 - cosine falls."""
    alarm = "diversity_over_seeds"
    if (problem := _no_pairs(baseline, candidate, thresholds)) is not None:
        return not_run(alarm, problem)
    assert baseline is not None and candidate is not None
    base, cand = _unit(baseline), _unit(candidate)
    before, after = (1 - _pair_cosines(features).mean(axis=1) for features in (base, cand))
    vendi = f"{_vendi(base).mean():.2f} to {_vendi(cand).mean():.2f}"
    return diversity_falls(
        before,
        after,
        thresholds.diversity_drop,
        measure="mean 1 - cosine",
        beside=f"different pictures per prompt (Vendi score of {base.shape[1]} images) from {vendi}",
        sample="draws the same image",
        what="The model draws ever the same picture of a prompt",
    )


def style_collapse(baseline: Features, candidate: Features, thresholds: Thresholds) -> Alarm:
    """The images of different prompts become alike: their mean cosine rises."""
    alarm = "style_collapse"
    if (problem := _no_features(baseline, candidate)) is not None:
        return not_run(alarm, problem)
    assert baseline is not None and candidate is not None
    if len(baseline) < 3:
        return not_run(alarm, "it takes 3 prompts or more")
    before, after = _cosine_between_prompts(_unit(baseline)), _cosine_between_prompts(_unit(candidate))
    difference, threshold = paired_difference(after, before), thresholds.style_similarity_rise
    state = state_of(difference.mean, threshold, difference.low > 0)
    what = "The mean cosine between images of different prompts"
    numbers = f"{what} goes from {before.mean():.3f} to {after.mean():.3f}, {signed(difference)}."
    return raised(alarm, difference.mean, threshold, state, numbers)


def near_duplicates(baseline: Features, candidate: Features, thresholds: Thresholds) -> Alarm:
    """More pairs of seeds give the same picture."""
    alarm = "near_duplicates"
    if (problem := _no_pairs(baseline, candidate, thresholds)) is not None:
        return not_run(alarm, problem)
    assert baseline is not None and candidate is not None
    cosine = thresholds.near_duplicate_cosine
    before, after = ((_pair_cosines(_unit(features)) > cosine).mean(axis=1) for features in (baseline, candidate))
    what = f"Pairs of seeds that give the same picture (cosine above {cosine:g})"
    return share_rises(alarm, before, after, thresholds.near_duplicate_rise, what)


def photometry(
    baseline: Mapping[str, np.ndarray],
    candidate: Mapping[str, np.ndarray],
    thresholds: Thresholds,
) -> Alarm:
    """Saturation, clipped luma or sharpness move far from where the base's images lie.

    The shift of the mean is measured in median absolute deviations of the base over prompts; the value is the largest.

    Args:
        baseline: name of the measure -> (prompts, images).
        candidate: the same shapes.
    """
    names = [name for name in candidate if name in baseline]
    if not names:
        return not_run("photometry", "no colours and edges were measured for both models")
    shifts: list[tuple[float, AlarmState, str]] = []
    for name in names:
        before = np.asarray(baseline[name], dtype=np.float64)
        difference = paired_difference(np.asarray(candidate[name]), before)
        by_prompt = before if before.ndim == 1 else before.mean(axis=1)
        mad = float(np.median(np.abs(by_prompt - np.median(by_prompt))))
        shift = difference.mean / max(mad, thresholds.photometry_smallest_mad)
        state = state_of(abs(shift), thresholds.photometry_mads, difference.low > 0 or difference.high < 0)
        shifts.append((shift, state, f"{name} from {by_prompt.mean():.3f} by {signed(difference)}"))
    shift, state, _ = max(shifts, key=lambda entry: (_STATES.index(entry[1]), abs(entry[0])))
    numbers = f"In units of the base's spread over prompts the largest shift is {shift:+.1f}: "
    numbers += "; ".join(text for *_, text in shifts) + "."
    return raised("photometry", abs(shift), thresholds.photometry_mads, state, numbers)


def broken_images(baseline: tuple[int, int] | None, candidate: tuple[int, int] | None, thresholds: Thresholds) -> Alarm:
    """More images are black, of one colour, not finite or missing.

    Args:
        baseline: (broken images, all images).
        candidate: likewise.
    """
    if baseline is None or candidate is None or 0 in (baseline[1], candidate[1]):
        return not_run("broken_images", "broken images were not counted for both models")
    for broken, total in (baseline, candidate):
        if not 0 <= broken <= total:
            raise ValueError(f"broken images must be (broken, all), got {(broken, total)}")
    what = "Broken images (one colour, not finite, missing)"
    return count_rises("broken_images", baseline, candidate, thresholds.broken_rise, what)


def training_leak(
    num_leaked: int | None, num_prompts: int, thresholds: Thresholds, what: str = "training captions"
) -> Alarm:
    """The model was trained on the prompts it is examined with.

    Args:
        num_leaked: prompts that were trained on too, from `count_leaked`.
        num_prompts: all prompts.
        what: the prompts of training are called.
    """
    if num_leaked is None or not num_prompts:
        return not_run("training_leak", f"the {what} are not known")
    if not 0 <= num_leaked <= num_prompts:
        raise ValueError(f"num_leaked must be from 0 to the {num_prompts} prompts, got {num_leaked}")
    share = num_leaked / num_prompts
    state: AlarmState = "alarm" if share > thresholds.leaked_share else "warn" if num_leaked else "ok"
    numbers = f"{num_leaked} of {num_prompts} prompts are {what} too."
    return raised("training_leak", share, thresholds.leaked_share, state, numbers)


def stagnation(
    candidate: Mapping[str, np.ndarray],
    previous: Mapping[str, np.ndarray] | None,
    roles: Mapping[str, Role],
) -> Alarm:
    """No scorer tells this round from the one before. A reason to stop, not to distrust: "warn" at most.

    The value is the number of scorers that see a difference, by intervals that hold together at 95 % (Bonferroni).

    Args:
        candidate: scorer -> (prompts, images).
        previous: the same of the round before.
        roles: scorer -> its role; "drift" is left out.
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


# Rules that alarms of pictures and of answers share


_STATES: tuple[AlarmState, ...] = ("not run", "ok", "warn", "alarm")


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


def diversity_falls(
    before: np.ndarray, after: np.ndarray, threshold: float, *, measure: str, beside: str, sample: str, what: str
) -> Alarm:
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
    state = state_of(drop, threshold, difference.high < 0)
    return raised(alarm, drop, threshold, state, numbers, f"{what}: stop earlier, or train for fewer steps per round.")


def count_rises(
    alarm: str, baseline: tuple[int, int], candidate: tuple[int, int], threshold: float, what: str
) -> Alarm:
    """The alarm of samples in some state that become more.

    Only counts are compared, so the test is not paired: Fisher's exact one, one-sided. A rise above the threshold that
    chance would give in more than 1 of 200 cases is a warning only; so rare, because samples of one prompt tend to go
    wrong together, which the test does not know.

    Args:
        baseline: (samples in that state, all samples), at least one.
        candidate: likewise.
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
    size = max(abs(interval.low), abs(interval.high), abs(interval.mean))
    # Three digits of the largest number: scorers differ in scale by a factor of 100
    decimals = decimals_of(size, 3)
    mean, low, high = (round(value, decimals) + 0.0 for value in (interval.mean, interval.low, interval.high))
    return f"{mean:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]"


def differences_of(candidate: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scorer that both have -> (prompts,) candidate minus base, over the mean of the images."""
    differences = {}
    for name in candidate:
        if name not in base:
            continue
        a, b = np.asarray(candidate[name], dtype=np.float64), np.asarray(base[name], dtype=np.float64)
        if a.shape != b.shape:
            raise ValueError(
                f"{name} must be of the same prompts and images for both models, got {a.shape} and {b.shape}"
            )
        differences[name] = a - b if a.ndim == 1 else (a - b).mean(axis=1)
    return differences


def _no_features(baseline: Features, candidate: Features) -> str | None:
    """Why features cannot be compared; None = they can."""
    if baseline is None or candidate is None:
        return "no scorer gave image features for both models"
    if baseline.ndim != 3 or baseline.shape != candidate.shape:
        raise ValueError(
            f"features must have shape (prompts, images, width), alike for both models, got {baseline.shape} and "
            f"{candidate.shape}"
        )
    return None


def _no_pairs(baseline: Features, candidate: Features, thresholds: Thresholds) -> str | None:
    """Why images of one prompt cannot be compared; None = they can."""
    if (problem := _no_features(baseline, candidate)) is not None:
        return problem
    assert baseline is not None
    return too_few_to_pair(baseline.shape[1], len(baseline), thresholds.diversity_prompts, "image")


def _unit(features: np.ndarray) -> np.ndarray:
    """(prompts, images, width) float64 of length 1."""
    features = np.asarray(features, dtype=np.float64)
    lengths = np.linalg.norm(features, axis=2, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        prompt = int(np.argwhere(~np.isfinite(lengths) | (lengths == 0))[0][0])
        raise ValueError(f"features must be finite and not 0, which those of prompt number {prompt} are not")
    return features / lengths


def _pair_cosines(features: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of images of one prompt: (prompts, images, width) -> (prompts, images (images - 1) / 2)."""
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
