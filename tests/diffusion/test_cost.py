"""What a round costs, against torch's counter on the real code."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spin_diffusion.diffusion.config import Config
from spin_diffusion.diffusion.cost import (
    RoundWork,
    UnitCosts,
    count_units,
    generation_flops,
    phase_flops,
    step_flops,
    work_of,
)
from spin_diffusion.samples.sample import Batch
from spin_diffusion.store.parsing import build
from tests.playing import asked, make_game


def config(**flags) -> Config:
    """Settings of a run: batches of 3, images in 2 guided steps."""
    few = {"train_batch_size": 3, "num_inference_steps": 2, "guidance_scale": 3.0}
    return build(Config, {"pretrained_model_name_or_path": "base", **few, **flags})


def batch_of(game, sides: int) -> Batch:
    latents = torch.zeros(3, 4, 32 // game.latent_px, 32 // game.latent_px)
    side = {"latents": latents, "condition_frame": torch.tensor([[32, 32, 0, 0, 32, 32]] * 3, dtype=torch.int32)}
    return Batch(["a", "b", "c"], ["a", "b", "c"], side, side if sides == 2 else {}, [1, 2, 3])


@pytest.mark.parametrize("family", ["sd1_dir", "sdxl_dir"])
def test_an_optimizer_step_costs_what_the_counter_counts(family, request):
    game = make_game(request.getfixturevalue(family))
    unit = count_units(game.family, game.pipeline, 32)
    for source, sides in (("opponent", 2), ("none", 1)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            game.scores(game.player, batch_of(game, sides)).scores.player_real.sum().backward()
            game.player.zero_grad()
        expected = step_flops(unit, work_of(config(), source, 10, 1))
        # Fine-tuning's pass of the frozen model is for the logs, and is not charged
        logs = 3 * unit.unet if source == "none" else 0
        # These prompts were not encoded before
        assert counter.get_total_flops() == expected + logs + 3 * unit.text
    # A network's backward pass takes about two forward ones, and about one where its weights stand still
    assert 1.5 < unit.unet_backward / unit.unet < 2.2
    assert 0.6 < unit.unet_backward_inputs / unit.unet < 1.3
    assert all(parameter.requires_grad for parameter in game.player.parameters())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("family", ["sd1_dir", "sdxl_dir"])
def test_a_rounds_images_cost_what_the_counter_counts(family, guidance_scale, request):
    game = make_game(request.getfixturevalue(family))
    unit = count_units(game.family, game.pipeline, 32)
    zeros = bool(game.pipeline.config.get("force_zeros_for_empty_prompt"))
    work = work_of(config(guidance_scale=guidance_scale), "opponent", 3, 5, zeros)
    rows = asked(*(f"picture {n}" for n in range(3)))
    game.sampling = type(game.sampling)(num_inference_steps=2, guidance_scale=guidance_scale, generation_batch_size=2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        game.encode(game.generate(rows, [1, 2, 3]))
    assert counter.get_total_flops() == generation_flops(unit, work)


def test_the_arithmetic_of_a_round():
    unit = UnitCosts(unet=10, unet_backward=20, unet_backward_inputs=11, text=1, vae_encode=3, vae_decode=5)
    work = RoundWork(7, scored=4, compared=4, drawn=6, encoded=6, decoded=6, denoisings=8)
    assert step_flops(unit, work) == 4 * (10 + 20) + 4 * 10
    assert generation_flops(unit, work) == 6 * (8 * 10 + 1 + 3 + 5)
    assert work_of(config(), "data", 10, 1).drawn == 0
    assert [work_of(config(num_generated=2), "opponent", 10, steps).drawn for steps in (1, 2, 4)] == [6, 12, 20]
    assert work_of(config(), "opponent", 10, 1, world=2).drawn == 6
    # Four candidates for half of the prompts, one for the others; two of each are encoded at most
    candidates = work_of(config(candidates={"number": 4, "scorer": "pickscore", "share": 0.5}), "opponent", 10, 1)
    assert (candidates.drawn, candidates.encoded) == (25, 20)
    flipped = work_of(config(random_flip=True), "opponent", 10, 7)
    assert generation_flops(unit, flipped) - generation_flops(unit, work_of(config(), "opponent", 10, 7)) == 10 * 3
    again = work_of(config(gradient_checkpointing=True), "opponent", 10, 1)
    assert step_flops(unit, again) == 6 * (2 * 10 + 20) + 6 * 10
    # The ledger's share of the matrix rate leaves out what is computed again
    assert phase_flops(unit, again, "trained", 6, 3) == 2 * (6 * (10 + 20) + 6 * 10)
    # A pipeline whose empty prompt is zeros encodes one prompt an image
    assert [work_of(config(), "opponent", 10, 1, zeros).prompts_per_image for zeros in (False, True)] == [2, 1]
    assert unit.of_area(2.0) == UnitCosts(20, 40, 22, 1, 6, 10)
    assert step_flops(unit, work_of(config(use_lora=True), "opponent", 10, 1)) == 6 * (10 + 11) + 6 * 10
    # Fixed draws: the opponent's forward passes are made once, before the first step
    fixed = work_of(config(fixed_draws=3), "opponent", 10, 7)
    assert (fixed.compared, fixed.scored_once) == (0, 10 * 2 * 3)
    # 7 steps visit each of 10 pairs 7 * 3 / 10 times, half of which may be fixed draws
    by_itself = work_of(config(fixed_draws="auto"), "opponent", 10, 7)
    assert by_itself.scored_once == 10 * 2 * (7 * 3 // 20)
    assert step_flops(unit, fixed) == 6 * (10 + 20)
    assert generation_flops(unit, fixed) == generation_flops(unit, work_of(config(), "opponent", 10, 7)) + 60 * 10
