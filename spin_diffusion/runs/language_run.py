"""A language run: how its base, its real answers, its evaluation and its costs come about. `run` does the rest."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin_diffusion.data.rows import Expected, LeftOut, ReadReport, TextExample
from spin_diffusion.data.text import read_held_out, read_text_examples
from spin_diffusion.llm.base import LanguageBase, load_language_model
from spin_diffusion.llm.chat import check_tokenizer, fingerprint, with_arguments
from spin_diffusion.llm.config import AnswerEvaluationSettings, LanguageConfig, warnings_of
from spin_diffusion.llm.game import ADAPTER, MODEL, LanguageGame
from spin_diffusion.llm.generation import check_vllm
from spin_diffusion.llm.lm_eval_tasks import check_tasks
from spin_diffusion.runs.advice import advice
from spin_diffusion.runs.answer_evaluator import answer_samples, check_judges
from spin_diffusion.runs.evaluator import RunEvaluator, RunReporter
from spin_diffusion.runs.language_plan import FIRST_ROWS, plan_answers
from spin_diffusion.runs.plan import lines
from spin_diffusion.runs.plateau import fine_tuning
from spin_diffusion.runs.publish import Card, place_name, round_facts
from spin_diffusion.runs.run import Run, play_run
from spin_diffusion.samples.real import DataManifest, prepare
from spin_diffusion.samples.sample import Row
from spin_diffusion.selfplay.record import HELD_OUT, RoundRecord
from spin_diffusion.store.input_error import InputError, printable, read_bytes
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.progress import Progress, tell
from spin_diffusion.store.shipped import shipped_name
from spin_diffusion.store.weights import config_of

TEMPLATE_BYTES = 2**20
HOPELESS_LONG_ROWS = 1000
"""So many rows whose prompts are too long, and none before them that can be used, end the reading."""


def run_language(config: LanguageConfig) -> list[RoundRecord]:
    """Play all rounds of `config` with a causal language model and return their records. Raises as `play_run`."""
    return play_run(LanguageRun(config))


class LanguageRun(Run):
    """A language run."""

    program = "language training"
    config: LanguageConfig
    game: LanguageGame

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self.held_out = self.output_dir / HELD_OUT if config.data.holds_out else None

    def fine_tuning(self) -> "LanguageRun":
        """A run of the same kind that fine-tunes."""
        config = self.config
        rounds = dataclasses.replace(config.rounds, stop_when_learnt=False)
        evaluation = AnswerEvaluationSettings(config.evaluation.eval_every_round, "always", [], 2)
        sections = fine_tuning(config, config.data, rounds=rounds, evaluation=evaluation)
        return LanguageRun(dataclasses.replace(config, **sections))

    def check(self) -> None:
        """Refuse benchmarks and judges that there are not."""
        if self.config.evaluation.lm_eval.tasks:
            check_tasks(self.config.evaluation.lm_eval)
        check_judges(self.config.evaluation.judges or [])

    def launch(self, accelerator: Accelerator) -> dict[str, str]:
        """Refuse what vLLM cannot draw; its version, where it is asked for."""
        versions = {}
        if self.config.generation.engine == "vllm":
            versions["vllm"] = self._check_vllm(accelerator)
        for warning in warnings_of(self.config):
            tell(f"Warning: {warning}", accelerator)
        return versions

    def open(self, accelerator: Accelerator) -> None:
        """The base checkpoint as a game."""
        self.game = open_game(self.config, accelerator)

    def _check_vllm(self, accelerator: Accelerator) -> str:
        if accelerator.num_processes > 1:
            raise InputError(
                f"--engine vllm draws in one process, and this job has {accelerator.num_processes}: launch one, or "
                "leave the flag out"
            )
        if len(base_of(self.config).adapters()) > 1:
            raise InputError(
                f"--engine vllm draws from the files of {self.config.model.model_name_or_path}, and those are an "
                "adapter: leave --engine out, or merge it (PEFT's merge_and_unload), save_pretrained() the result with "
                "its tokenizer, and give that folder"
            )
        adapter_rank = self.config.language.rank if self.config.language.use_lora else None
        return check_vllm(accelerator.mixed_precision, accelerator.device.type, adapter_rank)

    def plan(self, progress: Progress) -> list[str]:
        """The plan, and what the chat template does to the first answers."""
        plan = plan_answers(self.config, self.game, progress)
        told = lines(plan, self.config.run.output_dir, self.game.accelerator.device, "judges")
        told += advice(self.config, plan["rows"], self.game, plan["processes"])
        told += [f"Of the first {FIRST_ROWS} answers: {line}" for line in self.game.chat.notes()]
        if self.config.generation.engine == "vllm":
            told.append("Drawing was timed with transformers, not with vLLM")
        return told

    def prepare(self, progress: Progress) -> DataManifest:
        """The manifest of the real answers, which are prepared as those that are held out are."""
        data, with_rejected = self.config.data, self.config.needs_losers
        report = ReadReport()
        warnings: list[str] = []
        answers = read_text_examples(data, with_rejected=with_rejected, report=report)
        manifest = self._prepare(self.output_dir / "data", answers, report, warnings, progress)
        if report.read:
            for line in [*warnings, *report.lines(), *self.game.chat.notes()]:
                tell(line, self.game.accelerator)
        if self.held_out is not None:
            aside = ReadReport()
            self.game.chat.count_anew()
            self._prepare(self.held_out, read_held_out(data, report=aside), aside, [], progress)
            if aside.read:
                for line in [f"{aside.used} answers", *aside.lines()[1:], *self.game.chat.notes()]:
                    tell(f"held out: {line.strip()}", self.game.accelerator)
        return manifest

    def base(self) -> Mapping[str, object]:
        """The base with the adapters that were merged into it, and the hash of its weights."""
        parts = key_of(config=config_of(self.game.model))
        named = self.game.base.identity() | {"name": shipped_name(self.game.base.name)}
        return named | {"weights": self.game.base_hash, "parts": parts}

    def header(self, data: DataManifest) -> str:
        """What the run plays with."""
        parameters, rounds = list(self.game.model.parameters()), self.config.rounds
        total = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        what = "all trained" if trained == total else f"{trained / 1e6:.2f} M trained in an adapter"
        return (
            f"Base       {shipped_name(self.game.base.name)} ({total / 1e6:.2f} M parameters, {what})\n"
            f"Data       {data['rows']} real answers\n"
            f"Objective  {self.config.titles}, opponent {rounds.opponent}, {rounds.num_generated} "
            f"generated answer{'s' if rounds.num_generated > 1 else ''} to each real one, "
            f"{self.config.generation.describe()}\n"
        )

    def ready(self, pairs: int, progress: Progress) -> None:
        """Nothing: the game is ready as it was opened."""

    def evaluator(self, progress: Progress) -> RunReporter:
        """What measures by answers to the held-out prompts, where there are any."""
        samples = answer_samples(self.config, self.game, progress)
        if samples is None:
            return RunReporter(self.config, self.game.accelerator, of_answers=True)
        base = shipped_name(self.game.base.name), "model"
        return RunEvaluator(self.config, self.game, base, _saved(self.config), samples)

    def card(self, rows: int) -> Card:
        """What the model card says of base, data and settings, and what loads the model."""
        return card(self.config, self.output_dir, rows)

    def loading_code(self) -> tuple[Path, str]:
        """The model's folder or the adapter's, and lines of Python that load it."""
        folder = (self.output_dir / _saved(self.config)).resolve()
        return folder, loading_code(self.game.base, str(folder), self.config.language.use_lora, os.path.realpath)

    def _prepare(
        self, folder: Path, answers: Iterable[TextExample], report: ReadReport, warnings: list[str], progress: Progress
    ) -> DataManifest:
        game, config = self.game, self.config
        settings = dataclasses.asdict(config.data) | {
            "max_length": config.language.max_length,
            "max_new_tokens": config.generation.max_new_tokens,
            "with_rejected": config.needs_losers,
            "shard": config.rounds.samples_per_shard,
            **fingerprint(game.tokenizer),
        }
        return prepare(
            folder,
            lambda: _rows(game, answers, report, warnings),
            settings,
            config.rounds.samples_per_shard,
            game,
            self.game.accelerator,
            progress,
            report.as_dict,
        )


def loading_code(base: LanguageBase, saved: str, uses_adapter: bool, name: Callable[[str], str]) -> str:
    """Lines of Python by which a user loads what a run made of its base.

    Args:
        saved: folder or hub id of the model or the adapter, with its tokenizer.
        name: from a place of the base on this disk to what the lines call it.
    """
    quoted = json.dumps(saved)
    model = f"AutoModelForCausalLM.from_pretrained({quoted})"
    if uses_adapter:
        model = f"PeftModel.from_pretrained({base.code(name)}, {quoted})"
    lines = ["from peft import PeftModel"] if uses_adapter else []
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", f"model = {model}"]
    return "\n".join([*lines, f"tokenizer = AutoTokenizer.from_pretrained({quoted})"])


def card(config: LanguageConfig, output_dir: Path, rows: int) -> Card:
    """What the model card says of a language model.

    Args:
        rows: real answers of the run.
    """
    language, folder = config.language, output_dir / _saved(config)
    adapter = f"LoRA of rank {language.rank}, alpha {language.alpha:g}"
    base, dataset = base_of(config), str(config.data.dataset_name)
    code = loading_code(base, config.run.hub_model_id or f"./{folder.name}", language.use_lora, place_name)
    return Card(
        "A language model",
        base.name,
        code,
        (),
        dataset,
        [
            ("answers", f"{rows} from `{place_name(dataset)}`"),
            *round_facts(
                config, rows, f"{config.rounds.num_generated} to each real answer, {config.generation.describe()}"
            ),
            ("optimizer", config.training.optimizer),
            ("trained", adapter if language.use_lora else "all weights"),
            ("seed", config.rounds.seed),
        ],
        samples="answers",
        library="peft" if language.use_lora else "transformers",
        task="text-generation",
        is_adapter=language.use_lora,
        at_root=folder if folder.is_dir() else None,
    )


def _saved(config: LanguageConfig) -> str:
    """Name of the folder that a player is saved in."""
    return ADAPTER if config.language.use_lora else MODEL


def base_of(config: LanguageConfig) -> LanguageBase:
    """The base that the settings name."""
    name, remote_code = str(config.model.model_name_or_path), config.language.trust_remote_code
    return LanguageBase(name, config.model.revision, remote_code)


def open_game(config: LanguageConfig, accelerator: Accelerator) -> LanguageGame:
    """The base checkpoint as a game."""
    base = base_of(config)
    model, tokenizer = load_language_model(base)
    if config.model.chat_template is not None:
        tokenizer.chat_template = _template(Path(config.model.chat_template))
    if config.model.chat_template_kwargs:
        tokenizer.chat_template = with_arguments(tokenizer.chat_template, config.model.chat_template_kwargs)
    check_sizes(model, tokenizer, base.name, config.language.max_length)
    return LanguageGame(
        model,
        tokenizer,
        base,
        settings=config.language,
        generation=config.generation,
        accelerator=accelerator,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )


def check_sizes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str, max_length: int) -> None:
    """Refuse what would end in the middle of a run: a token without an embedding, a place without a position.

    Raises:
        InputError: `max_length` is above the model's positions, learned or not, or the tokenizer has larger ids than
            the input embedding has rows.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # None, or a number below 1, is how configurations say that there is no limit
    if positions is not None and 0 < positions < max_length:
        raise InputError(
            f"--max_length {max_length} is above the {positions} positions of --model_name_or_path {base} "
            f"(max_position_embeddings): give at most {positions}"
        )
    rows, needed = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise InputError(
            f"--model_name_or_path {base}: its tokenizer has ids up to {needed - 1}, and its input embedding {rows} "
            "rows: give the tokenizer that the model was trained with, or resize the embedding "
            f"(resize_token_embeddings({needed})) and save both"
        )


