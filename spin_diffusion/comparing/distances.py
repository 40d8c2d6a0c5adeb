"""How far the test pictures of the base and of every method are from the real ones of their world, over the seeds."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from spin_diffusion.comparing.results import Difference, Distances, Mean
from spin_diffusion.comparing.settings import Mode
from spin_diffusion.evaluation.distribution import Features, Replicates, believable, interval
from spin_diffusion.evaluation.features import Comparison, keep_measured
from spin_diffusion.evaluation.records import Metric
from spin_diffusion.evaluation.statistics import half_width
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.files import read_rows, rows_metadata, tensors_metadata
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of

_OfSeeds = dict[int, dict[Metric, Replicates]]


def distances_of(
    by_method: Mapping[str, Mapping[Mode, Mapping[int, Path]]], compared: Comparison, per_prompt: int, prompts: int
) -> Distances:
    """The base and every method, drawn in each way.

    Args:
        by_method: the base first; of each way and seed the file of the scores of its pictures, if there is one.
        per_prompt, prompts: pictures of each test prompt, and how many prompts there are.
    """
    real = _real(compared)
    metrics, left_out = believable(prompts, per_prompt, len(real), real.shape[1])
    found: Distances = {
        "title": f"{len(real)} real {compared.said}, in {real.shape[1]} features of {compared.name}",
        "num_real": len(real),
        "num_images": prompts * per_prompt,
        "left_out": left_out,
        "rows": [],
    }
    if not metrics:
        return found
    measured: dict[str, dict[Mode, _OfSeeds]] = {
        method: {
            mode: {
                seed: of_file
                for seed, path in of_seeds.items()
                if (of_file := _measured(path, per_prompt, compared, real)) is not None
            }
            for mode, of_seeds in by_mode.items()
        }
        for method, by_mode in by_method.items()
    }
    base = next(iter(measured.values())).get("best", {})
    for method, by_mode in measured.items():
        for mode, of_seeds in by_mode.items():
            if of_seeds:
                common = of_seeds is not base and of_seeds.keys() & base.keys()
                apart = {metric: _difference(metric, of_seeds, base) for metric in metrics} if common else {}
                means = {metric: _mean(metric, of_seeds) for metric in metrics}
                found["rows"].append({"method": method, "mode": mode, "metrics": means, "to_base": apart})
    return found


def nearest(views: Mapping[Sampling, Path], compared: Comparison, per_prompt: int, prompts: int) -> Sampling | None:
    """The settings of the sampler by which the pictures have the lowest Frechet distance, its bias taken off; of equal
    ones the cheapest. None where some have no pictures.

    Args:
        views: the files of the scores.
        per_prompt, prompts: as of `distances_of`.

    Raises:
        InputError: they are too few for so many features.
    """
    real, distances = _real(compared), {}
    metrics, why = believable(prompts, per_prompt, *real.shape)
    if "fd" not in metrics:
        raise InputError(f"--sweep by fd: {why}; give more --num_validation_prompts")
    for how, path in views.items():
        if (found := _measured(path, per_prompt, compared, real)) is None:
            return None
        distances[how] = interval("fd", found["fd"]).mean
    return min(sorted(distances), key=lambda how: distances[how])


def _real(compared: Comparison) -> Features:
    return compared.real_features("cuda" if torch.cuda.is_available() else "cpu")


def _measured(scores: Path, per_prompt: int, compared: Comparison, real: Features) -> dict[Metric, Replicates] | None:
    """What is measured of the pictures of a file of scores, kept beside these files; None where there are none."""
    rows = read_rows(scores) if scores.is_file() else []
    if not rows or "features" not in rows[0]:
        return None
    rows.sort(key=lambda row: (row["id"], row["k"]))
    features = np.array([row["features"] for row in rows], np.float32)
    images = features.reshape(-1, per_prompt, features.shape[1])
    key = key_of(drawn=rows_metadata(scores)[KEY], real=tensors_metadata(compared.path)[KEY])
    path = scores.parents[1] / "distances" / f"{scores.stem}.safetensors"
    return keep_measured(path, key, partial(np.asarray, images), real)


def _mean(metric: Metric, of_seeds: _OfSeeds, other: _OfSeeds | None = None) -> Mean:
    """The mean over seeds; the interval joins that of the jackknife, whose groups are the same for all seeds, and
    Student's over the seeds."""
    seeds = sorted(of_seeds) if other is None else sorted(of_seeds.keys() & other.keys())
    each = {seed: interval(metric, of_seeds[seed][metric], other[seed][metric] if other else None) for seed in seeds}
    together = interval(
        metric, _averaged(metric, of_seeds, seeds), _averaged(metric, other, seeds) if other is not None else None
    )
    means = np.array([found.mean for found in each.values()])
    between = float(half_width(means, 0.95)) if len(seeds) > 1 else 0.0
    low, high = (math.hypot(end - together.mean, between) for end in (together.low, together.high))
    of_seed = {str(seed): found.mean for seed, found in each.items()}
    return {"mean": together.mean, "low": together.mean - low, "high": together.mean + high, "seeds": of_seed}


def _averaged(metric: Metric, of_seeds: Mapping[int, Mapping[Metric, Replicates]], seeds: Sequence[int]) -> Replicates:
    parts = [of_seeds[seed][metric] for seed in seeds]
    return Replicates(
        float(np.mean([part.whole for part in parts])),
        np.mean([part.without_prompts for part in parts], axis=0),
        np.mean([part.without_real for part in parts], axis=0),
    )


def _difference(metric: Metric, of_seeds: _OfSeeds, base: _OfSeeds) -> Difference:
    """The difference to the base, paired over the seeds that both have, one at least."""
    return {**_mean(metric, of_seeds, base), "adjusted": None}
