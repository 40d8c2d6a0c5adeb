"""What trackers are told of a round's steps, which begin anew in every round."""

from accelerate import Accelerator


def name_axis(name: str, accelerator: Accelerator) -> None:
    """Let wandb draw what `log_step` tells under this name over its own steps."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.tracker.define_metric(f"{name}/*", step_metric=f"{name}/step")


def log_step(name: str, values: dict[str, float], step: int, accelerator: Accelerator) -> None:
    """Tell all trackers an optimizer step's values.

    Args:
        name: that the values' names begin with.
        step: of the round, from 1 on.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            # One count for a whole run that must never fall: it would drop the second round's steps
            tracker.log(values | {f"{name}/step": step})
        else:
            tracker.log(values, step=step)
