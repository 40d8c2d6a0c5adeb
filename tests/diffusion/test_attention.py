"""The choice of an attention kernel: shapes of the real network, the fastest able one, the others behind it."""

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import scaled_dot_product_attention

from spin_diffusion.diffusion import attention as module
from spin_diffusion.diffusion.attention import attention, attention_shapes, measure
from tests.playing import make_game


def test_the_shapes_are_those_of_a_forward_pass(sdxl_dir, monkeypatch):
    game = make_game(sdxl_dir)
    seen: Counter = Counter()

    def watching(query, key, value, *inputs, **named):
        seen[query.shape[1], query.shape[2], key.shape[2], query.shape[3]] += 1
        return scaled_dot_product_attention(query, key, value, *inputs, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    tokens, size = 77, 16
    added = {
        "text_embeds": torch.zeros(1, game.pipeline.text_encoder_2.config.projection_dim),
        "time_ids": torch.zeros(1, 6),
    }
    inputs = torch.zeros(1, tokens, game.player.config.cross_attention_dim)
    game.player(torch.zeros(1, 4, size, size), torch.tensor([3]), inputs, added_cond_kwargs=added)
    assert seen and Counter(attention_shapes(game.player, size, tokens)) == seen


def test_every_kernel_that_can_is_timed_and_the_others_are_left_out(sdxl_dir):
    found = measure([(2, 64, 64, 8), (2, 64, 77, 8)], 2, torch.device("cpu"), torch.float32)
    assert found["math"] > 0 and found["cudnn"] is None and found["efficient"] is None  # these need a GPU


def test_the_fastest_is_taken_and_what_it_cannot_compute_still_works(sdxl_dir, monkeypatch):
    game = make_game(sdxl_dir)
    monkeypatch.setattr(module, "measure", lambda *inputs: {"flash": None, "cudnn": 1.0, "efficient": 3.0, "math": 2.0})
    q = torch.randn(1, 2, 8, 4)
    expected = scaled_dot_product_attention(q, q, q)
    with attention("measure", game.player, 16, 2, Accelerator(cpu=True), None) as kernel:
        assert kernel == "cudnn"  # not there on a CPU: the next one computes
        assert torch.allclose(scaled_dot_product_attention(q, q, q), expected, atol=1e-6)
    with attention("torch", game.player, 16, 2, Accelerator(cpu=True), None) as kernel:
        assert kernel == "torch"


@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_a_kernel_by_name_is_the_one_that_computes(kernel, sdxl_dir):
    game = make_game(sdxl_dir)
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    with attention(kernel, game.player, 16, 2, Accelerator(cpu=True), None) as chosen:
        computed = type(scaled_dot_product_attention(q, q, q).grad_fn).__name__
    assert chosen == kernel and ("FlashAttention" in computed) == (kernel == "flash")
