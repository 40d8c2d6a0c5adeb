"""Tasks of lm-evaluation-harness for the present player, through its Python API. Needs the extra `lm-eval`."""

from typing import Any

from spin_diffusion.input_error import InputError
from spin_diffusion.llm.game import LanguageGame
from spin_diffusion.llm.generation import language_model


def run_tasks(game: LanguageGame, tasks: list[str], limit: int | None) -> dict[str, dict[str, Any]]:
    """Each task's metrics by "task/metric": value, and a 95 % interval from the harness's own standard error.

    Args:
        limit: examples of each task; None = all.

    Raises:
        InputError: the harness is not installed, or has no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise InputError("--lm_eval_tasks needs lm-evaluation-harness: pip install 'spin-diffusion[lm-eval]'") from None
    model = HFLM(pretrained=language_model(game.model), tokenizer=game.tokenizer, batch_size="auto")
    try:
        results = lm_eval.simple_evaluate(model=model, tasks=tasks, limit=limit)["results"]
    except (KeyError, ValueError) as error:
        raise InputError(f"--lm_eval_tasks {', '.join(tasks)}: {str(error).splitlines()[0]}") from error
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            spread = 1.96 * error if isinstance(error, int | float) else None
            found[f"{task}/{key}"] = {
                "title": f"{task}, {metric}", "value": float(value),
                "low": value - spread if spread is not None else None,
                "high": value + spread if spread is not None else None, "better": "none",
            }  # fmt: skip
    return found
