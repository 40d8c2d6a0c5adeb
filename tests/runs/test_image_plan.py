"""The plan of a run: its arithmetic, what it says, and how its report holds it against what the run took."""

import pytest
import torch
from PIL import Image

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.runs import image_plan
from spin_diffusion.runs.image_plan import ImageRates, disk, predict, probe
from spin_diffusion.runs.plan import lines
from spin_diffusion.store.input_error import InputError
from tests.playing import examples, make_game

GB = 10**9
RATES = ImageRates(
    denoise=0.1, finish=1.0, encode=0.5, pair=2.0, update=3.0, score=0.25, image_bytes=10, picture_bytes=20,
    latent_bytes=100, prompt_bytes=7, player_bytes=1000, checkpoint_bytes=3000, drawing_memory=1, training_memory=2,
)  # fmt: skip


def config(*flags: str):
    return parse_config(
        ["--pretrained_model_name_or_path", "base", "--max_train_steps", "4", "--train_batch_size", "2",
         "--num_inference_steps", "10", "--rounds", "2", *flags]
    )  # fmt: skip


def test_seconds_are_rates_times_how_often_the_settings_ask():
    first, second = predict(config(), RATES, pairs=12, pictures=6, world=1)
    assert first["generated"] == pytest.approx(12 * (1.0 + 10 * 0.1))
    assert first["cached"] == pytest.approx(12 * 0.5) and first["evaluated"] == pytest.approx(6 * 2.0)
    assert first["trained"] == pytest.approx(4 * 2 * 2.0 + 4 * 3.0)
    assert second == first | {"round": 2}


def test_processes_share_the_images_and_each_trains_its_own_pairs():
    alone, shared = (predict(config(), RATES, pairs=12, pictures=6, world=world)[0] for world in (1, 4))
    assert shared["generated"] == pytest.approx(alone["generated"] / 4)
    assert shared["trained"] == alone["trained"]


def test_the_errors_at_fixed_draws_are_shared_out_as_well():
    fixed = config("--fixed_draws", "2")
    alone, shared = (predict(fixed, RATES, pairs=12, pictures=0, world=world)[0]["cached"] for world in (1, 4))
    assert shared == pytest.approx(alone / 4)


def test_the_last_round_is_evaluated_even_if_the_others_are_not():
    rounds = predict(config("--eval_every_round", "false"), RATES, pairs=12, pictures=6, world=1)
    assert [entry["evaluated"] for entry in rounds] == [0, pytest.approx(6 * 2.0)]


def test_the_pictures_of_an_evaluation_are_those_of_every_prompt_at_every_scale(tiny_prompts):
    flags = ["--validation_prompts", str(tiny_prompts), "--num_validation_images", "3"]
    assert image_plan._pictures_of_evaluation(config(*flags)) == 4 * 3
    assert image_plan._pictures_of_evaluation(config(*flags, "--validation_guidance_scales", "[1, 3]")) == 4 * 3 * 2
    assert image_plan._pictures_of_evaluation(config()) == 0


@pytest.mark.parametrize(
    ("flags", "drawn", "encoded", "scored"),
    [
        (["--objective", "sft"], 0, 0, 0),
        (["--num_generated", "3"], 36, 36, 0),
        (["--num_candidates", "4", "--candidate_scorer", "pickscore", "--candidate_share", "0.5"], 30, 24, 0),
        (["--fixed_draws", "2"], 12, 12, 12 * 2),
    ],
)
def test_every_source_of_images_is_counted(flags, drawn, encoded, scored):
    entry = predict(config(*flags), RATES, pairs=12, pictures=0, world=1)[0]
    assert entry["generated"] == pytest.approx(drawn * 2.0)
    assert entry["cached"] == pytest.approx(encoded * 0.5 + scored * 0.25)


