"""A pair differs in its pictures alone: one frame, caption, mirror, level and noise, for both sides and the drawing."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from spin_diffusion.data.rows import Example
from spin_diffusion.diffusion import game as game_module
from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.diffusion.game import DiffusionGame, example_id
from spin_diffusion.diffusion.sampling import SAMPLERS
from spin_diffusion.diffusion.settings import ImageSettings
from spin_diffusion.samples.candidates import Candidates
from spin_diffusion.samples.real import prepare
from spin_diffusion.samples.sample import Batch
from spin_diffusion.samples.sampling import OWN_SIZE, REAL_SIZE
from spin_diffusion.selfplay.rounds import SelfPlay, play
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture
from tests.playing import ROUNDS, SAMPLING, TRAINING, make_game

SHAPES = [(40, 40), (96, 60), (30, 120), (32, 32), (248, 60), (20, 32)]
"""Widths and heights."""


def picture(shape: tuple[int, int], seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (shape[1], shape[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(losers: bool = False, same: bool = False, count: int = 12):
    """Noise of several shapes, whose worse image has another shape, or is the same."""
    for number in range(count):
        better = picture(SHAPES[number % len(SHAPES)], number)
        worse = better if same else picture(SHAPES[(number + 1) % len(SHAPES)], 100 + number)
        yield Example(f"picture {number}", better, worse if losers else None, f"row {number}")


def game_of(base, lossless: bool = False, images: dict | None = None, **denoiser):
    """A game at 32 px whose pictures are larger, smaller and of other shapes."""
    made = make_game(base, sampling=replace(SAMPLING, guidance_scale=3.0, num_inference_steps=2), **denoiser)
    return DiffusionGame(
        made.family, made.pipeline, made.base, sampling=made.sampling,
        denoiser=made.denoiser,
        images=replace(made.images, image_format="png" if lossless else "jpeg", **images or {}),
        accelerator=made.accelerator,
    )  # fmt: skip


def play_with(game, folder, training=TRAINING, same: bool = False, candidates=None, **rounds):
    losers = rounds.get("objective") == "dpo"
    prepare(folder / "data", lambda: game.real_rows(pictures(losers, same)), {}, 4, game, game.accelerator)
    settings = replace(ROUNDS, **{"rounds": 1} | rounds)
    return play(SelfPlay(game, folder / "data", folder, settings, training, game.accelerator, candidates=candidates))


def rows_of(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in read_rows(path)]


class Recorder:
    """What the UNets are called with beside x_t, while pairs are scored: one dictionary of each pair's rows a call."""

    def __init__(self, game, monkeypatch) -> None:
        self.calls: list[list[dict[str, torch.Tensor]]] = []
        self._scoring = False
        forward = UNet2DConditionModel.forward

        def heard(unet, x_t, t, **named):
            if self._scoring:
                self._heard(x_t, t, named)
            return forward(unet, x_t, t, **named)

        monkeypatch.setattr(UNet2DConditionModel, "forward", heard)
        for name in ("scores", "scores_at_draws"):
            monkeypatch.setattr(game, name, self._listening(getattr(game, name)))

    def _listening(self, method):
        def scored(*given):
            self._scoring = True
            self.calls.append([])
            try:
                return method(*given)
            finally:
                self._scoring = False

        return scored

    def _heard(self, x_t, t, named) -> None:
        assert set(named) <= {"encoder_hidden_states", "added_cond_kwargs", "return_dict"}
        told = {"t": t, "tokens": named["encoder_hidden_states"], **named.get("added_cond_kwargs", {})}
        assert all(len(tensor) == len(x_t) for tensor in told.values())
        self.calls[-1].append({"x_t": x_t.detach().clone(), **told})

    def pairs(self):
        """Of each call that has both sides: the inputs of either one."""
        for call in (one for scored in self.calls for one in scored):
            half = len(call["x_t"]) // 2
            yield {name: x[:half] for name, x in call.items()}, {name: x[half:] for name, x in call.items()}


def check_recorded(recorder, frames: dict[tuple[int, ...], str]) -> set[tuple[int, ...]]:
    """Both sides of every call are told the same, and frames of the real images or of their mirror images."""
    seen = set()
    for real, generated in recorder.pairs():
        for name in real.keys() - {"x_t"}:
            assert torch.equal(real[name], generated[name]), name
        assert not torch.equal(real["x_t"], generated["x_t"])
        if "time_ids" in real:
            seen |= {tuple(map(int, row)) for row in real["time_ids"]}
    assert seen <= frames.keys()
    return seen


