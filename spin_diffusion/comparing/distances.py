"""How far the test pictures of the base and of every method are from the real ones of their world, over the seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from spin_diffusion.comparing.cells import View, read_view, scores_path
from spin_diffusion.comparing.plan import Cell
from spin_diffusion.comparing.results import Difference, Distances, Mean
from spin_diffusion.comparing.settings import Mode
from spin_diffusion.evaluation.distribution import Features, Replicates, believable, interval
from spin_diffusion.evaluation.features import keep_measured
from spin_diffusion.evaluation.records import Metric
from spin_diffusion.evaluation.statistics import half_width
from spin_diffusion.runs.real_pictures import of_data
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.store.files import rows_metadata
from spin_diffusion.store.keys import KEY, key_of

_OfSeeds = dict[int, dict[Metric, Replicates]]


@dataclass(frozen=True)
class Drawn:
    """Cells of the base or of a method, one for each seed, the round whose pictures are compared, and how they were
    drawn."""

    cells: Sequence[Cell]
    round: int
    ways: Mapping[Mode, Sampling]


def distances_of(
    by_method: Mapping[str, Drawn],
    folder_of: Callable[[Cell], Path],
    spec: str,
    said: str,
    per_prompt: int,
    prompts: int,
    real_folder: Path,
) -> Distances | None:
    """The base and every method, drawn in each way; None while no run is finished.

    Args:
        by_method: the base first.
        folder_of: the folder of a cell. The real pictures are those that the first finished run was trained on.
        spec: NAME[=PATH] of the embedding.
        said: which real pictures these are, in words.
        per_prompt, prompts: pictures of each test prompt, and how many prompts there are.
        real_folder: where the features of the real pictures are kept.
    """
    runs = [folder_of(cell) / "run" / "data" for drawn in by_method.values() for cell in drawn.cells]
    data = next((folder for folder in runs if (folder / "manifest.json").is_file()), None)
    if data is None:
        return None
    compared = of_data(spec, data, said, real_folder)
    real = compared.real_features("cuda" if torch.cuda.is_available() else "cpu")
    metrics, left_out = believable(prompts, per_prompt, len(real), real.shape[1])
    found: Distances = {
        "title": f"{len(real)} real {said}, in {real.shape[1]} features of {compared.name}",
        "num_real": len(real),
        "num_images": prompts * per_prompt,
        "left_out": left_out,
        "rows": [],
    }
    if not metrics:
        return found
    key = key_of(embedding=compared.key, real=compared.content)
    measured: dict[str, dict[Mode, _OfSeeds]] = {
        method: {
            mode: _of_seeds(drawn, View("test", drawn.round, how), folder_of, per_prompt, real, key)
            for mode, how in drawn.ways.items()
        }
        for method, drawn in by_method.items()
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


def _of_seeds(
    drawn: Drawn, view: View, folder_of: Callable[[Cell], Path], per_prompt: int, real: Features, real_key: str
) -> _OfSeeds:
    """What is measured of a view of each cell that has its pictures."""
    found = {}
    for cell in drawn.cells:
        folder = folder_of(cell)
        rows = read_view(folder, view)
        if rows is None or "features" not in rows[0]:
            continue
        rows.sort(key=lambda row: (row["id"], row["k"]))
        features = np.array([row["features"] for row in rows], np.float32)
        images = features.reshape(-1, per_prompt, features.shape[1])
        key = key_of(drawn=rows_metadata(scores_path(folder, view))[KEY], real=real_key)
        path = folder / "distances" / f"{view.name}.safetensors"
        found[cell.seed] = keep_measured(path, key, partial(np.asarray, images), real)
    return found


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
