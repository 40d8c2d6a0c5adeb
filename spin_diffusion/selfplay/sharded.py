"""The player in parts: each process trains its share of weights, gradients and optimizer state (FSDP2).

Computation is as with whole weights: parts are fp32 and gathered as such, block by block, and autocast casts them as it
casts the opponent's, so that the two models' scores stay comparable. The game's own player waits in main memory.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.selfplay.trainee import Trainee, make_optimizer
from spin_diffusion.store.input_error import InputError

SHARDABLE = ("adamw", "rmsprop", "sgd")
"""Optimizers that compute element by element; the others look at whole tensors or have kernels of their own."""

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def wants_shards(settings: TrainSettings, accelerator: Accelerator) -> bool:
    """Whether the player is to be trained in parts: by --fully_shard, or by an accelerate config for FSDP."""
    return settings.fully_shard or accelerator.distributed_type == DistributedType.FSDP


def check_sharding(player: nn.Module, settings: TrainSettings, accelerator: Accelerator, moving_average: bool) -> None:
    """InputError names what cannot be trained in parts.

    Args:
        moving_average: whether the next opponent is an average of the player's weights (--opponent ema).
    """
    if not wants_shards(settings, accelerator):
        return
    if accelerator.num_processes < 2 and not torch.distributed.is_initialized():
        raise InputError(
            "--fully_shard shares the player out over processes, and this is one without others: launch two or more"
        )
    if not all(parameter.requires_grad for parameter in player.parameters()):
        raise InputError("--fully_shard is for whole weights; adapters are small: leave it out")
    if settings.optimizer not in SHARDABLE:
        raise InputError(f"--optimizer {settings.optimizer} works on whole weights: use {', '.join(SHARDABLE)}")
    if moving_average:
        raise InputError("--opponent ema averages whole weights: choose another opponent, or leave --fully_shard out")
    if accelerator.scaler is not None:
        raise InputError("--mixed_precision fp16 cannot be used with sharded weights: use bf16")
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is not None and (plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading):
        raise InputError(
            "the accelerate config needs fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false, as in "
            "training/accelerate/fsdp2.yaml"
        )


class Sharded(Trainee):
    """A copy of the game's player, trained in parts over all processes."""

    kind = "in parts"

    def _prepare(self) -> None:
        self.game.player.to("cpu")
        # Parts of a tensor must be contiguous
        player: Any = copy.deepcopy(self.game.player)
        player = player.to(memory_format=torch.contiguous_format)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            player._no_split_modules = list(_block_names(player))  # where accelerate looks for them
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None  # autocast is for both models
            self.schedulable = make_optimizer(list(player.parameters()), self.learning_rate, self.settings)
            self.model, self.optimizer = self.accelerator.prepare(player, self.schedulable)
        else:
            device = self.accelerator.device.type
            mesh = init_device_mesh(device, (self.accelerator.num_processes,))
            names = _block_names(player)
            for module in reversed(list(player.modules())):
                if type(module).__name__ in names:
                    fully_shard(module, mesh=mesh)
            self.model = fully_shard(player, mesh=mesh)
            self.schedulable = make_optimizer(list(player.parameters()), self.learning_rate, self.settings)
            self.optimizer = self.accelerator.prepare(self.schedulable)
        self.parameters = list(self.model.parameters())
        assert any(isinstance(part, DTensor) for part in self.parameters), "nothing was sharded"

    def update(self) -> Tensor:
        """Update this process's parts of the weights; the norm is that of the gradient of all parts."""
        return whole(super().update())

    def distance(self) -> float | None:
        """The distance of the whole weights, one tensor at a time."""
        return self.game.distance(part.detach() for part in self._whole())

    def _whole(self) -> Iterator[Tensor]:
        for part in self.parameters:
            yield whole(part)

    @torch.no_grad()
    def gather(self) -> None:
        """Whole weights into the game's player, on every process."""
        for kept, found in zip(self.game.player.parameters(), self._whole(), strict=True):
            kept.copy_(found)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """As of whole weights; meanwhile every process has all of them on its device."""
        with super().shown():
            self.game.player.to(self.accelerator.device)
            try:
                yield
            finally:
                self.game.player.to("cpu")

    @torch.no_grad()
    def scatter(self) -> None:
        """This process's parts of the game's player."""
        for kept, part in zip(self.game.player.parameters(), self.parameters, strict=True):
            if isinstance(part, DTensor):
                # Every process has the whole: none has to be sent anything
                part.copy_(distribute_tensor(kept, part.device_mesh, part.placements, src_data_rank=None))
            else:
                part.copy_(kept)

    def save(self, directory: Path) -> None:
        """Every process writes its parts, as safetensors that any number of processes can read."""
        self._store(
            lambda state: dcp.save(
                state, storage_writer=dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
            )
        )

    def load(self, directory: Path) -> None:
        """Every process reads its parts."""

        def read(state: dict[str, Tensor]) -> None:
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(directory)))

        self._store(read)

    def _store(self, write_or_read: Any) -> None:
        """Hand over all state as one flat mapping of tensors, and take up what has become of it."""
        player = get_model_state_dict(self.model)
        optimizer = get_optimizer_state_dict(self.model, self.schedulable, options=_FLAT)
        # Weights under two names (an output layer that is the embedding) are stored under the first
        names = dict(self.model.named_parameters(remove_duplicate=False)).keys()
        again = names - dict(self.model.named_parameters()).keys()
        averages = self.ema.shadow_params if self.ema is not None else []
        once = {name: tensor for name, tensor in player.items() if name not in again}
        parts = {"player": once, "optimizer": optimizer, "ema": dict(enumerate(averages))}
        flat = {
            f"{part}.{name}": tensor
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)  # the optimizer's settings are this run's
        }
        write_or_read(flat)
        set_model_state_dict(self.model, player)
        set_optimizer_state_dict(self.model, self.schedulable, optimizer, options=_FLAT)

    def _release(self) -> None:
        self.gather()
        del self.model, self.optimizer, self.schedulable, self.parameters
        self.game.player.to(self.accelerator.device)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in parts, put together on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _block_names(player: nn.Module) -> set[str]:
    """Classes of the blocks that a model is to be shared out by, as the models themselves know them."""
    return {name for module in player.modules() for name in getattr(module, "_no_split_modules", None) or ()}