def frames_of(game, folder) -> dict[tuple[int, ...], str]:
    """The frames that pairs may have, and of which images."""
    found = {}
    for row in rows_of(folder / "data" / "samples"):
        size = row["frame"][4:]
        frame = row["frame"] if game.images.size_conditioning == "real" else [*size, 0, 0, *size]
        found[tuple(frame)] = row["id"]
        if game.images.random_flip:
            height, width, top, left, *target = frame
            scale = max(target[0] / height, target[1] / width)
            found[(height, width, top, max(target[1], round(width * scale)) - target[1] - left, *target)] = row["id"]
    return found


@pytest.mark.parametrize(
    ("rounds", "options"),
    [
        ({}, {"images": {"size_conditioning": "target", "random_flip": True}}),
        ({"objective": "dpo"}, {"images": {"size_conditioning": "target", "max_aspect_ratio": 4.0}}),
        ({}, {"images": {"max_aspect_ratio": 4.0, "random_flip": True}, "winner_preserving_mu": 0.5}),
        ({"objective": "dpo"}, {"fixed_draws": 2, "images": {"max_aspect_ratio": 4.0, "random_flip": True}}),
        ({"num_generated": 2}, {"fixed_draws": 2, "images": {"random_flip": True}}),
        ({"opponent": "pool", "rounds": 2}, {"images": {"random_flip": True}}),
        ({"real_parts": 2, "rounds": 2, "objective": "space", "num_generated": 3}, {"images": {"random_flip": True}}),
    ],
    ids=["target", "target_dpo", "sizes", "dpo_draws", "draws", "pool", "space_parts"],
)
def test_both_sides_reach_the_denoiser_with_the_same_inputs(rounds, options, sdxl_dir, tmp_path, monkeypatch):
    game = game_of(sdxl_dir, proportion_empty_prompts=0.4, **options)
    recorder = Recorder(game, monkeypatch)
    play_with(game, tmp_path, **rounds)
    frames = frames_of(game, tmp_path)
    seen = check_recorded(recorder, frames)
    assert len(recorder.calls) >= 4 and len(seen) >= min(3, len(frames))
    if game.images.size_conditioning == "target":
        assert all(frame == (*frame[4:], 0, 0, *frame[4:]) for frame in seen)


def test_candidates_on_the_real_side_are_told_the_frame_of_the_data(sdxl_dir, tmp_path, monkeypatch):
    game = game_of(sdxl_dir, images={"max_aspect_ratio": 4.0, "random_flip": True})
    recorder = Recorder(game, monkeypatch)
    judge = Candidates(3, 0.5, "by bytes", lambda: lambda rows: [float(sum(row["image"])) for row in rows])
    play_with(game, tmp_path, candidates=judge)
    assert len(check_recorded(recorder, frames_of(game, tmp_path))) >= 3


def test_fine_tuning_is_told_the_frames_too(sdxl_dir, tmp_path, monkeypatch):
    game = game_of(sdxl_dir)
    recorder = Recorder(game, monkeypatch)
    play_with(game, tmp_path, objective="sft", beta=1.0)
    told = {tuple(map(int, row)) for scored in recorder.calls for call in scored for row in call["time_ids"]}
    assert told <= frames_of(game, tmp_path).keys() and len(told) >= 3


# The opponent's drawing


@pytest.mark.parametrize(("size_conditioning", "guidance_scale"), [("real", 3.0), ("target", 3.0), ("real", 1.0)])
def test_each_image_is_drawn_as_diffusers_draws_it_with_its_frame(size_conditioning, guidance_scale, sdxl_dir):
    """In one batch of several frames each image is the one that a plain pipeline call draws, told its frame."""
    game = game_of(sdxl_dir, lossless=True, images={"size_conditioning": size_conditioning, "max_aspect_ratio": 4.0})
    game.sampling = replace(game.sampling, guidance_scale=guidance_scale, generation_batch_size=4)
    rows = list(game.real_rows(pictures()))
    assert len({tuple(row["frame"]) for row in rows}) == len(SHAPES)
    drawn = game.generate(rows, list(range(len(rows))))
    pipeline = type(game.pipeline)(**dict(game.pipeline.components))
    pipeline.scheduler = SAMPLERS["ddim"](dict(pipeline.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    for place, (row, made) in enumerate(zip(rows, drawn, strict=True)):
        frame = game.frame_of(row)
        told = {"real": REAL_SIZE, "target": OWN_SIZE}[size_conditioning]
        assert made["frame"] == frame and f'"size_condition": "{told}"' in made["sampler"]
        height, width = row["frame"][4:]
        expected = pipeline(
            row["prompt"], height=height, width=width, num_inference_steps=2, guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(place),
            original_size=tuple(frame[:2]), crops_coords_top_left=tuple(frame[2:4]), target_size=tuple(frame[4:]),
        ).images[0]  # fmt: skip
        found = open_picture(made["image"])
        apart = np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int))
        assert found.size == expected.size and apart.max() <= 2  # the batch changes rounding


