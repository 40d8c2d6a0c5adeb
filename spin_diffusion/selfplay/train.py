"""The training loop of a round: the same for every game and every objective. Accelerate lives here.

A run's randomness is a function of (seed, round, position of the pair in the stream), never of a process, so a resumed
run, or one on another number of processes with the same global batch, sees the same pairs with the same noise.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay import health
from spin_diffusion.selfplay.game import Batch, Game
from spin_diffusion.selfplay.objectives import Loss, PairScores, without_margin
from spin_diffusion.selfplay.run_dir import (
    commit,
    file_hashes,
    part_of,
    read_json,
    seed_from,
    verify_hashes,
    write_file,
)

CHECKPOINT, ANCHOR, HEALTHY = "checkpoint-", "anchor", "healthy"


@dataclass(frozen=True)
class TrainSettings(health.HealthSettings):
    """How a round is trained. A list holds one value per round; when it is shorter, its last value repeats."""

    max_train_steps: int | list[int] | None = 500
    """Optimizer steps in each round; None = --num_train_epochs."""
    num_train_epochs: float | list[float] | None = None
    """Times that a round sees each real sample, where --max_train_steps is None."""
    train_batch_size: int = 1
    """Pairs per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float | list[float] = 2e-5
    """Initial learning rate (after warm-up)."""
    scale_lr: bool = False
    """Multiply the learning rate by accumulation steps x batch size x processes."""
    lr_scheduler: str = "constant_with_warmup"
    """linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup."""
    lr_warmup_steps: int | list[int] = 0
    """Optimizer steps of warm-up in each round."""
    lr_warmup_ratio: float = 0.0
    """Share of a round's steps that are warm-up, in [0, 1], where --lr_warmup_steps is 0."""
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of the polynomial schedule."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "rmsprop", "sgd"] = "adamw"
    """adamw_8bit needs the extra `8bit` and a CUDA device; rmsprop and sgd have no momentum."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; the norm before clipping is logged. 0 = no clipping."""
    use_ema: bool = False
    """Promote an exponential moving average of the player's weights over the round instead of its last weights."""
    ema_decay: float = 0.9999
    """Largest decay of that average."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Default: what `accelerate launch` was told. Errors and scores are fp32 in any case."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    two_passes: bool = False
    """Compute the gradient of one side of the pairs after the other: half the activations, one more forward pass."""
    allow_tf32: bool = False
    """TF32 matrix products on Ampere and later GPUs."""
    refresh_opponent_steps: int | None = None
    """Every so many optimizer steps of a round its player becomes the one that anchors the scores; the samples stay.
    (New samples as well: shorter rounds.)"""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints within a round."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept of a round in training; the oldest go first."""
    keep_checkpoints: bool = False
    """Keep a round's checkpoints after it has been promoted."""
    resume_from_checkpoint: str = "latest"
    """latest, or the name of a checkpoint of the round in training (checkpoint-500)."""


@dataclass(frozen=True)
class RoundPlan:
    """What the loop needs to know of one round: the settings' values for it, and the objective bound to its beta."""

    name: str
    """For trackers: the objective and the round."""
    round_: int
    seed: int
    steps: int
    learning_rate: float
    warmup_steps: int
    beta: float
    loss: Loss
    anchored_at_player: bool
    """Whether the round starts with player = opponent, so that every r must be 0 at step 0."""
    margin_dropout: float = 0.0
    """Share of the pairs whose generated side takes no part in a step."""