def _template(path: Path) -> str:
    try:
        return read_bytes(path, at_most=TEMPLATE_BYTES).decode("utf-8")
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"--chat_template {printable(path)} cannot be read ({error}): give a Jinja file") from None


def _rows(
    game: LanguageGame, examples: Iterable[TextExample], report: ReadReport, warnings: list[str]
) -> Iterator[Row]:
    """Stored rows; what the tokenizer cannot use is counted where the reader counts. `warnings` gets what is odd."""
    checked = False
    for example in examples:
        if not checked:
            checked = True
            odd = check_tokenizer(game.tokenizer, chats=isinstance(example.prompt, list))
            warnings += [f"Warning: {warning}" for warning in odd]
        try:
            yield game.real_row(example)
        except LeftOut as left_out:
            report.used -= 1
            report.leave_out(example.where, left_out.reason, left_out.detail)
            too_long = report.left_out[Expected.PROMPT_TOO_LONG]
            if too_long >= HOPELESS_LONG_ROWS and not report.used:
                first = report.kept_rows[Expected.PROMPT_TOO_LONG][0]
                raise InputError(
                    f"reading stopped early: of {report.read} rows none can be used, {too_long} for a prompt longer "
                    f"than --max_length {game.settings.max_length} (the first is {first}): raise it"
                ) from None
