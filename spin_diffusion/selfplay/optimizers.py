"""The optimizers of a round by name."""

import torch
from torch import nn

from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.store.input_error import InputError

EPSILON = 1e-8
"""Added to the root of the second moment."""


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
            parameters, lr=learning_rate, betas=betas, weight_decay=settings.adam_weight_decay,
            eps=EPSILON,
        )  # fmt: skip
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=settings.adam_weight_decay, eps=EPSILON,
        fused=parameters[0].device.type in ("cuda", "cpu"),  # one kernel for all weights
    )  # fmt: skip