class Average:
    """An exponential moving average of weights that outlives a round: the opponent `ema`.

    Unlike `--use_ema` it has a constant decay and no warm-up, since it starts from the last opponent's weights.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.weights = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def step(self, parameters: list[nn.Parameter]) -> None:
        """Move towards the parameters by 1 - decay."""
        torch._foreach_lerp_(self.weights, [parameter.detach() for parameter in parameters], 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, parameters: list[nn.Parameter]) -> None:
        """Write the average into the parameters."""
        for parameter, weight in zip(parameters, self.weights, strict=True):
            parameter.copy_(weight)


def trained_parameters(game: Game) -> list[nn.Parameter]:
    """What of the player is trained."""
    return [parameter for parameter in game.player.parameters() if parameter.requires_grad]


@dataclass
class Pairs:
    """All pairs of a round, read on demand: tensors by `fetch`."""

    ids: Sequence[str]
    prompts: Sequence[str]
    fetch: Callable[[list[int]], tuple[dict[str, Tensor], dict[str, Tensor]]]
    draws: int = 0
    """0: each visit of a pair has its own randomness. K: visit v has that of draw v mod K, at which the opponent's
    scores are kept as (rows, K)."""
    epochs: dict[int, Tensor] = field(default_factory=dict)

    def batch(self, positions: list[int], seed: int, round_: int) -> Batch:
        """The pairs at these positions of the round's endless stream: one permutation of all pairs after another."""
        indices = [self._index(position, seed, round_) for position in positions]
        if self.draws:
            visits = [position // len(self.ids) for position in positions]
            return self.at_draws(indices, [visit % self.draws for visit in visits], seed, round_)
        real, generated = self.fetch(indices)
        seeds = [seed_from(seed, "pair", round_, position) for position in positions]
        return Batch([self.ids[i] for i in indices], [self.prompts[i] for i in indices], real, generated, seeds)

    def at_draws(self, indices: list[int], draws: list[int], seed: int, round_: int) -> Batch:
        """These pairs, each at one of its own draws."""
        real, generated = self.fetch(indices)
        for side in (real, generated):
            if "opponent_score" in side:
                kept = side["opponent_score"]
                places = torch.tensor(draws).repeat_interleave(len(kept) // len(draws))
                side["opponent_score"] = kept.gather(1, places[:, None]).squeeze(1)
        seeds = [seed_from(seed, "draw", round_, self.ids[i], k) for i, k in zip(indices, draws, strict=True)]
        return Batch([self.ids[i] for i in indices], [self.prompts[i] for i in indices], real, generated, seeds)

    def _index(self, position: int, seed: int, round_: int) -> int:
        epoch, place = divmod(position, len(self.ids))
        if epoch not in self.epochs:
            # Two epochs are enough for a batch that lies across them
            self.epochs = {known: order for known, order in self.epochs.items() if abs(known - epoch) == 1}
            generator = torch.Generator().manual_seed(seed_from(seed, "order", round_, epoch))
            self.epochs[epoch] = torch.randperm(len(self.ids), generator=generator)
        return int(self.epochs[epoch][place])


def of_round(value: Any, round_: int) -> Any:
    """A setting's value in a round: a list holds one per round and repeats its last."""
    return value[min(round_, len(value)) - 1] if isinstance(value, list) else value


def steps_of_round(settings: TrainSettings, round_: int, pairs: int, world: int) -> tuple[int, int]:
    """Optimizer steps of a round of so many pairs on `world` processes, and how many of them are warm-up."""
    steps = of_round(settings.max_train_steps, round_)
    if steps is None:
        epochs = of_round(settings.num_train_epochs, round_)
        assert epochs is not None, "the configuration checks that one of the two is given"
        steps = max(1, math.ceil(epochs * pairs / pairs_per_step(settings, world)))
    return steps, of_round(settings.lr_warmup_steps, round_) or round(settings.lr_warmup_ratio * steps)


def check_batch(pairs: int, settings: TrainSettings, world: int) -> int:
    """Pairs in each optimizer step of `world` processes; InputError when there are fewer pairs than that."""
    per_step = pairs_per_step(settings, world)
    if pairs < per_step:
        raise InputError(
            f"{pairs} pairs are fewer than one batch of {per_step} ({settings.train_batch_size} per process x "
            f"{settings.gradient_accumulation_steps} accumulation steps x {world} processes): lower --train_batch_size "
            "or --gradient_accumulation_steps, or give more examples"
        )
    return per_step


def train(
    game: Game,
    pairs: Pairs,
    plan: RoundPlan,
    settings: TrainSettings,
    accelerator: Accelerator,
    directory: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    average: Average | None = None,
) -> dict[str, Any]:
    """Train the player for one round, from the newest checkpoint in `directory` on, and return what it came to.

    Args:
        average: follows the player's weights, step by step.

    Raises:
        InputError: fewer pairs than one global batch, a damaged checkpoint, a missing extra.
        FloatingPointError: a loss or gradient that is not finite.
    """
    per_step = check_batch(len(pairs.ids), settings, accelerator.num_processes)

    # The optimizer and the schedule of this round
    player = game.player
    trained = trained_parameters(game)
    optimizer = make_optimizer(trained, plan.learning_rate * (per_step if settings.scale_lr else 1), settings)
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=plan.warmup_steps,
        num_training_steps=plan.steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )
    ema = EMAModel(trained, decay=settings.ema_decay) if settings.use_ema else None
    wrapped, optimizer = accelerator.prepare(player, optimizer)
    if accelerator.scaler is not None and (fresh := type(accelerator.scaler)().state_dict()):
        accelerator.scaler.load_state_dict(fresh)  # the last round's scale must not depend on whether it was resumed
    if ema is not None:
        ema.to(accelerator.device)

    # Go on where a killed run stopped
    history: list[dict[str, Any]] = []
    anchors: list[dict[str, Any]] = []
    anchor_hash = game.opponent_hash() if settings.refresh_opponent_steps else ""
    with _player_in_checkpoints(accelerator, game):
        checkpoint = _newest_checkpoint(directory, settings.resume_from_checkpoint)
        first_step = 0
        if checkpoint is not None:
            first_step, history, anchors = _load_checkpoint(checkpoint, game, accelerator, ema, average, settings)
            schedule.last_epoch = first_step  # the optimizer's state already holds this step's rate

        ended: health.Finding | None = None
        snapshots = _Snapshots(directory, game, accelerator, ema, average) if health.rolls_back(settings) else None
        for step in range(first_step, plan.steps):
            if snapshots is not None and step % health.WINDOW_STEPS == 0:
                snapshots.take(step)
            started = time.perf_counter()
            lr = optimizer.param_groups[0]["lr"]
            if settings.refresh_opponent_steps and step and step % settings.refresh_opponent_steps == 0:
                before = anchors[-1]["hash"] if anchors else anchor_hash
                assert game.opponent_hash() == before, f"step {step}: the opponent changed while the player was trained"
                anchors.append({"step": step, "hash": _refresh_opponent(game, directory, accelerator)})
            metrics, gradient_norm = _take_step(step, game, wrapped, optimizer, pairs, plan, settings, accelerator)
            schedule.step()
            if ema is not None:
                ema.step(trained)
            if average is not None:
                average.step(trained)

            # What the step said
            entry = _summary(metrics, plan.beta) | {
                "grad_norm": gradient_norm,
                "lr": lr,
                "pairs_per_second": per_step / (time.perf_counter() - started),
            }
            if (step + 1) % health.WINDOW_STEPS == 0 or step + 1 == plan.steps:
                distance = game.distance()
                entry |= {} if distance is None else {"distance": distance}
            history.append({"step": step + 1} | entry)
            accelerator.log(_flat(entry, plan.name), step=step + 1)
            found = health.findings(history, plan.beta, settings)
            for one in found:
                sentence = one.sentence + (game.remedy if one.rule.startswith("forgetting") else "")
                history[-1].setdefault("findings", {})[one.rule] = sentence
                accelerator.print(f"Round {plan.round_}, step {step + 1}, {one.rule}: {sentence}")
            ended = health.gravest(found)
            progress(step + 1, plan.steps, f"loss {entry['loss']:.4f}  accuracy {entry['implicit_accuracy']:.2f}")

            done = ended is not None or step + 1 == plan.steps
            if not done and (step + 1) % settings.checkpointing_steps == 0:
                _save_checkpoint(directory, step + 1, accelerator, ema, average, settings, history, anchors)
            if done:
                break
        kept_step = history[-1]["step"]
        if ended is not None and ended.action == "roll_back" and snapshots is not None:
            kept_step = snapshots.go_back(before=kept_step - health.WINDOW_STEPS)

    if ema is not None:
        ema.copy_to(trained)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # gives the player its own forward back
    accelerator.free_memory()
    if accelerator.is_main_process:
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        write_file(directory / "metrics.jsonl", lambda part: part.write_text(lines))
    last = history[-health.WINDOW_STEPS :]
    return {
        "steps": history[-1]["step"],
        "resumed_from": first_step,
        "stopped_early": ended is not None,
        "health": [
            {"step": entry["step"], "rule": rule, "action": getattr(settings, f"on_{rule}"), "sentence": sentence}
            for entry in history
            for rule, sentence in entry.get("findings", {}).items()
        ],
        "ended_by": None
        if ended is None
        else {"rule": ended.rule, "action": ended.action, "sentence": ended.sentence, "kept_step": kept_step},
        "anchors": anchors,
        "distance": next((entry["distance"] for entry in reversed(history) if "distance" in entry), None),
        **{key: sum(entry[key] for entry in last) / len(last) for key in _COLUMNS[:_LEVEL]},
    }


def _take_step(
    step: int,
    game: Game,
    player: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: Pairs,
    plan: RoundPlan,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> tuple[Tensor, float]:
    """One optimizer step on one global batch.

    Returns:
        What is logged of the pairs of all processes, (pairs, columns) on the CPU, and the gradient's norm before
        clipping.
    """
    records, rank, world = [], accelerator.process_index, accelerator.num_processes

    def ids() -> list[str]:
        micros = range(settings.gradient_accumulation_steps)
        return [id_ for micro in micros for id_ in _ids_everywhere(pairs, step, micro, plan, settings, world)]

    gradient_norm = torch.zeros(())
    for micro in range(settings.gradient_accumulation_steps):
        batch = pairs.batch(_positions(step, micro, settings, rank, world), plan.seed, plan.round_)
        with accelerator.accumulate(player):
            with torch.no_grad() if settings.two_passes else nullcontext():
                scored = game.scores(player, batch)
            scores = _as_leaves(scored.scores) if settings.two_passes else scored.scores
            trained_on = _without_some_margins(scores, batch.seeds, plan.margin_dropout)
            losses = plan.loss(trained_on)
            if step == 0 and plan.anchored_at_player:
                _check_start(trained_on, losses, plan, game.start_tolerance[accelerator.mixed_precision])
            if settings.two_passes:
                _backward_by_sides(losses.mean(), scores, scored.generated_scale, game, player, batch, accelerator)
            else:
                accelerator.backward(losses.mean())
            records.append(_record(scored.scores, losses, scored.level, plan.beta))
            if accelerator.sync_gradients:
                limit = settings.max_grad_norm or float("inf")
                gradient_norm = accelerator.clip_grad_norm_(player.parameters(), limit)
                # The one wait for the device in a step
                metrics = accelerator.gather(torch.cat(records)).cpu()
                # Under fp16 the scaler expects infinite gradients now and then and skips their step itself
                norm = float(gradient_norm) if accelerator.mixed_precision != "fp16" else 0.0
                health.check_finite(
                    metrics[:, 0].mean().item(), norm, step=step, levels=metrics[:, _LEVEL], ids=ids,
                    round_=plan.round_, level_name=game.level_name,
                )  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
    return metrics, float(gradient_norm)


def _as_leaves(scores: PairScores) -> PairScores:
    """The same scores, at which a loss's gradient is to be stopped."""
    return PairScores(
        scores.player_real.requires_grad_(), scores.player_generated.requires_grad_(), scores.opponent_real,
        scores.opponent_generated,
    )  # fmt: skip


def _backward_by_sides(
    loss: Tensor,
    scores: PairScores,
    generated_scale: Tensor | None,
    game: Game,
    player: nn.Module,
    batch: Batch,
    accelerator: Accelerator,
) -> None:
    """The gradient of a loss of known scores, one side of the pairs after the other.

    d loss = sum over sides of (d loss / d score) d score: each side is scored again, alone, so that the activations of
    one side are in memory at a time.
    """
    sides = torch.autograd.grad(loss, [scores.player_real, scores.player_generated], allow_unused=True)
    of_real, of_generated = (torch.zeros_like(scores.player_real) if side is None else side for side in sides)
    if generated_scale is not None:
        of_generated = of_generated * generated_scale
    copies = len(of_real) // len(batch.ids)
    of_real = of_real.view(len(batch.ids), copies).sum(dim=1)  # a real row has one score, however many rows it meets
    known = {"opponent_score": scores.opponent_real.detach()[::copies]}
    passes = [(Batch(batch.ids, batch.prompts, batch.real | known, {}, batch.seeds), of_real)]
    if batch.generated:
        known = {"opponent_score": scores.opponent_generated.detach()}
        ids, prompts, seeds = (
            [value for value in values for _ in range(copies)] for values in (batch.ids, batch.prompts, batch.seeds)
        )
        passes.append((Batch(ids, prompts, batch.generated | known, {}, seeds), of_generated))
    for number, (side, gradient) in enumerate(passes):
        last = number + 1 == len(passes)
        # Gradients of several processes are gathered once, in the last of the backward passes
        with nullcontext() if last else accelerator.no_sync(player):
            accelerator.backward((game.scores(player, side).scores.player_real * gradient).sum())


def _without_some_margins(scores: PairScores, seeds: list[int], share: float) -> PairScores:
    """The scores with the generated side of a share of the pairs left out, chosen by the pairs' seeds."""
    if share == 0:
        return scores
    dropped = torch.tensor([seed_from(seed, "margin") / 2**63 < share for seed in seeds])
    copies = len(scores.player_real) // len(seeds)
    return without_margin(scores, dropped.repeat_interleave(copies).to(scores.player_real.device))


def _refresh_opponent(game: Game, directory: Path, accelerator: Accelerator) -> str:
    """The player of this moment anchors the scores from here on; its hash. Its weights are kept for a resume."""
    game.save(directory / ANCHOR, prove=False)
    accelerator.wait_for_everyone()
    game.promote()
    return game.opponent_hash()


def _seat_anchor(checkpoint: Path, expected: str, game: Game, accelerator: Accelerator) -> None:
    """Seat the opponent that anchored the scores when a checkpoint was made, in place of the round's first."""
    game.restore(checkpoint / ANCHOR)
    game.promote()
    assert game.opponent_hash() == expected, f"{checkpoint}: its anchor is not the one that it was made with"
    if accelerator.is_main_process:
        shutil.copytree(checkpoint / ANCHOR, checkpoint.parent / ANCHOR, dirs_exist_ok=True)
    accelerator.wait_for_everyone()


def _positions(step: int, micro: int, settings: TrainSettings, rank: int, world: int) -> list[int]:
    """This process's places in the stream of pairs. A step's set of places depends on the global batch alone."""
    start = ((step * settings.gradient_accumulation_steps + micro) * world + rank) * settings.train_batch_size
    return list(range(start, start + settings.train_batch_size))


def _ids_everywhere(
    pairs: Pairs, step: int, micro: int, plan: RoundPlan, settings: TrainSettings, world: int
) -> list[str]:
    return [
        pairs.ids[pairs._index(position, plan.seed, plan.round_)]
        for rank in range(world)
        for position in _positions(step, micro, settings, rank, world)
    ]


def _check_start(scores: PairScores, losses: Tensor, plan: RoundPlan, tolerance: float) -> None:
    at_zero = PairScores(
        scores.player_real.detach(), scores.player_generated.detach(),
        scores.player_real.detach(), scores.player_generated.detach(),
    )  # fmt: skip
    size = max(1.0, scores.player_real.abs().max().item(), scores.player_generated.abs().max().item())
    health.check_start(
        scores.r_real.detach(), scores.r_generated.detach(), losses.detach(), plan.loss(at_zero), tolerance * size,
        plan.beta,
    )  # fmt: skip


_COLUMNS = (
    "loss", "r_real", "r_generated", "margin", "implicit_accuracy", "saturation", "score_real", "score_generated",
    "level",
)  # fmt: skip
_LEVEL = len(_COLUMNS) - 1


def _record(scores: PairScores, losses: Tensor, level: Tensor, beta: float) -> Tensor:
    """(pairs, columns) fp32, on the device: what is logged of each pair."""
    margin = scores.margin.detach()
    # A margin of exactly 0 is half right: at step 0 the accuracy is 0.5, not 0
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    return torch.stack(
        [
            losses.detach(), scores.r_real.detach(), scores.r_generated.detach(), margin, accuracy,
            health.saturated(margin, beta), scores.player_real.detach(), scores.player_generated.detach(), level,
        ],
        dim=1,
    )  # fmt: skip


def _summary(metrics: Tensor, beta: float) -> dict[str, Any]:
    entry: dict[str, Any] = {name: metrics[:, column].mean().item() for column, name in enumerate(_COLUMNS[:_LEVEL])}
    for column, name in enumerate(_COLUMNS[:_LEVEL]):
        if name != "loss":
            entry[f"{name}_by_quarter"] = health.by_quarter(metrics[:, column], metrics[:, _LEVEL])
    return entry


def _flat(entry: dict[str, Any], prefix: str) -> dict[str, float]:
    """Tracker names: TRL's for what it has a name for, one scalar for each quarter of the levels."""
    names = {"r_real": "rewards/real", "r_generated": "rewards/generated", "margin": "rewards/margins",
             "implicit_accuracy": "rewards/accuracies", "loss": "train_loss", "score_real": "scores/real",
             "score_generated": "scores/generated"}  # fmt: skip
    flat = {}
    for key, value in entry.items():
        if key.endswith("_by_quarter"):
            name = key.removesuffix("_by_quarter")
            flat |= {
                f"{prefix}/{names.get(name, name)}/quarter_{q + 1}": mean
                for q, mean in enumerate(value)
                if mean is not None
            }
        else:
            flat[f"{prefix}/{names.get(key, key)}"] = value
    return flat


def make_optimizer(
    parameters: list[nn.Parameter], learning_rate: float, settings: TrainSettings
) -> torch.optim.Optimizer:
    """The settings' optimizer; InputError names a missing extra."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, lr=learning_rate, weight_decay=settings.adam_weight_decay, scale_parameter=False,
            relative_step=False, warmup_init=False,
        )  # fmt: skip
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            parameters, lr=learning_rate, eps=settings.adam_epsilon, weight_decay=settings.adam_weight_decay
        )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=settings.adam_weight_decay)
    if settings.optimizer == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise InputError(
                "--optimizer adamw_8bit needs bitsandbytes: pip install 'spin-diffusion[8bit]', or use adafactor"
            ) from None
        return bitsandbytes.optim.AdamW8bit(
            parameters, lr=learning_rate, betas=betas, weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
        )  # fmt: skip
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=settings.adam_weight_decay, eps=settings.adam_epsilon,
        fused=parameters[0].device.type == "cuda",  # one kernel for all weights
    )  # fmt: skip


@contextmanager
def _player_in_checkpoints(accelerator: Accelerator, game: Game) -> Iterator[None]:
    """Checkpoints hold the player as `game.save` writes it, so that each loads in a pipeline like a finished round."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], directory: str) -> None:
        game.save(Path(directory), prove=False)
        weights.clear()

    def load(models: list[nn.Module], directory: str) -> None:
        game.restore(Path(directory))
        models.clear()

    hooks = [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _save_checkpoint(
    directory: Path,
    step: int,
    accelerator: Accelerator,
    ema: EMAModel | None,
    average: Average | None,
    settings: TrainSettings,
    history: list[dict[str, Any]],
    anchors: list[dict[str, Any]],
) -> None:
    path = directory / f"{CHECKPOINT}{step}"
    part = part_of(path)
    if accelerator.is_main_process:
        if settings.checkpoints_total_limit is not None:
            for old in _checkpoints(directory)[: -settings.checkpoints_total_limit + 1 or None]:
                shutil.rmtree(old)
        part.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))  # every rank: each has a random state of its own
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            _save_weights(ema.shadow_params, part / "ema.safetensors")
        if average is not None:
            _save_weights(average.weights, part / "average.safetensors")
        if anchors:
            shutil.copytree(directory / ANCHOR, part / ANCHOR, dirs_exist_ok=True)
        (part / "trainer.json").write_text(
            json.dumps(
                {
                    "step": step,
                    "global_batch": pairs_per_step(settings, accelerator.num_processes),
                    "ema_steps": ema.optimization_step if ema is not None else 0,
                    "history": history,
                    "anchors": anchors,
                }
            )
        )
        (part / "hashes.json").write_text(json.dumps(file_hashes([part], part), indent=2))
        commit(path)
    accelerator.wait_for_everyone()


def _load_checkpoint(
    path: Path,
    game: Game,
    accelerator: Accelerator,
    ema: EMAModel | None,
    average: Average | None,
    settings: TrainSettings,
) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    hashes = path / "hashes.json"
    if not hashes.is_file():
        raise InputError(f"{path} is not a checkpoint of this program (it has no hashes.json): delete it and run again")
    verify_hashes(read_json(hashes), path)
    state = read_json(path / "trainer.json")
    batch = pairs_per_step(settings, accelerator.num_processes)
    if state["global_batch"] != batch:
        raise InputError(
            f"{path} was made with {state['global_batch']} pairs in each optimizer step, this run has {batch}: change "
            "--train_batch_size, --gradient_accumulation_steps or the number of processes to keep their product"
        )
    if state["anchors"]:
        _seat_anchor(path, state["anchors"][-1]["hash"], game, accelerator)
    accelerator.load_state(str(path))
    if ema is not None:
        ema.shadow_params = _load_weights(path / "ema.safetensors", accelerator)
        ema.optimization_step = state["ema_steps"]
    if average is not None:
        average.weights = _load_weights(path / "average.safetensors", accelerator)
    accelerator.print(f"Resuming from {path.parent.name}/{path.name}")
    return state["step"], state["history"], state["anchors"]


class _Snapshots:
    """The player at the last two multiples of the rules' window, to go back to what no rule has looked at yet."""

    def __init__(
        self, directory: Path, game: Game, accelerator: Accelerator, ema: EMAModel | None, average: Average | None
    ) -> None:
        self.folder, self.game, self.accelerator = directory / HEALTHY, game, accelerator
        self.ema, self.average = ema, average

    def take(self, step: int) -> None:
        """Keep the player as it is before this step, in place of the one of three windows ago."""
        target = self.folder / str(step)
        if not (target / "complete").is_file():
            self.game.save(target, prove=False)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                if self.ema is not None:
                    _save_weights(self.ema.shadow_params, target / "ema.safetensors")
                if self.average is not None:
                    _save_weights(self.average.weights, target / "average.safetensors")
                (target / "complete").touch()
        if self.accelerator.is_main_process:
            for old in self._steps():
                if 0 < old <= step - 3 * health.WINDOW_STEPS:
                    shutil.rmtree(self.folder / str(old))
        self.accelerator.wait_for_everyone()

    def go_back(self, before: int) -> int:
        """Put the newest player of at most this step back, or the round's first; its step."""
        step = max(found for found in self._steps() if found <= max(before, 0))
        source = self.folder / str(step)
        self.game.restore(source)
        if self.ema is not None:
            self.ema.shadow_params = _load_weights(source / "ema.safetensors", self.accelerator)
        if self.average is not None:
            self.average.weights = _load_weights(source / "average.safetensors", self.accelerator)
        self.accelerator.wait_for_everyone()
        return step

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir()) if self.folder.is_dir() else []


