"""A whole game on a tiny pipeline, small enough to be played many times in a test."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from spin_diffusion.data.rows import Example
from spin_diffusion.diffusion.base import Base, load_checkpoint
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.settings import (
    DenoiserSettings,
    ImageSettings,
    SamplingSettings,
)
from spin_diffusion.samples.candidates import Candidates
from spin_diffusion.samples.real import prepare
from spin_diffusion.samples.sample import Row
from spin_diffusion.selfplay.looks import Judge, Preview
from spin_diffusion.selfplay.one_round import Round
from spin_diffusion.selfplay.round_settings import RoundSettings
from spin_diffusion.selfplay.rounds import SelfPlay, play
from spin_diffusion.selfplay.train import TrainSettings
from spin_diffusion.selfplay.train_settings import LoraSettings
from spin_diffusion.store.run_dir import settle

ROUNDS = RoundSettings(rounds=2, beta=2000.0, samples_per_shard=4, seed=1)
TRAINING = TrainSettings(max_train_steps=4, train_batch_size=2, learning_rate=1e-4, checkpointing_steps=2)


def examples(count: int = 10, losers: bool = False) -> Iterator[Example]:
    """Coloured noise with a caption each."""
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    for number in range(count):
        yield Example(f"picture {number}", picture(), picture() if losers else None, f"row {number}")


SAMPLING = SamplingSettings(num_inference_steps=2, guidance_scale=3.0, generation_batch_size=2, sampler="ddim")


def make_game(
    base: Path | Base,
    precision: str = "no",
    accumulation: int = 1,
    sampling: SamplingSettings = SAMPLING,
    lora: LoraSettings | None = None,
    gradient_checkpointing: bool = False,
    **denoiser: Any,
) -> DiffusionGame:
    """A game of a tiny pipeline at 32 px."""
    base = base if isinstance(base, Base) else Base(str(base))
    family, pipeline = load_checkpoint(base)
    return DiffusionGame(
        family,
        pipeline,
        base,
        images=ImageSettings(resolution=32),
        sampling=sampling,
        denoiser=DenoiserSettings(**denoiser),
        lora=lora,
        gradient_checkpointing=gradient_checkpointing,
        accelerator=Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation),
    )


def asked(*prompts: str) -> list[Row]:
    """Rows for `generate`: prompts whose real images would be squares of 32 px."""
    return [{"id": str(n), "prompt": prompt, "frame": [32, 32, 0, 0, 32, 32]} for n, prompt in enumerate(prompts)]


def prepare_data(game: DiffusionGame, directory: Path, count: int = 10, losers: bool = False, first: int = 0) -> None:
    """The examples from a number on as prepared data."""
    found = list(examples(first + count, losers))[first:]
    prepare(directory, lambda: game.real_rows(found), {}, 4, game, game.accelerator)


@contextmanager
def drawing_for_all() -> Iterator[None]:
    """Rounds draw for all real samples, visited or not: rounds of unlike lengths then draw in the same batches, whose
    size shows in a picture's last bits, and train on the same pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Round, "visits", lambda round_: round_.sets[0].part.count(round_.sets[0].data))
        yield


def play_all(
    base: Path,
    output_dir: Path,
    training: TrainSettings = TRAINING,
    game: DiffusionGame | None = None,
    candidates: Candidates | None = None,
    held_out: int = 0,
    judge: Judge | None = None,
    preview: Preview | None = None,
    **rounds: Any,
) -> list[dict[str, Any]]:
    """Prepare and play as a fresh process would, and return the rounds' records."""
    game = game or make_game(base, accumulation=training.gradient_accumulation_steps)
    if output_dir.is_dir():
        settle(output_dir)
    losers = rounds.get("objective") == "dpo"
    prepare_data(game, output_dir / "data", losers=losers)
    rounds_ = replace(ROUNDS, **rounds)
    run = SelfPlay(
        game, output_dir / "data", output_dir, rounds_, training, game.accelerator, candidates=candidates,
        judge=judge, preview=preview,
    )  # fmt: skip
    if held_out:
        run.held_out = output_dir / "held_out"
        prepare_data(game, run.held_out, held_out, first=10)
    return play(run)
