"""Mirror images: both sides of a pair together, the same for both models, with the crop's frame of the mirror image."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from spin_diffusion.diffusion.cost import RoundWork, UnitCosts, generation_flops, phase_flops
from spin_diffusion.diffusion.images import crop, encode_pixels, mirrored_frame, to_pixels
from spin_diffusion.store.pictures import open_picture
from tests.diffusion.test_game import batch_of
from tests.playing import examples, make_game, play_all


def flipping(base, **denoiser):
    game = make_game(base, **denoiser)
    game.images = replace(game.images, random_flip=True)
    return game


def test_a_mirrored_latent_is_that_of_the_mirrored_image(sdxl_dir):
    game = flipping(sdxl_dir)
    rows = list(game.real_rows(examples(3, losers=True)))
    encoded = game.encode(rows)
    for prefix in ("", "loser_"):
        pixels = to_pixels([open_picture(row[f"{prefix}image"]) for row in rows])
        batches = pixels.flip(-1).split(game.sampling.generation_batch_size)  # other batches, other roundings
        expected = torch.cat([encode_pixels(game.pipeline.vae, batch, ["a"] * len(batch)) for batch in batches])
        assert torch.equal(encoded[f"{prefix}mirrored_latents"], expected.half())
        assert not torch.equal(encoded[f"{prefix}mirrored_latents"], encoded[f"{prefix}latents"])


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (34, 32), (32, 32)])
def test_the_mirrored_frame_is_that_of_a_crop_of_the_mirror_image(size):
    image = Image.effect_noise(size, 50)
    square, frame = crop(image, (32, 32))
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    other, other_frame = crop(flipped, (32, 32))
    assert mirrored_frame(frame) == other_frame
    assert other.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() == square.tobytes()


def test_half_of_the_visits_see_both_images_mirrored(sdxl_dir, monkeypatch):
    game = flipping(sdxl_dir)
    batch = batch_of(game, pairs=16)
    seen = []
    noised = game.noising.noised_and_target
    monkeypatch.setattr(
        type(game.noising), "noised_and_target", lambda self, x_0, *rest: seen.append(x_0) or noised(x_0, *rest)
    )
    game.scores(game.player, batch)
    game.scores(game.player, replace(batch, seeds=[seed + 100 for seed in batch.seeds]))
    for x_0 in seen:
        real, generated = x_0.split(16)
        flips = []
        for row in range(16):
            mirrored = torch.equal(real[row], batch.real["mirrored_latents"][row].float())
            assert mirrored or torch.equal(real[row], batch.real["latents"][row].float())
            name = "mirrored_latents" if mirrored else "latents"
            assert torch.equal(generated[row], batch.generated[name][row].float())
            flips.append(mirrored)
        assert 3 <= sum(flips) <= 13
    assert not torch.equal(seen[0], seen[1])  # a pair's other visit may be the other way round


def test_r_is_zero_at_the_start_and_kept_scores_are_of_the_same_orientation(sdxl_dir):
    game = flipping(sdxl_dir, fixed_draws=2)
    batch = batch_of(game)
    scores = game.scores(game.player, batch).scores
    assert scores.r_real.abs().max() <= 1e-6
    real, generated = game.scores_at_draws(batch)
    assert torch.allclose(real, scores.opponent_real) and torch.allclose(generated, scores.opponent_generated)


@pytest.mark.parametrize("objective", ["spin", "dpo"])
def test_rounds_with_mirror_images_are_played(objective, sdxl_dir, tmp_path):
    records = play_all(sdxl_dir, tmp_path, game=flipping(sdxl_dir), objective=objective)
    assert [record["state"] for record in records] == ["PROMOTED"] * 2


def test_the_second_orientation_is_counted():
    unit = UnitCosts(unet=1, unet_backward=2, unet_backward_inputs=1, text=3, vae_encode=7, vae_decode=11)
    once = RoundWork(steps=1, scored=2, compared=2, drawn=4, encoded=4, decoded=4, denoisings=5)
    twice = replace(once, views=2)
    assert generation_flops(unit, twice) - generation_flops(unit, once) == 4 * 7
    assert phase_flops(unit, twice, "cached", 4, 1) == 2 * phase_flops(unit, once, "cached", 4, 1) == 56
