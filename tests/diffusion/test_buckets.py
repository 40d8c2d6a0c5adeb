"""Images of several sizes: the table of sizes, crops, the opponent's images, scores in mixed batches, the stream."""

import io
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from spin_diffusion.data.rows import Example
from spin_diffusion.diffusion import images
from spin_diffusion.diffusion.cost import UnitCosts
from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.diffusion.images import area_share, bucket_sizes, nearest, packed, sizes_in_words, unpacked
from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.samples.candidates import Candidates
from spin_diffusion.samples.pairs import TOGETHER, Pairs, kinds_of
from spin_diffusion.samples.real import prepare
from spin_diffusion.samples.sample import Batch
from spin_diffusion.samples.shards import Part
from spin_diffusion.selfplay.rounds import SelfPlay, play
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture
from tests.diffusion.test_game import nudge, only
from tests.playing import ROUNDS, TRAINING, make_game

SHAPES = [(64, 64), (40, 80), (90, 45), (33, 31), (30, 120), (64, 40)]
"""Widths and heights."""


def pictures(count: int = 12, losers: bool = False):
    """Coloured noise of several shapes."""
    rng = np.random.default_rng(0)

    def picture(shape):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (shape[1], shape[0], 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        yield Example(f"picture {number}", picture(shape), picture((50, 50)) if losers else None, f"row {number}")


def game_of_sizes(base, ratio: float = 2.0, **options):
    made = make_game(base, **options)
    made.images = replace(made.images, max_aspect_ratio=ratio)
    return type(made)(
        made.family, made.pipeline, made.base, images=made.images, sampling=made.sampling, denoiser=made.denoiser,
        accelerator=made.accelerator,
    )  # fmt: skip


def mixed_batch(game, pairs: int = 6, losers: bool = False) -> Batch:
    rows = list(game.real_rows(pictures(pairs, losers)))
    other = game.generate(rows, list(range(pairs)))
    real, generated = game.encode(rows), game.encode(other)
    return Batch([row["id"] for row in rows], [row["prompt"] for row in rows], real, generated, list(range(pairs)))


# The table


def test_sdxls_sizes_are_among_ours():
    sizes = bucket_sizes(1024, 32, 4.0)
    for height, width in [(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1536), (512, 2048), (704, 1472)]:
        assert (height, width) in sizes and (width, height) in sizes


@pytest.mark.parametrize(("resolution", "multiple"), [(1024, 32), (512, 64), (768, 64), (64, 8), (800, 32)])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 4.0])
def test_sizes_fit_the_networks_the_memory_and_the_ratio(resolution, multiple, ratio):
    sizes = bucket_sizes(resolution, multiple, ratio)
    assert sizes[0] == (resolution, resolution) and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert resolution**2 * 0.75 < height * width <= resolution**2 or multiple * 8 > resolution
        assert max(height, width) / min(height, width) <= ratio and (width, height) in sizes
    assert ratio > 1 or len(sizes) == 1


def test_sizes_fit_the_pipeline_too_with_a_vae_of_a_small_factor(sd1_dir):
    made = make_game(sd1_dir)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    made.pipeline.register_modules(vae=AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, **kinds))
    game = DiffusionGame(
        made.family, made.pipeline, made.base, images=ImageSettings(resolution=64, max_aspect_ratio=3.0),
        sampling=made.sampling, denoiser=made.denoiser, accelerator=made.accelerator,
    )  # fmt: skip
    assert game.latent_px == 2 and len(game.sizes) > 1
    assert all(height % 8 == width % 8 == 0 for height, width in game.sizes)


def test_a_size_is_the_longest_short_side_that_fits():
    every = {(h, w) for h in range(64, 2049, 64) for w in range(1024, 2049, 64) if h * w <= 1024**2 and w / h <= 3}
    longest = {(max(h for h, other in every if other == w), w) for w in {w for _, w in every}}
    assert {size for size in bucket_sizes(1024, 32, 3.0) if size[1] >= size[0]} == longest


