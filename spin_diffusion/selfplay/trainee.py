"""The player in training: prepared for the processes at hand, with its optimizer.

Either every process has all of it (one process, or DDP), or each holds a part of its weights, gradients and optimizer
state (`sharded`). Outside a round's training the game's player is always whole.

With updates fused into the backward pass each weight is updated as soon as its gradient is there, which is then let go.
The gradients of all weights are never in memory together: for fp32 training 4 bytes a weight less. What looks at all of
them before the first update, such as clipping by their norm, is not possible then.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.store.input_error import InputError

EPSILON = 1e-8
"""Added to the root of the second moment."""
BETAS = (0.9, 0.999)
"""Decays of the first and second moment of adamw."""


def make_optimizer(
    parameters: list[nn.Parameter], learning_rate: float, settings: TrainSettings
) -> torch.optim.Optimizer:
    """The settings' optimizer; InputError names a missing extra."""
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=settings.adam_weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=learning_rate, eps=EPSILON, weight_decay=settings.adam_weight_decay)
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
            parameters,
            lr=learning_rate,
            betas=BETAS,
            weight_decay=settings.adam_weight_decay,
            eps=EPSILON,
        )
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=BETAS,
        weight_decay=settings.adam_weight_decay,
        eps=EPSILON,
        fused=parameters[0].device.type in ("cuda", "cpu"),  # one kernel for all weights
    )


_STATE, _NUMBERS = "optimizer.safetensors", "optimizer.json"
"""Files of a checkpoint with fused updates."""


def trained_parameters(game: Game) -> list[nn.Parameter]:
    """What of the player is trained."""
    return [parameter for parameter in game.player.parameters() if parameter.requires_grad]


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


