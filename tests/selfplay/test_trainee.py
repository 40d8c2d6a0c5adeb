"""The player with its optimizer: one update."""

import math
from dataclasses import replace

import pytest
import torch

from spin_diffusion.selfplay.trainee import Trainee
from tests.playing import TRAINING, make_game


@pytest.mark.parametrize(("max_grad_norm", "moved"), [(1e-3, 1e-3), (0.0, None)])
def test_an_update_moves_by_the_clipped_gradient_and_returns_its_norm_before(max_grad_norm, moved, sdxl_dir):
    game = make_game(sdxl_dir)
    settings = replace(TRAINING, optimizer="sgd", adam_weight_decay=0.0, max_grad_norm=max_grad_norm)
    trainee = Trainee(game, 1.0, settings, game.accelerator)
    before = [parameter.detach().double() for parameter in trainee.parameters]
    for parameter in trainee.parameters:
        parameter.grad = torch.full_like(parameter, 0.01)
    norm = 0.01 * math.sqrt(sum(parameter.numel() for parameter in trainee.parameters))
    assert trainee.update().item() == pytest.approx(norm, rel=1e-4)
    squares = [
        (now.detach().double() - then).square().sum() for now, then in zip(trainee.parameters, before, strict=True)
    ]
    assert math.sqrt(sum(squares)) == pytest.approx(norm if moved is None else moved, rel=0.02)
    assert all(parameter.grad is None for parameter in trainee.parameters)
