"""Whether supervised training has finished with a base, asked before its rounds: a round of fine-tuning at each of
several rates, with the run's own steps and each from the base, judged on real samples that it does not see.

Self-play has something to add where maximum likelihood has nothing left to gain; before that, fine-tuning is the better
buy (`assets/exact_plateau` shows both).
"""

import dataclasses
from typing import Any

from scipy.stats import t

from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.selfplay.clustered import MeanInterval, interval_text
from spin_diffusion.selfplay.record import GapRecord, RoundRecord
from spin_diffusion.selfplay.train_settings import of_round

RATES = (0.1, 0.3, 1.0, 3.0)
"""At which the base is fine-tuned, as multiples of the run's."""
NUM_HELD_OUT = 128
"""Real samples that are set aside where the settings set none aside."""


def fine_tuning(config: RunConfig, data: Any, **sections: Any) -> dict[str, Any]:
    """The sections in which the settings of the rounds of fine-tuning, one for each rate, with the steps of a run's
    first round and in the folder OUTPUT_DIR-plateau, differ from the run's.

    Args:
        data: the section of that name.
        sections: those in which this kind of run turns off what fine-tuning alone has no use for.
    """
    rounds = dataclasses.replace(
        sections.pop("rounds", config.rounds),
        rounds=len(RATES),
        objective="sft",
        objective_options=None,
        generated_from=None,
        opponent="latest",
    )
    folder = config.run.output_dir.rstrip("/") + "-plateau"
    run = dataclasses.replace(config.run, output_dir=folder, compare_with=None, push_to_hub=False)
    data = data if data.holds_out else dataclasses.replace(data, num_held_out=NUM_HELD_OUT)
    rate = of_round(config.training.learning_rate, 1)
    training = dataclasses.replace(
        config.training,
        learning_rate=[float(f"{factor * rate:.6g}") for factor in RATES],
        max_train_steps=of_round(config.training.max_train_steps, 1),
        num_train_epochs=of_round(config.training.num_train_epochs, 1),
        lr_warmup_steps=of_round(config.training.lr_warmup_steps, 1),
        select_every=None,  # the best of many flatters
        select_by="gap",
    )
    return sections | {"rounds": rounds, "run": run, "data": data, "training": training}


def gains(config: RunConfig, records: list[RoundRecord]) -> list[str]:
    """What fine-tuning gained on the held-out samples at each rate, in a line each, and what that means for self-play.

    Args:
        config: of the fine-tuning.
    """
    found = {of_round(config.training.learning_rate, record["round"]): record["held_out_gap"] for record in records}
    together = {rate: for_all(gap, len(found)) for rate, gap in found.items()}
    steps, samples = records[0]["training"]["steps"], records[0]["held_out_gap"]["num_samples"]
    return [
        f"By {steps} steps of fine-tuning the base the score of {samples} held-out real samples changed by (95 % for "
        "all rates together)",
        *(f"  rate {rate:<8g} {interval_text(gap)}" for rate, gap in together.items()),
        verdict(together),
    ]


def for_all(gap: GapRecord, rates: int) -> MeanInterval:
    """The interval of a gap, wide enough that those of all rates hold together (Bonferroni), by the quantiles of
    Student's t for as many prompts as samples."""
    if gap["low"] is None or gap["high"] is None:
        return {"mean": gap["mean"], "low": None, "high": None}
    wider = t.ppf(1 - 0.025 / rates, gap["num_samples"] - 1) / t.ppf(0.975, gap["num_samples"] - 1)
    low, high = (gap["mean"] + wider * (end - gap["mean"]) for end in (gap["low"], gap["high"]))
    return {"mean": gap["mean"], "low": float(low), "high": float(high)}


def verdict(found: dict[float, MeanInterval]) -> str:
    """What the intervals of the gains mean for self-play, by the rate."""
    known = {rate: (gap["low"], gap["high"]) for rate, gap in found.items() if gap["low"] is not None}
    if not known:
        return "That says nothing yet: hold out more samples (--num_held_out)."
    if gaining := [rate for rate, (low, _) in known.items() if low is not None and low > 0]:
        return (
            f"It still gains at {' and '.join(f'{rate:g}' for rate in gaining)}, so supervised training has not "
            "finished with this base: fine-tune first (--objective sft) until it gains at no rate. Self-play pays "
            "after it."
        )
    if all(high is not None and high < 0 for _, high in known.values()):
        return (
            "It loses at every rate: with these real samples supervised training only forgets, so it has finished with "
            f"this base, or a lower rate than {min(known):g} would still gain. Ask again at a tenth (--learning_rate)."
        )
    return (
        "It gains at no rate beyond chance: supervised training has finished with this base, which is where self-play "
        "pays. More held-out samples (--num_held_out) make the question sharper."
    )
