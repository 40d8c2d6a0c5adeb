"""Drawing: the default sampler, files written beside it, memory that does not hold a batch, a compiled UNet."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch._dynamo import config as dynamo

from spin_diffusion.diffusion import images
from spin_diffusion.diffusion.sampling import SAMPLERS, draw_images, sampling_pipeline
from spin_diffusion.diffusion.settings import SamplingSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture
from tests.playing import TRAINING, asked, make_game, play_all
from tests.tiny import BETAS


def test_by_default_25_steps_of_the_second_order_solver():
    settings = SamplingSettings()
    sampler = SAMPLERS[settings.sampler](BETAS)
    assert settings.num_inference_steps == 25 and isinstance(sampler, DPMSolverMultistepScheduler)
    assert (sampler.config.algorithm_type, sampler.config.solver_order) == ("dpmsolver++", 2)


def test_the_files_are_the_drawn_images_in_the_order_of_the_rows(sdxl_dir):
    game = make_game(sdxl_dir)
    rows = asked(*(f"fox {number}" for number in range(5)))
    told: list[int] = []
    made = game.generate(rows, [7, 8, 9, 10, 11], told.append)
    drawn = game.draw(game.opponent, [row["prompt"] for row in rows], [7, 8, 9, 10, 11], game.opponent_sampling)
    assert [row["image"] for row in made] == [images.to_bytes(image, game.images) for image in drawn]
    assert [row["seed"] for row in made] == [7, 8, 9, 10, 11] and told == [2, 4, 5]
    assert json.loads(made[0]["sampler"])["num_inference_steps"] == 2


def test_a_batch_that_memory_does_not_hold_is_decoded_in_parts(sdxl_dir, monkeypatch):
    vae = make_game(sdxl_dir).pipeline.vae
    latents = torch.randn(7, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = images.decode_latents(vae, latents, list("abcdefg"))
    decode, sizes, most = vae.decode, [], 2

    def decode_few(part):
        if len(part) > most:
            raise torch.OutOfMemoryError("too many")
        sizes.append(len(part))
        return decode(part)

    monkeypatch.setattr(vae, "decode", decode_few)
    assert torch.allclose(images.decode_latents(vae, latents, list("abcdefg")), whole, atol=1e-5)
    assert sizes == [2, 2, 2, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        images.decode_latents(vae, latents, list("abcdefg"))


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_a_compiled_unet_draws_the_same_and_is_saved_under_its_names(how, sdxl_dir, tmp_path, monkeypatch):
    compiled: list[object] = []

    def interpreted(function, **settings):
        compiled.append(function)
        return torch_compile(function, **settings, backend="eager")  # the graph is made; no compiler is needed

    torch_compile = torch.compile
    plain = make_game(sdxl_dir)
    monkeypatch.setattr(torch, "compile", interpreted)
    game = make_game(sdxl_dir, compile=how)
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in game.player.modules())
    assert len(compiled) == 2 * (blocks if how == "blocks" else 1)  # the player's and the opponent's
    rows = asked("a fox", "a hen")
    drawn, expected = game.generate(rows, [3, 4]), plain.generate(rows, [3, 4])
    assert [row["image"] for row in drawn] == [row["image"] for row in expected]
    game.save(tmp_path)
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert saved.state_dict().keys() == plain.player.state_dict().keys()
    game.promote()
    assert game.opponent_hash() == game.player_hash() == plain.player_hash()


def test_a_round_trains_in_graphs_with_gradients_and_the_next_one_compiles_nothing(sd1_dir, tmp_path, monkeypatch):
    """All transformer blocks share one code object, whose graphs dynamo counts: drawing, evaluation with and without
    guidance, the opponent and the player, at every depth of the UNet."""
    graphs: list[bool] = []

    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    torch_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **settings: torch_compile(function, **settings, backend=backend)
    )
    torch._dynamo.reset()
    # Two graphs, or eight by default, are too few, and beyond the limit dynamo shall raise rather than run on eagerly
    with dynamo.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        game = make_game(sd1_dir, compile="blocks")
        for scale in (1.0, 3.0):
            sampling = replace(game.opponent_sampling, guidance_scale=scale)
            game.draw(game.player, ["a fox", "a hen", "a cat"], [1, 2, 3], sampling)
        play_all(sd1_dir, tmp_path, TRAINING, game, rounds=1)
        in_first = list(graphs)
        assert any(in_first) and not all(in_first)
        play_all(sd1_dir, tmp_path, TRAINING, game, rounds=2)
    assert graphs == in_first


def test_a_compiled_unet_sees_one_size_of_batch(sdxl_dir, monkeypatch):
    sizes: list[int] = []

    def interpreted(function, **settings):
        compiled = torch_compile(function, **settings, backend="eager")

        def watched(sample, *inputs, **named):
            sizes.append(len(sample))
            return compiled(sample, *inputs, **named)

        return watched

    torch_compile = torch.compile
    plain = make_game(sdxl_dir)
    monkeypatch.setattr(torch, "compile", interpreted)
    game = make_game(sdxl_dir, compile="whole")
    rows = asked(*(f"fox {number}" for number in range(5)))
    seeds = [7, 8, 9, 10, 11]
    drawn, expected = game.generate(rows, seeds), plain.generate(rows, seeds)
    assert len(sizes) == 6 and set(sizes) == {4}  # always two images, with and without their prompts
    for found, other in zip(drawn, expected, strict=True):
        difference = images.to_pixels([open_picture(found["image"])]) - images.to_pixels([open_picture(other["image"])])
        assert found["id"] == other["id"] and difference.abs().mean() < 0.01  # the batch changes rounding only


@pytest.mark.parametrize(("sampler", "offset", "steps"), [("ddim", 0, 1001), ("ddim", 1, 1000), ("dpmpp", 0, 1001)])
def test_more_steps_than_the_noise_has_are_refused_before_anything_is_drawn(sampler, offset, steps, sdxl_dir):
    game = make_game(sdxl_dir)
    pipeline = sampling_pipeline(game.pipeline, game.opponent, sampler)
    pipeline.scheduler.register_to_config(steps_offset=offset)
    sampling = replace(game.opponent_sampling, sampler=sampler, num_inference_steps=steps)
    with pytest.raises(InputError, match=f"^{steps} denoising steps are too many .* trained with 1000: give fewer$"):
        draw_images(pipeline, ["a fox"], [1], sampling, batch_size=1)


@pytest.mark.parametrize(("base", "guidance_scale"), [("sdxl_dir", 3.0), ("sdxl_dir", 1.0), ("sd2_dir", 3.0)])
def test_a_scaled_prediction_is_epsilon_scaled_in_a_ddim_loop_written_out(base, guidance_scale, request):
    """Guided first and scaled then, in fp64; where a v model gets noise alone, there is nothing to scale."""
    game = make_game(request.getfixturevalue(base))
    sampling = replace(game.opponent_sampling, num_inference_steps=5, guidance_scale=guidance_scale)
    factor, scheduler = 1.2, SAMPLERS["ddim"](dict(game.pipeline.scheduler.config))
    scheduler.set_timesteps(sampling.num_inference_steps)
    inputs = game.questions.inputs(["a fox", "a fox"], [False, True], torch.tensor([[32, 32, 0, 0, 32, 32]] * 2))
    side = 32 // game.latent_px
    x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(3)).double()
    abars = scheduler.alphas_cumprod.double()
    for t, before in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        with torch.no_grad():
            predicted = game.player(x.float().repeat(2, 1, 1, 1), t, **inputs, return_dict=False)[0].double()
        wanted, dropped = predicted.chunk(2)
        guided = dropped + guidance_scale * (wanted - dropped)
        a, b = abars[t].sqrt(), (1 - abars[t]).sqrt()
        eps = guided if game.noising.prediction_type == "epsilon" else a * guided + b * x
        if a == 0:
            x_0 = -guided
        else:
            eps = factor * eps
            x_0 = (x - b * eps) / a
        abar = abars[before] if before is not None else scheduler.final_alpha_cumprod.double()
        x = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    expected = images.decode_latents(game.pipeline.vae, x.float(), ["a fox"])

    def apart(scale: float) -> float:
        drawn = game.draw(game.player, ["a fox"], [3], replace(sampling, prediction_scale=scale))
        return (images.to_pixels(drawn) - images.to_pixels(images.to_images(expected))).abs().max().item()

    assert apart(factor) <= 2.5 / 127.5 < apart(1.0)
