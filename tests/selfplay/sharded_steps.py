"""Run by `test_sharded.py` in several processes: a small model trained in parts. Leaves what it came to in files."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from spin_diffusion.selfplay.sharded import Sharded, whole
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.selfplay.trainee import Trainee


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Player(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(5) for _ in range(2))
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def main() -> None:
    how, optimizer, folder, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    accelerator = Accelerator(cpu=True)
    settings = TrainSettings(optimizer=optimizer, use_ema=True, fully_shard=how in ("own", "accelerate"),
                             train_batch_size=8 // accelerator.num_processes)  # fmt: skip
    game = SimpleNamespace(player=Player(), distance=lambda weights: sum(w.square().sum().item() for w in weights))
    if how == "accelerate":
        # accelerate turns FSDP on beside an accelerator only; its way of preparing a model works without one
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        accelerator.state.distributed_type = DistributedType.FSDP
    trainee = (Trainee if how == "whole" else Sharded)(game, 1e-2, settings, accelerator)
    assert how == "whole" or any(isinstance(part, DTensor) for part in trainee.parameters)
    checkpoint, begun = folder / "checkpoint", 0
    if (folder / "begun.txt").is_file():
        begun = int((folder / "begun.txt").read_text())
        trainee.load(checkpoint)
        trainee.ema.optimization_step = begun
    rank, world = accelerator.process_index, accelerator.num_processes
    for step in range(begun, steps):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        share = x[rank * 8 // world : (rank + 1) * 8 // world]
        with trainee.accumulating():
            accelerator.backward(trainee.model(share).square().mean())
            norm = trainee.update()
        trainee.ema.step(trainee.parameters)
    state = {"norm": norm.detach()}
    state |= {f"optimizer.{name}": whole(value) for name, value in _moments(trainee)}
    state |= {f"ema.{place}": whole(tensor) for place, tensor in enumerate(trainee.ema.shadow_params)}
    if how != "whole":
        state["distance"] = torch.tensor(trainee.distance())
        checkpoint.mkdir(exist_ok=True)
        trainee.save(checkpoint)
        accelerator.wait_for_everyone()
        trainee.gather()
        kept = [parameter.detach().clone() for parameter in game.player.parameters()]
        with torch.no_grad():
            for parameter in game.player.parameters():
                parameter.mul_(2)
        trainee.scatter()
        for parameter in game.player.parameters():
            parameter.data.zero_()
        trainee.gather()
        assert all(torch.equal(2 * a, b) for a, b in zip(kept, game.player.parameters(), strict=True))
        with torch.no_grad():
            for parameter in game.player.parameters():
                parameter.div_(2)
        trainee.scatter()
        (folder / "begun.txt").write_text(str(steps))
    trainee.ema = None  # the weights themselves
    trainee.finish()
    state |= {f"player.{name}": tensor for name, tensor in game.player.state_dict().items()}
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in state.items()},
        folder / f"rank-{rank}-of-{world}.safetensors",
    )


def _moments(trainee: Trainee) -> list[tuple[str, torch.Tensor]]:
    """The optimizer's state by the place of its parameter."""
    states = trainee.schedulable.state
    return [
        (f"{place}.{name}", value)
        for place, parameter in enumerate(trainee.parameters)
        for name, value in states[parameter].items()
        if isinstance(value, torch.Tensor)
    ]


if __name__ == "__main__":
    main()