def test_the_disk_holds_every_round_and_the_checkpoints_of_one():
    settings = config("--checkpointing_steps", "1")
    data, rounds = 12 * (10 + 100 + 7), 2 * (12 * 10 + 6 * 20 + 1000) + 1000
    assert disk(settings, RATES, 12, 6) == data + rounds + 12 * 100 + (3 + 1) * 3000
    limited = config("--checkpointing_steps", "1", "--checkpoints_total_limit", "1")
    assert disk(settings, RATES, 12, 6) - disk(limited, RATES, 12, 6) == 2 * 3000
    candidates = config(
        "--checkpointing_steps", "1", "--num_candidates", "4", "--candidate_scorer", "pickscore",
        "--candidate_share", "0.5",
    )  # fmt: skip
    assert disk(candidates, RATES, 12, 6) - disk(settings, RATES, 12, 6) == 2 * (30 - 12) * 10 + (24 - 12) * 100
    steps = config("--checkpointing_steps", "1", "--trajectory", "steps", "--sampler", "ddim")
    assert disk(steps, RATES, 12, 6) - disk(settings, RATES, 12, 6) == 12 * 100 * 11  # ten steps have eleven states
    rival = config("--checkpointing_steps", "1", "--compare_with", "[sft]")
    assert disk(rival, RATES, 12, 6) - disk(settings, RATES, 12, 6) == 2 * (6 * 20 + 1000) + 1000


@pytest.mark.parametrize(("fixed_draws", "flags"), [(0, ()), (1, ()), (0, ("--fused_backward", "true"))])
def test_the_probe_measures_a_real_game_and_leaves_its_player_alone(sdxl_dir, fixed_draws, flags):
    game = make_game(sdxl_dir, fixed_draws=fixed_draws)
    before = game.player_hash()
    settings = config("--fixed_draws", str(fixed_draws), "--generation_batch_size", "2", "--max_grad_norm", "0", *flags)
    rates = probe(settings, game, list(examples(2)))
    assert min(rates.denoise, rates.encode, rates.pair, rates.update) > 0 and (rates.score > 0) == (fixed_draws > 0)
    weights = 4 * sum(parameter.numel() for parameter in game.player.parameters())
    assert rates.player_bytes == weights and 3 * weights <= rates.checkpoint_bytes < 3.1 * weights
    assert rates.latent_bytes == 2 * 4 * 16 * 16 + 4 * 6
    moved = max(
        (one - other).abs().max().item()
        for one, other in zip(game.player.parameters(), make_game(sdxl_dir).player.parameters(), strict=True)
    )
    assert moved < 1e-10, (before, game.player_hash())


def test_the_time_of_a_step_is_what_two_more_of_them_take(sdxl_dir, monkeypatch):
    game, asked = make_game(sdxl_dir), []
    monkeypatch.setattr(game, "draw", lambda *given: asked.append(given[-1]) or [Image.new("RGB", (32, 32))] * 2)
    monkeypatch.setattr(image_plan, "seconds_of", lambda call, device: call() and 5.0 + 2.0 * asked[-1])
    monkeypatch.setattr(game, "encode", lambda rows: {"latents": torch.zeros(len(rows), 4, 16, 16)})
    monkeypatch.setattr(image_plan, "_probe_training", lambda *given: (0.0, 1.0, 1.0, 1))
    rates = probe(config("--generation_batch_size", "2"), game, list(examples(2)))
    assert (rates.denoise, rates.finish) == (2.0 / 2, 5.0 / 2)


def test_a_batch_that_does_not_fit_is_one_line(sdxl_dir, monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(image_plan, "_probe", full)
    with pytest.raises(InputError, match=r"20\.00 GiB.*lower --train_batch_size"):
        probe(config(), make_game(sdxl_dir), list(examples(2)))


def test_what_does_not_fit_is_said():
    plan = {
        "encode_real_seconds": 1.0, "rounds": predict(config(), RATES, 12, 6, 1), "rows": 12, "processes": 1,
        "disk_bytes": 3 * GB, "free_bytes": 2 * GB, "memory_bytes": {"drawing": GB, "training": 2 * GB},
        "device_bytes": 8 * GB,
    }  # fmt: skip
    cpu = torch.device("cpu")
    told = lines(plan, "out", cpu, "scorers")
    assert "3.00 GB of 2.0 GB free" in told[-2] and "does NOT fit; lower" in told[-2]
    assert "2.00 GB of 8.0 GB of this machine" in told[-1] and "NOT" not in told[-1]
    assert "NOT" in lines(replace_bytes(plan, GB), "out", cpu, "scorers")[-1]


def replace_bytes(plan, there):
    return plan | {"device_bytes": there}
