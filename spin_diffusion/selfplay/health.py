"""What must hold while a round is trained, and the signs that it is going wrong.

A margin loss can look excellent while both r fall, that is, while the player forgets how to model either sample. And a
saturated margin loss does not stop moving the weights, because Adam normalises its tiny gradients. So the absolute
r_real is watched, and a round can end early once its pairs are told apart.

A rule is a pure function of what was logged of the round so far, so that a resumed run sees what an unbroken one saw.
"""

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Literal, TypedDict, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor

from spin_diffusion.selfplay.game import PairScores
from spin_diffusion.selfplay.train_settings import Action, HealthSettings


def check_start(
    scores: PairScores,
    losses: Float[Tensor, " batch"],
    loss: Callable[[PairScores], Float[Tensor, " batch"]],
    tolerance: float,
    beta: float,
) -> None:
    """Assert that player and opponent agree before the first step of a round: every r is 0, and the loss its value
    there (ln 2 for SPIN, ln(1 + mu) + mu ln(1 + 1/mu) for SPACE).

    Args:
        loss: the objective, of which `losses` are those of `scores`.
        tolerance: largest |r| that is rounding, relative to max(1, |score|).
        beta: the objective's; a tolerance on r is one of beta times it on the loss.

    Raises:
        AssertionError: dropout left on, two dtypes, other noise, a wrong adapter or a stale cache.
    """
    player = (scores.player_real.detach(), scores.player_generated.detach())
    tolerance *= max(1.0, *(score.abs().max().item() for score in player))
    worst = max(r.abs().max().item() for r in (scores.r_real, scores.r_generated))
    assert worst <= tolerance, (
        f"step 0: player and opponent disagree by {worst:.3g} on the same sample (at most {tolerance:g} is rounding); "
        "look for dropout, dtypes, noise that is not shared, a wrong adapter or a stale cache"
    )
    off = (losses.detach() - loss(PairScores(*player, *player))).abs().max().item()
    assert off <= max(1.0, 2 * beta) * tolerance, f"step 0: the loss is off its value at r = 0 by {off:.3g}"


def check_weights(parameters: Iterable[Tensor], round_: int) -> None:
    """Stop the run when the last update, after which no loss is computed, left weights that are not finite.

    Raises:
        FloatingPointError: says what to change.
    """
    bad = sum(int((~parameter.detach().isfinite()).sum()) for parameter in parameters)
    if bad:
        raise FloatingPointError(f"round {round_}: {bad:,} weights are not finite {_AFTER_THE_LAST_STEP}")


def check_prediction(prediction: Tensor, path: Path) -> None:
    """Stop the run when the weights in `path` are finite and what they say is not.

    Raises:
        FloatingPointError: says what to change.
    """
    if not prediction.isfinite().all():
        raise FloatingPointError(f"{path}: what the player says is not finite {_AFTER_THE_LAST_STEP}")


_AFTER_THE_LAST_STEP = (
    "after the last step: lower --learning_rate or train in another precision, in another --output_dir (a begun run "
    "keeps its settings)"
)


def check_finite(
    loss: float,
    gradient_norm: float,
    *,
    step: int,
    levels: Float[Tensor, " pairs"],
    ids: Callable[[], list[str]],
    round_: int,
    level_name: str,
) -> None:
    """Stop the run when the loss or the gradient is not finite.

    Args:
        ids: of the samples, when they are wanted.

    Raises:
        FloatingPointError: with round, step, range of levels and sample ids.
    """
    if isfinite(loss) and isfinite(gradient_norm):
        return
    what = "loss" if not isfinite(loss) else "gradient norm"
    value = loss if not isfinite(loss) else gradient_norm
    names = ids()
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise FloatingPointError(
        f"round {round_}, step {step}: the {what} is {value} ({level_name} {levels.min():.3f} to {levels.max():.3f} of "
        f"their range, samples {shown}); lower --learning_rate, use --mixed_precision no, or look at these samples"
    )


WINDOW_STEPS = 20
"""Steps that a rule looks back on, and after which it says something at the earliest."""

LOOK_BACK = 40 * WINDOW_STEPS
"""The most steps that a rule is shown: a mean that forgets a twentieth a step holds nothing older in 16 digits, and a
step takes as long at the end of a long round as at its start."""

