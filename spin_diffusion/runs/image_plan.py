"""What a run will take: a probe of one batch of each kind, times how often the settings ask for it."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from spin_diffusion.data.reading import Example, read_examples
from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import draws_worth_keeping, work_of
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.images import to_bytes
from spin_diffusion.diffusion.prompts import CutPrompts
from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.evaluation.prompt_sets import load_prompts
from spin_diffusion.runs.plan import count_rows, kept_checkpoints, out_of_memory, probe_training, seconds_of, write_plan
from spin_diffusion.runs.start import needs_losers, rivals
from spin_diffusion.samples.sample import Batch
from spin_diffusion.selfplay.ledger import forget_peak_memory, peak_memory
from spin_diffusion.selfplay.round_settings import objectives_of, source_of
from spin_diffusion.selfplay.train_settings import check_batch, of_round, pairs_per_step, steps_of_round
from spin_diffusion.selfplay.trainee import trained_parameters
from spin_diffusion.store.progress import Progress
from spin_diffusion.store.run_dir import seed_from


@dataclass(frozen=True)
class Rates:
    """What the probe measured, of one process.

    Attributes:
        denoise: seconds of one denoising step of one image, guidance included.
        finish: seconds of an image beside its steps: its prompt, the VAE's decoder, the codec.
        encode: seconds of one image through the VAE's encoder.
        pair: seconds of a pair in a step, forward and backward, both models.
        update: seconds of the optimizer's part of a step.
        score: seconds of a pair's opponent errors at one fixed draw; 0 without fixed draws.
        image_bytes, picture_bytes, latent_bytes, prompt_bytes: of a stored training image, of one of the evaluation's
            (PNG), of what is kept of an image and of a prompt.
        player_bytes, checkpoint_bytes: of what is saved of a player, and of a checkpoint within a round.
        drawing_memory, training_memory: peak bytes of the probe's parts; of the process as a whole on a CPU.
    """

    denoise: float
    finish: float
    encode: float
    pair: float
    update: float
    score: float
    image_bytes: int
    picture_bytes: int
    latent_bytes: int
    prompt_bytes: int
    player_bytes: int
    checkpoint_bytes: int
    drawing_memory: int
    training_memory: int


def make_plan(config: Config, game: DiffusionGame, captions: CutPrompts, progress: Progress) -> dict[str, Any]:
    """Probe, predict, and write `plan.json` into the output folder, where the run's report finds it.

    Args:
        captions: counts those of the real images, while these are counted.

    Raises:
        InputError: a batch that does not fit in memory; fewer pairs than a batch.
    """
    accelerator = game.accelerator
    few, rows = _examples(config, captions, progress)
    pairs = rows // config.rounds.real_parts
    check_batch(pairs, config.training, accelerator.num_processes)
    config = settle_draws(config, game, pairs)
    rates = probe(config, game, few)
    pictures = _pictures_of_evaluation(config)
    return write_plan(
        Path(config.run.output_dir), accelerator, rates,
        rows=rows,
        rounds=predict(config, rates, pairs, pictures, accelerator.num_processes),
        encode_real_seconds=rows * rates.encode / accelerator.num_processes,
        disk_bytes=disk(config, rates, rows, pictures),
    )  # fmt: skip


def settle_draws(config: Config, game: DiffusionGame, pairs: int) -> Config:
    """The settings with a number for `--fixed_draws auto`, by the round that visits a pair least; the game's too."""
    if config.denoiser.fixed_draws != "auto":
        return config
    world = game.accelerator.num_processes
    steps = min(steps_of_round(config.training, k, pairs, world)[0] for k in range(1, config.rounds.rounds + 1))
    visits = steps * pairs_per_step(config.training, world) / pairs
    game.fixed_draws = draws_worth_keeping(visits)
    if not game.fixed_draws:
        game.accelerator.print(f"Fixed draws: none, since a round of {steps} steps visits a pair {visits:.2g} times")
    return replace(config, denoiser=replace(config.denoiser, fixed_draws=game.fixed_draws))


def _examples(config: Config, captions: CutPrompts, progress: Progress) -> tuple[list[Example], int]:
    """The first examples, and how many there are."""
    wanted = max(config.training.train_batch_size, 2)
    examples = captions.passing(read_examples(config.data, with_losers=needs_losers(config)))
    few = list(islice(examples, wanted))
    return few, count_rows(len(few), examples, progress)


# The probe


def probe(config: Config, game: DiffusionGame, few: list[Example]) -> Rates:
    """Draw, encode and train one batch of each kind.

    Args:
        few: at least as many examples as a training batch has; they are repeated where more are needed.
    """
    try:
        return _probe(config, game, few)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, game, "--use_lora true, --optimizer adamw_8bit or --fixed_draws 1") from None


