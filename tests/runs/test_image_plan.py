"""The plan of a run: its arithmetic, what it says, and how its report holds it against what the run took."""

import pytest
import torch
from PIL import Image

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.runs import image_plan
from spin_diffusion.runs.image_plan import probe, shown, works
from spin_diffusion.runs.plan import Rates, Sizes, disk, lines, predict
from spin_diffusion.store.input_error import InputError
from tests.playing import examples, make_game

GB = 10**9
RATES = Rates(
    prepare=0.5, draw=2.0, encode=0.5, score=0.25, pair=2.0, update=3.0, real_bytes=117, sample_bytes=10,
    shown_bytes=20, encoded_bytes=100, player_bytes=1000, checkpoint_bytes=3000, drawing_memory=1, training_memory=2,
)  # fmt: skip


def config(*flags: str):
    return parse_config(
        ["--pretrained_model_name_or_path", "base", "--max_train_steps", "4", "--train_batch_size", "2",
         "--num_inference_steps", "10", "--rounds", "2", *flags]
    )  # fmt: skip


def seconds(settings, world: int = 1, pictures: int = 6) -> list[dict[str, float | int]]:
    """What is predicted of the rounds of twelve images."""
    return predict(settings, RATES, Sizes(12, 0, pictures), works(settings, 12, 0, world), world)


def size(settings) -> int:
    """What is predicted of the folder of a run with twelve images."""
    return disk(settings, RATES, Sizes(12, 0, 6), works(settings, 12, 0, 1))


def test_seconds_are_rates_times_how_often_the_settings_ask():
    first, second = seconds(config(), 1, 6)
    assert first["generated"] == pytest.approx(8 * 2.0)  # those that 4 steps of 2 pairs visit
    assert first["cached"] == pytest.approx(8 * 0.5) and first["evaluated"] == pytest.approx(6 * 2.0)
    assert first["trained"] == pytest.approx(4 * 2 * 2.0 + 4 * 3.0)
    assert second == first | {"round": 2}


def test_processes_share_the_images_and_each_trains_its_own_pairs():
    alone, shared = (seconds(config("--max_train_steps", "6"), world, 6)[0] for world in (1, 4))
    assert shared["generated"] == pytest.approx(alone["generated"] / 4)
    assert shared["trained"] == alone["trained"]


def test_the_errors_at_fixed_draws_are_shared_out_as_well():
    fixed = config("--fixed_draws", "2")
    alone, shared = (seconds(fixed, world, 0)[0]["cached"] for world in (1, 4))
    assert shared == pytest.approx(alone / 4)


def test_the_last_round_is_evaluated_even_if_the_others_are_not():
    rounds = seconds(config("--eval_every_round", "false"), 1, 6)
    assert [entry["evaluated"] for entry in rounds] == [0, pytest.approx(6 * 2.0)]


def test_the_pictures_of_an_evaluation_are_those_of_every_prompt_at_every_scale(tiny_prompts):
    flags = ["--validation_prompts", str(tiny_prompts), "--num_validation_images", "3"]
    assert shown(config(*flags)) == 4 * 3
    assert shown(config(*flags, "--validation_guidance_scales", "[1, 3]")) == 4 * 3 * 2
    assert shown(config()) == 0


@pytest.mark.parametrize(
    ("flags", "drawn", "encoded", "scored"),
    [
        (["--objective", "sft"], 0, 0, 0),
        (["--num_generated", "3"], 24, 24, 0),
        (["--candidates", "{number: 4, scorer: pickscore, share: 0.5}"], 30, 24, 0),
        (["--fixed_draws", "2"], 12, 12, 12 * 2),
    ],
)
def test_every_source_of_images_is_counted(flags, drawn, encoded, scored):
    entry = seconds(config(*flags), 1, 0)[0]
    assert entry["generated"] == pytest.approx(drawn * 2.0)
    assert entry["cached"] == pytest.approx(encoded * 0.5 + scored * 0.25)


