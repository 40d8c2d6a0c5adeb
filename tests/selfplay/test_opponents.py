"""Which earlier selves draw and which one anchors the score, rule by rule, on a tiny pipeline."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from spin_diffusion.runs.run import lineage
from spin_diffusion.samples.scores import mixture_score
from spin_diffusion.selfplay import train as train_module
from spin_diffusion.selfplay.opponents import OPPONENTS, pool
from spin_diffusion.selfplay.round_settings import OpponentName
from spin_diffusion.selfplay.train import Average
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.run_dir import file_hash
from tests.playing import TRAINING, make_game, play_all

ONE_STEP = replace(TRAINING, max_train_steps=1, lr_warmup_steps=0)


class Killed(BaseException):
    """Stands for a SIGKILL: no handler may catch it."""


def weights_of(folder) -> str:
    return file_hash(folder / "unet" / "diffusion_pytorch_model.safetensors")


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kill_after(monkeypatch, step: int) -> None:
    """Stop training for good when `step` optimizer steps of a round have been taken."""
    take_step = train_module._take_step

    def dies(number, *args):
        if number == step:
            raise Killed
        return take_step(number, *args)

    monkeypatch.setattr(train_module, "_take_step", dies)


def test_every_opponent_that_can_be_named_has_its_rule():
    assert set(OPPONENTS) == set(get_args(OpponentName))


def test_rules_name_the_selves_and_their_shares():
    assert OPPONENTS["latest"]([1, 2]) == {2: 1.0} and OPPONENTS["latest"]([]) == {0: 1.0}
    assert OPPONENTS["base"]([1, 2]) == {0: 1.0}
    assert OPPONENTS["last_two"]([1, 3]) == {1: 0.5, 3: 0.5}
    assert pool([1, 2]) == pytest.approx({2: 1 / 3, 1: 1 / 3, 0: 1 / 3})
    assert pool([]) == {0: 1.0}


def test_a_pool_is_all_earlier_selves_alike():
    assert pool([1, 2, 4]) == {0: 0.25, 1: 0.25, 2: 0.25, 4: 0.25}


def test_a_mixtures_score_is_the_logarithm_of_its_density():
    density = torch.tensor([[0.2, 0.5], [0.6, 0.1]])
    found = mixture_score(density.log(), torch.tensor([0.25, 0.75]))
    assert torch.allclose(found.exp(), torch.tensor([0.25 * 0.2 + 0.75 * 0.6, 0.25 * 0.5 + 0.75 * 0.1]))


def test_each_sample_of_a_pool_says_who_drew_it(sdxl_dir, tmp_path):
    records = play_all(sdxl_dir, tmp_path, ONE_STEP, rounds=3, opponent="pool")
    members = records[2]["opponent"]["members"]
    assert [found["round"] for found in members] == [0, 1, 2]
    known = {found["hash"] for found in members}
    drawn = [row["opponent"] for path in (tmp_path / "round-3" / "samples").glob("*") for row in read_rows(path)]
    assert len(known) == 3 and set(drawn) <= known and len(set(drawn)) > 1
    counts = {str(found["round"]): drawn.count(found["hash"]) for found in members}
    assert records[2]["drawn"] == counts and sum(counts.values()) == len(drawn)
    told = lineage(records)[2]
    assert told["opponent"]["members"] == members and told["drawn"] == counts and told["started_from"] == 2
    assert records[2]["opponent"]["anchors"] == [dict(members[2], weight=1.0)]  # the newest anchors
    assert records[2]["opponent"]["rule"] == "pool"


def test_the_base_can_anchor_what_the_latest_draws(sdxl_dir, tmp_path):
    records = play_all(sdxl_dir, tmp_path, anchor="base")
    drawn_by, anchor = records[1]["opponent"]["members"], records[1]["opponent"]["anchors"]
    assert [found["round"] for found in drawn_by] == [1] and [found["round"] for found in anchor] == [0]
    assert drawn_by[0]["hash"] != anchor[0]["hash"] == records[0]["opponent"]["hash"]
    # The second round starts where the first ended, so its r are not 0
    assert entries(tmp_path / "round-1")[0]["r_real"] == 0
    assert entries(tmp_path / "round-2")[0]["r_real"] != 0


def test_the_average_is_the_plain_recurrence():
    weight = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    average = Average([weight], 0.9)
    with torch.no_grad():
        for value in (1.0, 2.0):
            weight.fill_(value)
            average.step([weight])
    assert torch.allclose(average.weights[0], torch.tensor([0.9 * 0.1 + 0.2, 0.9 * (0.9 + 0.1) + 0.2]))


AVERAGED = {"training": replace(TRAINING, ema_decay=0.5), "rounds": 2, "opponent": "ema"}


@pytest.fixture(scope="module")
def averaged(sdxl_dir, tmp_path_factory):
    """The folder of a run with an averaged opponent, and its records."""
    folder = tmp_path_factory.mktemp("averaged")
    return folder, play_all(sdxl_dir, folder, **AVERAGED)


def test_an_averaged_opponent_follows_the_player_across_rounds(sdxl_dir, averaged):
    folder, records = averaged

    def load(*below):
        return load_file(folder.joinpath(*below, "unet", "diffusion_pytorch_model.safetensors"))

    base = make_game(sdxl_dir).player.state_dict()
    player, average = load("round-1"), load("round-1", "ema")
    # Between where the round began and where it ended
    for name in ("conv_in.weight", "conv_out.weight"):
        assert 0 < (average[name] - base[name]).norm() < (player[name] - base[name]).norm()
    assert weights_of(folder) == weights_of(folder / "round-2")
    assert not (folder / "ema").exists()
    # The second round's opponent is the average, its player goes on from the player
    assert records[1]["opponent"]["members"][0]["hash"] != records[0]["opponent"]["hash"]
    second = entries(folder / "round-2")[0]
    assert second["r_real"] != 0 or second["r_generated"] != 0


def test_the_average_goes_on_from_the_round_before(sdxl_dir, tmp_path):
    play_all(sdxl_dir, tmp_path, replace(ONE_STEP, ema_decay=0.75), rounds=3, opponent="ema")

    def load(*folder):
        return load_file(tmp_path.joinpath(*folder, "unet", "diffusion_pytorch_model.safetensors"))

    average = {name: tensor.double() for name, tensor in make_game(sdxl_dir).player.state_dict().items()}
    for k in (1, 2, 3):
        player, found = load(f"round-{k}"), load(f"round-{k}", "ema")
        average = {name: 0.75 * tensor + 0.25 * player[name].double() for name, tensor in average.items()}
        apart = max((found[name] - tensor).abs().max().item() for name, tensor in average.items())
        moved = max((player[name] - tensor).abs().max().item() for name, tensor in average.items())
        assert apart < 1e-3 * moved, k


def test_a_killed_run_with_an_averaged_opponent_ends_with_the_same_bytes(sdxl_dir, averaged, tmp_path, monkeypatch):
    for kill_at in (1, 3):
        with monkeypatch.context() as patch:
            kill_after(patch, kill_at)
            with pytest.raises(Killed):
                play_all(sdxl_dir, tmp_path, **AVERAGED)
    play_all(sdxl_dir, tmp_path, **AVERAGED)
    for name in ("unet", "round-1/ema/unet", "round-2/ema/unet"):
        name += "/diffusion_pytorch_model.safetensors"
        assert file_hash(averaged[0] / name) == file_hash(tmp_path / name)


def test_the_anchored_loss_is_what_is_trained(sdxl_dir, tmp_path):
    first = replace(TRAINING, max_train_steps=1)
    plain = play_all(sdxl_dir, tmp_path / "plain", first, rounds=1)
    anchored = play_all(sdxl_dir, tmp_path / "anchored", first, rounds=1, objective_options={"sft_weight": 0.5})
    score = entries(tmp_path / "plain" / "round-1")[0]["score_real"]
    difference = anchored[0]["training"]["loss"] - plain[0]["training"]["loss"]
    assert difference == pytest.approx(-0.5 * 2000.0 * score, rel=1e-5)


def test_a_rival_can_take_its_generated_side_from_the_data(sdxl_dir, tmp_path):
    from spin_diffusion.selfplay.rounds import SelfPlay, play
    from tests.playing import ROUNDS, prepare_data

    game = make_game(sdxl_dir)
    prepare_data(game, tmp_path / "data", losers=True)
    rounds = replace(ROUNDS, rounds=1, objective="hinge", generated_from="data")
    records = play(SelfPlay(game, tmp_path / "data", tmp_path, rounds, TRAINING, game.accelerator))
    assert records[0]["generated"] == "data" and not (tmp_path / "round-1" / "samples").exists()