Metric = Literal[
    "loss", "r_real", "r_generated", "margin", "implicit_accuracy", "saturation", "score_real", "score_generated"
]
METRICS: tuple[Metric, ...] = get_args(Metric)
"""What is logged of each pair."""
Quarters = list[float | None]
"""Means over the pairs in each quarter of the levels; None where it has none."""


class StepEntry(TypedDict, total=False):
    """A line of metrics.jsonl: what was logged of an optimizer step, means over its pairs."""

    step: int
    loss: float
    r_real: float
    r_generated: float
    margin: float
    implicit_accuracy: float
    saturation: float
    score_real: float
    score_generated: float
    r_real_by_quarter: Quarters
    r_generated_by_quarter: Quarters
    margin_by_quarter: Quarters
    implicit_accuracy_by_quarter: Quarters
    saturation_by_quarter: Quarters
    score_real_by_quarter: Quarters
    score_generated_by_quarter: Quarters
    grad_norm: float
    lr: float
    pairs_per_second: float
    distance: float
    """How far the weights are from the opponent's, now and then."""
    findings: dict[str, str]
    """What rules of health said, by their names."""


History = list[StepEntry]
"""What was logged of each optimizer step of the round so far."""

Check = Callable[[History, float, HealthSettings], str | None]
"""(history, the objective's beta, settings) -> what is wrong in a few words with the number, and in a sentence after it
what to change; or None."""


def smoothed(values: list[float]) -> tuple[float, float]:
    """Exponential mean of a series at its end, and the standard error of that mean."""
    weights, series = _weights(len(values), WINDOW_STEPS), np.array(values)
    mean, square = float(weights @ series), float(weights @ series**2)
    return mean, (max(square - mean**2, 0.0) / WINDOW_STEPS) ** 0.5


@functools.cache
def _weights(number: int, window: int) -> Float[np.ndarray, " number"]:
    """What each of so many values counts in their mean: the newest a window's share, or as much as any other where they
    are fewer, and what came before it shares the rest. Asked for several times a step, while the device waits."""
    newest = np.maximum(1 / window, 1 / np.arange(1, number + 1))
    left = np.append(np.cumprod((1 - newest)[:0:-1])[::-1], 1.0)  # by all that came after it
    return newest * left[:number]


def _lost(values: list[float], beta: float) -> float | None:
    """The mean of r_real where it is below 0 by more than twice its standard error, and by enough to matter to the
    objective (beta * r_real < -0.05)."""
    mean, error = smoothed(values)
    return mean if len(values) >= WINDOW_STEPS and mean < -2 * error and beta * mean < -0.05 else None


_GENTLER = "Lower --learning_rate or --max_train_steps"


def forgetting(history: History, beta: float, settings: HealthSettings) -> str | None:
    """r_real below 0: the margin grows although, or because, the real samples are forgotten."""
    lost = _lost([entry["r_real"] for entry in history], beta)
    if lost is None:
        return None
    return f"r_real {lost:.2e} (times beta {beta * lost:.2f}): the real samples are being forgotten. {_GENTLER}"


def forgetting_quarter(history: History, beta: float, settings: HealthSettings) -> str | None:
    """r_real below 0 in a quarter of the levels, where `forgetting` sees nothing."""
    if _lost([entry["r_real"] for entry in history], beta) is not None:
        return None
    for quarter in range(4):
        found = [entry["r_real_by_quarter"][quarter] for entry in history]
        lost = _lost([value for value in found if value is not None], beta)
        if lost is not None:
            return (
                f"r_real {lost:.2e} (times beta {beta * lost:.2f}) in quarter {quarter + 1} of 4 of the levels: there "
                f"the real samples are being forgotten. {_GENTLER}"
            )
    return None


def saturation(history: History, beta: float, settings: HealthSettings) -> str | None:
    """Pairs told apart so well that further steps only move the weights at random."""
    if len(history) < WINDOW_STEPS:
        return None
    share, _ = smoothed([entry["saturation"] for entry in history])
    if share < settings.limit("saturation"):
        return None
    return (
        f"its pairs are told apart ({share:.0%} of them beyond doubt). For more steps in a round lower --beta or raise "
        "--health {saturation: SHARE}"
    )