def test_the_nearest_size_is_the_one_that_crops_least_off():
    # 1.45 : 1 loses 31 % as a square, 27 % as 2 : 1, though 1.45 is nearer to 1 than to 2
    assert nearest([(64, 64), (32, 64)], 100, 145) == (32, 64)
    assert nearest([(64, 64), (64, 32)], 145, 100) == (64, 32)


def test_the_nearest_size_is_nearest_in_shape():
    sizes = [(64, 64), (48, 80), (80, 48)]
    assert nearest(sizes, 100, 100) == (64, 64)
    assert nearest(sizes, 1000, 1600) == (48, 80)
    assert nearest(sizes, 900, 100) == (80, 48)
    for height, width in [(100, 125), (125, 100)]:  # 1.25 : 1 is nearer to 1 : 1 than to 5 : 3
        assert nearest(sizes, height, width) == (64, 64)


# Crops


@pytest.mark.parametrize("target", [(48, 80), (80, 48), (64, 64)])
@pytest.mark.parametrize("shape", [(200, 100), (100, 200), (96, 160), (77, 33), (2000, 25), (25, 2000)])
def test_a_crop_shows_what_its_frame_says(target, shape):
    """On a picture whose colour is its place, the crop's corners have the colours of the frame's places."""
    width, height = shape
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    picture = Image.fromarray((np.stack([columns, rows, 0 * rows], axis=-1) * 255).round().astype(np.uint8))
    crop, frame = images.crop(picture, target)
    assert (crop.height, crop.width) == target and frame[:2] == [height, width] and tuple(frame[4:]) == target
    scale = max(target[0] / height, target[1] / width)
    top, left = frame[2:4]
    middle = np.asarray(crop, dtype=float)[target[0] // 2, target[1] // 2] / 255
    assert middle[0] == pytest.approx((left + target[1] // 2 + 0.5) / (width * scale), abs=0.02)
    assert middle[1] == pytest.approx((top + target[0] // 2 + 0.5) / (height * scale), abs=0.02)
    assert top == 0 or left == 0  # nothing is cut off along the side that just fits


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (100, 150), (401, 101), (63, 64), (64, 257), (300, 40)])
def test_a_crop_is_the_whole_resized_and_then_cut(shape):
    """To the bit up to four times the target's length. Beyond, what is kept is resized alone: Pillow may take its two
    passes in the other order then, and clips between them."""
    rows = np.random.default_rng(0).integers(64, 192, (17, 26, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    picture = Image.fromarray(rows).resize(shape, Image.Resampling.BILINEAR)
    crop, (height, width, top, left, *target) = images.crop(picture, (64, 64))
    scale = max(64 / height, 64 / width)
    whole = picture.resize((max(64, round(width * scale)), max(64, round(height * scale))), Image.Resampling.LANCZOS)
    right = np.asarray(whole.crop((left, top, left + 64, top + 64))).astype(int)
    assert (width, height) == shape and target == [64, 64] and crop.size == (64, 64)
    assert np.abs(np.asarray(crop) - right).max() <= (0 if max(shape) <= 4 * min(shape) else 2)


@pytest.mark.parametrize("shape", [(32, 20_000), (20_000, 32)])
def test_of_a_long_strip_no_more_is_resized_than_is_kept(shape, monkeypatch):
    """The whole would be 1024 x 640,000 px: 2 GB, and half a minute."""
    resize, sizes = Image.Image.resize, []

    def watched(image, size, *more):
        sizes.append(size)
        return resize(image, size, *more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    crop, frame = images.crop(Image.new("RGB", shape, "red"), (1024, 1024))
    assert crop.size == (1024, 1024) and crop.getpixel((512, 512)) == (255, 0, 0)
    assert sorted(frame[2:4]) == [0, (640_000 - 1024) // 2] and sizes == [(1024, 1024)]


def test_what_is_packed_comes_out_again():
    rows = [torch.randn(4, 3, 5), torch.randn(4, 4, 4), torch.randn(4, 5, 3)]
    together = packed(rows, 16)
    assert together.shape == (3, 4, 16) and (together[0, :, 15:] == 0).all()
    for row, values in zip(together, rows, strict=True):
        assert torch.equal(unpacked(row[None], *values.shape[1:])[0], values)


# The game


def test_the_opponent_draws_each_image_in_the_size_of_the_real_one(sdxl_dir):
    game = game_of_sizes(sdxl_dir)
    assert len(game.sizes) > 2
    rows = list(game.real_rows(pictures()))
    drawn = game.generate(rows, list(range(len(rows))))
    seen = set()
    for place, (row, made) in enumerate(zip(rows, drawn, strict=True)):
        real, other = (open_picture(each["image"]) for each in (row, made))
        assert real.size == other.size == (row["frame"][5], row["frame"][4])
        assert made["frame"] == row["frame"]
        assert made["id"] == row["id"] and made["seed"] == place
        seen.add(real.size)
    assert len(seen) >= 3
    # A picture is that of its own prompt, seed and size, whatever is drawn beside it
    alone = game.generate([rows[4]], [4])[0]
    pixels = [np.asarray(open_picture(each["image"]), dtype=float) for each in (alone, drawn[4])]
    assert np.abs(pixels[0] - pixels[1]).mean() < 1


def test_a_pairs_worse_image_has_the_size_of_the_better_one(sdxl_dir):
    for row in game_of_sizes(sdxl_dir).real_rows(pictures(losers=True)):
        better, worse = (open_picture(row[name]) for name in ("image", "loser_image"))
        assert better.size == worse.size == (row["frame"][5], row["frame"][4])


def test_an_image_on_its_side_is_turned_before_its_shape_is_taken(sdxl_dir):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (80, 40)).save(buffer, "JPEG", exif=exif)
    row = next(iter(game_of_sizes(sdxl_dir).real_rows([Example("a picture", buffer.getvalue(), None, "row 0")])))
    assert row["frame"][:2] == [80, 40] and row["frame"][4] > row["frame"][5]


@pytest.mark.parametrize("flip", [False, True])
def test_latents_are_those_of_each_image_alone(flip, sdxl_dir):
    game = game_of_sizes(sdxl_dir)
    game.images = replace(game.images, random_flip=flip)
    rows = list(game.real_rows(pictures(6)))
    encoded = game.encode(rows)
    for place, row in enumerate(rows):
        pixels = images.to_pixels([open_picture(row["image"])])
        height, width = row["frame"][4:]
        assert game.sizes[encoded["condition_kind"][place]] == (height, width)
        for name, seen in (("latents", pixels), ("mirrored_latents", pixels.flip(-1)))[: 1 + flip]:
            found = unpacked(encoded[name][place][None], height // game.latent_px, width // game.latent_px)
            expected = images.encode_pixels(game.pipeline.vae, seen, ["a"])
            assert torch.allclose(found.float(), expected, atol=2e-3)


@pytest.mark.parametrize("base", ["sd1_dir", "sdxl_dir"])
def test_a_mixed_batch_scores_each_pair_as_it_scores_alone(base, request):
    game = game_of_sizes(request.getfixturevalue(base), winner_preserving_mu=0.5)
    batch = mixed_batch(game)
    nudge(game.player)
    together = game.scores(game.player, batch)
    assert len(set(batch.condition["kind"].tolist())) >= 3
    for place in range(len(batch.ids)):
        alone = game.scores(game.player, only(batch, place))
        for name in ("player_real", "player_generated", "opponent_real", "opponent_generated"):
            expected = getattr(alone.scores, name)[0]
            assert getattr(together.scores, name)[place].item() == pytest.approx(expected.item(), rel=1e-4), name
        assert together.level[place] == alone.level[0]
    (together.scores.margin * torch.arange(1.0, 7.0)).sum().backward()
    of_all = [p.grad.clone() for p in game.player.parameters()]
    game.player.zero_grad()
    for place in range(len(batch.ids)):
        (game.scores(game.player, only(batch, place)).scores.margin * (place + 1.0)).sum().backward()
    largest = max(grad.abs().max() for grad in of_all)
    for grad, parameter in zip(of_all, game.player.parameters(), strict=True):
        assert (grad - parameter.grad).abs().max() <= 1e-4 * largest


def test_r_is_zero_at_the_start_and_several_images_per_prompt_keep_their_order(sdxl_dir):
    game = game_of_sizes(sdxl_dir)
    batch = mixed_batch(game)
    twice = replace(batch, generated={name: t.repeat_interleave(2, dim=0) for name, t in batch.generated.items()})
    once, both = game.scores(game.player, batch).scores, game.scores(game.player, twice).scores
    assert once.r_real.abs().max() <= 1e-6 and both.r_generated.abs().max() <= 1e-6
    assert torch.allclose(both.player_real, once.player_real.repeat_interleave(2), atol=1e-5)
    assert torch.allclose(both.player_generated, once.player_generated.repeat_interleave(2), atol=1e-5)


def test_scores_at_fixed_draws_are_those_of_the_direct_way(sdxl_dir):
    game = game_of_sizes(sdxl_dir, fixed_draws=2)
    batch = mixed_batch(game)
    real, generated = game.scores_at_draws(batch)
    scores = game.scores(game.player, batch).scores
    assert torch.allclose(real, scores.opponent_real) and torch.allclose(generated, scores.opponent_generated)
    real, generated = game.scores_at_draws(replace(batch, generated={}))
    assert torch.allclose(real, scores.opponent_real) and len(generated) == 0


def test_sdxl_is_told_the_sizes(sdxl_dir, monkeypatch):
    game = game_of_sizes(sdxl_dir)
    batch, told_ids, forward = mixed_batch(game), [], game.player.forward

    def listening(x_t, t, **inputs):
        told_ids.append((x_t.shape[-2:], inputs["added_cond_kwargs"]["time_ids"]))
        return forward(x_t, t, **inputs)

    monkeypatch.setattr(game.player, "forward", listening)
    game.scores(game.player, batch)
    for (height, width), time_ids in told_ids:
        assert (time_ids[:, 4] == height * game.latent_px).all() and (time_ids[:, 5] == width * game.latent_px).all()
    assert sum(len(time_ids) for _, time_ids in told_ids) == 12


# The stream


@pytest.mark.parametrize("count", [37, 64, 100])
def test_every_epoch_has_every_pair_once_and_runs_of_one_kind(count):
    kinds = torch.tensor([(number * 7) % 11 % 4 for number in range(count)])
    pairs = Pairs([str(number) for number in range(count)], [""] * count, lambda i: ({}, {}), kinds=kinds)
    stream = [pairs._index(position, 3, 1) for position in range(6 * count)]
    for epoch in range(6):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert stream[:count] != stream[count : 2 * count]
    mixed = sum(
        len({int(kinds[i]) for i in stream[start : start + TOGETHER]}) > 1 for start in range(0, 6 * count, TOGETHER)
    )
    # At most what is left over of four kinds in each epoch, and the batch across its end
    assert mixed <= 6 * math.ceil(4 * (TOGETHER - 1) / TOGETHER + 1)
    assert mixed < 0.6 * 6 * count / TOGETHER
    firsts = Counter(int(kinds[stream[epoch * count + 8]]) for epoch in range(6))
    assert len(firsts) > 1  # kinds come in random turns


def test_without_kinds_the_stream_is_as_it_was():
    plain = Pairs(list("abcdefgh"), [""] * 8, lambda i: ({}, {}))
    of_one = Pairs(list("abcdefgh"), [""] * 8, lambda i: ({}, {}), kinds=torch.zeros(8))
    assert [plain._index(p, 1, 1) for p in range(8)] == [of_one._index(p, 1, 1) for p in range(8)]


# Rounds


@pytest.mark.parametrize(
    "options",
    [{"objective": "dpo"}, {"num_generated": 2, "objective": "space"}, {"real_parts": 2}],
    ids=["dpo", "space", "parts"],
)
def test_rounds_with_several_sizes_are_played(options, sdxl_dir, tmp_path):
    game = game_of_sizes(sdxl_dir)
    losers = options.get("objective") == "dpo"
    prepare(tmp_path / "data", lambda: game.real_rows(pictures(24, losers)), {}, 4, game, game.accelerator)
    kinds = kinds_of(tmp_path / "data" / "encoded", Part())
    assert len(kinds) == 24 and len(set(kinds.tolist())) >= 3
    rounds, training = replace(ROUNDS, **options), replace(TRAINING, max_train_steps=2)
    records = play(SelfPlay(game, tmp_path / "data", tmp_path, rounds, training, game.accelerator))
    assert [record["state"] for record in records] == ["PROMOTED"] * 2
    if losers:
        return
    part, compared = Part(0, options.get("real_parts", 1)), 0
    for path in sorted((tmp_path / "data" / "samples").glob("*.parquet")):
        real = read_rows(path)[part.places]
        drawn = read_rows(tmp_path / "round-1" / "samples" / path.name)
        for row in drawn:
            assert row["frame"][4:] == real[row["place"]]["frame"][4:]
        compared += len(drawn)
    assert compared


def test_kinds_are_those_of_the_pairs_of_a_part_and_of_candidates(sdxl_dir, tmp_path):
    game = game_of_sizes(sdxl_dir)
    prepare(tmp_path / "data", lambda: game.real_rows(pictures(24)), {}, 7, game, game.accelerator)
    candidates = Candidates(2, 0.5, "by bytes", lambda: lambda rows: [float(len(row["image"])) for row in rows])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        taken = Pairs.batch

        def watching(self, *given):
            found = taken(self, *given)
            seen.append((self.kinds, found, self.ids))
            return found

        patch.setattr(Pairs, "batch", watching)
        play(SelfPlay(
            game, tmp_path / "data", tmp_path, replace(ROUNDS, rounds=2, real_parts=2), TRAINING, game.accelerator,
            candidates=candidates,
        ))  # fmt: skip
    sizes = {}
    for path in sorted((tmp_path / "data" / "samples").glob("*.parquet")):
        sizes |= {row["id"]: tuple(row["frame"][4:]) for row in read_rows(path)}
    assert len(seen) >= 8
    for kinds, batch, ids in seen:
        assert len(kinds) == len(ids) > 2
        assert [game.sizes[kind] for kind in kinds.tolist()] == [sizes[id_] for id_ in ids]
        assert [game.sizes[kind] for kind in batch.condition["kind"].tolist()] == [sizes[id_] for id_ in batch.ids]


# Refusals and figures


def test_a_ratio_below_one_is_refused():
    with pytest.raises(InputError, match="--max_aspect_ratio 0.5 must be at least 1"):
        ImageSettings(max_aspect_ratio=0.5)
    with pytest.raises(InputError, match="must be at least 1"):
        ImageSettings(max_aspect_ratio=math.nan)


def test_the_mean_area_scales_the_work():
    sizes = [(64, 64), (48, 80)]
    share = area_share(sizes, torch.tensor([0, 1, 1, 1]))
    assert share == pytest.approx((4096 + 3 * 3840) / 4 / 4096)
    unit = UnitCosts(unet=1000, unet_backward=2000, unet_backward_inputs=1500, text=7, vae_encode=100, vae_decode=200)
    less = unit.of_area(share)
    assert less.text == 7 and less.unet == round(1000 * share) and less.vae_decode == round(200 * share)
    assert sizes_in_words(sizes, torch.tensor([0, 1, 1, 1])) == "80 x 48 (3), 64 x 64 (1), width x height in px"
