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

from spin_diffusion.data.rows import LeftOut
from spin_diffusion.data.text import read_held_out, read_text_examples
from spin_diffusion.llm.config import LanguageConfig
from spin_diffusion.llm.game import LanguageGame, transcript
from spin_diffusion.runs.config import needs_losers, rivals
from spin_diffusion.runs.plan import (
    PhaseSeconds,
    Rates,
    count_rows,
    fitting,
    predict_disk,
    predict_rounds,
    probe_training,
    seconds_of,
    stand_in_batch,
    write_plan,
)
from spin_diffusion.samples.sample import Row
from spin_diffusion.selfplay.device import forget_peak_memory, peak_memory
from spin_diffusion.selfplay.opponents import OPPONENTS
from spin_diffusion.selfplay.round_settings import objectives_of, source_of
from spin_diffusion.selfplay.train_settings import check_batch, of_round
from spin_diffusion.selfplay.trainee import trained_parameters
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress

FIRST_ROWS = 1024
"""So many are tokenised for their lengths."""
SHORT, LONG = 8, 32
"""Tokens of the two answers whose times tell a token from what comes before it."""


@dataclass(frozen=True, kw_only=True)
class AnswerRates(Rates):
    """What the probe measured of answers.

    Attributes:
        start: seconds of a batch of answers before its first token.
        token: seconds of a token of all answers of a batch.
        longest: tokens of the longest answer of a batch, on average.
        tokenise: seconds of one real sample on its way to a stored row.
        row_bytes, encoded_bytes: of a stored answer, and of its encoding.
    """

    start: float
    token: float
    longest: float
    tokenise: float
    row_bytes: int
    encoded_bytes: int


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
        Path(config.run.output_dir),
        accelerator,
        rates,
        rows=sizes.rows,
        rounds=predict(config, rates, sizes, accelerator.num_processes),
        encode_real_seconds=(sizes.rows + sizes.held_out) * rates.tokenise,  # by one process
        disk_bytes=disk(config, rates, sizes),
    )


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
    usable = round(rows * len(few) / len(first))
    sizes = Sizes(usable, len(held_out), asked * config.evaluation.num_validation_answers)
    return few, sizes, seconds / len(first)


# The probe


def probe(config: LanguageConfig, game: LanguageGame, few: list[Row]) -> AnswerRates:
    """Draw, score and train one batch of each kind.

    Args:
        few: stored rows; they are repeated where a batch needs more.
    """
    with fitting(game, "--use_lora true or --optimizer adamw_8bit"):
        return _probe(config, game, few)


def _probe(config: LanguageConfig, game: LanguageGame, few: list[Row]) -> AnswerRates:
    device = game.accelerator.device
    forget_peak_memory(device)
    start, token = _probe_drawing(config, game, few)
    drawing_memory = peak_memory(device)

    scored = game.encode(_repeated(few, config.language.score_batch_size))
    game.promote()
    score = seconds_of(lambda: game.opponent_scores(scored), device) / config.language.score_batch_size

    forget_peak_memory(device)
    chosen = _repeated(few, config.training.train_batch_size)
    encoded = game.encode(chosen)
    encoded["opponent_score"] = game.opponent_scores(encoded)
    pair, update, checkpoint_bytes = probe_training(config, game, stand_in_batch(config, chosen, encoded))
    saved = trained_parameters(game) if config.language.use_lora else list(game.model.parameters())
    whole = game.encode(few[: config.rounds.samples_per_shard])
    return AnswerRates(
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

    took: list[float] = []
    lengths: list[int] = []
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


def predict(config: LanguageConfig, rates: AnswerRates, sizes: Sizes, world: int) -> list[dict[str, float | int]]:
    """Seconds of each round's phases.

    Args:
        world: processes.
    """
    pairs, held_out = sizes.rows // config.rounds.real_parts, sizes.held_out
    answer = (rates.start + rates.longest * rates.token) / config.generation.generation_batch_size

    def phases(k: int) -> PhaseSeconds:
        drawn, scored = _work(config, of_round(config.rounds.objective, k), pairs + held_out)
        anchors = 1
        if config.rounds.anchor == "opponent":
            anchors = len(OPPONENTS[config.rounds.opponent](list(range(1, k))))
        # The gap is measured on held-out pairs when a round was trained
        gap = held_out / (pairs + held_out) * scored * rates.score
        return PhaseSeconds(drawn * answer, anchors * scored * rates.score, gap)

    evaluation = sizes.asked * answer + held_out * rates.score
    return predict_rounds(config, rates, pairs, world, phases, evaluation)


def _work(config: LanguageConfig, objective: str, rows: int) -> tuple[int, int]:
    """Answers that the opponent draws in a round with so many real ones, and answers that it scores."""
    source = source_of(config.rounds, objective)
    drawn = rows * config.rounds.num_generated if source == "opponent" else 0
    return drawn, rows + (rows if source == "data" else drawn)


def disk(config: LanguageConfig, rates: AnswerRates, sizes: Sizes) -> int:
    """The most bytes that the output folder holds at a time, rivals included."""
    pairs = sizes.rows // config.rounds.real_parts

    def drawn(name: str) -> int:
        return _work(config, name, pairs + sizes.held_out)[0]

    data = (sizes.rows + sizes.held_out) * (rates.row_bytes + rates.encoded_bytes)
    most = max(drawn(name) for name in (objectives_of(config.rounds)[0], *rivals(config)))
    return predict_disk(
        config,
        rates,
        pairs,
        data,
        samples=lambda name: (drawn(name) + sizes.asked) * rates.row_bytes,
        working=most * rates.encoded_bytes,
    )
