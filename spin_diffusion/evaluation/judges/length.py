"""Length: how many tokens an answer has. Neither up nor down is good; compare it with the base."""

from spin_diffusion.evaluation.judges import Answer, Judge, LogLikelihood
from spin_diffusion.evaluation.specs import About

ABOUT = About(title="Length", scale="tokens of the answer by the model's own tokenizer", role="drift")


def load(device: str, path: str | None = None) -> Judge:
    """The judge; it has no weights."""
    return length


def length(answers: list[Answer], log_likelihood: LogLikelihood) -> list[float]:
    """Tokens of each answer."""
    return [float(answer.num_tokens) for answer in answers]
