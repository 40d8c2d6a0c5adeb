"""What is said before a run is trained, where its settings hardly fit what is trained or how many samples there are."""

from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.train_settings import of_round, pairs_per_step, steps_of_round

ADAPTER_RATES = (5e-6, 1e-4)
"""The rates that adapters are trained with by public recipes: zephyr-7b-dpo-qlora of the alignment-handbook; diffusers'
examples of SDXL (1e-5 for Diffusion-DPO, 1e-4 for text-to-image)."""
WHOLE_RATES = (1e-7, 2e-5)
"""Those of all weights: SPIN's last rounds (arXiv 2401.01335); the model cards of SPIN-Diffusion (arXiv 2402.10210)."""
LARGE = 100_000_000
"""Weights from which on WHOLE_RATES hold: small models are trained faster."""
MANY_VISITS = 20
"""Visits of a sample in a round from which on it may be learnt by heart; SPIN-Diffusion's rounds have few."""


def advice(config: RunConfig, rows: int, game: Game, world: int) -> list[str]:
    """Lines for people, none where all fits.

    Args:
        rows: real samples that are trained on.
        world: processes.
    """
    training, rounds = config.training, range(1, config.rounds.rounds + 1)
    rates = [of_round(training.learning_rate, k) for k in rounds]
    weights = sum(parameter.numel() for parameter in game.player.parameters())
    of_rate = rate_line(rates, bool(config.flat()["use_lora"]), weights) if training.optimizer != "sgd" else None
    visits = max(visits_of_round(config, rows, k, world) for k in rounds)
    return [line for line in (of_rate, visits_line(visits)) if line is not None]


def rate_line(rates: list[float], use_lora: bool, weights: int) -> str | None:
    """A warning of rates for all weights that an adapter is trained with, and the reverse; None where there is none.

    Args:
        rates: of the rounds.
        weights: of the whole model, its adapters included.
    """
    highest = max(rates)
    if use_lora and highest < ADAPTER_RATES[0]:
        return (
            f"Rate       {highest:g} is one for all weights: an adapter hardly moves at it, and is usually trained "
            f"with {ADAPTER_RATES[0]:g} to {ADAPTER_RATES[1]:g} (--learning_rate)"
        )
    if not use_lora and highest >= ADAPTER_RATES[1] and weights > LARGE:
        return (
            f"Rate       {highest:g} is one for an adapter: all weights are usually trained with {WHOLE_RATES[0]:g} to "
            f"{WHOLE_RATES[1]:g} (--learning_rate); or give --use_lora true"
        )
    return None


def visits_of_round(config: RunConfig, rows: int, round_: int, world: int) -> float:
    """How often a round trains on each of its real samples, in the mean.

    Args:
        rows: real samples of the run.
        world: processes.
    """
    pairs = rows // config.rounds.real_parts
    steps, _ = steps_of_round(config.training, round_, pairs, world)
    return steps * pairs_per_step(config.training, world) / pairs


def visits_line(visits: float) -> str | None:
    """A warning of rounds that visit a sample so often; None where it is not often."""
    if visits <= MANY_VISITS:
        return None
    return (
        f"Visits     a round trains on each real sample {visits:.0f} times, so that it may be learnt by heart: give "
        "more samples, or shorter rounds (--max_train_steps, or null and --num_train_epochs 5)"
    )