def test_pictures_of_an_evaluation_are_told_what_users_tell(sdxl_dir):
    game = game_of(sdxl_dir)
    told = []
    game.player.register_forward_pre_hook(
        lambda unet, given, named: told.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    game.draw(game.player, ["a fox"], [0], game.opponent_sampling)
    assert told and all((time_ids == torch.tensor([32, 32, 0, 0, 32, 32])).all() for time_ids in told)


def test_samples_that_were_drawn_otherwise_are_drawn_again(sdxl_dir, tmp_path, monkeypatch):
    game = game_of(sdxl_dir)
    generate, left = game.generate, [2]

    def dies(*given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return generate(*given)

    monkeypatch.setattr(game, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        play_with(game, tmp_path)
    before = rows_of(tmp_path / "round-1" / "samples")
    assert before and all('"guidance_scale": 3.0' in row["sampler"] for row in before)
    game = game_of(sdxl_dir)
    game.sampling = replace(game.sampling, guidance_scale=1.0)
    play_with(game, tmp_path)
    after = rows_of(tmp_path / "round-1" / "samples")
    assert len(after) == 8 and all('"guidance_scale": 1.0' in row["sampler"] for row in after)


def test_a_sample_that_was_drawn_under_another_frame_is_not_scored(sdxl_dir, tmp_path):
    game = game_of(sdxl_dir)
    rows = list(game.real_rows(pictures(count=4)))
    drawn = game.generate(rows, [0, 1, 2, 3])
    names = ([row["id"] for row in rows], [row["prompt"] for row in rows])
    assert Batch(*names, game.encode(rows), game.encode(drawn), [0] * 4).condition["frame"].shape == (4, 6)
    drawn[2]["frame"] = [64, 32, 0, 0, 32, 32]
    with pytest.raises(AssertionError, match="the generated samples are not of their pairs' frame"):
        Batch(*names, game.encode(rows), game.encode(drawn), [0] * 4)
    with pytest.raises(AssertionError, match="not of their pairs' frame"):  # rows that slipped
        Batch(*names, game.encode(rows), game.encode(game.generate(rows[1:] + rows[:1], [0] * 4)), [0] * 4)


# Nothing can be learnt from pairs of equal pictures


@pytest.mark.parametrize(
    ("rounds", "options", "start"),
    [
        ({}, {"images": {"size_conditioning": "target"}}, np.log(2)),
        ({"objective": "space"}, {}, 2 * np.log(2)),
        ({"objective": "dpo"}, {}, np.log(2)),
        ({}, {"winner_preserving_mu": 0.5, "images": {"max_aspect_ratio": 4.0, "random_flip": True}}, np.log(2)),
    ],
    ids=["target", "space", "dpo", "sizes"],
)
def test_of_pairs_whose_pictures_are_the_same_nothing_can_be_learnt(
    rounds, options, start, sdxl_dir, tmp_path, monkeypatch
):
    """The opponent draws the very real images: whatever else the two sides were told would be what is learnt."""
    game = game_of(sdxl_dir, lossless=True, **options)
    real = {row["prompt"]: open_picture(row["image"]) for row in game.real_rows(pictures())}
    proof, *_ = real.values()

    def draws_the_real_ones(pipeline, prompts, seeds, sampling, **how):
        yield [real.get(prompt, proof) for prompt in prompts]

    monkeypatch.setattr(game_module, "draw_batches", draws_the_real_ones)
    # Not Adam, whose division by the gradient's size would make steps of its rounding
    training = replace(TRAINING, max_train_steps=12, train_batch_size=4, optimizer="sgd", learning_rate=1e-4)
    (record,) = play_with(game, tmp_path, training, same=True, **rounds)
    trained = record["training"]
    assert trained["loss"] == pytest.approx(start, abs=1e-3)
    assert trained["implicit_accuracy"] == 0.5
    assert trained["r_real"] == pytest.approx(trained["r_generated"], abs=1e-9)


# Settings


def test_the_setting_is_one_of_two():
    given = ["--pretrained_model_name_or_path", "base"]
    assert parse_config(given).images.size_conditioning == "real" == ImageSettings().size_conditioning
    assert parse_config([*given, "--size_conditioning", "target"]).images.size_conditioning == "target"
    with pytest.raises(InputError, match="size_conditioning"):
        parse_config([*given, "--size_conditioning", "users"])


def test_data_that_were_prepared_with_one_setting_are_not_those_of_the_other(sdxl_dir, tmp_path):
    real, target = (game_of(sdxl_dir, images={"size_conditioning": name}) for name in ("real", "target"))
    rows = list(real.real_rows(pictures(count=2)))
    assert example_id(next(pictures(count=1))) == rows[0]["id"]
    frames = [game.encode(rows)["condition_frame"].tolist() for game in (real, target)]
    assert frames == [[row["frame"] for row in rows], [[32, 32, 0, 0, 32, 32]] * 2]
