"""The player under DeepSpeed's ZeRO: optimizer state and gradients shared out over processes, in stage 3 weights too.

For machines that are set up for DeepSpeed; `sharded` does the same with torch alone and can do more. Only training is
DeepSpeed's: weights are fp32, and autocast casts them as it casts the opponent's, so that the two models' scores stay
comparable. Checkpoints are whole tensors in safetensors, not DeepSpeed's pickles.
"""

import copy
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spin_diffusion.selfplay.optimizers import make_optimizer
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.selfplay.trainee import Trainee
from spin_diffusion.store.input_error import InputError

ELEMENTWISE = ("adamw", "rmsprop", "sgd")
"""Optimizers that can work on a part of a tensor: the others look at whole ones or have kernels of their own."""

_LAUNCHED, _STAGE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"
_OFFLOAD = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
_WEIGHTS, _NUMBERS = "zero.safetensors", "zero.json"


def launched_stage() -> int:
    """ZeRO's stage by the accelerate config that this process was launched with; 0 = it is not one for DeepSpeed."""
    return int(os.environ.get(_STAGE, "2")) if os.environ.get(_LAUNCHED, "false").lower() == "true" else 0


@contextmanager
def as_plain_processes() -> Iterator[None]:
    """Where an `Accelerator` is made as for DDP, whatever the launcher said: sampling, encoding and evaluation need
    nothing of DeepSpeed, and under accelerate's autocast would be another one."""
    launched = os.environ.pop(_LAUNCHED, None)
    try:
        yield
    finally:
        if launched is not None:
            os.environ[_LAUNCHED] = launched


def check_zero(player: nn.Module, settings: TrainSettings, accelerator: Accelerator, moving_average: bool) -> None:
    """InputError names what cannot be trained under ZeRO, or that DeepSpeed is missing.

    Args:
        moving_average: whether the next opponent is an average of the player's weights (--opponent ema).
    """
    stage = launched_stage()
    if not stage:
        return
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise InputError("the accelerate config asks for DeepSpeed: pip install 'spin-diffusion[deepspeed]'") from None
    launched = f"the accelerate config's zero_stage: {stage}"
    if stage not in (2, 3):
        raise InputError(f"{launched} must be 2 or 3")
    if any(os.environ.get(name, "none") not in ("none", "") for name in _OFFLOAD):
        raise InputError(f"{launched}: weights and optimizer state stay on the device; set its offload devices to none")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise InputError(
            f"{launched}: batch sizes, clipping and precision are this program's settings; leave "
            "deepspeed_config_file out, as training/accelerate/zero2.yaml does"
        )
    instead = "leave it out, or launch with training/accelerate/fsdp2.yaml"
    if not all(parameter.requires_grad for parameter in player.parameters()):
        raise InputError(f"{launched}: adapters are small; launch with training/accelerate/eight_gpus.yaml")
    if settings.optimizer not in ELEMENTWISE:
        raise InputError(f"--optimizer {settings.optimizer} works on whole weights: use {', '.join(ELEMENTWISE)}")
    if accelerator.mixed_precision == "fp16":
        raise InputError(f"{launched}: --mixed_precision fp16 cannot be used with it: use bf16")
    for flag, wanted in (("--use_ema", settings.use_ema), ("--opponent ema", moving_average)):
        if wanted:
            raise InputError(f"{launched}: {flag} averages weights that are not there as a whole: {instead}")
    for flag, wanted in (("--fully_shard", settings.fully_shard), ("--two_passes", settings.two_passes)):
        if wanted:
            raise InputError(f"{launched}: {flag} is another way of saving memory: {instead}")


