"""LoRA (arXiv 2106.09685): player and opponent as two adapters on one UNet.

Both are there from the start, so no second copy of the UNet is ever in memory. The opponent is never "adapters switched
off", which it would be in the first round only. The player's Parameters stay the same objects for as long as the game
lives, and the player's adapter is the active one wherever nothing else is said: an optimizer, a wrapper for several
processes and a recomputed forward pass all meet the adapter that is trained.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spin_diffusion.diffusion.kohya import KohyaForm
from spin_diffusion.selfplay.train_settings import LoraSettings
from spin_diffusion.store.files import read_json, tensors_hash, weights_hash
from spin_diffusion.store.input_error import InputError, one_line

PLAYER, OPPONENT = "player", "opponent"
WEIGHTS = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHTS = "kohya.safetensors"
"""The same adapter in fp16, as ComfyUI, Forge and A1111 read it."""
CONFIG = "lora_config.json"
"""Beside the weights: the settings, and the hash of the base's weights that they were trained on."""
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")


class Adapters:
    """The two adapters of a UNet. The player's are fp32 and trainable, whatever the dtype of the base.

    `denoiser.Copies` has the same methods, for two UNets.
    """

    saved = "lora"
    """Name of the folder that a user loads."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        settings: LoraSettings,
        base_hash: str,
        base: Callable[[], Any],
        kohya: KohyaForm,
    ) -> None:
        """Add both to `unet`, equal and without effect.

        Args:
            base_hash: of the UNet's weights, which a saved adapter is told to belong to.
            base: makes a pipeline with the base's own UNet.

        Raises:
            InputError: no layer of a name in `lora_target_modules`.
        """
        self.unet, self.opponent = unet, unet
        self.settings, self.base_hash, self.base, self.kohya = settings, base_hash, base, kohya
        targets = list(settings.lora_target_modules or ATTENTION)
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name, _ in unet.named_modules()):
                raise InputError(
                    f"--lora_target_modules {target}: the UNet has no layer of this name; attentions have "
                    f"{', '.join(ATTENTION)}, and ff.net.0.proj, ff.net.2 beside them"
                )
        config = _config(settings.rank, settings.alpha, targets)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
            torch.manual_seed(0)  # every process, and every start of a run, begins with the same adapter
            for name in (OPPONENT, PLAYER):
                unet.add_adapter(config, adapter_name=name)
        self.layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
        for layer in self.layers:
            for part in (layer.lora_A, layer.lora_B):
                part.float()
        unet.eval()
        self._train_player()
        self._fresh = {name: tensor.clone() for name, tensor in self.weights(PLAYER).items()}
        self._load(OPPONENT, self._fresh)

    def _train_player(self) -> None:
        self.unet.set_adapter(PLAYER)  # which makes it trainable, and only it

    def _activate(self, name: str) -> None:
        """Let the layers compute with an adapter, and leave what is trainable as it is. peft's own way there walks over
        all modules and parameters, which a GPU would wait for twice in a step (`benchmarks/adapters.py`)."""
        for layer in self.layers:
            layer._active_adapter = [name]
        assert self.layers[0].active_adapters == [name], "this release of peft knows the active adapter otherwise"

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The Parameters of one adapter, in the order of the layers."""
        return [part[name].weight for layer in self.layers for part in (layer.lora_A, layer.lora_B)]

    def weights(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter, by the names that diffusers knows them by."""
        return {key: tensor.detach() for key, tensor in get_peft_model_state_dict(self.unet, adapter_name=name).items()}

    def _load(self, name: str, weights: dict[str, Tensor]) -> None:
        set_peft_model_state_dict(self.unet, dict(weights), adapter_name=name)
        self._train_player()

    @contextmanager
    def as_opponent(self) -> Iterator[None]:
        """The opponent's adapter active."""
        self._activate(OPPONENT)
        try:
            yield
        finally:
            self._activate(PLAYER)

    def promote(self) -> None:
        """The opponent becomes a copy of the player."""
        self._load(OPPONENT, self.weights(PLAYER))

    def release(self) -> None:
        """Nothing: the opponent has next to no memory of its own."""

    def pairs(self, weights: Iterable[Tensor] | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix of the player's adapter with the opponent's."""
        return zip(self.parameters(PLAYER), self.parameters(OPPONENT), strict=True)

    def player_hash(self) -> str:
        """SHA-256 over the adapter's names and bytes."""
        return tensors_hash(self.weights(PLAYER))

    def opponent_hash(self) -> str:
        """SHA-256 over the adapter's names and bytes."""
        return tensors_hash(self.weights(OPPONENT))

    def folders(self) -> dict[str, Callable[[Path], None]]:
        """The player, relative to the base, as `pipeline.load_lora_weights` reads it; and what the round changed."""
        return {self.saved: self.save, "lora_round": self.save_change}

    def save(self, folder: Path) -> None:
        """The player, relative to the base."""
        self._write(folder, self.weights(PLAYER), self.settings.rank, self.settings.alpha)

    def save_change(self, folder: Path) -> None:
        """What the round changed: player minus opponent, exactly, as an adapter of twice the rank.

        B_p A_p - B_o A_o = [B_p, -B_o] [A_p; A_o].
        """
        player, opponent = self.weights(PLAYER), self.weights(OPPONENT)
        change = {}
        for key, tensor in player.items():
            other = opponent[key]
            down = ".lora_A." in key
            change[key] = torch.cat([tensor, other if down else -other], dim=0 if down else 1)
        self._write(folder, change, 2 * self.settings.rank, 2 * self.settings.alpha)

    def _write(self, folder: Path, weights: dict[str, Tensor], rank: int, alpha: float) -> None:
        config = _config(rank, alpha, sorted(self.settings.lora_target_modules or ATTENTION)).to_dict()
        described = {f"unet.{key}": sorted(v) if isinstance(v, set) else v for key, v in config.items()}
        # The key that diffusers reads rank and alpha from; a second one would be written in an order of its own
        metadata = {"lora_adapter_metadata": json.dumps(described, sort_keys=True, default=str)}
        tensors = {f"unet.{key}": tensor.cpu().contiguous() for key, tensor in weights.items()}
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        settings = asdict(self.settings) | {"rank": rank, "lora_alpha": alpha, "base": self.base_hash}
        said = {"modelspec.title": "LoRA by spin-diffusion", "spin_diffusion.base": self.base_hash}
        said["spin_diffusion.adapter"] = tensors_hash(weights)
        (folder / KOHYA_WEIGHTS).write_bytes(self.kohya.file(weights, rank, alpha, torch.float16, said))
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")

    def restore(self, directory: Path | None) -> None:
        """The player as saved below `directory`, or as it was at first; its Parameters stay the same objects. Raises
        InputError: an adapter of another rank, on other layers, or of another base."""
        if directory is None:
            self._load(PLAYER, self._fresh)
            return
        other = ", or start in another --output_dir"
        self._load(PLAYER, read_adapter(directory / self.saved, self._fresh, self.base_hash, other))

    def fresh(self, path: Path) -> UNet2DConditionModel:
        """A UNet as a user gets it from the base and what was saved in `path`."""
        pipeline = self.base()
        load_adapter(pipeline, path)
        return pipeline.unet


def _config(rank: int, alpha: float, targets: list[str]) -> LoraConfig:
    # Without dropout: it would make the two models' scores differ at step 0
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, init_lora_weights="gaussian")


def read_adapter(
    folder: Path, expected: Mapping[str, Tensor], base_hash: str, otherwise: str = ""
) -> dict[str, Tensor]:
    """The weights of a saved adapter, by the names that diffusers knows them by.

    Args:
        expected: tensors of the same names and shapes.
        base_hash: of the UNet that they are to be put on.
        otherwise: what else can be done about another base, for the message.

    Raises:
        InputError: an adapter of another rank, on other layers, of another base, or with numbers that are not finite.
    """
    settings = read_json(folder / CONFIG, remedy="restore it") if (folder / CONFIG).is_file() else {}
    base = settings.get("base", base_hash)
    if base != base_hash:
        raise InputError(
            f"{folder / WEIGHTS} was trained on another base (hash {base[:12]}, this one has {base_hash[:12]}): give "
            f"that base{otherwise}"
        )
    try:
        weights = {key.removeprefix("unet."): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read ({one_line(error)}): restore it") from error
    if {key: tensor.shape for key, tensor in weights.items()} != {key: t.shape for key, t in expected.items()}:
        raise InputError(
            f"{folder / WEIGHTS} is an adapter of another rank, or on other layers, or lacks some of them: restore it, "
            "or give the settings that it was trained with"
        )
    if odd := [key for key, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise InputError(f"{folder / WEIGHTS}: {odd[0]} has numbers that are not finite (NaN or infinity): restore it")
    return weights


def load_adapter(pipeline: Any, folder: Path, fused_at: float | None = None) -> dict[str, Tensor]:
    """Put a saved adapter on the UNet of a pipeline, as `pipeline.load_lora_weights` does, with every tensor of its
    file in its place; its weights, by the names that diffusers knows them by.

    Args:
        fused_at: the strength at which it is added to the UNet's own weights; None = it stays beside them.

    Raises:
        InputError: as `read_adapter`.
    """
    base_hash, layers = weights_hash(pipeline.unet), _layers_of(folder, pipeline.unet)
    try:
        pipeline.load_lora_weights(str(folder), weight_name=WEIGHTS)
    except Exception as error:  # peft and diffusers raise dozens of kinds
        raise InputError(f"cannot load the adapter {folder}: {one_line(error)}") from error
    # peft fills what the file lacks with random numbers, and leaves out what it has no place for
    (name,) = pipeline.get_active_adapters()
    weights = read_adapter(folder, get_peft_model_state_dict(pipeline.unet, adapter_name=name), base_hash)
    lacking = sorted(layers - {key.rpartition(".lora_")[0] for key in weights})
    if lacking:
        raise InputError(
            f"{folder / WEIGHTS} lacks what it learned of {len(lacking)} layers, such as {lacking[0]}: restore it"
        )
    if fused_at is not None:
        pipeline.fuse_lora(lora_scale=fused_at)
        pipeline.unload_lora_weights()
    return weights


def _layers_of(folder: Path, unet: UNet2DConditionModel) -> set[str]:
    """The layers of a UNet that a saved adapter is on by its settings."""
    if not (folder / CONFIG).is_file():
        return set()
    targets = read_json(folder / CONFIG).get("lora_target_modules") or ATTENTION
    return {name for name, _ in unet.named_modules() if any(f".{name}".endswith(f".{target}") for target in targets)}