def _save_weights(weights: list[Tensor], path: Path) -> None:
    save_file({f"{place:05d}": tensor.contiguous() for place, tensor in enumerate(weights)}, path)


def _load_weights(path: Path, accelerator: Accelerator) -> list[Tensor]:
    found = load_file(path)
    return [found[name].to(accelerator.device) for name in sorted(found)]


def pairs_per_step(settings: TrainSettings, world: int) -> int:
    """Of all processes together."""
    return settings.train_batch_size * settings.gradient_accumulation_steps * world


def _checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in directory.glob(f"{CHECKPOINT}*") if p.name.removeprefix(CHECKPOINT).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def _newest_checkpoint(directory: Path, wanted: str) -> Path | None:
    found = _checkpoints(directory)
    if wanted == "latest":
        return found[-1] if found else None
    named = [path for path in found if path.name == Path(wanted).name]
    if found and not named:
        raise InputError(
            f"--resume_from_checkpoint {wanted}: {directory} has {', '.join(path.name for path in found)}; "
            "give one of these, or latest"
        )
    return named[0] if named else None


def remove_checkpoints(directory: Path) -> None:
    """Delete a round's checkpoints, snapshots and last anchor, which are of no use once its player is saved."""
    for path in _checkpoints(directory):
        shutil.rmtree(path)
    for name in (ANCHOR, HEALTHY):
        shutil.rmtree(directory / name, ignore_errors=True)
