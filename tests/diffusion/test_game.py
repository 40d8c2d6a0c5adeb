"""The diffusion game: what must hold of scores, samples and saved weights, for every family."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.runs.image_run import open_game
from spin_diffusion.samples.sample import Batch
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.objectives import spin
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.input_error import InputError
from tests.playing import asked, examples, make_game

EVERY_BASE = ["sd1_dir", "sd2_dir", "sdxl_dir"]


@pytest.fixture(params=["sd2_dir", "sdxl_dir"])
def base(request):
    """One of each family, and of each prediction: v and epsilon."""
    return request.getfixturevalue(request.param)


def batch_of(game, pairs: int = 4, generated: bool = True) -> Batch:
    rows = list(game.real_rows(examples(2 * pairs)))
    real, other = game.encode(rows[:pairs]), game.encode(rows[pairs:])
    prompts = [row["prompt"] for row in rows[:pairs]]
    ids = [row["id"] for row in rows[:pairs]]
    return Batch(ids, prompts, real, other if generated else {}, list(range(pairs)))


def only(batch: Batch, place: int) -> Batch:
    here = slice(place, place + 1)
    real, other, condition = (
        {name: tensor[here] for name, tensor in side.items()} for side in (batch.real, batch.generated, batch.condition)
    )
    return Batch(batch.ids[here], batch.prompts[here], real, other, batch.seeds[here], condition)


def nudge(module: torch.nn.Module, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def test_it_is_a_game(sdxl_dir):
    assert isinstance(make_game(sdxl_dir), Game)


@pytest.mark.parametrize("base", EVERY_BASE, indirect=True)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_r_is_zero_where_the_player_is_the_opponent(base, precision):
    game = make_game(base, precision, proportion_empty_prompts=0.5)
    scores = game.scores(game.accelerator.prepare_model(game.player), batch_of(game)).scores
    assert scores.r_real.abs().max() <= 1e-6 and scores.r_generated.abs().max() <= 1e-6
    assert torch.allclose(spin(scores, 5000.0), torch.full((4,), 0.693147), atol=1e-4)


def test_a_moved_player_has_other_scores_and_the_opponent_keeps_its_own(base):
    game = make_game(base)
    before = game.scores(game.player, batch_of(game)).scores
    nudge(game.player)
    after = game.scores(game.player, batch_of(game)).scores
    assert (after.r_real.abs() > 1e-6).all()
    assert torch.equal(after.opponent_real, before.opponent_real)
    assert torch.equal(after.opponent_generated, before.opponent_generated)


class Exact(torch.nn.Module):
    """A denoiser that is exact for the images of one side: it knows their x_0 and solves for the noise."""

    def __init__(self, game, known: torch.Tensor) -> None:
        super().__init__()
        self.game, self.x_0 = game, torch.cat([known, known])

    def forward(self, x_t, t, **inputs):
        abar, x_0 = self.game.noising.abar[t][:, None, None, None], self.x_0
        eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
        if self.game.noising.prediction_type == "epsilon":
            return (eps,)
        return (abar.sqrt() * eps - (1 - abar).sqrt() * x_0,)


@pytest.mark.parametrize("side", ["real", "generated"])
def test_a_denoiser_that_is_exact_for_one_side_scores_that_side_best(base, side):
    game = make_game(base)
    batch = batch_of(game)
    for number, tensors in enumerate((batch.real, batch.generated)):  # as large as a trained VAE's
        generator = torch.Generator().manual_seed(number)
        tensors["latents"] = torch.randn(tensors["latents"].shape, generator=generator)
    known = getattr(batch, side)["latents"]
    scores = game.scores(Exact(game, known), batch).scores
    exact, other = scores.player_real, scores.player_generated
    if side == "generated":
        exact, other = other, exact
    assert exact.abs().max() < 1e-5
    assert (other < -1e-3).all()


def test_real_and_generated_share_noise_and_level(base):
    game = make_game(base)
    batch = batch_of(game)
    same = replace(batch, generated=batch.real)
    nudge(game.player)
    scores = game.scores(game.player, same).scores
    assert torch.allclose(scores.player_real, scores.player_generated, atol=1e-6)


def test_a_pairs_scores_do_not_depend_on_the_pairs_beside_it(base):
    game = make_game(base, proportion_empty_prompts=0.5)
    batch = batch_of(game)
    nudge(game.player)
    together = game.scores(game.player, batch).scores
    for i in range(4):
        alone = game.scores(game.player, only(batch, i)).scores
        assert torch.allclose(alone.player_real[0], together.player_real[i], atol=1e-5)
        assert torch.allclose(alone.opponent_generated[0], together.opponent_generated[i], atol=1e-5)


def test_the_winner_preserving_rule_changes_gradients_and_no_value(sdxl_dir):
    plain, guarded = make_game(sdxl_dir), make_game(sdxl_dir, winner_preserving_mu=0.9)
    gradients, values = [], []
    for game in (plain, guarded):
        scores = game.scores(game.player, batch_of(game)).scores
        spin(scores, 2000.0).mean().backward()
        values.append(scores.player_generated.detach())
        gradients.append(game.player.conv_in.weight.grad.clone())
    assert torch.equal(values[0], values[1])
    assert not torch.allclose(gradients[0], gradients[1])


def test_the_winner_preserving_rule_knows_which_side_is_the_real_one(sdxl_dir):
    game = make_game(sdxl_dir, winner_preserving_mu=0.9)
    batch = batch_of(game)
    exact = Exact(game, batch.real["latents"].float())
    exact.x_0 = torch.cat([batch.real["latents"], batch.generated["latents"]]).float()
    off = torch.tensor([1.0] * 4 + [2.0] * 4)[:, None, None, None].requires_grad_()  # errors of 1 everywhere, and of 2
    scored = game.scores(lambda *inputs, **more: (exact(*inputs, **more)[0] + off,), batch)
    (scored.scores.player_real + scored.scores.player_generated).sum().backward()
    # Minus the errors, the generated ones times (1 - mu) |g_real|^2 / <g_real, g_generated> = 0.1 * 1 / 2
    assert torch.allclose(off.grad.flatten(), torch.tensor([-1.0] * 4 + [-2.0 * 0.05] * 4), rtol=1e-3)


def test_without_a_generated_side_only_the_real_one_is_scored(sdxl_dir):
    game = make_game(sdxl_dir)
    scores = game.scores(game.player, batch_of(game, generated=False)).scores
    assert (scores.player_real < 0).all() and torch.equal(scores.r_generated, torch.zeros(4))


def test_a_dropped_caption_is_the_samplers_unconditional_input(base):
    game = make_game(base)
    frames = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    ours = game.prompts.conditioning(["a fox", "a fox"], [True, False], frames)
    theirs = game.pipeline.encode_prompt(
        "a fox", device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    assert torch.allclose(ours.tokens[0], theirs[1][0], atol=1e-6)
    assert torch.allclose(ours.tokens[1], theirs[0][0], atol=1e-6)
    if ours.added:
        assert torch.allclose(ours.added["text_embeds"][0], theirs[3][0], atol=1e-6)
        assert torch.allclose(ours.added["text_embeds"][1], theirs[2][0], atol=1e-6)


def test_samples_are_the_same_bytes_again_and_depend_on_their_seed(base):
    game = make_game(base)
    rows = asked("p 0", "p 1", "p 2")
    first, again = game.generate(rows, [1, 2, 3]), game.generate(rows, [1, 2, 3])
    assert [row["image"] for row in first] == [row["image"] for row in again]
    assert game.generate(rows, [4, 2, 3])[0]["image"] != first[0]["image"]


def test_a_picture_depends_on_its_own_seed_up_to_rounding(base):
    import numpy as np

    game = make_game(base)
    together = game.draw(game.player, ["a", "b"], [1, 2], game.opponent_sampling)
    alone = game.draw(game.player, ["b"], [2], game.opponent_sampling)
    difference = np.abs(np.asarray(together[1], dtype=int) - np.asarray(alone[0], dtype=int))
    assert difference.max() <= 2


def test_promotion_copies_the_player_and_then_leaves_it_alone(sdxl_dir):
    game = make_game(sdxl_dir)
    nudge(game.player)
    game.promote()
    assert weights_hash(game.opponent) == weights_hash(game.player)
    kept = weights_hash(game.opponent)
    nudge(game.player)
    assert weights_hash(game.opponent) == kept
    assert not any(parameter.requires_grad for parameter in game.opponent.parameters())


@pytest.mark.parametrize("base", EVERY_BASE, indirect=True)
def test_what_is_saved_loads_in_a_pipeline_and_predicts_the_same(base, tmp_path):
    game = make_game(base)
    nudge(game.player)
    game.save(tmp_path)
    fresh = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert weights_hash(fresh) == weights_hash(game.player)
    pipeline = DiffusionPipeline.from_pretrained(base, unet=fresh)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a fox", height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)


def test_a_save_that_does_not_load_back_the_same_is_caught(sdxl_dir, tmp_path, monkeypatch):
    game = make_game(sdxl_dir)
    good = UNet2DConditionModel.from_pretrained

    def other(*args, **kwargs):
        unet, said = good(*args, **kwargs)
        nudge(unet)
        return unet, said

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", other)
    with pytest.raises(AssertionError, match="predicts something else"):
        game.save(tmp_path)


def test_restore_brings_back_what_was_saved_and_the_base(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir)
    start = weights_hash(game.player)
    nudge(game.player)
    game.save(tmp_path, prove=False)
    moved = weights_hash(game.player)
    game.restore(None)
    assert weights_hash(game.player) == start
    game.restore(tmp_path)
    assert weights_hash(game.player) == moved


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("scheduler", "beta_end", 0.013), ("text_encoder", "hidden_act", "gelu"), ("unet", "norm_eps", 1e-3)],
)
def test_a_base_is_another_with_another_configuration_of_a_part(part, key, value, sd1_dir, tmp_path):
    changed = shutil.copytree(sd1_dir, tmp_path / "base")
    path = next(path for path in (changed / part).glob("*config.json") if "tokenizer" not in path.name)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    games = [make_game(folder) for folder in (sd1_dir, sd1_dir, changed)]
    assert len({game.base_hash for game in games}) == 1
    assert games[0].parts_hash == games[1].parts_hash != games[2].parts_hash


def test_resolutions_that_the_unet_cannot_take_are_refused(sdxl_dir):
    from spin_diffusion.diffusion.settings import ImageSettings

    game = make_game(sdxl_dir)
    with pytest.raises(InputError, match="multiple of 8"):
        ImageSettings(resolution=30)
    assert replace(game.images, resolution=64).resolution == 64


def test_samples_are_the_opponents_whatever_the_player_has_become(base):
    game = make_game(base)
    rows = asked("a fox", "a hen")
    before = [row["image"] for row in game.generate(rows, [1, 2])]
    nudge(game.player)
    assert [row["image"] for row in game.generate(rows, [1, 2])] == before
    game.promote()
    assert [row["image"] for row in game.generate(rows, [1, 2])] != before


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_an_optimizer_that_lays_weights_out_plainly_gets_them_so(optimizer, sdxl_dir, tiny_parquet, tmp_path):
    config = parse_config(
        ["--pretrained_model_name_or_path", str(sdxl_dir), "--dataset_name", str(tiny_parquet), "--resolution", "32",
         "--output_dir", str(tmp_path), "--optimizer", optimizer]
    )  # fmt: skip
    game = open_game(config, Accelerator(cpu=True))
    laid_out = game.player.conv_in.weight.is_contiguous()
    assert laid_out == (optimizer == "adamw_8bit") == (not game.channels_last)
