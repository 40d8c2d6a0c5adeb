"""What a run will take: a probe of one batch of each kind, times how often the settings ask for it."""

import os
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from spin_diffusion.config import Config
from spin_diffusion.data import Example, read_examples
from spin_diffusion.diffusion.cost import work_of
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.images import to_bytes
from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.evaluation.prompt_sets import load_prompts
from spin_diffusion.input_error import InputError
from spin_diffusion.running import needs_losers, rivals
from spin_diffusion.selfplay.fused import Fused
from spin_diffusion.selfplay.game import Batch
from spin_diffusion.selfplay.ledger import forget_peak_memory, peak_memory, wait_for
from spin_diffusion.selfplay.objectives import bind
from spin_diffusion.selfplay.progress import Progress
from spin_diffusion.selfplay.round_settings import objectives_of, source_of
from spin_diffusion.selfplay.run_dir import seed_from, write_json
from spin_diffusion.selfplay.train_settings import check_batch, of_round, steps_of_round
from spin_diffusion.selfplay.trainee import Trainee, trained_parameters

PROBE_SECONDS = 20.0
"""The most that each of the probe's three parts takes, beyond its first two calls."""


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


def make_plan(config: Config, game: DiffusionGame, progress: Progress) -> dict[str, Any]:
    """Probe, predict, and write `plan.json` into the output folder, where the run's report finds it.

    Raises:
        InputError: a batch that does not fit in memory; fewer pairs than a batch.
    """
    accelerator = game.accelerator
    few, rows = _examples(config, progress)
    pairs = rows // config.rounds.real_parts
    check_batch(pairs, config.training, accelerator.num_processes)
    rates = probe(config, game, few)
    rounds = predict(config, rates, pairs, _pictures_of_evaluation(config), accelerator.num_processes)
    plan = {
        "rows": rows,
        "processes": accelerator.num_processes,
        "rates": asdict(rates),
        "rounds": rounds,
        "encode_real_seconds": rows * rates.encode / accelerator.num_processes,
        "disk_bytes": disk(config, rates, rows, _pictures_of_evaluation(config)),
        "free_bytes": shutil.disk_usage(_existing(Path(config.run.output_dir))).free,
        "memory_bytes": {"drawing": rates.drawing_memory, "training": rates.training_memory},
        "device_bytes": _device_bytes(accelerator.device),
    }
    if accelerator.is_main_process:
        write_json(Path(config.run.output_dir) / "plan.json", plan)
    return plan


def _examples(config: Config, progress: Progress) -> tuple[list[Example], int]:
    """The first examples, and how many there are."""
    wanted = max(config.training.train_batch_size, 2)
    examples = read_examples(config.data, with_losers=needs_losers(config))
    few = list(islice(examples, wanted))
    bar = progress.phase("count the real samples", 0)
    rows = len(few)
    for _ in examples:
        rows += 1
        bar(rows, "")
    return few, rows


# The probe


def probe(config: Config, game: DiffusionGame, few: list[Example]) -> Rates:
    """Draw, encode and train one batch of each kind.

    Args:
        few: at least as many examples as a training batch has; they are repeated where more are needed.
    """
    try:
        return _probe(config, game, few)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"this does not fit in the memory of {game.accelerator.device} ({str(error).splitlines()[0][:160]}): lower "
            "--train_batch_size or --generation_batch_size, or set --gradient_checkpointing true, --use_lora true, "
            "--optimizer adamw_8bit or --fixed_draws 1"
        ) from None


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
    by_length = [_seconds(lambda steps=steps: draw(steps), device) for steps in (short, long)]
    denoise = max(by_length[1] - by_length[0], 0.0) / (long - short)
    finish = max(by_length[0] - short * denoise, 0.0)
    drawing_memory = peak_memory(device)

    game.encode(rows[:1])
    encode = _seconds(lambda: game.encode(rows), device)
    encoded = game.encode(rows)
    told = game.prompts.family.embed(game.pipeline, prompts[:1])

    forget_peak_memory(device)
    pair, update, score, checkpoint_bytes = _probe_training(config, game, rows, encoded)
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
    """Seconds of a pair, of an update, and of a pair's errors at a fixed draw; bytes of a checkpoint."""
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
        score = _seconds(lambda: known.append(game.scores_at_draws(batch)), device) / size
        of_real, of_other = known[-1]
        batch.real["opponent_score"] = of_real
        if batch.generated:
            batch.generated["opponent_score"] = of_other
        game.release_opponent()
    beta = of_round(config.rounds.beta, 1)
    mu = of_round(config.rounds.mu, 1) or float(config.rounds.num_generated)
    loss = bind(objective, **{"beta": beta, "mu": mu} | (config.rounds.objective_options or {}))
    # A rate so small that nothing is learnt here
    trainee = (Fused if config.training.fused_backward else Trainee)(game, 1e-12, config.training, game.accelerator)

    def passes() -> None:
        trainee.backward(loss(game.scores(trainee.model, batch).scores).mean())

    passes()
    trainee.step()  # the optimizer's state is there from here on
    pair, update = _seconds(passes, device) / size, _seconds(trainee.step, device)
    weights = sum(p.numel() * p.element_size() for p in trainee.parameters)
    state = sum(t.numel() * t.element_size() for t in trainee.optimizer_state())
    trainee.finish()
    return pair, update, score, weights + state


