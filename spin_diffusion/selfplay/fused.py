"""Updates fused into the backward pass: each weight is updated as soon as its gradient is there, which is then let go.

The gradients of all weights are never in memory together: for fp32 training 4 bytes a weight less. What looks at all of
them before the first update, such as clipping by their norm, is not possible then.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spin_diffusion.selfplay.optimizers import make_optimizer
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.selfplay.trainee import Trainee, trained_parameters
from spin_diffusion.store.input_error import InputError

_STATE, _NUMBERS = "optimizer.safetensors", "optimizer.json"


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
    if settings.two_passes:
        raise InputError(f"{flag}, so --two_passes would update twice in a step: leave one of them out")
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
        """Of all gradients since the last call, on their device."""
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
        """Of all weights."""
        states = (kept for optimizer in self._each for kept in optimizer.state.values())
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def save(self, directory: Path) -> None:
        """The player, and the state of every weight's optimizer: tensors, and numbers beside them."""
        super().save(directory)
        if self.accelerator.is_main_process:
            tensors: dict[str, Tensor] = {}
            numbers: dict[str, Any] = {}
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
