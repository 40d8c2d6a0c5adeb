"""Alarms of pictures: diversity lost, one style for every prompt, colours that shout, broken images.

Each compares a model's pictures with the base's, paired by prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spin_diffusion.evaluation.alarm_rules import (
    BROKEN_RISE,
    DIVERSITY_PROMPTS,
    Alarm,
    count_rises,
    diversity_falls,
    not_run,
    raised,
    share_rises,
    signed,
    state_of,
    too_few_to_pair,
)
from spin_diffusion.evaluation.records import AlarmState
from spin_diffusion.evaluation.statistics import paired_difference

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


def picture_alarms(baseline: Pictures, candidate: Pictures) -> list[Alarm]:
    """All alarms that look at the pictures themselves."""
    return [
        diversity_over_seeds(baseline.features, candidate.features),
        style_collapse(baseline.features, candidate.features),
        near_duplicates(baseline.features, candidate.features),
        photometry(baseline.photometry or {}, candidate.photometry or {}),
        broken_images(baseline.broken, candidate.broken),
    ]


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
    advice = (
        "Everything begins to look the same: look at the gallery for a style, a frame or a background that no prompt "
        "asked for, and use an earlier round or training images of more kinds."
    )
    return raised("style_collapse", difference.mean, STYLE_SIMILARITY_RISE, state, numbers, advice)


def near_duplicates(baseline: np.ndarray | None, candidate: np.ndarray | None) -> Alarm:
    """More pairs of seeds give the same picture."""
    both = _features(baseline, candidate, pairs=True)
    if isinstance(both, str):
        return not_run("near_duplicates", both)
    before, after = ((pair_cosines(features) > NEAR_DUPLICATE_COSINE).mean(axis=1) for features in both)
    what = f"Pairs of seeds that give the same picture (cosine above {NEAR_DUPLICATE_COSINE:g})"
    advice = "The seed matters less and less: look at the most similar pairs, and stop earlier."
    return share_rises("near_duplicates", before, after, NEAR_DUPLICATE_RISE, what, advice)


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
    advice = (
        "Colours, exposure or edges have moved as a whole, which scorers tend to reward before people notice: look for "
        "neon colours, blown-out skies, stippling or blur, and use an earlier round."
    )
    return raised("photometry", abs(shift), PHOTOMETRY_MADS, state, numbers, advice)


def broken_images(baseline: tuple[int, int] | None, candidate: tuple[int, int] | None) -> Alarm:
    """More images are black, of one colour, not finite or missing, of (broken images, all images)."""
    if baseline is None or candidate is None or 0 in (baseline[1], candidate[1]):
        return not_run("broken_images", "broken images were not counted for both models")
    what = "Broken images (one colour, not finite, missing)"
    advice = "Scores leave them out and so look better than the model is: see the failures, and check the precision."
    return count_rises("broken_images", baseline, candidate, BROKEN_RISE, what, advice)


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
