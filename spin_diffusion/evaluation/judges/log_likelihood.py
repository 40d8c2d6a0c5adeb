"""Log-likelihood of the real answer: how much of the data the model explains, whatever it says when it is asked.

It is minus the held-out negative log-likelihood that language models are trained by, so no other judge is closer to
what self-play promises: that the model comes nearer to the data's distribution.
"""

from spin_diffusion.evaluation.judges import Answer, Judge, LogLikelihood
from spin_diffusion.evaluation.specs import About
from spin_diffusion.store.input_error import InputError

ABOUT = About(
    title="log p(real answer)",
    scale="log-likelihood in nats of the real answer with its end token, given the prompt: summed over its tokens, not "
    "per token, so that long answers weigh more; at most 0. A difference of 1 means that the real answer became e "
    "times as likely. It does not depend on what the model answered",
    role="held-out",
    text="the evaluated model's own template and tokenizer",
)


def load(device: str, path: str | None = None) -> Judge:
    """The judge; it has no weights of its own.

    Raises:
        InputError: when called with an answer whose prompt has no real answer.
    """
    return log_likelihood_of_references


def log_likelihood_of_references(answers: list[Answer], log_likelihood: LogLikelihood) -> list[float]:
    """log p(real answer | prompt) in nats for each answer; the same for all answers to one prompt."""
    wanted: dict[tuple[str, str], None] = {}  # each once, in order
    for answer in answers:
        if answer.reference is None:
            raise InputError(
                f"the prompt {answer.id} has no real answer, and log_likelihood needs one for every prompt"
            )
        wanted[answer.prompt, answer.reference] = None
    found = log_likelihood([prompt for prompt, _ in wanted], [reference for _, reference in wanted])
    if len(found) != len(wanted):
        raise ValueError(f"{len(found)} log-likelihoods do not match {len(wanted)} real answers")
    by_pair = dict(zip(wanted, found, strict=True))
    return [float(by_pair[answer.prompt, answer.reference]) for answer in answers if answer.reference is not None]
