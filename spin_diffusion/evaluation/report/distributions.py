"""Histograms of the headline's paired differences, from scores.parquet, and whether it agrees with the tables."""

from collections.abc import Sequence

import numpy as np

from spin_diffusion.evaluation.modalities import samples_per_prompt
from spin_diffusion.evaluation.records import ComparisonEntry, ScorerEntry
from spin_diffusion.evaluation.report import plots
from spin_diffusion.evaluation.report.choosing import differences
from spin_diffusion.evaluation.report.labels import Labels
from spin_diffusion.evaluation.report.plots import Panel
from spin_diffusion.evaluation.report.reading import Evaluation
from spin_diffusion.evaluation.report.tables import comparisons
from spin_diffusion.evaluation.report.wording import direction, signed


def distributions(evaluation: Evaluation) -> tuple[list[Panel], list[str]]:
    """Histograms of the headline's paired differences, and what scores.parquet says that results.json does not."""
    results = evaluation.results
    model, scale = results["headline"]["model"], results["headline"]["guidance_scale"]
    if model is None or model == results["baseline"]:
        return [], []
    compared, labels = comparisons(results), Labels(results)
    complete = _complete_prompts(evaluation, labels.ran)
    panels, doubts = [], []
    for number, scorer in enumerate(labels.ran):
        comparison = compared.get((model, scorer["name"], scale))
        by_prompt: dict[str, list[float]] = {}
        for (id_, _), value in differences(evaluation.scores, scorer["name"], results["baseline"], model).items():
            if id_ in complete:
                by_prompt.setdefault(id_, []).append(value)
        values = [float(np.mean(of_prompt)) for of_prompt in by_prompt.values()]
        title, digits = labels.title(scorer["name"]), labels.decimals[scorer["name"]]
        if comparison is not None and not _agree(values, comparison):
            mean = f"{signed(float(np.mean(values)), 6)} over {len(values)}" if values else "nothing over 0"
            doubts.append(
                f"scores.parquet gives {mean} prompts as the mean difference by {title}, results.json "
                f"{signed(comparison['difference'], 6)} over {comparison['num_prompts']}: the histogram and the "
                "gallery may be of another evaluation than the tables."
            )
        if not values:
            continue
        low, middle, high = (signed(float(q), digits) for q in np.quantile(values, [0.25, 0.5, 0.75]))
        mean = signed(float(np.mean(values)), digits)
        caption = f"{len(values)} prompts: mean {mean}, quartiles {low}, {middle}, {high}"
        role = scorer["role"]
        chart = plots.histogram(f"histogram-{number}", f"Histogram of differences, {caption}", values, role == "drift")
        panels.append(Panel(title, chart, role, direction(role), caption))
    return panels, doubts


def _complete_prompts(evaluation: Evaluation, ran: Sequence[ScorerEntry]) -> set[str]:
    """Prompts of which every model has every sample scored by every scorer: the same ones as in the tables."""
    keys: dict[str, set[tuple[str, str, int]]] = {}
    for model, scorer, id_, k in evaluation.scores:
        keys.setdefault(id_, set()).add((model, scorer, k))
    wanted = {
        (model["name"], scorer["name"], k)
        for model in evaluation.results["models"]
        for scorer in ran
        for k in range(samples_per_prompt(evaluation.results["protocol"]))
    }
    return {id_ for id_, has in keys.items() if has >= wanted}


def _agree(values: list[float], comparison: ComparisonEntry) -> bool:
    """Whether the mean of these values is the difference that results.json has."""
    if len(values) != comparison["num_prompts"]:
        return False
    width = max(comparison["high"] - comparison["low"], abs(comparison["difference"]))
    return bool(not values or abs(float(np.mean(values)) - comparison["difference"]) <= 1e-3 * width + 1e-9)