class Trainee:
    """The game's player itself, trained in place; every process has all of it.

    Attributes:
        model: what is called in training: the player, wrapped for several processes.
        optimizer: as accelerate has wrapped it; `schedulable`: as a schedule wants it.
        parameters: what is trained.
        ema: of the parameters, with --use_ema.
        kind: what of it a checkpoint holds; one kind cannot read another's.
    """

    kind = "whole"

    def __init__(self, game: Game, learning_rate: float, settings: TrainSettings, accelerator: Accelerator) -> None:
        self.game, self.settings, self.accelerator = game, settings, accelerator
        self.learning_rate = learning_rate
        self._prepare()
        self.ema = EMAModel(self.parameters, decay=settings.ema_decay or 0.9999) if settings.use_ema else None
        if accelerator.scaler is not None and (fresh := type(accelerator.scaler)().state_dict()):
            accelerator.scaler.load_state_dict(fresh)  # the last round's scale must not depend on a resume
        if self.ema is not None:
            self.ema.to(accelerator.device)

    def _prepare(self) -> None:
        self.parameters = trained_parameters(self.game)
        self.schedulable = make_optimizer(self.parameters, self.learning_rate, self.settings)
        self.model, self.optimizer = self.accelerator.prepare(self.game.player, self.schedulable)

    # A step: `accumulating` around each of its batches, after the last one `update`

    def accumulating(self) -> AbstractContextManager[Any]:
        """Around the work on a batch; says by `accelerator.sync_gradients` whether it is the last of a step."""
        return self.accelerator.accumulate(self.model)

    def update(self) -> Tensor:
        """Clip the gradient, update the weights by it and forget it; its norm before clipping, on its device."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def update_averages(self, average: Average | None) -> None:
        """Let --use_ema's average, and the one that outlives the round, follow the weights after a step."""
        for one in (self.ema, average):
            if one is not None:
                one.step(self.parameters)

    def optimizer_state(self) -> list[Tensor]:
        """What the optimizer keeps of the weights on this process."""
        return [t for kept in self.schedulable.state.values() for t in kept.values() if isinstance(t, Tensor)]

    def distance(self) -> float | None:
        """`Game.distance` of the player as it is now; called on all processes."""
        return self.game.distance()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it the game's player is what would be promoted now: whole, and its average with --use_ema. Weights and
        random states are as before afterwards. Called on all processes."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._swap_with_ema()
            self.gather()
            try:
                yield
            finally:
                self._swap_with_ema()

    @torch.no_grad()
    def _swap_with_ema(self) -> None:
        if self.ema is not None:
            for parameter, average in zip(self.parameters, self.ema.shadow_params, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)

    def gather(self) -> None:
        """Make the game's player what is in training; called on all processes."""

    def scatter(self) -> None:
        """Go on from the game's player as it is now, with the optimizer's state as it is."""

    def save(self, directory: Path) -> None:
        """Write what a checkpoint holds; called on all processes."""
        hook = self.accelerator.register_save_state_pre_hook(self._save_player)
        try:
            self.accelerator.save_state(str(directory))  # every rank: each has a random state of its own
        finally:
            hook.remove()
        if self.ema is not None and self.accelerator.is_main_process:
            save_weights(self.ema.shadow_params, directory / "ema.safetensors")

    def load(self, directory: Path) -> None:
        """Take up what `save` wrote."""
        hook = self.accelerator.register_load_state_pre_hook(self._load_player)
        try:
            self.accelerator.load_state(str(directory))
        finally:
            hook.remove()
        if self.ema is not None:
            self.ema.shadow_params = load_weights(directory / "ema.safetensors", self.accelerator)

    # Checkpoints hold the player as the game writes it, so that each loads in a pipeline like a finished round

    def _save_player(self, models: list[nn.Module], weights: list[dict[str, Tensor]], directory: str) -> None:
        self.game.save(Path(directory), prove=False)
        weights.clear()

    def _load_player(self, models: list[nn.Module], directory: str) -> None:
        self.game.restore(Path(directory))
        models.clear()

    def finish(self) -> None:
        """The game's player has what was trained, whole; the rest is let go."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        self.accelerator.wait_for_everyone()
        self._release()
        self.accelerator.free_memory()

    def _release(self) -> None:
        # Gives the player its own forward back
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


def check_fused(settings: TrainSettings, accelerator: Accelerator) -> None:
    """InputError names what needs all gradients at once."""
    if not settings.fused_backward:
        return
    flag = "--fused_backward lets each gradient go at once"
    if accelerator.num_processes > 1 or settings.fully_shard:
        raise InputError(f"{flag}, and several processes have to add theirs up: use --fully_shard there")
    if settings.gradient_accumulation_steps > 1:
        raise InputError(
            f"{flag}, so --gradient_accumulation_steps {settings.gradient_accumulation_steps} has nothing to add up: "
            "set it to 1"
        )
    if settings.max_grad_norm:
        raise InputError(f"{flag}, so --max_grad_norm {settings.max_grad_norm} cannot be kept: set it to 0")
    if accelerator.mixed_precision == "fp16":
        raise InputError(f"{flag}, and --mixed_precision fp16 has to scale them first: use bf16")


class _Updates(torch.optim.Optimizer):
    """For the loop and the schedule: one learning rate; the updates have been made in the backward pass."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__([torch.zeros(1, requires_grad=True)], {"lr": learning_rate})
        self.squares: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        """Nothing is left to do."""

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients since the last call, on their device."""
        total = torch.stack(self.squares).sum().sqrt() if self.squares else torch.zeros(())
        self.squares.clear()
        return total


class Fused(Trainee):
    """The game's player, updated weight by weight in the backward pass."""

    kind = "with fused updates"

    def _prepare(self) -> None:
        self.parameters = trained_parameters(self.game)
        self.model = self.accelerator.prepare(self.game.player)
        self.optimizer = self.schedulable = _Updates(self.learning_rate)
        self._each = [make_optimizer([weight], self.learning_rate, self.settings) for weight in self.parameters]
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self._update(optimizer))
            for weight, optimizer in zip(self.parameters, self._each, strict=True)
        ]

    def _update(self, optimizer: torch.optim.Optimizer):  # noqa: ANN202 - torch's hook
        def update(weight: nn.Parameter) -> None:
            assert weight.grad is not None
            self.optimizer.squares.append(weight.grad.float().square().sum())
            optimizer.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"]
            optimizer.step()
            weight.grad = None

        return update

    def update(self) -> Tensor:
        """The norm of the gradient by which the backward pass has updated the weights."""
        return self.optimizer.gradient_norm()

    def optimizer_state(self) -> list[Tensor]:
        """What the optimizers of all weights keep."""
        states = (kept for optimizer in self._each for kept in optimizer.state.values())
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def save(self, directory: Path) -> None:
        """The player, and the state of every weight's optimizer: tensors, and numbers beside them."""
        super().save(directory)
        if self.accelerator.is_main_process:
            tensors: dict[str, Tensor] = {}
            numbers: dict[str, object] = {}
            for place, (weight, optimizer) in enumerate(zip(self.parameters, self._each, strict=True)):
                for name, value in optimizer.state[weight].items():
                    if isinstance(value, Tensor):
                        tensors[f"{place}.{name}"] = value
                    else:
                        numbers[f"{place}.{name}"] = value
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, directory / _STATE)
            (directory / _NUMBERS).write_text(json.dumps(numbers))

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """What `save` wrote."""
        super().load(directory)
        states: list[dict[str, object]] = [{} for _ in self.parameters]
        for found in (load_file(directory / _STATE), json.loads((directory / _NUMBERS).read_text())):
            for name, value in found.items():
                place, _, key = name.partition(".")
                weight = self.parameters[int(place)]
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    # In the weight's own layout (channels_last, say): fused kernels walk memory, not places
                    value = torch.empty_like(weight, dtype=value.dtype).copy_(value)
                states[int(place)][key] = value
        for optimizer, state in zip(self._each, states, strict=True):
            optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._each.clear()
        super()._release()


def save_weights(weights: list[Tensor], path: Path) -> None:
    """A list of tensors as safetensors."""
    save_file({f"{place:05d}": tensor.contiguous() for place, tensor in enumerate(weights)}, path)


def load_weights(path: Path, accelerator: Accelerator) -> list[Tensor]:
    """What `save_weights` wrote, on this process's device."""
    found = load_file(path)
    return [found[name].to(accelerator.device) for name in sorted(found)]
