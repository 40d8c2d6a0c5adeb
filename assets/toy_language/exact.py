"""The exact judge: minus KL(data || model) of a language model on the toy language, in nats.

A judge plug-in: `load(device)` returns `(answers, log_likelihood) -> scores`, higher = better, at most 0. With p the
data dialect's known probabilities and q the model's, both given the prompt,

    KL(data || model) = sum over all answers y of p(y) (log p(y) - log q(y and the end token))

is summed over every answer of the language to a prompt, without sampling. It is 0 only if the model is the data's
distribution, and it does not depend on what the model answered: all answers to one prompt have one score.
"""

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from spin_diffusion.evaluation.judges import Answer, Judge, LogLikelihood
from spin_diffusion.evaluation.scorers import About
from spin_diffusion.store.input_error import InputError

ABOUT = About(
    title="minus KL(data || model)",
    scale="nats per answer, exact, at most 0: -2 means that a real answer is on average e^2 times likelier in the data "
    "than under the model; it does not depend on what the model answered",
    role="truth",
    text="prompts of the toy language; the evaluated model's own template and tokenizer",
    licence="Apache-2.0",
)


def _load_language() -> ModuleType:
    """language.py beside this file, also when this file is itself loaded by its path."""
    path = Path(__file__).resolve().with_name("language.py")
    spec = importlib.util.spec_from_file_location("toy_language_language", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


language = _load_language()


def load(device: str = "cpu") -> Judge:
    """The judge. `device` is accepted for the plug-in's signature; the model runs where `log_likelihood` runs it.

    Returns:
        (answers, log_likelihood) -> minus KL(data || model) of each answer's prompt, in nats. A prompt that is not of
        the toy language is an InputError.
    """

    def judge(answers: list[Answer], log_likelihood: LogLikelihood) -> list[float]:
        found = kl(log_likelihood, list(dict.fromkeys(answer.prompt for answer in answers)))
        return [-found[answer.prompt] for answer in answers]

    return judge


def kl(
    log_likelihood: LogLikelihood, prompts: Sequence[str] = language.PROMPTS, dialect: str = "data"
) -> dict[str, float]:
    """KL(dialect || model) in nats by prompt: over every answer, with the end token.

    Args:
        log_likelihood: (prompts, completions) -> the model's log p(completion and end token | prompt) in nats; called
            once, with a row for every prompt and answer.

    Raises:
        InputError: a prompt is not of the toy language.
    """
    for prompt in prompts:
        if prompt not in language.PROMPTS:
            raise InputError(
                f"{prompt!r} is not a prompt of the toy language, so KL(data || model) is not known for it; its"
                f" {len(language.PROMPTS)} prompts are like {language.PROMPTS[0]!r}"
            )
    known = {prompt: language.answers(prompt, dialect) for prompt in prompts}
    rows = [(prompt, answer, p) for prompt, probabilities in known.items() for answer, p in probabilities.items()]
    log_q = log_likelihood([prompt for prompt, _, _ in rows], [answer for _, answer, _ in rows])
    terms: dict[str, list[float]] = {prompt: [] for prompt in known}
    for (prompt, _, p), value in zip(rows, log_q, strict=True):
        terms[prompt].append(p * (math.log(p) - float(value)))
    return {prompt: math.fsum(values) for prompt, values in terms.items()}