def _probe(config: Config, game: DiffusionGame, few: list[Example]) -> Rates:
    device, batch = game.accelerator.device, config.sampling.generation_batch_size
    rows = list(game.real_rows(few))
    drawn_batch = [dict(rows[place % len(rows)]) for place in range(batch)]
    prompts = [row["prompt"] for row in drawn_batch]

    # Drawing: two lengths tell a step from the rest
    forget_peak_memory(device)
    short, long = 1, 3

    def draw(steps: int) -> list[Any]:
        return game.draw(game.player, prompts, list(range(batch)), config.sampling.guidance_scale, steps)

    pictures = draw(short)
    by_length = [seconds_of(lambda steps=steps: draw(steps), device) for steps in (short, long)]
    denoise = max(by_length[1] - by_length[0], 0.0) / (long - short)
    finish = max(by_length[0] - short * denoise, 0.0)
    drawing_memory = peak_memory(device)

    game.encode(rows[:1])
    encode = seconds_of(lambda: game.encode(rows), device)
    encoded = game.encode(rows)
    told = game.prompts.family.embed(game.pipeline, prompts[:1])

    forget_peak_memory(device)
    score, pair, update, checkpoint_bytes = _probe_training(config, game, rows, encoded)
    parameters = trained_parameters(game)
    saved = game.player.parameters() if game.adapters is None else parameters
    return Rates(
        denoise=denoise / batch,
        finish=finish / batch,
        encode=encode / len(rows),
        pair=pair,
        update=update,
        score=score,
        image_bytes=sum(len(row["image"]) for row in rows) // len(rows),
        picture_bytes=len(to_bytes(pictures[0], ImageSettings(image_format="png"))),
        latent_bytes=sum(t.numel() * t.element_size() for t in encoded.values()) // len(rows),
        prompt_bytes=sum(t.numel() * 2 for t in told.values()),
        player_bytes=sum(p.numel() * p.element_size() for p in saved),
        checkpoint_bytes=checkpoint_bytes,
        drawing_memory=drawing_memory,
        training_memory=peak_memory(device),
    )


def _probe_training(
    config: Config, game: DiffusionGame, rows: list[dict[str, Any]], encoded: dict[str, torch.Tensor]
) -> tuple[float, float, float, int]:
    """Seconds of a pair's errors at a fixed draw, of a pair, and of an update; bytes of a checkpoint."""
    size, device = config.training.train_batch_size, game.accelerator.device
    objective = objectives_of(config.rounds)[0]
    source = source_of(config.rounds, objective)
    real = {name: tensor[:size] for name, tensor in encoded.items() if not name.startswith("loser_")}
    other = {name: tensor.repeat_interleave(config.rounds.num_generated, dim=0) for name, tensor in real.items()}
    if game.steps is not None:
        other["states"] = _stand_in_states(game, real["latents"])
    chosen = rows[:size]
    batch = Batch(
        [row["id"] for row in chosen], [row["prompt"] for row in chosen], real, {} if source == "none" else other,
        [seed_from("plan", place) for place in range(size)],
    )  # fmt: skip
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


def _stand_in_states(game: DiffusionGame, latents: torch.Tensor) -> torch.Tensor:
    """Trajectories of the right shape."""
    states = latents[:, None].expand(-1, game.sampling.num_inference_steps + 1, *latents.shape[1:])
    return states + 0.1 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))


# From rates to a run


def predict(config: Config, rates: Rates, pairs: int, pictures: int, world: int) -> list[dict[str, float | int]]:
    """Seconds of each round's phases, as the ledger names them; what the scorers take is not in them.

    Args:
        pairs: real samples of a round.
        pictures: that the evaluation of a model draws.
        world: processes.
    """
    image = rates.finish + config.sampling.num_inference_steps * rates.denoise
    steps_of_pictures = config.evaluation.validation_num_inference_steps or config.sampling.num_inference_steps
    found: list[dict[str, float | int]] = []
    for k in range(1, config.rounds.rounds + 1):
        source = source_of(config.rounds, of_round(config.rounds.objective, k))
        steps, _ = steps_of_round(config.training, k, pairs, world)
        work = work_of(config, source, pairs, steps)
        visited = steps * config.training.train_batch_size * config.training.gradient_accumulation_steps
        evaluated = pictures if k == config.rounds.rounds or config.evaluation.eval_every_round else 0
        found.append(
            {
                "round": k,
                "generated": work.drawn * image / world,
                "cached": (work.encoded * rates.encode + pairs * config.denoiser.fixed_draws * rates.score) / world,
                "trained": visited * rates.pair + steps * rates.update,
                "evaluated": evaluated * (rates.finish + steps_of_pictures * rates.denoise) / world,
            }
        )
    return found


def disk(config: Config, rates: Rates, rows: int, pictures: int) -> int:
    """The most bytes that the output folder holds at a time, rivals included."""
    pairs, rounds = rows // config.rounds.real_parts, config.rounds.rounds
    runs = [objectives_of(config.rounds)[0], *rivals(config)]
    data = rows * (rates.image_bytes + rates.latent_bytes + rates.prompt_bytes)
    total = data
    for name in runs:
        work = work_of(config, source_of(config.rounds, name), pairs, 1)
        total += rounds * (work.drawn * rates.image_bytes + pictures * rates.picture_bytes + rates.player_bytes)
        total += rates.player_bytes  # the top folder's
    # Of one round at a time: encodings, trajectories, checkpoints and the one that is being written
    steps = max(steps_of_round(config.training, k, pairs, 1)[0] for k in range(1, rounds + 1))
    encoded = max(work_of(config, source_of(config.rounds, name), pairs, 1).encoded for name in runs)
    total += encoded * rates.latent_bytes
    if config.trajectory.trajectory != "forward":
        total += pairs * rates.latent_bytes * (config.sampling.num_inference_steps + 1)
    return total + kept_checkpoints(config.training, steps) * rates.checkpoint_bytes


def _pictures_of_evaluation(config: Config) -> int:
    """That one model draws."""
    settings = config.evaluation
    if not settings.validation_prompts:
        return 0
    prompts = len(load_prompts(settings.validation_prompts, settings.max_validation_prompts).rows)
    return prompts * settings.num_validation_images * len(settings.validation_guidance_scales or [0])