def error_growth(history: History, beta: float, settings: HealthSettings) -> str | None:
    """The error on real samples against that of the opponent on the same samples: samples are being wrecked."""
    if len(history) < WINDOW_STEPS:
        return None
    recent = history[-WINDOW_STEPS:]
    player = -sum(entry["score_real"] for entry in recent)
    opponent = player + sum(entry["r_real"] for entry in recent)
    if opponent <= 0 or player / opponent - 1 <= settings.limit("error_growth"):
        return None
    return (
        f"the player's error on the real samples is {player / opponent - 1:.0%} above the opponent's (limit "
        f"{settings.limit('error_growth'):.0%}): what it draws is being spoilt. {_GENTLER}"
    )


def distance(history: History, beta: float, settings: HealthSettings) -> str | None:
    """How far the weights have moved from the opponent's."""
    measured = [entry["distance"] for entry in history if entry.get("distance") is not None]
    if not measured or measured[-1] <= settings.limit("distance"):
        return None
    return (
        f"the weights are {measured[-1]:.0%} of their length away from the opponent's (limit "
        f"{settings.limit('distance'):.0%}). {_GENTLER}"
    )


def gradient_spike(history: History, beta: float, settings: HealthSettings) -> str | None:
    """A gradient far above what the steps before it had."""
    if len(history) <= WINDOW_STEPS:
        return None
    usual = median(entry["grad_norm"] for entry in history[-WINDOW_STEPS - 1 : -1])
    norm = history[-1]["grad_norm"]
    if norm <= settings.limit("gradient_spike") * usual or usual == 0:
        return None
    return (
        f"the gradient norm is {norm:.3g}, {norm / usual:.0f} times the median of the {WINDOW_STEPS} steps before. "
        "Look at the samples of this step, lower --learning_rate or --max_grad_norm"
    )


def nothing_learnt(history: History, beta: float, settings: HealthSettings) -> str | None:
    """Accuracy at a half and no margin after three windows."""
    if len(history) < 3 * WINDOW_STEPS or not tells_apart(history):
        return None
    accuracy, error = smoothed([entry["implicit_accuracy"] for entry in history])
    margin, _ = smoothed([entry["margin"] for entry in history])
    if abs(accuracy - 0.5) > max(2 * error, 0.02) or abs(beta * margin) > 0.05:
        return None
    return (
        f"accuracy {accuracy:.2f}, beta * margin {beta * margin:+.3f}: real is told from generated no better than by "
        "chance. Raise --learning_rate or --beta; or there is nothing left to learn"
    )


def tells_apart(history: History) -> bool:
    """Whether the objective has a generated side, without which there is no margin to speak of."""
    return any(entry["r_generated"] for entry in history)


RULES: dict[str, Check] = {
    "forgetting": forgetting,
    "forgetting_quarter": forgetting_quarter,
    "saturation": saturation,
    "error_growth": error_growth,
    "distance": distance,
    "gradient_spike": gradient_spike,
    "nothing_learnt": nothing_learnt,
}
"""To add a rule, write its function, name it here, and give HealthSettings a field of its name."""


@dataclass(frozen=True)
class Finding:
    """What a rule found in a round, and what follows."""

    rule: str
    action: Action
    sentence: str


def said_in(history: History) -> set[str]:
    """The rules that have said something in a round so far (entries' `findings`)."""
    return {name for entry in history for name in entry.get("findings", {})}


def findings(history: History, beta: float, settings: HealthSettings, said: Collection[str]) -> list[Finding]:
    """What the rules say at the end of `history`, but for those that have `said` something before."""
    recent = history[-LOOK_BACK:]
    found = []
    for name, check in RULES.items():
        action = settings.action(name)
        if action != "ignore" and name not in said:
            sentence = check(recent, beta, settings)
            if sentence is not None:
                found.append(Finding(name, action, sentence))
    return found


def gravest(found: list[Finding]) -> Finding | None:
    """The one that ends the round: a roll back before a stop; None = the round goes on."""
    return next((one for action in ("roll_back", "stop") for one in found if one.action == action), None)


def rolls_back(settings: HealthSettings) -> bool:
    """Whether some rule may, so that snapshots are needed."""
    return any(settings.action(name) == "roll_back" for name in RULES)
