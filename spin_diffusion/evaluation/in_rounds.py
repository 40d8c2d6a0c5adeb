"""What a round makes of its evaluation: numbers for its record, and whether its player is promoted."""

from typing import Any

from spin_diffusion.evaluation.modalities import modality_of
from spin_diffusion.evaluation.records import AggregateEntry, ComparisonEntry, Results
from spin_diffusion.evaluation.settings import PromoteIf
from spin_diffusion.store.input_error import InputError


def metrics_of(results: Results, model: str) -> dict[str, Any]:
    """Means, differences and verdicts of one model, as numbers for trackers and for the round's record."""
    at_key = modality_of(results["protocol"]).at_key

    def name(entry: AggregateEntry | ComparisonEntry) -> str:
        return entry["scorer"] + at_key.format(_key(entry["guidance_scale"]))

    metrics: dict[str, Any] = {}
    for entry in results["results"]:
        if entry["model"] == model and entry["aggregate"] == "mean":
            metrics[name(entry)] = entry["mean"]
    for compared in results["comparisons"]:
        if compared["model"] == model:
            metrics[f"{name(compared)}/difference"] = compared["difference"]
            metrics[f"{name(compared)}/win_rate"] = compared["win_rate"]
    return metrics


def _key(scale: float | None) -> str:
    return "given" if scale is None else f"{scale:g}"


def promotion(results: Results, promote_if: PromoteIf) -> tuple[bool, str]:
    """Whether a player is promoted by its comparison with its opponent, and why.

    It counts at every guidance scale: one where the player fell is enough to reject it; to be improved it must be at
    one at least.
    """
    if promote_if == "always":
        return True, ""
    lacking = [scorer["name"] for scorer in results["scorers"] if scorer["state"] != "run"]
    if lacking:
        raise InputError(f"--promote_if {promote_if} cannot be decided: {', '.join(lacking)} could not be run")
    roles = {scorer["name"]: scorer["role"] for scorer in results["scorers"]}
    at = modality_of(results["protocol"]).at
    fell = [
        f"{entry['scorer']} fell by {-entry['difference']:.3g}" + at.format(f"guidance {_key(entry['guidance_scale'])}")
        for entry in results["comparisons"]
        if entry["verdict"] == "regressed" and roles[entry["scorer"]] in ("truth", "held-out", "alignment")
    ]
    if fell:
        return False, "; ".join(fell)
    if promote_if == "improved" and not any(v["verdict"] == "improved" for v in results["verdicts"]):
        return False, "; ".join(dict.fromkeys(v["reason"] for v in results["verdicts"]))
    return True, ""
