"""What a language run is evaluated by: held-out prompts answered by the present player, judged; held-out likelihood."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from spin_diffusion.data.rows import LeftOut
from spin_diffusion.data.text import TextExample, read_held_out
from spin_diffusion.evaluation.evaluated import EvaluatedModel
from spin_diffusion.evaluation.judges import __name__ as JUDGES
from spin_diffusion.evaluation.protocols import answer_protocol
from spin_diffusion.evaluation.records import MeasureEntry
from spin_diffusion.evaluation.scorers._checkpoints import HUB_ID
from spin_diffusion.evaluation.scoring import are_scored
from spin_diffusion.evaluation.specs import check_specs, parse_spec
from spin_diffusion.llm.chat import fingerprint
from spin_diffusion.llm.config import LanguageConfig
from spin_diffusion.llm.game import LanguageGame, transcript
from spin_diffusion.llm.lm_eval_tasks import run_tasks
from spin_diffusion.runs.evaluator import EvaluationSamples
from spin_diffusion.runs.page import read_for_page
from spin_diffusion.samples.drawn import DrawnAnswer, Request, Shards, answer_shards, requests_of
from spin_diffusion.samples.sampling import precision_of
from spin_diffusion.selfplay.clustered import clustered_mean
from spin_diffusion.store.files import Made, build, is_built, read_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of, place_hash
from spin_diffusion.store.progress import Progress

MEASURES = "held_out.json"
"""What is measured of a model beside its answers' scores."""


def check_judges(specs: Sequence[str]) -> None:
    """Refuse before a run judges that there are not, and weights that are neither on the disk nor a hub's.

    An evaluation goes on without a judge that cannot be loaded; whoever asks for one should not train first.

    Raises:
        InputError: names the flag and the judge.
    """
    check_specs(JUDGES, specs)
    for spec in specs:
        _, _, path = parse_spec(spec)
        if path and not Path(path).expanduser().exists() and not HUB_ID.fullmatch(path):
            raise InputError(f"--judges {spec}: {path} does not exist, and a hub id is written ORG/NAME")


def _fits(example: TextExample, game: LanguageGame) -> bool:
    """Whether it can be written as tokens; what cannot was counted when the held-out answers were prepared."""
    try:
        game.chat.answer_ids(example.prompt, example.completion)
    except LeftOut:
        return False
    return True


def answer_samples(config: LanguageConfig, game: LanguageGame, progress: Progress) -> "AnswerSamples | None":
    """The answers that a run is evaluated by; None = nothing is held out."""
    examples = [example for example in read_held_out(config.data) if _fits(example, game)]
    return AnswerSamples(config, game, examples, progress) if examples else None


def _measured(path: Path) -> dict[str, dict[str, object]]:
    """What else is measured of a model; empty where that cannot be read."""
    found: dict[str, dict[str, object]] = read_for_page(read_json, path, dict[str, object]) or {}
    return {name: measured for name, measured in found.items() if name != KEY}


