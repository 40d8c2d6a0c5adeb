"""One side of the pairs after the other: the same gradient, half the activations."""

from dataclasses import replace

import pytest
import torch

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.samples.pairs import ReadAhead
from spin_diffusion.samples.sample import Batch
from spin_diffusion.selfplay.objective_names import OBJECTIVES
from spin_diffusion.selfplay.objectives import bind
from spin_diffusion.selfplay.train import Pairs, RoundPlan, _take_step
from spin_diffusion.selfplay.trainee import Trainee
from spin_diffusion.store.input_error import InputError
from tests.diffusion.test_game import batch_of, nudge
from tests.playing import TRAINING, make_game


class OneBatch(Pairs):
    """Always the same pairs."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.ids, batch.prompts, lambda indices: ({}, {}))
        self.given = batch

    def batch(self, positions, seed, round_) -> Batch:
        return self.given


def gradient(base, objective: str, two_passes: bool, copies: int = 1, **denoiser):
    """Of one step: the gradient on the player, what was logged, and the rows of each pass that kept activations."""
    game = make_game(base, proportion_empty_prompts=0.4, **denoiser)
    nudge(game.player, 0.01)
    batch = batch_of(game, 4, generated=OBJECTIVES[objective].generated != "none")
    if copies > 1:
        more = {name: tensor.repeat_interleave(copies, dim=0) for name, tensor in batch.generated.items()}
        more["latents"] = more["latents"] + 0.1 * torch.arange(len(more["latents"]))[:, None, None, None]
        batch = replace(batch, generated=more)
    settings = replace(TRAINING, two_passes=two_passes, max_grad_norm=0.0)
    loss = bind(objective, beta=50.0, mu=float(copies))
    plan = RoundPlan("", 1, 0, 1, 1e-3, 0, 50.0, loss, False)
    rows: list[int] = []
    game.player.register_forward_pre_hook(
        lambda module, inputs: rows.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    gradients: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            gradients.update({n: p.grad.clone() for n, p in game.player.named_parameters() if p.grad is not None})

    trainee = Trainee(game, 0.0, settings, game.accelerator)
    trainee.optimizer = Keep(game.player.parameters(), lr=0.0)
    metrics, norm = _take_step(1, trainee, ReadAhead(OneBatch(batch), 4), plan)
    return gradients, metrics, norm, rows


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_the_gradient_is_that_of_one_pass(objective, sdxl_dir):
    whole, logged, norm, _ = gradient(sdxl_dir, objective, False)
    parts, logged_too, norm_too, _ = gradient(sdxl_dir, objective, True)
    assert whole.keys() == parts.keys() and norm > 0
    largest = max(tensor.abs().max() for tensor in whole.values())
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 2e-4 * largest
    assert torch.allclose(logged, logged_too, rtol=1e-5, atol=1e-7) and norm == pytest.approx(norm_too, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"copies": 3}, {"winner_preserving_mu": 0.3}, {"snr_gamma": 5.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_so_it_is_with_all_that_weighs_the_sides(settings, sdxl_dir):
    whole, *_ = gradient(sdxl_dir, "space", False, **settings)
    parts, *_ = gradient(sdxl_dir, "space", True, **settings)
    plain, *_ = gradient(sdxl_dir, "space", True, **({"copies": settings["copies"]} if "copies" in settings else {}))
    largest = max(tensor.abs().max() for tensor in whole.values())
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 2e-4 * largest
    if "copies" not in settings:
        assert max((plain[name] - parts[name]).abs().max() for name in whole) > 1e-3 * largest


def test_one_sides_activations_are_in_memory_at_a_time(sdxl_dir):
    assert gradient(sdxl_dir, "spin", False)[3] == [8]
    assert gradient(sdxl_dir, "spin", True)[3] == [4, 4]
    assert gradient(sdxl_dir, "sft", True)[3] == [4]


def test_what_would_not_be_the_same_is_refused():
    for flags in (["--trajectory", "steps", "--sampler", "ddim"], ["--use_lora", "true", "--lora_dropout", "0.1"]):
        with pytest.raises(InputError, match="--two_passes"):
            parse_config(["--pretrained_model_name_or_path", "base", "--two_passes", "true", *flags])
