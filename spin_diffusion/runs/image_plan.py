"""What an image run will take: its probe, and how often its settings ask for what."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

from spin_diffusion.data.reading import read_examples, with_held_out
from spin_diffusion.data.rows import Example
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import draws_worth_keeping, work_of
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.images import to_bytes
from spin_diffusion.diffusion.prompts import CutPrompts
from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.evaluation.prompt_sets import load_prompts
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
from spin_diffusion.selfplay.round_settings import source_of
from spin_diffusion.selfplay.train_settings import check_batch, pairs_per_step, steps_of_round
from spin_diffusion.selfplay.trainee import trained_parameters
from spin_diffusion.store.progress import Progress, tell


def plan_images(config: Config, game: DiffusionGame, captions: CutPrompts, progress: Progress) -> Plan:
    """Probe, and make the plan.

    Args:
        captions: counts those of the real images, while these are counted.

    Raises:
        InputError: a batch that does not fit in memory; fewer pairs than a batch.
    """
    accelerator = game.accelerator
    few, rows = _examples(config, captions, progress)
    held_out = min(config.data.num_held_out, rows)
    rows -= held_out
    pairs = rows // config.rounds.real_parts
    check_batch(pairs, config.training, accelerator.num_processes)
    config = settle_draws(config, accelerator, pairs)
    game.fixed_draws = int(config.denoiser.fixed_draws)
    rates = probe(config, game, few)
    rates = replace(rates, prepare=rates.prepare / accelerator.num_processes)  # shared out
    return make_plan(
        config,
        accelerator,
        rates,
        Sizes(rows, held_out, shown(config)),
        works(config, pairs, held_out, accelerator.num_processes),
    )


def settle_draws(config: Config, accelerator: Accelerator, pairs: int) -> Config:
    """The settings with a number for `--fixed_draws auto`, by the round that visits a pair least."""
    if config.denoiser.fixed_draws != "auto":
        return config
    world = accelerator.num_processes
    steps = min(steps_of_round(config.training, k, pairs, world)[0] for k in range(1, config.rounds.rounds + 1))
    visits = steps * pairs_per_step(config.training, world) / pairs
    fixed_draws = draws_worth_keeping(visits)
    if not fixed_draws:
        tell(f"Fixed draws: none, since a round of {steps} steps visits a pair {visits:.2g} times", accelerator)
    return replace(config, denoiser=replace(config.denoiser, fixed_draws=fixed_draws))


def _examples(config: Config, captions: CutPrompts, progress: Progress) -> tuple[list[Example], int]:
    """The first examples, and how many there are."""
    wanted = max(config.training.train_batch_size, 2)
    examples = captions.passing(read_examples(with_held_out(config.data), with_losers=config.needs_losers))
    few = list(islice(examples, wanted))
    return few, count_rows(len(few), examples, progress)


# The probe


def probe(config: Config, game: DiffusionGame, few: list[Example]) -> Rates:
    """Draw, encode and train one batch of each kind.

    Args:
        few: at least as many examples as a training batch has; they are repeated where more are needed.
    """
    with fitting(game, "--use_lora true, --optimizer adamw_8bit or --fixed_draws 1"):
        return _probe(config, game, few)


def _probe(config: Config, game: DiffusionGame, few: list[Example]) -> Rates:
    device, batch = game.accelerator.device, config.sampling.generation_batch_size
    rows = list(game.real_rows(few))
    drawn_batch = [dict(rows[place % len(rows)]) for place in range(batch)]
    prompts = [row["prompt"] for row in drawn_batch]

    # Drawing: two lengths tell a step from the rest
    forget_peak_memory(device)
    short, long = 1, 3

    def draw(steps: int) -> list[Any]:
        sampling = replace(game.opponent_sampling, num_inference_steps=steps)
        return game.draw(game.player, prompts, list(range(batch)), sampling)

    pictures = draw(short)
    by_length = [seconds_of(partial(draw, steps), device) for steps in (short, long)]
    denoise = max(by_length[1] - by_length[0], 0.0) / (long - short)
    finish = max(by_length[0] - short * denoise, 0.0)
    drawing_memory = peak_memory(device)

    game.encode(rows[:1])
    encode = seconds_of(lambda: game.encode(rows), device)
    encoded = game.encode(rows)
    embedded = game.prompts.family.embed(game.pipeline, prompts[:1])

    forget_peak_memory(device)
    score, pair, update, checkpoint_bytes = _probe_training(config, game, rows, encoded)
    parameters = trained_parameters(game)
    saved = game.player.parameters() if game.saved == "unet" else parameters
    steps = config.sampling.num_inference_steps
    image = sum(len(row["image"]) for row in rows) // len(rows)
    latents = sum(t.numel() * t.element_size() for t in encoded.values()) // len(rows)
    return Rates(
        prepare=encode / len(rows),
        draw=(finish + steps * denoise) / batch,
        encode=encode / len(rows),
        score=score,
        pair=pair,
        update=update,
        real_bytes=image + latents + sum(t.numel() * 2 for t in embedded.values()),
        sample_bytes=image,
        shown_bytes=len(to_bytes(pictures[0], ImageSettings(image_format="png"))),
        encoded_bytes=latents,
        player_bytes=sum(p.numel() * p.element_size() for p in saved),
        checkpoint_bytes=checkpoint_bytes,
        drawing_memory=drawing_memory,
        training_memory=peak_memory(device),
    )


def _probe_training(
    config: Config, game: DiffusionGame, rows: list[Row], encoded: dict[str, torch.Tensor]
) -> tuple[float, float, float, int]:
    """Seconds of a pair's errors at a fixed draw, of a pair, and of an update; bytes of a checkpoint."""
    size, device = config.training.train_batch_size, game.accelerator.device
    batch = stand_in_batch(config, rows[:size], {name: tensor[:size] for name, tensor in encoded.items()})
    score = 0.0
    if game.fixed_draws:
        known: list[Any] = []
        score = seconds_of(lambda: known.append(game.scores_at_draws(batch)), device) / size
        of_real, of_other = known[-1]
        batch.real["opponent_score"] = of_real
        if batch.generated:
            batch.generated["opponent_score"] = of_other
        game.release_opponent()
    return score, *probe_training(config, game, batch)


# How often the settings ask for what


def works(config: Config, pairs: int, held_out: int, world: int) -> Callable[[str, int], Work]:
    """(objective, round) -> the work of a round of so many pairs and held-out ones on so many processes."""

    def work(objective: str, round_: int) -> Work:
        source = source_of(config.rounds, objective)
        steps, _ = steps_of_round(config.training, round_, pairs, world)
        trained = work_of(config, source, pairs, steps, world=world)
        measured = work_of(config, source, held_out, held_out)  # for all of these the opponent draws
        encoded = trained.encoded + measured.encoded
        scored = (pairs + held_out) * int(config.denoiser.fixed_draws)
        return Work(trained.drawn + measured.drawn, encoded, encoded, scored)

    return work


def shown(config: Config) -> int:
    """Pictures that the evaluation of one model draws."""
    asked = config.evaluation
    if not asked.validation_prompts:
        return 0
    prompts = len(load_prompts(asked.validation_prompts, asked.max_validation_prompts).rows)
    return prompts * asked.num_validation_images * len(asked.validation_guidance_scales or [0])
