"""The UNet as it is trained and asked: its frozen copy, its precision, its kernels."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo import config as dynamo

from spin_diffusion.diffusion.parts import Part, load_unet
from spin_diffusion.selfplay.device import autocast_dtype, cast_for_autocast
from spin_diffusion.store.files import weights_hash

Compile = Literal["no", "blocks", "whole"]


class Copies:
    """The player is a UNet of its own, trained as a whole; the opponent is a frozen copy of it.

    `lora.Adapters` has the same methods, for a player and an opponent on one UNet.
    """

    saved = "unet"
    """Name of the folder that a user loads."""

    def __init__(
        self, player: UNet2DConditionModel, mixed_precision: str, how: Compile, base: Callable[[], Any]
    ) -> None:
        """Args: base: makes a pipeline with the base's own UNet."""
        self.player, self.mixed_precision = player.requires_grad_(True).eval(), mixed_precision
        self.how, self.base = how, base
        self.opponent: UNet2DConditionModel | None = None
        self.promote()

    def promote(self) -> None:
        """The opponent becomes a copy of the player; under autocast it says the same in half the memory."""
        self.opponent = copy.deepcopy(self.player).requires_grad_(False).eval()
        cast_for_autocast(self.opponent, autocast_dtype(self.mixed_precision))
        compile_unet(self.opponent, self.how)

    def release(self) -> None:
        """Free the opponent's memory."""
        self.opponent = None

    def as_opponent(self) -> AbstractContextManager[None]:
        """Where `opponent` is the opponent: everywhere."""
        return nullcontext()

    def pairs(self, weights: Iterable[Tensor] | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of the player, or of these weights in their place, with the opponent's."""
        assert self.opponent is not None
        return zip(weights or self.player.parameters(), self.opponent.parameters(), strict=True)

    def player_hash(self) -> str:
        """Hash of the weights as they are now."""
        return weights_hash(self.player)

    def opponent_hash(self) -> str:
        """Hash of the weights as they are now."""
        assert self.opponent is not None
        return weights_hash(self.opponent)

    def folders(self) -> dict[str, Callable[[Path], None]]:
        """What `restore` and a user read, by its name: as UNet2DConditionModel.from_pretrained does."""
        return {self.saved: self._write}

    def _write(self, folder: Path) -> None:
        self.player.save_config(folder)
        # Written here rather than by save_pretrained, which refuses channels_last and splits SDXL in two files
        weights = {name: tensor.detach().contiguous() for name, tensor in self.player.state_dict().items()}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def restore(self, directory: Path | None) -> None:
        """Load what is saved below `directory`, or the base, into the player's parameters in place."""
        unet = self.base().unet if directory is None else self.fresh(directory / self.saved)
        self.player.load_state_dict(unet.state_dict())

    def fresh(self, path: Path) -> UNet2DConditionModel:
        """A UNet as a user gets it from what was saved in `path`."""
        return load_unet(Part(path, str(path)))


GRAPHS = 64
"""The most graphs of one piece of code, as which all transformer blocks of a UNet count: at four depths, for drawing,
evaluation with and without guidance, the opponent and the player. Beyond the limit, 8 by default, it runs eagerly."""


def compile_unet(unet: UNet2DConditionModel, how: Compile) -> None:
    """Compile in place, so that no weight changes its name; a copy of a compiled UNet is not compiled."""
    if how != "no":
        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    if how == "blocks":
        unet.compile_repeated_blocks(dynamic=False)
    elif how == "whole":
        unet.compile(dynamic=False)
