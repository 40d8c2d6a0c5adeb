"""Adapters of a UNet in the form of kohya's sd-scripts, which ComfyUI, Forge and A1111 read.

A layer has three tensors: NAME.lora_down.weight, NAME.lora_up.weight and the number NAME.alpha. Its change is
up down alpha / rank, the same product as diffusers' lora_B lora_A. NAME is `lora_unet_` and the layer's name with
underscores for points: the name that diffusers gives it, or of a family with ORIGINAL_NAMES that of the code it was
first published with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from spin_diffusion.diffusion.original import UNET, unet_origins
from spin_diffusion.store.weights import weights_file


@dataclass(frozen=True)
class KohyaForm:
    """How the adapters of one base are written.

    Attributes:
        names: NAME of every layer that can have an adapter, by diffusers' name of the layer.
        base: what a file says of its base: the keys of Stability AI's ModelSpec 1.0.1, and of sd-scripts.
    """

    names: Mapping[str, str]
    base: Mapping[str, str]

    @classmethod
    def of(cls, family: ModuleType, unet: UNet2DConditionModel, prediction_type: str, resolution: int) -> "KohyaForm":
        """The form of a family's adapters for a UNet without any; resolution of the images trained on, px."""
        layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        original = _original_layers(unet) if family.ORIGINAL_NAMES else {}
        names = {layer: "lora_unet_" + original.get(layer, layer).replace(".", "_") for layer in layers}
        base = model_spec(family, unet, prediction_type, resolution)
        base["modelspec.architecture"] += "/lora"
        if not family.ORIGINAL_NAMES:
            base["modelspec.implementation"] = "diffusers"
        version = family.architecture(unet.config, prediction_type)[1]
        base |= {"ss_base_model_version": version, "ss_v2": str("_v2" in version)}
        return cls(names, base)

    def file(
        self, weights: Mapping[str, Tensor], rank: int, alpha: float, dtype: torch.dtype, said: Mapping[str, str]
    ) -> bytes:
        """An adapter as a safetensors file.

        Args:
            weights: lora_A and lora_B of each layer, by the names that diffusers knows them by.
            alpha: of every layer.
            said: what else the file says of itself, `modelspec.title` among it, which programs show.
        """
        tensors = {}
        for key, tensor in weights.items():
            layer, _, part = key.rpartition(".lora_")
            kind = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
            tensors[f"{self.names[layer]}.{kind}"] = tensor.to("cpu", dtype).contiguous()
            tensors[f"{self.names[layer]}.alpha"] = torch.tensor(alpha)  # fp32: a strength makes it any number
        network = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
        return weights_file(tensors, {**self.base, **network, **said})


def model_spec(family: ModuleType, unet: UNet2DConditionModel, prediction_type: str, resolution: int) -> dict[str, str]:
    """What a file in the original layout says of its model: the keys of Stability AI's ModelSpec 1.0.1.

    Args:
        prediction_type: as the scheduler says it.
        resolution: side of the images trained on, px.
    """
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture(unet.config, prediction_type)[0],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
    }


def _original_layers(unet: UNet2DConditionModel) -> dict[str, str]:
    """The names of a UNet's layers in the code that SDXL was first published with (Stability's generative-models)."""
    origins = unet_origins(unet.state_dict()).items()
    return {_layer(origin.names[0]): _layer(name.removeprefix(UNET)) for name, origin in origins}


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]