def test_the_disk_holds_every_round_and_the_checkpoints_of_one():
    settings = config("--checkpointing_steps", "1")
    data, rounds = 12 * (10 + 100 + 7), 2 * (8 * 10 + 6 * 20 + 1000) + 1000
    assert size(settings) == data + rounds + 8 * 100 + (2 + 1) * 3000
    assert size(settings) - size(config("--checkpointing_steps", "2")) == 3000
    few = [size(config("--rounds", "9", "--keep_rounds", str(kept))) for kept in (9, 3, 2)]
    assert few[0] - few[1] == 5 * 1000 and few[1] - few[2] == 1000  # one is saved before an older one goes
    candidates = config(
        "--checkpointing_steps", "1", "--candidates", "{number: 4, scorer: pickscore, share: 0.5}",
    )  # fmt: skip
    assert size(candidates) - size(settings) == 2 * (30 - 8) * 10 + (24 - 8) * 100
    rival = config("--checkpointing_steps", "1", "--compare_with", "[sft]")
    assert size(rival) - size(settings) == 2 * (6 * 20 + 1000) + 1000


@pytest.mark.parametrize(("fixed_draws", "flags"), [(0, ()), (1, ()), (0, ("--fused_backward", "true"))])
def test_the_probe_measures_a_real_game_and_leaves_its_player_alone(sdxl_dir, fixed_draws, flags):
    game = make_game(sdxl_dir, fixed_draws=fixed_draws)
    before = game.player_hash()
    settings = config("--fixed_draws", str(fixed_draws), "--generation_batch_size", "2", "--max_grad_norm", "0", *flags)
    rates = probe(settings, game, list(examples(2)))
    assert min(rates.draw, rates.encode, rates.pair, rates.update) > 0 and (rates.score > 0) == (fixed_draws > 0)
    weights = 4 * sum(parameter.numel() for parameter in game.player.parameters())
    assert rates.player_bytes == weights and 3 * weights <= rates.checkpoint_bytes < 3.1 * weights
    assert rates.encoded_bytes == 2 * 4 * 16 * 16 + 4 * 6
    moved = max(
        (one - other).abs().max().item()
        for one, other in zip(game.player.parameters(), make_game(sdxl_dir).player.parameters(), strict=True)
    )
    assert moved < 1e-10, (before, game.player_hash())


def test_the_time_of_a_step_is_what_two_more_of_them_take(sdxl_dir, monkeypatch):
    game, asked = make_game(sdxl_dir), []
    monkeypatch.setattr(game, "draw", lambda *given: asked.append(given[-1]) or [Image.new("RGB", (32, 32))] * 2)
    monkeypatch.setattr(
        image_plan, "seconds_of", lambda call, device: call() and 5.0 + 2.0 * asked[-1].num_inference_steps
    )
    monkeypatch.setattr(game, "encode", lambda rows: {"latents": torch.zeros(len(rows), 4, 16, 16)})
    monkeypatch.setattr(image_plan, "_probe_training", lambda *given: (0.0, 1.0, 1.0, 1))
    settings = config("--generation_batch_size", "2")
    rates = probe(settings, game, list(examples(2)))
    assert rates.draw == 5.0 / 2 + 10 * 2.0 / 2


def test_a_batch_that_does_not_fit_is_one_line(sdxl_dir, monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(image_plan, "_probe", full)
    with pytest.raises(InputError, match=r"20\.00 GiB.*lower --train_batch_size"):
        probe(config(), make_game(sdxl_dir), list(examples(2)))


def test_what_does_not_fit_is_said():
    plan = {
        "encode_real_seconds": 1.0, "rounds": seconds(config()), "rows": 12, "processes": 1,
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


def test_judgements_and_previews_are_part_of_the_time():
    def looked(*flags: str) -> float:
        settings = config("--num_held_out", "40", "--validation_prompts", "null", *flags)
        return predict(settings, RATES, Sizes(12, 40, 0), works(settings, 12, 40, 1), 1)[0]["looked"]

    assert looked("--preview_every", "0") == 0
    # Of 4 steps: the start, the second, the last one
    assert looked("--preview_every", "0", "--select_every", "2") == pytest.approx(3 * 40 * 2.0 / 2)
    assert looked("--preview_every", "0", "--select_every", "2", "--select_by", "sharpness") == pytest.approx(
        3 * 32 * 2.0
    )
    by_distance = ("--select_by", "fd", "--distribution_features", "dinov2")
    assert looked("--preview_every", "0", "--select_every", "2", *by_distance) == pytest.approx(3 * 40 * 2.0)
    assert looked("--preview_every", "3") == pytest.approx(2 * 4 * 2.0)
    assert looked() == pytest.approx(3 * 4 * 2.0), (
        "the start, and of 4 steps the first, which is a quarter, and the last"
    )