def _stand_in_states(game: DiffusionGame, latents: torch.Tensor) -> torch.Tensor:
    """Trajectories of the right shape."""
    states = latents[:, None].expand(-1, game.sampling.num_inference_steps + 1, *latents.shape[1:])
    return states + 0.1 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))


def _seconds(call: Any, device: torch.device) -> float:
    """The fastest of up to three calls, in at most about PROBE_SECONDS."""
    best, begun = float("inf"), time.perf_counter()
    for _ in range(3):
        started = time.perf_counter()
        call()
        wait_for(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - begun > PROBE_SECONDS:
            break
    return best


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
        work = work_of(config.flat(), source, pairs, steps)
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
        work = work_of(config.flat(), source_of(config.rounds, name), pairs, 1)
        total += rounds * (work.drawn * rates.image_bytes + pictures * rates.picture_bytes + rates.player_bytes)
        total += rates.player_bytes  # the top folder's
    # Of one round at a time: encodings, trajectories, checkpoints and the one that is being written
    steps = max(steps_of_round(config.training, k, pairs, 1)[0] for k in range(1, rounds + 1))
    made = max(0, (steps - 1) // config.training.checkpointing_steps)
    kept = min(made, config.training.checkpoints_total_limit or made)
    encoded = max(work_of(config.flat(), source_of(config.rounds, name), pairs, 1).encoded for name in runs)
    total += encoded * rates.latent_bytes
    if config.trajectory.trajectory != "forward":
        total += pairs * rates.latent_bytes * (config.sampling.num_inference_steps + 1)
    return total + (kept + (1 if made else 0)) * rates.checkpoint_bytes


def _pictures_of_evaluation(config: Config) -> int:
    """That one model draws."""
    settings = config.evaluation
    if not settings.validation_prompts:
        return 0
    prompts = len(load_prompts(settings.validation_prompts, settings.max_validation_prompts).rows)
    return prompts * settings.num_validation_images * len(settings.validation_guidance_scales or [0])


def lines(config: Config, plan: dict[str, Any], device: torch.device) -> list[str]:
    """The plan for people."""
    total = plan["encode_real_seconds"]
    told = [f"{'round':>5}  {'draw':>9}  {'encode':>9}  {'train':>9}  {'evaluate':>9}"]
    for entry in plan["rounds"]:
        parts = [entry[phase] for phase in ("generated", "cached", "trained", "evaluated")]
        total += sum(parts)
        told.append(f"{entry['round']:>5}  " + "  ".join(f"{_span(seconds):>9}" for seconds in parts))
    told.append(f"Time     {_span(total)} for {plan['rows']} real samples on {plan['processes']} "
                f"process{'es' if plan['processes'] > 1 else ''}, without scorers, start and rivals")  # fmt: skip
    told.append(_fits("Disk", plan["disk_bytes"], plan["free_bytes"], f"free in {config.run.output_dir}",
                      "lower --checkpoints_total_limit or --max_train_samples"))  # fmt: skip
    peak = max(plan["memory_bytes"].values())
    where = "of the GPU" if device.type == "cuda" else "of this machine"
    told.append(_fits("Memory", peak, plan["device_bytes"], where, "lower --train_batch_size"))
    return told


def _fits(what: str, needed: int, there: int, where: str, remedy: str) -> str:
    said = f"{what:<8} {needed / 1e9:,.2f} GB of {there / 1e9:,.1f} GB {where}"
    return said if needed <= there else f"{said}: does NOT fit; {remedy}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _existing(path: Path) -> Path:
    return next(found for found in (path, *path.absolute().parents) if found.exists())