class Zero(Trainee):
    """A copy of the game's player, trained by DeepSpeed."""

    kind = "by ZeRO"

    def _prepare(self) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("WARNING")
        self.game.player.to("cpu")
        player = copy.deepcopy(self.game.player).to(memory_format=torch.contiguous_format).to(self.accelerator.device)
        self.schedulable = make_optimizer(list(player.parameters()), self.learning_rate, self.settings)
        self.stage = launched_stage()
        self.model, *_ = deepspeed.initialize(
            model=player, optimizer=self.schedulable, config=_config(self.settings, self.accelerator, self.stage)
        )
        self.parameters = list(self.model.module.parameters())
        self.optimizer = _Stepped(self.schedulable)

    def accumulating(self) -> AbstractContextManager[Any]:
        """Gradients are gathered as DeepSpeed thinks fit."""
        return self.accelerator.accumulate()

    def backward(self, loss: Tensor) -> None:
        """Add a batch's gradient."""
        self.model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.model.backward(loss)

    def clip(self) -> Tensor:
        """Clip and update, which DeepSpeed does together; the norm before."""
        self.model.step()
        return torch.as_tensor(self.model.get_global_grad_norm())

    def step(self) -> None:
        """Nothing is left to do."""

    def distance(self) -> float | None:
        """Of the whole weights, one tensor at a time."""
        return self.game.distance(self._whole())

    def _whole(self) -> Iterator[Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in self.parameters:
            yield safe_get_full_fp32_param(parameter).detach()

    @torch.no_grad()
    def gather(self) -> None:
        """Whole weights into the game's player, on every process."""
        for kept, found in zip(self.game.player.parameters(), self._whole(), strict=True):
            kept.copy_(found.view_as(kept))

    @torch.no_grad()
    def scatter(self) -> None:
        """This process's parts of the game's player."""
        for kept, parameter in zip(self.game.player.parameters(), self.parameters, strict=True):
            self._put(parameter, kept)

    def _put(self, parameter: nn.Parameter, value: Tensor) -> None:
        """A whole weight, which every process has: where DeepSpeed computes with it, and where it updates it."""
        import deepspeed

        value = value.detach().to(self.accelerator.device).contiguous()
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.data.copy_(value)
        self._put_part(parameter, value, None)

    def _put_part(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """This process's part of a whole tensor: of the fp32 weight, or of the optimizer's state of this name."""
        from deepspeed import utils

        if self.stage == 2:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * self.accelerator.num_processes)
        padded[: value.numel()] = value.flatten()
        part = padded.narrow(0, size * self.accelerator.process_index, size)
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)

    def _flat_parts(self) -> list[Tensor]:
        """The tensors that the optimizer updates: this process's parts, one after the other."""
        zero = self.model.optimizer
        return zero.single_partition_of_fp32_groups if self.stage == 2 else zero.fp32_partitioned_groups_flat

    def _state_names(self) -> list[str]:
        """Of the optimizer's state, element by element."""
        part = self._flat_parts()[0]
        state = self.schedulable.state[part].items()
        return [name for name, value in state if isinstance(value, Tensor) and value.shape == part.shape]

    def optimizer_state(self) -> list[Tensor]:
        """What the optimizer keeps of the weights on this process."""
        states = (self.schedulable.state[part] for part in self._flat_parts())
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def save(self, directory: Path) -> None:
        """Whole weights and optimizer state, put together tensor by tensor; the main process writes them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors = {}
        for place, (parameter, weight) in enumerate(zip(self.parameters, self._whole(), strict=True)):
            found = {"weight": weight}
            found |= {name: safe_get_full_optimizer_state(parameter, name) for name in self._state_names()}
            if self.accelerator.is_main_process:
                tensors |= {f"{place}.{name}": tensor.detach().cpu().contiguous() for name, tensor in found.items()}
        if self.accelerator.is_main_process:
            save_file(tensors, directory / _WEIGHTS)
            state = self.schedulable.state[self._flat_parts()[0]]
            steps = {name: float(value) for name, value in state.items() if name not in self._state_names()}
            (directory / _NUMBERS).write_text(json.dumps(steps))

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Every process takes its parts."""
        self._begin_state()
        numbers = json.loads((directory / _NUMBERS).read_text())
        for part in self._flat_parts():
            for name, value in numbers.items():
                self.schedulable.state[part][name].fill_(value)
        with safe_open(directory / _WEIGHTS, framework="pt") as file:
            for place, parameter in enumerate(self.parameters):
                self._put(parameter, file.get_tensor(f"{place}.weight"))
                for name in self._state_names():
                    value = file.get_tensor(f"{place}.{name}").to(self.accelerator.device)
                    self._put_part(parameter, value, name)

    def _begin_state(self) -> None:
        """Let the optimizer make its state, by a step on no gradient that moves nothing."""
        zero = self.model.optimizer
        rates = [(group, group["lr"]) for group in self.schedulable.param_groups]
        for group, _ in rates:
            group["lr"] = 0.0
        for number, part in enumerate(self._flat_parts()):
            part.grad = torch.zeros_like(part)
            zero._optimizer_step(number)
            part.grad = None
        for group, rate in rates:
            group["lr"] = rate
        if self.stage == 2:
            zero._lazy_init_hp_params_optimizer_state()

    def _release(self) -> None:
        self.gather()
        self.model.destroy()
        del self.model, self.optimizer, self.schedulable, self.parameters
        self.game.player.to(self.accelerator.device)


class _Stepped:
    """For the loop: the learning rate; DeepSpeed has stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = optimizer.param_groups


def _config(settings: TrainSettings, accelerator: Accelerator, stage: int) -> dict[str, Any]:
    """DeepSpeed's settings, of which the user sees none."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": settings.max_grad_norm,
        # Its own linear layer adds biases in fp32, and by replacing torch's function does so to the opponent as well
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if accelerator.mixed_precision == "bf16":
        # No module named: weights and gradients travel in fp32
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
