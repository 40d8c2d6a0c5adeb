"""What a language run will take: a probe of one batch of each kind, times how often the settings ask for it.

How long answers will be is not known before they are drawn: the opponent's are taken to be as long as the real ones.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spin_diffusion.data.report import LeftOut
from spin_diffusion.data.text import read_held_out, read_text_examples
from spin_diffusion.store.input_error import InputError
from spin_diffusion.llm.config import LanguageConfig
from spin_diffusion.llm.game import LanguageGame, transcript
from spin_diffusion.runs.plan import count_rows, kept_checkpoints, out_of_memory, probe_training, seconds_of, write_plan
from spin_diffusion.runs.start import needs_losers, rivals
from spin_diffusion.samples.sample import Batch, Row
from spin_diffusion.selfplay.ledger import forget_peak_memory, peak_memory
from spin_diffusion.selfplay.opponents import OPPONENTS
from spin_diffusion.store.progress import Progress
from spin_diffusion.selfplay.round_settings import objectives_of, source_of
from spin_diffusion.store.run_dir import seed_from
from spin_diffusion.selfplay.train_settings import check_batch, of_round, steps_of_round
from spin_diffusion.selfplay.trainee import trained_parameters

FIRST_ROWS = 1024
"""So many are tokenised for their lengths."""
SHORT, LONG = 8, 32
"""Tokens of the two answers whose times tell a token from what comes before it."""


@dataclass(frozen=True)
class Rates:
    """What the probe measured, of one process.

    Attributes:
        start: seconds of a batch of answers before its first token.
        token: seconds of a token of all answers of a batch.
        longest: tokens of the longest answer of a batch, on average.
        tokenise: seconds of one real sample on its way to a stored row.
        score: seconds of a row's score by the opponent.
        pair: seconds of a pair in a step, forward and backward.
        update: seconds of the optimizer's part of a step.
        row_bytes, encoded_bytes: of a stored answer, and of its encoding.
        player_bytes, checkpoint_bytes: of what is saved of a player, and of a checkpoint within a round.
        drawing_memory, training_memory: peak bytes of the probe's parts; of the process as a whole on a CPU.
    """

    start: float
    token: float
    longest: float
    tokenise: float
    score: float
    pair: float
    update: float
    row_bytes: int
    encoded_bytes: int
    player_bytes: int
    checkpoint_bytes: int
    drawing_memory: int
    training_memory: int


@dataclass(frozen=True)
class Sizes:
    """How much there is: real answers, held-out answers, and the answers that an evaluation draws."""

    rows: int
    held_out: int
    asked: int


def make_plan(config: LanguageConfig, game: LanguageGame, progress: Progress) -> dict[str, Any]:
    """Probe, predict, and write `plan.json` into the output folder, where the run's report finds it.

    Raises:
        InputError: a batch that does not fit in memory; fewer pairs than a batch.
    """
    accelerator = game.accelerator
    few, sizes, tokenise = _read(config, game, progress)
    check_batch(sizes.rows // config.rounds.real_parts, config.training, accelerator.num_processes)
    rates = replace(probe(config, game, few), tokenise=tokenise)
    return write_plan(
        Path(config.run.output_dir), accelerator, rates,
        rows=sizes.rows,
        rounds=predict(config, rates, sizes, accelerator.num_processes),
        encode_real_seconds=(sizes.rows + sizes.held_out) * rates.tokenise,  # by one process
        disk_bytes=disk(config, rates, sizes),
    )  # fmt: skip


def _read(config: LanguageConfig, game: LanguageGame, progress: Progress) -> tuple[list[Row], Sizes, float]:
    """The first rows, how many of what there are, and the seconds that one takes."""
    examples = read_text_examples(config.data, with_rejected=needs_losers(config))
    first, few, started = list(islice(examples, FIRST_ROWS)), [], time.perf_counter()
    for example in first:
        with suppress(LeftOut):
            few.append(game.real_row(example))
    seconds = time.perf_counter() - started
    if not few:
        raise InputError(
            f"of the first {len(first)} rows none has a prompt within --max_length {config.language.max_length}: raise "
            "it, or give other data"
        )
    rows = count_rows(len(first), examples, progress)
    held_out = list(read_held_out(config.data))
    prompts = len({transcript(example.prompt) for example in held_out})
    asked = min(prompts, config.evaluation.max_validation_prompts or prompts)
    sizes = Sizes(
        round(rows * len(few) / len(first)), len(held_out), asked * config.evaluation.num_validation_answers
    )  # fmt: skip
    return few, sizes, seconds / len(first)


# The probe


def probe(config: LanguageConfig, game: LanguageGame, few: list[Row]) -> Rates:
    """Draw, score and train one batch of each kind.

    Args:
        few: stored rows; they are repeated where a batch needs more.
    """
    try:
        return _probe(config, game, few)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, game, "--use_peft true or --optimizer adamw_8bit") from None


def _probe(config: LanguageConfig, game: LanguageGame, few: list[Row]) -> Rates:
    device = game.accelerator.device
    forget_peak_memory(device)
    start, token = _probe_drawing(config, game, few)
    drawing_memory = peak_memory(device)

    scored = game.encode(_repeated(few, config.language.score_batch_size))
    game.promote()
    score = seconds_of(lambda: game.opponent_scores(scored), device) / config.language.score_batch_size

    forget_peak_memory(device)
    pair, update, checkpoint_bytes = probe_training(config, game, _batch(config, game, few))
    saved = trained_parameters(game) if config.language.use_peft else list(game.model.parameters())
    whole = game.encode(few[: config.rounds.samples_per_shard])
    return Rates(
        start=start,
        token=token,
        longest=expected_longest([len(row["tokens"]) for row in few], config.generation.generation_batch_size),
        tokenise=0.0,
        score=score,
        pair=pair,
        update=update,
        row_bytes=sum(_stored_bytes(row) for row in few) // len(few),
        encoded_bytes=sum(t.numel() * t.element_size() for t in whole.values()) // len(whole["end"]),
        player_bytes=sum(p.numel() * p.element_size() for p in saved),
        checkpoint_bytes=checkpoint_bytes,
        drawing_memory=drawing_memory,
        training_memory=peak_memory(device),
    )


def _probe_drawing(config: LanguageConfig, game: LanguageGame, few: list[Row]) -> tuple[float, float]:
    """Seconds of a batch of answers before its first token, and of a token of all of them, by transformers."""
    settings = config.generation
    prompts = [row["prompt_ids"] for row in _repeated(few, settings.generation_batch_size)]
    drawn: list[int] = []

    def draw() -> None:
        drawn[:] = [len(answer.ids) for answer in game.draw(prompts, list(range(len(prompts))))]

    took, lengths = [], []
    for limit in (SHORT, LONG):
        game.generation = replace(settings, max_new_tokens=min(limit, settings.max_new_tokens), engine="transformers")
        if not took:
            draw()  # what a device does once is not to be timed
        took.append(seconds_of(draw, game.accelerator.device))
        lengths.append(max(drawn))
    game.generation = settings
    if lengths[1] == lengths[0] or took[1] <= took[0]:  # short answers: nothing tells the two parts of a time apart
        return 0.0, took[1] / lengths[1]
    token = (took[1] - took[0]) / (lengths[1] - lengths[0])
    return max(took[0] - lengths[0] * token, 0.0), token


def _batch(config: LanguageConfig, game: LanguageGame, few: list[Row]) -> Batch:
    """A training batch whose generated side is made of real answers."""
    chosen = _repeated(few, config.training.train_batch_size)
    encoded = game.encode(chosen)
    encoded["opponent_score"] = game.opponent_scores(encoded)
    real = {name: tensor for name, tensor in encoded.items() if not name.startswith("loser_")}
    other = {name: tensor.repeat_interleave(config.rounds.num_generated, dim=0) for name, tensor in real.items()}
    source = source_of(config.rounds, objectives_of(config.rounds)[0])
    return Batch(
        [row["id"] for row in chosen], [row["prompt"] for row in chosen], real, {} if source == "none" else other,
        [seed_from("plan", place) for place in range(len(chosen))],
    )  # fmt: skip


def expected_longest(lengths: list[int], batch: int) -> float:
    """The mean of the largest of `batch` draws, with replacement, from these lengths."""
    ordered = np.sort(np.asarray(lengths, np.float64))
    below = np.arange(len(ordered) + 1) / len(ordered)
    return float(ordered @ np.diff(below**batch))


def _stored_bytes(row: Row) -> int:
    """About what a parquet file holds of a row, uncompressed."""
    ids = sum(len(row[name]) for name in ("prompt_ids", "tokens", "loser_tokens") if name in row)
    return 8 * ids + len((row["prompt"] + row["text"]).encode("utf-8", "surrogatepass"))


def _repeated(few: list[Row], number: int) -> list[Row]:
    return [few[place % len(few)] for place in range(number)]


# From rates to a run


def predict(config: LanguageConfig, rates: Rates, sizes: Sizes, world: int) -> list[dict[str, float | int]]:
    """Seconds of each round's phases, as the ledger names them; what the judges take is not in them.

    Args:
        world: processes.
    """
    pairs = sizes.rows // config.rounds.real_parts
    answer = (rates.start + rates.longest * rates.token) / config.generation.generation_batch_size
    found: list[dict[str, float | int]] = []
    for k in range(1, config.rounds.rounds + 1):
        drawn, scored = _work(config, of_round(config.rounds.objective, k), pairs + sizes.held_out)
        anchors = 1
        if config.rounds.anchor == "opponent":
            anchors = len(OPPONENTS[config.rounds.opponent](list(range(1, k)), config.rounds.pool_weights))
        steps, _ = steps_of_round(config.training, k, pairs, world)
        visited = steps * config.training.train_batch_size * config.training.gradient_accumulation_steps
        # The gap is taken of held-out pairs when a round was trained
        gap = sizes.held_out / (pairs + sizes.held_out) * scored * rates.score
        evaluated = sizes.asked * answer + sizes.held_out * rates.score
        if not (k == config.rounds.rounds or config.evaluation.eval_every_round):
            evaluated = 0.0
        found.append(
            {
                "round": k,
                "generated": drawn * answer / world,
                "cached": anchors * scored * rates.score / world,
                "trained": visited * rates.pair + steps * rates.update + gap / world,
                "evaluated": evaluated / world,
            }
        )
    return found


def _work(config: LanguageConfig, objective: str, rows: int) -> tuple[int, int]:
    """Answers that the opponent draws in a round with so many real ones, and answers that it scores."""
    source = source_of(config.rounds, objective)
    drawn = rows * config.rounds.num_generated if source == "opponent" else 0
    return drawn, rows + (rows if source == "data" else drawn)


def disk(config: LanguageConfig, rates: Rates, sizes: Sizes) -> int:
    """The most bytes that the output folder holds at a time, rivals included."""
    pairs, rounds = sizes.rows // config.rounds.real_parts, config.rounds.rounds
    runs = [objectives_of(config.rounds)[0], *rivals(config)]
    drawn = [_work(config, name, pairs + sizes.held_out)[0] for name in runs]
    total = (sizes.rows + sizes.held_out) * (rates.row_bytes + rates.encoded_bytes)
    for number in drawn:
        total += rounds * ((number + sizes.asked) * rates.row_bytes + rates.player_bytes)
        total += rates.player_bytes  # the top folder's
    # Of one round at a time: encodings, checkpoints and the one that is being written
    steps = max(steps_of_round(config.training, k, pairs, 1)[0] for k in range(1, rounds + 1))
    return total + max(drawn) * rates.encoded_bytes + kept_checkpoints(config.training, steps) * rates.checkpoint_bytes
