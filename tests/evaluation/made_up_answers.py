"""Made-up answers: models that answer by a rule, drawn and judged through the real functions."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.evaluation.evaluated import EvaluatedModel
from spin_diffusion.evaluation.judges import Answer, LogLikelihood
from spin_diffusion.evaluation.protocols import answer_protocol
from spin_diffusion.evaluation.results import conclude
from spin_diffusion.evaluation.scoring import SampleFolder, score_samples
from spin_diffusion.samples.drawn import DrawAnswers, answer_shards, draw_samples, requests_of
from spin_diffusion.store.progress import Progress

WORDS = "the quick brown fox jumps over a lazy dog and then sleeps in warm sun while small birds sing of summer".split()
SCRIPT = "</script><script>window.injected = 1</script>"


def sentence(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def prompts(number: int) -> list[dict[str, Any]]:
    """That many prompts with real answers of 20 words."""
    return [
        {"prompt": f"Question {i}: what of the {WORDS[i % len(WORDS)]}?", "category": "ab"[i % 2],
         "reference": sentence(random.Random(i), 20)}
        for i in range(number)
    ]  # fmt: skip


def protocol_of(requests: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    settings = {"name": "made up", "seed": 0, "temperature": 1.0, "top_p": 1.0, "top_k": None, "max_new_tokens": 64}
    return answer_protocol(requests, **(settings | changed))


def answers_by(text: Callable[[dict[str, Any]], str]) -> DrawAnswers:
    """A model that answers a request by a rule; every fifth answer to a prompt is cut."""

    def draw(rows: list[dict[str, Any]], done: Callable[[int], None]) -> list[dict[str, Any]]:
        texts = [text(row) for row in rows]
        done(len(rows))
        return [
            {"text": said, "finish": "length" if row["seed"] % 5 == 0 else "stop", "num_tokens": len(said.split()) + 1}
            for row, said in zip(rows, texts, strict=True)
        ]

    return draw


def babble(model: int = 0, num_words: int = 20) -> DrawAnswers:
    """A model of random words; `model` seeds it."""
    return answers_by(lambda row: sentence(random.Random(f"{row['seed']} {model}"), num_words))


def likes(model: int, gain: float) -> LogLikelihood:
    """Log-likelihoods around -40 + `gain`."""

    def log_likelihood(asked: list[str], completions: list[str]) -> list[float]:
        return [-40 + gain + random.Random(f"{text} {model}").gauss(0, 1) for text in completions]

    return log_likelihood


def answer(text: str, id: str = "0", k: int = 0, **changed: Any) -> Answer:
    return Answer(
        **({"id": id, "k": k, "prompt": f"prompt {id}", "text": text, "reference": None, "finish": "stop",
            "num_tokens": len(text.split())} | changed)
    )  # fmt: skip


def folder_of(directory: Path) -> SampleFolder:
    """Where the answers of a model lie, and their scores."""
    return SampleFolder(directory / "answers", directory / "scores", of_answers=True)


def draw_answers(
    requests: list[Any], directory: Path, protocol: Any, draw: DrawAnswers, weights_sha256: str = ""
) -> None:
    shards = answer_shards(requests, directory / "answers", protocol, weights_sha256, draw)
    draw_samples(shards, Accelerator(cpu=True), lambda scale, total: Progress().phase("", total))


def judge_answers(
    directories: dict[str, Path], specs: Sequence[str], log_likelihoods: dict[str, LogLikelihood] | None = None
) -> None:
    folders = {name: folder_of(directory) for name, directory in directories.items()}
    score_samples(folders, [None], specs, Accelerator(cpu=True), Progress().phase, log_likelihoods)


def evaluate(
    root: Path,
    models: Sequence[tuple[str, str, int | None, DrawAnswers, float]],
    *,
    rows: list[dict[str, Any]],
    answers_per_prompt: int = 2,
    specs: Sequence[str] = ("log_likelihood", "length", "distinct"),
    **options: Any,
) -> dict[str, Any]:
    """Draw, judge and conclude; models are (name, role, round, draw, gain of its log-likelihood)."""
    requests = requests_of(rows, answers_per_prompt, 0)
    protocol = protocol_of(requests)
    evaluated = []
    for place, (name, role, round_, draw, gain) in enumerate(models):
        folder, weights = root / f"models/{place}", f"{place:064x}"
        draw_answers(requests, folder, protocol, draw, weights)
        judge_answers({name: folder}, specs, {name: likes(place, gain)})
        evaluated.append(EvaluatedModel(name, role, folder_of(folder), round_, kind="model", weights_sha256=weights))
    options = {"title": "Made-up answers"} | options
    return conclude(root, evaluated, protocol, list(specs), **options)
