"""The main job for language models: load the base, prepare the data, play the rounds, compare, say what came out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin_diffusion.data.report import Expected, LeftOut, ReadReport
from spin_diffusion.data.text import TextExample, read_held_out, read_text_examples
from spin_diffusion.store.input_error import InputError
from spin_diffusion.llm.base import LanguageBase, base_of, load_language_model
from spin_diffusion.llm.chat import check_tokenizer, fingerprint, with_arguments
from spin_diffusion.llm.config import LanguageConfig, warnings_of
from spin_diffusion.llm.cost import ledger_costs
from spin_diffusion.runs.answer_evaluator import AnswerEvaluator, check_judges, harness_tasks
from spin_diffusion.llm.game import ADAPTER, MODEL, LanguageGame
from spin_diffusion.llm.generation import check_vllm
from spin_diffusion.llm.lm_eval_tasks import check_tasks
from spin_diffusion.runs.language_card import push_to_hub, write_model_card
from spin_diffusion.runs.language_plan import FIRST_ROWS, make_plan
from spin_diffusion.runs.plan import lines
from spin_diffusion.runs.start import (
    check_run_folder,
    check_training,
    make_accelerator,
    needs_losers,
    open_trackers,
    play_with_rivals,
    quiet_libraries,
    round_lines,
    start,
    take_run_folder,
    write_manifest,
)
from spin_diffusion.samples.sample import Row
from spin_diffusion.selfplay.one_round import HELD_OUT
from spin_diffusion.store.progress import Bars, Progress
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.round_settings import objectives_of
from spin_diffusion.store.run_dir import weights_hash
from spin_diffusion.samples.real import prepare
from spin_diffusion.selfplay.train_settings import check_batch
from spin_diffusion.store.folder import take_folder
from spin_diffusion.store.keys import key_of
from spin_diffusion.store.opening import read_bytes
from spin_diffusion.store.text import printable
from spin_diffusion.store.weights import config_of

PROGRAM = "language training"

TEMPLATE_BYTES = 2**20
HOPELESS_LONG_ROWS = 1000
"""So many rows whose prompts are too long, and none before them that can be used, end the reading."""


def run_language(config: LanguageConfig) -> list[dict[str, Any]]:
    """Play all rounds of `config` with a causal language model and return the rounds' records.

    Raises:
        InputError: anything the user gave that cannot be used; nothing that exists is touched.
    """
    output_dir = Path(config.run.output_dir)
    check_run_folder(config, output_dir, PROGRAM)
    if (tasks := harness_tasks(config)) is not None:
        check_tasks(tasks)
    check_judges(config.evaluation.judges or [])
    accelerator = start(config, output_dir, PROGRAM)
    if config.generation.engine == "vllm" and accelerator.num_processes > 1:
        raise InputError(
            f"--engine vllm draws in one process, and this job has {accelerator.num_processes}: launch one, or leave "
            "the flag out"
        )
    versions = {}
    if config.generation.engine == "vllm":
        adapter_rank = config.language.lora_r if config.language.use_peft else None
        if len(base_of(config).adapters()) > 1:
            raise InputError(
                f"--engine vllm draws from the files of {config.model.model_name_or_path}, and those are an adapter: "
                "leave --engine out, or merge it (PEFT's merge_and_unload), save_pretrained() the result with its "
                "tokenizer, and give that folder"
            )
        versions["vllm"] = check_vllm(accelerator.mixed_precision, accelerator.device.type, adapter_rank)
    for warning in warnings_of(config):
        accelerator.print(f"Warning: {warning}")

    game = open_game(config, accelerator)
    check_training(config, game.player, accelerator)
    take_run_folder(config, output_dir, PROGRAM, accelerator)
    progress = Bars() if accelerator.is_main_process else Progress()

    manifest = _prepared(config, game, output_dir, progress)
    pairs = manifest["rows"] // config.rounds.real_parts
    # Now, not after a night of drawing
    check_batch(pairs, config.training, accelerator.num_processes)
    weights, parts = weights_hash(game.model), key_of(config=config_of(game.model))
    write_manifest(output_dir, game.base.identity(), weights, parts, manifest, config, accelerator, versions)
    accelerator.print(_header(config, game, manifest["rows"]) + round_lines(config, manifest["rows"], accelerator))

    # The rounds, and what they are compared with
    open_trackers(config, output_dir, accelerator)
    evaluator = AnswerEvaluator(config, game, output_dir, accelerator, progress)
    evaluator.base()
    costs = ledger_costs(
        game,
        output_dir,
        forwards=1 + config.training.gradient_checkpointing + config.training.two_passes,
        matrix_flops_per_second=config.run.matrix_flops_per_second,
    )
    records = play_with_rivals(
        config, game, output_dir, accelerator, evaluator.of_rounds(), evaluator.of_rival, progress,
        output_dir / HELD_OUT if config.data.holds_out else None,
        costs=lambda rounds: costs(
            rounds, output_dir if rounds is config.rounds else output_dir / f"compare-{rounds.objective}"
        ),
    )  # fmt: skip
    if accelerator.is_main_process:
        write_model_card(output_dir, config, manifest["rows"], evaluator.tell())
        _tell_where(records, output_dir, game.base, config.language.use_peft)
        if config.run.push_to_hub:
            print(f"Uploaded to {push_to_hub(output_dir, config)}")
    return records


def _prepared(config: LanguageConfig, game: LanguageGame, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """The manifest of the real answers, which are prepared as those that are held out are."""
    with_rejected, accelerator = needs_losers(config), game.accelerator
    settings = _data_settings(config, with_rejected) | fingerprint(game.tokenizer)
    report, said = ReadReport(), []
    manifest = prepare(
        output_dir / "data",
        lambda: _rows(
            game, read_text_examples(config.data, with_rejected=with_rejected, report=report), report, said.append
        ),
        settings, config.rounds.samples_per_shard, game, accelerator, progress, report.as_dict,
    )  # fmt: skip
    for line in [*said, *report.lines(), *game.chat.notes()] if report.read else []:
        accelerator.print(line)
    if config.data.holds_out:
        aside = ReadReport()
        game.chat.count_anew()
        prepare(
            output_dir / HELD_OUT,
            lambda: _rows(game, read_held_out(config.data, report=aside), aside, lambda warning: None), settings,
            config.rounds.samples_per_shard, game, accelerator, progress, aside.as_dict,
        )  # fmt: skip
        if aside.read:
            for line in [f"{aside.used} answers", *aside.lines()[1:], *game.chat.notes()]:
                accelerator.print(f"held out: {line.strip()}")
    return manifest


def plan(config: LanguageConfig) -> None:
    """Say what a run will take, before it is started.

    Raises:
        InputError: as `run_language`; a batch that does not fit in memory.
    """
    output_dir = Path(config.run.output_dir)
    check_run_folder(config, output_dir, PROGRAM)
    quiet_libraries()
    accelerator = make_accelerator(config.training.mixed_precision)
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32
    game = open_game(config, accelerator)
    check_training(config, game.player, accelerator)
    if accelerator.is_main_process:
        take_folder(output_dir, PROGRAM)
    found = make_plan(config, game, Bars() if accelerator.is_main_process else Progress())
    for line in lines(found, config.run.output_dir, accelerator.device, "judges"):
        accelerator.print(line)
    for line in game.chat.notes():
        accelerator.print(f"Of the first {FIRST_ROWS} answers: {line}")
    if config.generation.engine == "vllm":
        accelerator.print("Drawing was timed with transformers, not with vLLM")


def open_game(config: LanguageConfig, accelerator: Accelerator) -> LanguageGame:
    """The base checkpoint as a game."""
    base, options = str(config.model.model_name_or_path), base_of(config).given()
    model, tokenizer = load_language_model(base, options)
    if config.model.chat_template is not None:
        tokenizer.chat_template = _template(Path(config.model.chat_template))
    if config.model.chat_template_kwargs:
        tokenizer.chat_template = with_arguments(tokenizer.chat_template, config.model.chat_template_kwargs)
    check_sizes(model, tokenizer, base, config.language.max_length)
    return LanguageGame(
        model,
        tokenizer,
        base,
        settings=config.language,
        generation=config.generation,
        accelerator=accelerator,
        gradient_checkpointing=config.training.gradient_checkpointing,
        base_options=options,
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
    game: LanguageGame, examples: Iterable[TextExample], report: ReadReport, warn: Callable[[str], None]
) -> Iterator[Row]:
    """Stored rows; what the tokenizer cannot use is counted where the reader counts."""
    checked = False
    for example in examples:
        if not checked:
            checked = True
            for warning in check_tokenizer(game.tokenizer, chats=isinstance(example.prompt, list)):
                warn(f"Warning: {warning}")
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


def _data_settings(config: LanguageConfig, with_rejected: bool) -> dict[str, Any]:
    """What decides the content of the prepared data."""
    kept = dataclasses.asdict(config.data) | {
        "max_length": config.language.max_length, "max_new_tokens": config.generation.max_new_tokens,
        "with_rejected": with_rejected, "shard": config.rounds.samples_per_shard,
    }  # fmt: skip
    return {key: value for key, value in kept.items() if key != "cache_dir"}


def _header(config: LanguageConfig, game: LanguageGame, rows: int) -> str:
    total = sum(parameter.numel() for parameter in game.model.parameters())
    trained = sum(parameter.numel() for parameter in game.model.parameters() if parameter.requires_grad)
    what = "all trained" if trained == total else f"{trained / 1e6:.2f} M trained in an adapter"
    rounds = config.rounds
    return (
        f"Base       {config.model.model_name_or_path} ({total / 1e6:.2f} M parameters, {what})\n"
        f"Data       {rows} real answers\n"
        f"Objective  {', '.join(title_of(name) for name in objectives_of(rounds))}, opponent {rounds.opponent}, {rounds.num_generated} generated "
        f"answer{'s' if rounds.num_generated > 1 else ''} to each real one, {config.generation.describe()}\n"
    )


def _tell_where(records: list[dict[str, Any]], output_dir: Path, base: LanguageBase, use_peft: bool) -> None:
    promoted = [record["round"] for record in records if record["state"] == "PROMOTED"]
    folder = output_dir / (ADAPTER if use_peft else MODEL)
    if not promoted:
        print(f"No round was promoted: the base stands, and there is no {folder.name}/ to load")
        return
    loaded = LanguageBase(str(folder)).code() if not use_peft else base.code_with(folder)
    print(f"The player of round {promoted[-1]} is in {folder}; load it with\n  {loaded}")