class AnswerSamples(EvaluationSamples):
    """The answers to a run's held-out prompts."""

    def __init__(
        self, config: LanguageConfig, game: LanguageGame, examples: list[TextExample], progress: Progress
    ) -> None:
        self.config, self.game, self.examples, self.accelerator = config, game, examples, game.accelerator
        # Where single answers are held out, prompts are shared on purpose
        self.shares_prompts = config.data.held_out_by == "row"
        self._tokens: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self.chats = {transcript(example.prompt): example.prompt for example in self.examples}
        firsts: dict[str, TextExample] = {}
        for example in self.examples:
            firsts.setdefault(transcript(example.prompt), example)
        prompts = [{"prompt": prompt, "reference": example.completion} for prompt, example in firsts.items()]
        if len(prompts) < 2:
            raise InputError(
                f"the held-out answers have {len(prompts)} prompt, and an interval needs 2: hold out more "
                "(--num_held_out, --held_out_dataset_name), or none"
            )
        prompts = prompts[: config.evaluation.max_validation_prompts]
        self.requests = requests_of(prompts, config.evaluation.num_validation_answers, config.rounds.seed)
        generation = config.generation
        # Another engine has other answers to the same seeds
        engine = {} if generation.engine == "transformers" else {"engine": generation.engine}
        protocol = answer_protocol(
            self.requests,
            name="held-out prompts",
            seed=config.rounds.seed,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k or None,
            max_new_tokens=generation.max_new_tokens,
            max_length=config.language.max_length,
            precision=precision_of(self.accelerator.mixed_precision),
            **fingerprint(game.tokenizer),
            **engine,
        )
        super().__init__(config.evaluation.judges or ["log_likelihood"], protocol, progress, self._shards)
        self.log_likelihood = self._log_likelihood

    def _shards(self, model: EvaluatedModel) -> Shards:
        """The player's answers to the held-out prompts."""
        weights = model.weights_sha256 or ""
        return answer_shards(self.requests, model.folder.samples, self.protocol, weights, self._answer)

    def measure(self, model: EvaluatedModel) -> None:
        """The held-out likelihood and the benchmarks."""
        if self.accelerator.is_main_process:
            path, key = self._measures_file(model), self._held_out_key(model)
            build(path, key, lambda: Made({**self._held_out_nll(), **self._lm_eval()}))
        self.accelerator.wait_for_everyone()

    def is_measured(self, model: EvaluatedModel) -> bool:
        """Whether these are there, and the answers' scores, for which some judges ask the model itself."""
        measured = is_built(self._measures_file(model), self._held_out_key(model))
        return measured and are_scored(model.folder, [None], self.specs)

    def _measures_file(self, model: EvaluatedModel) -> Path:
        return model.folder.samples.parent / MEASURES

    def _held_out_key(self, model: EvaluatedModel) -> str:
        asked = [[transcript(example.prompt), example.completion] for example in self.examples]
        tasks = self.config.evaluation.lm_eval
        files = [place and place_hash(place) for place in (*(tasks.tasks or []), tasks.folder)]
        weights, protocol = model.weights_sha256, self.protocol["id"]
        return key_of(weights=weights, protocol=protocol, asked=asked, tasks=asdict(tasks), files=files)

    def measures(self, models: list[EvaluatedModel]) -> list[MeasureEntry]:
        """The held-out likelihood and the benchmarks of each model."""
        return [
            cast(MeasureEntry, {"model": model.name, "round": model.round_, "name": name} | measured)
            for model in models
            for name, measured in _measured(self._measures_file(model)).items()
        ]

    def _answer(self, rows: list[Request], done: Callable[[int], None]) -> list[DrawnAnswer]:
        prompts = [self.game.chat.prompt_ids(self.chats[row["prompt"]]) for row in rows]
        drawn = self.game.draw(prompts, [row["seed"] for row in rows], done)
        return [
            {"text": self.game.chat.text(answer.ids), "finish": answer.finish, "num_tokens": len(answer.ids)}
            for answer in drawn
        ]

    def _log_likelihood(self, prompts: list[str], completions: list[str]) -> list[float]:
        """log p(completion and end token | prompt) by the present player, in nats."""
        tokens = [self._tokenised(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        return self.game.log_likelihood([prompt for prompt, _ in tokens], [answer for _, answer in tokens])

    def _tokenised(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Prompt and answer; kept, since every round asks for the same. A prompt that is not held out is taken as one
        question, if the data are chats."""
        if (prompt, completion) not in self._tokens:
            as_chat = isinstance(self.examples[0].prompt, list)
            chat = self.chats.get(prompt, [{"role": "user", "content": prompt}] if as_chat else prompt)
            answer = self.game.chat.answer_ids(chat, completion)
            self._tokens[prompt, completion] = self.game.chat.prompt_ids(chat), answer.ids
        return self._tokens[prompt, completion]

    def _held_out_nll(self) -> dict[str, Mapping[str, object]]:
        """The mean over all held-out answers, not only one per prompt, in nats per answer; interval over prompts."""
        prompts = [transcript(example.prompt) for example in self.examples]
        scores = self._log_likelihood(prompts, [example.completion for example in self.examples])
        mean = clustered_mean([-score for score in scores], prompts)
        title = "held-out negative log-likelihood, nats per answer"
        bounds = {"value": mean["mean"], "low": mean["low"], "high": mean["high"]}
        return {"held_out_nll": {"title": title, "better": "lower", **bounds}}

    def _lm_eval(self) -> Mapping[str, Mapping[str, object]]:
        tasks = self.config.evaluation.lm_eval
        return run_tasks(self.game, tasks) if tasks.tasks else {}
