"""Whether supervised training has finished with a base, asked before its rounds: one round of fine-tuning with the
run's own steps and rate, judged on real samples that it does not see.

Self-play has something to add where maximum likelihood has nothing left to gain; before that, fine-tuning is the better
buy (`assets/exact_plateau` shows both).
"""

import dataclasses
from typing import Any

from spin_diffusion.evaluation.settings import RunConfig
from spin_diffusion.selfplay.clustered import interval_text
from spin_diffusion.selfplay.record import RoundRecord
from spin_diffusion.selfplay.train_settings import of_round

NUM_HELD_OUT = 128
"""Real samples that are set aside where the settings set none aside."""


def fine_tuning(config: RunConfig, data: Any, **sections: Any) -> dict[str, Any]:
    """The sections in which the settings of one round of fine-tuning, with a run's steps and rate and in the folder
    OUTPUT_DIR-plateau, differ from the run's.

    Args:
        data: the section of that name.
        sections: those in which this kind of run turns off what fine-tuning alone has no use for.
    """
    rounds = dataclasses.replace(
        sections.pop("rounds", config.rounds), rounds=1, objective="sft", objective_options=None, generated_from=None
    )
    folder = config.run.output_dir.rstrip("/") + "-plateau"
    run = dataclasses.replace(config.run, output_dir=folder, compare_with=None, push_to_hub=False)
    data = data if data.holds_out else dataclasses.replace(data, num_held_out=NUM_HELD_OUT)
    training = dataclasses.replace(config.training, select_every=None, select_by="gap")  # the best of many flatters
    return sections | {"rounds": rounds, "run": run, "data": data, "training": training}


def tell_gain(config: RunConfig, records: list[RoundRecord]) -> None:
    """Print what the round of fine-tuning gained on the held-out samples, and what that means for self-play."""
    gap, steps = records[0]["held_out_gap"], records[0]["training"]["steps"]
    print(
        f"Fine-tuning, {steps} steps at rate {of_round(config.training.learning_rate, 1):g}: the score of "
        f"{gap['num_samples']} held-out real samples changed by {interval_text(gap)}.\n"
        f"{verdict(gap['low'], gap['high'])}"
    )


def verdict(low: float | None, high: float | None) -> str:
    """What the interval of the gain means for self-play; None = there is none."""
    if low is None or high is None:
        return "That says nothing yet: hold out more samples (--num_held_out)."
    if low > 0:
        return (
            "It still gains, so supervised training has not finished with this base: fine-tune first (--objective sft) "
            "until this is 0. Self-play pays after it."
        )
    if high < 0:
        return (
            "It loses: at this rate, with these real samples, supervised training only forgets, so it has finished "
            "with this base, or a lower rate would still gain. Ask again at a tenth of it."
        )
    return (
        "It gains nothing beyond chance: at this rate supervised training has finished with this base, which is where "
        "self-play pays. More held-out samples (--num_held_out) make the question sharper."
    )
