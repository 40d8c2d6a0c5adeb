"""The present evaluation against an older one of the same protocol: its model on the same prompts and seeds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spin_diffusion.evaluation.comparison import compare
from spin_diffusion.evaluation.records import ComparisonEntry, Scale, VerdictEntry, samples_per_prompt
from spin_diffusion.evaluation.report.reading import Evaluation, read_evaluation
from spin_diffusion.evaluation.verdicts import overall_verdict
from spin_diffusion.store.input_error import InputError


@dataclass(frozen=True)
class Past:
    """What became of an older evaluation's model."""

    title: str
    """Name of the older folder, and its model."""
    means: dict[str, tuple[float, float]]
    """Scorer -> mean of the older model and of the present one."""
    compared: list[ComparisonEntry]
    """Present minus older by each scorer that both have, tested as one family."""
    verdict: VerdictEntry
    """By the rule of all verdicts, without alarms."""
    left_out: list[str]
    """Scorers whose code or weights are not the older ones."""


def look_back(now: Evaluation, older: Path) -> Past:
    """The headline's model of an evaluation against that of the one in `older`.

    Raises:
        InputError: the older one cannot be read, they are of different protocols, or share no scorer or no prompt.
    """
    then = read_evaluation(older)
    if now.results["protocol"]["id"] != then.results["protocol"]["id"]:
        raise InputError(
            f"--against {older}: its protocol is {then.results['protocol']['id'][:16]} and that of {now.directory} is "
            f"{now.results['protocol']['id'][:16]}: other prompts, seeds or sampling, so a difference says nothing "
            "of the models; evaluate both alike"
        )
    keys = {scorer["name"]: scorer.get("key") for scorer in then.results["scorers"] if scorer["state"] == "run"}
    both = [s for s in now.results["scorers"] if s["state"] == "run" and s["name"] in keys]
    left_out = [scorer["name"] for scorer in both if scorer.get("key") != keys[scorer["name"]]]
    roles = {scorer["name"]: scorer["role"] for scorer in both if scorer["name"] not in left_out}
    arrays = _arrays(now, then, list(roles))
    title = f"{older.resolve().name}: {_model(then)}"
    scale = now.results["headline"]["guidance_scale"]
    compared = compare(arrays, "then", roles, {})
    verdicts = {entry["scorer"]: entry["verdict"] for entry in compared}
    concluded, reason = overall_verdict(verdicts, roles, {})
    said = VerdictEntry(model=f"{_model(now)} against {title}", guidance_scale=scale, verdict=concluded, reason=reason)
    means = {
        name: (float(arrays["then", scale, name].mean()), float(arrays["now", scale, name].mean())) for name in roles
    }
    return Past(title, means, compared, said, left_out)


def _model(evaluation: Evaluation) -> str:
    return evaluation.results["headline"]["model"] or evaluation.results["baseline"]


def _arrays(now: Evaluation, then: Evaluation, scorers: list[str]) -> dict[tuple[str, Scale, str], np.ndarray]:
    """("then" or "now", guidance scale, scorer) -> (prompts, samples), of the prompts that both have whole."""
    scale, numbers = now.results["headline"]["guidance_scale"], range(samples_per_prompt(now.results["protocol"]))
    sides = {"then": (then, _model(then)), "now": (now, _model(now))}
    ids = [
        id_
        for id_ in dict.fromkeys(row.id for row in now.samples)
        if all((m, s, id_, k) in one.scores for one, m in sides.values() for s in scorers for k in numbers)
    ]
    if not scorers or len(ids) < 2:
        lacking = "no scorer with the same code and weights" if not scorers else f"{len(ids)} scored prompts"
        raise InputError(f"--against {then.directory}: the two evaluations share {lacking}: nothing can be compared")
    return {
        (side, scale, s): np.array([[one.scores[m, s, id_, k] for k in numbers] for id_ in ids])
        for side, (one, m) in sides.items()
        for s in scorers
    }
