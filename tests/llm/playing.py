"""A whole game on a tiny language model, small enough to be played many times in a test."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from spin_diffusion.data.rows import TextExample
from spin_diffusion.data.settings import TextDataSettings
from spin_diffusion.data.text import read_text_examples
from spin_diffusion.llm.base import LanguageBase
from spin_diffusion.llm.config import LanguageRoundSettings
from spin_diffusion.llm.game import LanguageGame
from spin_diffusion.llm.settings import GenerationSettings, LanguageModelSettings
from spin_diffusion.runs.language_run import load_language_model
from spin_diffusion.samples.real import prepare
from spin_diffusion.selfplay.rounds import SelfPlay, play
from spin_diffusion.selfplay.train import TrainSettings

LANGUAGE = Path(__file__).resolve().parents[2] / "assets" / "toy_language"
ROUNDS = LanguageRoundSettings(rounds=2, objective="space", beta=1.0, samples_per_shard=8, seed=1)
TRAINING = TrainSettings(
    max_train_steps=4, train_batch_size=4, learning_rate=1e-3, checkpointing_steps=2, optimizer="rmsprop"
)


def examples(count: int = 20, rejected: bool = False) -> list[TextExample]:
    """The first answers of the language's training data."""
    settings = TextDataSettings(dataset_name=str(LANGUAGE / "data" / "train.jsonl"))
    found = list(itertools.islice(read_text_examples(settings), count))
    worse = "the cat sleeps."
    return [replace(example, rejected=worse) for example in found] if rejected else found


def make_game(
    precision: str = "no", accumulation: int = 1, checkpointing: bool = False, generation: dict[str, Any] | None = None,
    dropout: float = 0.0, base: Path = LANGUAGE / "base", **settings: Any,
) -> LanguageGame:  # fmt: skip
    """A game of the language's base, or another."""
    model, tokenizer = load_language_model(LanguageBase(str(base)))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    return LanguageGame(
        model,
        tokenizer,
        LanguageBase(str(base)),
        settings=LanguageModelSettings(**({"max_length": 48} | settings)),
        generation=GenerationSettings(**({"max_new_tokens": 20, "generation_batch_size": 4} | (generation or {}))),
        accelerator=Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation),
        gradient_checkpointing=checkpointing,
    )


def prepare_data(game: LanguageGame, directory: Path, found: list[TextExample]) -> None:
    """The examples as prepared data."""
    prepare(directory, lambda: (game.real_row(example) for example in found), {}, 8, game, game.accelerator)


def play_all(
    output_dir: Path,
    training: TrainSettings = TRAINING,
    game: LanguageGame | None = None,
    count: int = 20,
    held_out: int = 0,
    rejected: bool = False,
    **rounds: Any,
) -> list[dict[str, Any]]:
    """Prepare and play; the records of the rounds."""
    game = game or make_game()
    found = examples(count + held_out, rejected)
    prepare_data(game, output_dir / "data", found[:count])
    if held_out:
        prepare_data(game, output_dir / "held_out", found[count:])
    return play(SelfPlay(
        game, output_dir / "data", output_dir, replace(ROUNDS, **rounds), training, game.accelerator,
        held_out=output_dir / "held_out" if held_out else None,
    ))  # fmt: skip
