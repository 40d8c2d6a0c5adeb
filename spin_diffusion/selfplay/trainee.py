"""The player in training: prepared for the processes at hand, with its optimizer.

Either every process has all of it (one process, or DDP), or each holds a part of its weights, gradients and optimizer
state (`sharded`). Outside a round's training the game's player is always whole.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.optimizers import make_optimizer
from spin_diffusion.selfplay.train_settings import TrainSettings


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
        self.ema = EMAModel(self.parameters, decay=settings.ema_decay) if settings.use_ema else None
        if accelerator.scaler is not None and (fresh := type(accelerator.scaler)().state_dict()):
            accelerator.scaler.load_state_dict(fresh)  # the last round's scale must not depend on a resume
        if self.ema is not None:
            self.ema.to(accelerator.device)

    def _prepare(self) -> None:
        self.parameters = trained_parameters(self.game)
        self.schedulable = make_optimizer(self.parameters, self.learning_rate, self.settings)
        self.model, self.optimizer = self.accelerator.prepare(self.game.player, self.schedulable)

    # A step: `accumulating` around each of its batches, in it `backward`, after the last one `update`

    def accumulating(self) -> AbstractContextManager[Any]:
        """Around the work on a batch; says by `accelerator.sync_gradients` whether it is the last of a step."""
        return self.accelerator.accumulate(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add a batch's gradient."""
        self.accelerator.backward(loss)

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


def save_weights(weights: list[Tensor], path: Path) -> None:
    """A list of tensors as safetensors."""
    save_file({f"{place:05d}": tensor.contiguous() for place, tensor in enumerate(weights)}, path)


def load_weights(path: Path, accelerator: Accelerator) -> list[Tensor]:
    """What `save_weights` wrote, on this process's device."""
    found: dict[str, Any] = load_file(path)
    return [found[name].to(accelerator.device) for name in sorted(found)]
