"""What must hold while a round is trained, and the signs that it is going wrong.

A margin loss can look excellent while both r fall, that is, while the player forgets how to model either sample. And a
saturated margin loss does not stop moving the weights, because Adam normalises its tiny gradients. So the absolute
r_real is watched, and a round can end early once its pairs are told apart.
"""

from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor


def check_start(
    r_real: Float[Tensor, " batch"],
    r_generated: Float[Tensor, " batch"],
    losses: Float[Tensor, " batch"],
    losses_at_zero: Float[Tensor, " batch"],
    tolerance: float,
    scale: float,
) -> None:
    """Assert that player and opponent agree before the first step of a round: every r is 0.

    Args:
        losses_at_zero: the objective at r = 0 with the same player_real: ln 2 for SPIN, ln(1 + mu) + mu ln(1 + 1/mu)
            for SPACE.
        tolerance: largest |r| that is rounding.
        scale: the objective's beta; a tolerance on r is one of beta times it on the loss.

    Raises:
        AssertionError: dropout left on, two dtypes, other noise, a wrong adapter or a stale cache.
    """
    worst = max(r_real.abs().max().item(), r_generated.abs().max().item())
    assert worst <= tolerance, (
        f"step 0: player and opponent disagree by {worst:.3g} on the same sample (at most {tolerance:g} is rounding); "
        "look for dropout, dtypes, noise that is not shared, a wrong adapter or a stale cache"
    )
    off = (losses - losses_at_zero).abs().max().item()
    assert off <= max(1.0, 2 * scale) * tolerance, f"step 0: the loss is off its value at r = 0 by {off:.3g}"


def check_finite(
    loss: float,
    gradient_norm: float,
    *,
    step: int,
    levels: Float[Tensor, " pairs"],
    ids: list[str],
    round_: int,
    level_name: str,
) -> None:
    """Stop the run when the loss or the gradient is not finite.

    Raises:
        FloatingPointError: with round, step, range of levels and sample ids.
    """
    if isfinite(loss) and isfinite(gradient_norm):
        return
    what = "loss" if not isfinite(loss) else "gradient norm"
    value = loss if not isfinite(loss) else gradient_norm
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    raise FloatingPointError(
        f"round {round_}, step {step}: the {what} is {value} ({level_name} {levels.min():.3f} to {levels.max():.3f} of "
        f"their range, samples {shown}); lower --learning_rate, use --mixed_precision no, or look at these samples"
    )


@dataclass
class Watch:
    """Exponential means of r_real and of saturation over the steps of a round, and what they say.

    Attributes:
        stop_at_saturation: share of saturated pairs, in (0, 1], at which the round ends early; None = never.
        steps_seen: optimizer steps taken into the means.
    """

    stop_at_saturation: float | None
    window_steps: int = 20
    steps_seen: int = 0
    r_real: float = 0.0
    r_real_square: float = 0.0
    saturation: float = 0.0
    alarmed: bool = False

    def update(self, r_real: float, saturation: float) -> None:
        """Take one optimizer step's mean r_real and share of saturated pairs into the means."""
        self.steps_seen += 1
        weight = max(1 / self.window_steps, 1 / self.steps_seen)
        self.r_real += weight * (r_real - self.r_real)
        self.r_real_square += weight * (r_real**2 - self.r_real_square)
        self.saturation += weight * (saturation - self.saturation)

    def alarm(self, beta: float) -> str | None:
        """One sentence when the player is losing the real samples; once in a round.

        The rule: over the window, the mean of r_real is below 0 by more than twice its standard error, and by enough
        to matter to the objective (beta * r_real < -0.05).
        """
        if self.alarmed or self.steps_seen < self.window_steps:
            return None
        spread = max(self.r_real_square - self.r_real**2, 0.0) ** 0.5
        if self.r_real >= -2 * spread / self.window_steps**0.5 or beta * self.r_real > -0.05:
            return None
        self.alarmed = True
        return (
            f"the player models the real samples worse than the opponent does (r_real {self.r_real:.2e}, beta * "
            f"r_real {beta * self.r_real:.2f}): the margin grows by forgetting. Lower --learning_rate or "
            "--max_train_steps, or use an objective that holds r_real up, such as space"
        )

    def should_stop(self) -> bool:
        """Whether the pairs are told apart so well that further steps only move the weights at random."""
        return (
            self.stop_at_saturation is not None
            and self.steps_seen >= self.window_steps
            and self.saturation >= self.stop_at_saturation
        )


SATURATION = 4.0
"""|beta * r| beyond which a pair counts as saturated: it has 7 % of the gradient that it had at step 0."""


def saturated(r: Float[Tensor, " batch"], beta: float) -> Float[Tensor, " batch"]:
    """1 where |beta * r| > SATURATION, else 0."""
    return ((beta * r).abs() > SATURATION).to(r.dtype)


def by_quarter(values: Float[Tensor, " pairs"], levels: Float[Tensor, " pairs"]) -> list[float | None]:
    """The mean of `values` in each quarter of the levels [0, 1); None where a quarter has no pair."""
    quarters = torch.clamp((levels * 4).long(), max=3)
    return [values[quarters == q].mean().item() if (quarters == q).any() else None for q in range(4)]
