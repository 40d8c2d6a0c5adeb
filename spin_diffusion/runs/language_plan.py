"""What a language run will take: a probe of one batch of each kind, times how often the settings ask for it.

How long answers will be is not known before they are drawn: the opponent's are taken to be as long as the real ones.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import numpy as np

from spin_diffusion.data.rows import LeftOut
from spin_diffusion.data.text import read_held_out, read_text_examples
from spin_diffusion.llm.config import LanguageConfig
from spin_diffusion.llm.game import LanguageGame, transcript
from spin_diffusion.runs.plan import (
    Plan,
    Rates,
    Sizes,
    Work,
    count_rows,
    fitting,
    make_plan,
    probe_training,
    seconds_of,
    stand_in_batch,
)
from spin_diffusion.samples.sample import Row
from spin_diffusion.selfplay.device import forget_peak_memory, peak_memory
from spin_diffusion.selfplay.opponents import OPPONENTS
from spin_diffusion.selfplay.round_settings import source_of
from spin_diffusion.selfplay.train_settings import check_batch, pairs_visited
from spin_diffusion.selfplay.trainee import trained_parameters
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress

FIRST_ROWS = 1024
"""So many are tokenised for their lengths."""
SHORT, LONG = 8, 32
"""Tokens of the two answers whose times tell a token from what comes before it."""


def plan_answers(config: LanguageConfig, game: LanguageGame, progress: Progress) -> Plan:
    """Probe, and make the plan.

    Raises:
        InputError: a batch that does not fit in memory; fewer pairs than a batch.
    """
    few, sizes, seconds = _read(config, game, progress)
    check_batch(sizes.rows // config.rounds.real_parts, config.training, game.accelerator.num_processes)
    rates = replace(probe(config, game, few), prepare=seconds)  # by one process
    return make_plan(config, game.accelerator, rates, sizes, works(config, sizes, game.accelerator.num_processes))


def _read(config: LanguageConfig, game: LanguageGame, progress: Progress) -> tuple[list[Row], Sizes, float]:
    """The first rows, how many of what there are, and the seconds that one takes."""
    examples = read_text_examples(config.data, with_rejected=config.needs_losers)
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


def probe(config: LanguageConfig, game: LanguageGame, few: list[Row]) -> Rates:
    """Draw, score and train one batch of each kind.

    Args:
        few: stored rows; they are repeated where a batch needs more.
    """
    with fitting(game, "--use_lora true or --optimizer adamw_8bit"):
        return _probe(config, game, few)


def _probe(config: LanguageConfig, game: LanguageGame, few: list[Row]) -> Rates:
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
    longest = expected_longest([len(row["tokens"]) for row in few], config.generation.generation_batch_size)
    answer = (start + longest * token) / config.generation.generation_batch_size
    stored = sum(_stored_bytes(row) for row in few) // len(few)
    encoded_bytes = sum(t.numel() * t.element_size() for t in whole.values()) // len(whole["end"])
    return Rates(
        prepare=0.0,
        draw=answer,
        encode=0.0,
        score=score,
        pair=pair,
        update=update,
        real_bytes=stored + encoded_bytes,
        sample_bytes=stored,
        shown_bytes=stored,
        encoded_bytes=encoded_bytes,
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


# How often the settings ask for what


def works(config: LanguageConfig, sizes: Sizes, world: int) -> Callable[[str, int], Work]:
    """(objective, round) -> the work of a round on so many processes."""
    pairs = sizes.rows // config.rounds.real_parts
    rows = pairs + sizes.held_out

    def work(objective: str, round_: int) -> Work:
        source = source_of(config.rounds, objective)
        visited = pairs_visited(config.training, round_, pairs, world) + sizes.held_out
        drawn = visited * config.rounds.num_generated if source == "opponent" else 0
        # Every real sample is scored, whether it is visited or not
        scored = rows + (rows if source == "data" else drawn)
        beside_one = {"opponent": config.rounds.num_generated, "data": 1, "none": 0}[source]
        anchors = 1
        if config.rounds.anchor == "opponent":
            anchors = len(OPPONENTS[config.rounds.opponent](list(range(1, round_))))
        # The gap is measured on held-out pairs when a round was trained
        return Work(drawn, 0, drawn, anchors * scored, sizes.held_out * (1 + beside_one))

    return work
