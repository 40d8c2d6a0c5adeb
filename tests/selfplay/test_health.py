"""Invariants at a round's start, and alarms: each in a case where it fires and one where it does not."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch

from spin_diffusion.diffusion.game import DiffusionGame
from spin_diffusion.selfplay import health
from spin_diffusion.selfplay import train as train_module
from spin_diffusion.selfplay.game import PairScores
from spin_diffusion.selfplay.health import Finding
from spin_diffusion.selfplay.one_round import Judgement
from spin_diffusion.selfplay.rounds import SelfPlay, play
from spin_diffusion.selfplay.tracking import by_quarter, saturated
from spin_diffusion.selfplay.train_settings import HealthSettings
from spin_diffusion.store.run_dir import file_hash
from tests.playing import ROUNDS, TRAINING, drawing_for_all, make_game, play_all, prepare_data


def start(r: float = 0.0, loss: float = math.log(2), beta: float = 5000.0) -> None:
    zero, rs = torch.zeros(4), torch.full((4,), r)
    scores = PairScores(rs, zero, zero, zero)
    health.check_start(scores, torch.full((4,), loss), lambda at_zero: torch.full((4,), math.log(2)), 1e-5, beta)


def test_a_round_that_starts_with_equal_models_passes():
    start()


@pytest.mark.parametrize("r, loss", [(1e-3, math.log(2)), (-1e-3, math.log(2)), (0.0, 2.35)])
def test_a_round_that_starts_with_unequal_models_is_stopped(r, loss):
    with pytest.raises(AssertionError, match="step 0"):
        start(r, loss)


def test_the_generated_side_counts_at_the_start_and_rounding_does_not():
    at_zero, zero = torch.full((4,), math.log(2)), torch.zeros(4)
    scores = PairScores(zero, torch.full((4,), 1e-3), zero, zero)
    with pytest.raises(AssertionError, match="disagree by 0.001"):
        health.check_start(scores, at_zero, lambda scores: at_zero, 1e-5, 5000.0)
    start(loss=math.log(2) + 5e-6, beta=0.01)  # a small beta makes the loss no more exact than fp32 is


@pytest.mark.parametrize("loss, norm, what", [(math.nan, 1.0, "loss"), (1.0, math.inf, "gradient norm")])
def test_what_is_not_finite_stops_the_run_with_step_timesteps_and_samples(loss, norm, what):
    with pytest.raises(FloatingPointError) as error:
        health.check_finite(
            loss,
            norm,
            step=7,
            levels=torch.tensor([0.1, 0.9]),
            ids=lambda: ["a1", "b2"],
            round_=2,
            level_name="timesteps",
        )
    for part in ("round 2", "step 7", what, "0.100", "0.900", "a1, b2"):
        assert part in str(error.value)


def test_finite_values_pass():
    health.check_finite(0.5, 3.0, step=0, levels=torch.tensor([0.5]), ids=list, round_=1, level_name="timesteps")


# The rules: each in a round where it fires and in one where it does not

BETA = 2000.0


def findings(history: health.History, beta: float, settings: HealthSettings) -> list[health.Finding]:
    """What the rules say that they have not said before in the history."""
    return health.findings(history, beta, settings, health.said_in(history))


def history(steps: int = 40, **changed) -> list[dict]:
    """A healthy round, step by step; `changed`: name -> a value for every step, or a function of the step."""
    entries = []
    for step in range(steps):
        entry = {
            "step": step + 1,
            "r_real": 1e-4 * (1 + 0.1 * (-1) ** step),
            "r_generated": -1e-4,
            "r_real_by_quarter": [1e-4] * 4,
            "margin": 2e-4,
            "implicit_accuracy": 0.8,
            "saturation": 0.1,
            "score_real": -0.1,
            "grad_norm": 1.0,
            "distance": 0.01,
        }
        values = {name: value(step) if callable(value) else value for name, value in changed.items()}
        entries.append(entry | values)
    return entries


ROLL_BACK = HealthSettings(distance="roll_back")
WATCHED = HealthSettings(saturation=0.5)

FIRES = {
    "forgetting": {"r_real": lambda step: -1e-4 * (1 + 0.1 * (-1) ** step)},
    "forgetting_quarter": {"r_real_by_quarter": [1e-4, 3e-4, None, -1e-4]},
    "saturation": {"saturation": 0.8},
    "error_growth": {"score_real": -0.12, "r_real": -0.02},
    "distance": {"distance": 0.3},
    "gradient_spike": {"grad_norm": lambda step: 30.0 if step == 39 else 1.0},
    "nothing_learnt": {"steps": 70, "implicit_accuracy": 0.505, "margin": 1e-6},
}
"""What a round has to look like for each rule to speak."""

NEARLY = {
    "forgetting": {"r_real": -1e-6},  # below 0, but too little to matter to the objective
    "forgetting_quarter": {"r_real_by_quarter": [1e-4, 3e-4, None, -1e-6]},
    "saturation": {"saturation": 0.45},
    "error_growth": {"score_real": -0.105, "r_real": -0.005},
    "distance": {"distance": 0.19},
    "gradient_spike": {"grad_norm": lambda step: 9.0 if step == 39 else 1.0},
    "nothing_learnt": {"steps": 59, "implicit_accuracy": 0.505, "margin": 1e-6},
}


def test_every_rule_has_its_two_cases_and_its_setting():
    assert set(FIRES) == set(NEARLY) == set(health.RULES)
    assert {field.name for field in dataclasses.fields(HealthSettings)} == set(health.RULES)


@pytest.mark.parametrize("rule", FIRES)
def test_a_rule_fires_and_names_a_setting(rule):
    sentence = health.RULES[rule](history(**FIRES[rule]), BETA, WATCHED)
    assert sentence is not None and "--" in sentence and len(sentence) < 200
    assert findings(history(**FIRES[rule]), BETA, WATCHED)


@pytest.mark.parametrize("rule", NEARLY)
def test_a_rule_does_not_fire_just_below(rule):
    assert health.RULES[rule](history(**NEARLY[rule]), BETA, WATCHED) is None


def test_a_healthy_round_is_left_alone():
    assert findings(history(200), BETA, WATCHED) == []


@pytest.mark.parametrize("rule", ["forgetting", "forgetting_quarter", "saturation", "error_growth"])
def test_no_rule_speaks_before_its_window_is_full(rule):
    assert health.RULES[rule](history(**{"steps": 19} | FIRES[rule]), BETA, WATCHED) is None


@pytest.mark.parametrize("rule", ["forgetting", "forgetting_quarter", "saturation", "error_growth"])
def test_a_rule_speaks_once_its_window_is_full(rule):
    assert health.RULES[rule](history(**{"steps": 20} | FIRES[rule]), BETA, WATCHED) is not None


def test_a_mean_that_forgets_is_not_said_again_of_a_quarter():
    both = FIRES["forgetting"] | FIRES["forgetting_quarter"]
    assert [one.rule for one in findings(history(**both), BETA, WATCHED)] == ["forgetting"]


def test_noise_around_zero_is_no_forgetting():
    noisy = history(r_real=lambda step: -1e-4 + 5e-3 * (-1) ** step)
    assert health.forgetting(noisy, BETA, WATCHED) is None


def test_a_single_step_of_told_apart_pairs_is_no_saturation():
    assert health.saturation(history(saturation=lambda step: float(step == 39)), BETA, WATCHED) is None


def test_errors_and_distances_are_those_of_now():
    late = {"score_real": lambda step: -0.1 if step < 20 else -0.115, "r_real": lambda step: -0.015 * (step >= 20)}
    assert health.error_growth(history(**late), BETA, WATCHED) is not None  # 15 % by now, 7 % over the whole round
    over = {"score_real": lambda step: -0.1 if step >= 20 else -0.2, "r_real": lambda step: -0.1 * (step < 20)}
    assert health.error_growth(history(**over), BETA, WATCHED) is None
    assert health.distance(history(distance=lambda step: 0.3 if step == 39 else 0.1), BETA, WATCHED) is not None
    assert health.distance(history(distance=lambda step: 0.1 if step == 39 else 0.3), BETA, WATCHED) is None


def test_a_spike_is_held_against_the_steps_before_it_alone():
    # The median of the 20 before is 2; with the spike in place of the oldest it would be 3
    norms = [1.0] * 10 + [3.0] * 10 + [25.0]
    assert health.gradient_spike(history(21, grad_norm=lambda step: norms[step]), BETA, WATCHED) is not None


def test_after_steps_without_any_gradient_there_is_no_usual_one():
    norms = [0.0] * 20 + [1.0]
    assert health.gradient_spike(history(21, grad_norm=lambda step: norms[step]), BETA, WATCHED) is None


def test_an_accuracy_within_its_own_noise_is_chance():
    # One pair a step, right in three of five: 0.6, with a standard error of 0.11
    noisy = FIRES["nothing_learnt"] | {"implicit_accuracy": lambda step: float(step % 5 < 3)}
    assert health.nothing_learnt(history(**noisy), BETA, WATCHED) is not None


def test_pairs_told_apart_the_wrong_way_round_are_not_nothing():
    wrong = FIRES["nothing_learnt"] | {"margin": -1e-3}
    assert health.nothing_learnt(history(**wrong), BETA, WATCHED) is None


def test_saturation_is_only_watched_for_when_asked():
    full = history(saturation=1.0)
    assert findings(full, BETA, HealthSettings()) == []
    assert [one.action for one in findings(full, BETA, HealthSettings(saturation=0.9))] == ["stop"]


def test_an_objective_without_a_generated_side_is_not_asked_what_it_tells_apart():
    assert health.nothing_learnt(history(**FIRES["nothing_learnt"], r_generated=0.0), BETA, WATCHED) is None


def test_what_was_said_is_not_said_again_and_what_is_ignored_is_silent():
    spoken = history(**FIRES["distance"])
    found = findings(spoken, BETA, WATCHED)
    assert [(one.rule, one.action) for one in found] == [("distance", "warn")]
    spoken[-1]["findings"] = {"distance": found[0].sentence}
    assert findings(spoken + history(1, distance=0.4), BETA, WATCHED) == []
    assert findings(history(**FIRES["distance"]), BETA, replace(WATCHED, distance="ignore")) == []


def test_a_roll_back_goes_before_a_stop_and_a_warning_ends_nothing():
    bad = history(**FIRES["distance"] | FIRES["saturation"])
    assert health.gravest(findings(bad, BETA, WATCHED)).rule == "saturation"
    found = findings(bad, BETA, replace(WATCHED, distance="roll_back"))
    assert health.gravest(found).rule == "distance"
    assert health.gravest(findings(history(**FIRES["distance"]), BETA, WATCHED)) is None


def test_the_smoothed_mean_is_the_plain_recurrence():
    mean, error = health.smoothed([1.0, 3.0, 2.0])
    assert mean == pytest.approx(2.0) and error == pytest.approx(((1 + 9 + 4) / 3 - 4) ** 0.5 / 20**0.5)
    late, _ = health.smoothed([0.0] * 100 + [1.0])
    assert late == pytest.approx(1 / 20)
    values = [math.sin(7 * step) for step in range(60)]
    by_hand = square = 0.0
    for number, value in enumerate(values, start=1):
        weight = max(1 / 20, 1 / number)
        by_hand, square = by_hand + weight * (value - by_hand), square + weight * (value**2 - square)
        mean, error = health.smoothed(values[:number])
        assert mean == pytest.approx(by_hand, abs=1e-12)
        assert error == pytest.approx((max(square - by_hand**2, 0) / 20) ** 0.5, abs=1e-8)


# In real rounds


@pytest.fixture
def quick(monkeypatch):
    """Windows of two steps."""
    monkeypatch.setattr(health, "WINDOW_STEPS", 2)
    return replace(TRAINING, max_train_steps=6, learning_rate=1e-5)


def spoil(monkeypatch, step: int) -> None:
    """From this step of a round on, every step is logged with a distance beyond the limit."""
    take_step = train_module._take_step
    at = {"step": 0}

    def watching(number, *args):
        at["step"] = number
        return take_step(number, *args)

    monkeypatch.setattr(train_module, "_take_step", watching)
    monkeypatch.setattr(DiffusionGame, "distance", lambda game: 0.5 if at["step"] + 1 >= step else 0.01)


def player_after(sdxl_dir, folder, training, steps: int) -> str:
    play_all(
        sdxl_dir, folder, replace(training, max_train_steps=steps, health=HealthSettings(distance="ignore")), rounds=1
    )
    return file_hash(folder / "round-1/unet/diffusion_pytorch_model.safetensors")


def test_what_a_rule_is_not_shown_of_a_long_round_would_change_nothing():
    values = [math.sin(step) + (5.0 if step < 100 else 0.0) for step in range(3000)]
    assert health.smoothed(values[-health.LOOK_BACK :]) == pytest.approx(health.smoothed(values), rel=1e-12)
    late = history(3000) + history(100, **FIRES["forgetting"])
    (found,) = findings(late, BETA, WATCHED)
    assert found.sentence == health.forgetting(late, BETA, WATCHED)


@drawing_for_all()
def test_a_round_that_is_stopped_keeps_its_player(sdxl_dir, tmp_path, monkeypatch, quick):
    spoil(monkeypatch, 4)
    records = play_all(sdxl_dir, tmp_path / "stopped", replace(quick, health=HealthSettings(distance="stop")), rounds=1)
    ended = records[0]["training"]["ended_by"]
    assert (ended["rule"], ended["action"], ended["kept_step"]) == ("distance", "stop", 4)
    assert records[0]["training"]["steps"] == 4 and records[0]["state"] == "PROMOTED"
    assert file_hash(tmp_path / "stopped/round-1/unet/diffusion_pytorch_model.safetensors") == player_after(
        sdxl_dir, tmp_path / "plain", quick, 4
    )


def test_a_warning_is_recorded_and_the_round_goes_on(sdxl_dir, tmp_path, monkeypatch, quick, capsys):
    spoil(monkeypatch, 4)
    records = play_all(sdxl_dir, tmp_path, quick, rounds=1)
    assert records[0]["training"]["steps"] == 6 and records[0]["training"]["ended_by"] is None
    said = records[0]["training"]["health"][0]
    assert (said["step"], said["rule"], said["action"]) == (4, "distance", "warn")
    assert said["sentence"].startswith("the weights are 50%")
    assert "--learning_rate" in capsys.readouterr().out


def test_what_to_do_is_said_at_a_rules_first_sight_and_noted_every_time(sdxl_dir, tmp_path, monkeypatch, quick, capsys):
    spoil(monkeypatch, 4)
    records = play_all(sdxl_dir, tmp_path, quick, rounds=2)
    first, second = (line for line in capsys.readouterr().out.splitlines() if ", distance: " in line)
    assert "the weights are 50%" in first and "--learning_rate" in first
    assert "the weights are 50%" in second and "--learning_rate" not in second
    assert all("--learning_rate" in record["training"]["health"][0]["sentence"] for record in records)


@drawing_for_all()
def test_a_round_is_rolled_back_to_before_the_rules_window(sdxl_dir, tmp_path, monkeypatch, quick):
    spoil(monkeypatch, 6)
    quick = replace(quick, use_ema=True)
    records = play_all(sdxl_dir, tmp_path / "back", replace(quick, health=ROLL_BACK), rounds=1)
    ended = records[0]["training"]["ended_by"]
    assert (ended["action"], ended["kept_step"]) == ("roll_back", 4) and records[0]["state"] == "PROMOTED"
    assert file_hash(tmp_path / "back/round-1/unet/diffusion_pytorch_model.safetensors") == player_after(
        sdxl_dir, tmp_path / "plain", quick, 4
    )
    assert not (tmp_path / "back/round-1/healthy").exists()


@drawing_for_all()
def test_a_rule_in_the_middle_of_a_window_has_looked_back_a_whole_one(sdxl_dir, tmp_path, monkeypatch, quick):
    def at_step_five(history, beta, settings, said):
        return [Finding("distance", "roll_back", "moved")] if len(history) == 5 else []

    monkeypatch.setattr(health, "findings", at_step_five)
    records = play_all(sdxl_dir, tmp_path / "back", replace(quick, health=ROLL_BACK), rounds=1)
    assert records[0]["training"]["ended_by"]["kept_step"] == 2  # 5 - 2 = 3, and players are kept at 0, 2, 4
    monkeypatch.undo()
    monkeypatch.setattr(health, "WINDOW_STEPS", 2)
    assert file_hash(tmp_path / "back/round-1/unet/diffusion_pytorch_model.safetensors") == player_after(
        sdxl_dir, tmp_path / "plain", quick, 2
    )


def test_a_round_rolled_back_to_its_start_is_rejected_and_says_why(sdxl_dir, tmp_path, monkeypatch, quick):
    spoil(monkeypatch, 2)
    records = play_all(sdxl_dir, tmp_path, replace(quick, health=ROLL_BACK), rounds=1)
    assert [record["state"] for record in records] == ["REJECTED"]
    assert "rolled back to its start, distance" in records[0]["rejected_because"]
    assert not (tmp_path / "unet").exists()


def test_a_round_rolled_back_to_its_start_is_rejected_whatever_its_evaluation_says(
    sdxl_dir, tmp_path, monkeypatch, quick
):
    spoil(monkeypatch, 2)
    game = make_game(sdxl_dir)
    prepare_data(game, tmp_path / "data")
    records = play(SelfPlay(
        game, tmp_path / "data", tmp_path, replace(ROUNDS, rounds=1), replace(quick, health=ROLL_BACK),
        game.accelerator, lambda k, folder, parent: Judgement({"score": 1.0}),
    ))  # fmt: skip
    assert records[0]["state"] == "REJECTED" and "rolled back to its start" in records[0]["rejected_because"]


def test_a_round_killed_twice_that_rolls_back_ends_with_the_same_bytes(sdxl_dir, tmp_path, monkeypatch, quick):
    quick = replace(quick, health=ROLL_BACK, use_ema=True)
    spoil(monkeypatch, 6)
    whole = play_all(sdxl_dir, tmp_path / "whole", quick, rounds=1)
    watching = train_module._take_step
    for kill_at in (3, 5):

        def dies(number, *args, kill_at=kill_at):
            if number == kill_at:
                raise KeyboardInterrupt
            return watching(number, *args)

        monkeypatch.setattr(train_module, "_take_step", dies)
        with pytest.raises(KeyboardInterrupt):
            play_all(sdxl_dir, tmp_path / "killed", quick, rounds=1)
    monkeypatch.setattr(train_module, "_take_step", watching)
    again = play_all(sdxl_dir, tmp_path / "killed", quick, rounds=1)
    name = "round-1/unet/diffusion_pytorch_model.safetensors"
    assert file_hash(tmp_path / "whole" / name) == file_hash(tmp_path / "killed" / name)
    assert whole[0]["training"]["ended_by"] == again[0]["training"]["ended_by"]


def test_the_distance_is_that_of_the_weights(sdxl_dir):
    game = make_game(sdxl_dir)
    assert game.distance() == 0
    with torch.no_grad():
        for parameter in game.player.parameters():
            parameter *= 1.25
    assert game.distance() == pytest.approx(0.25, rel=1e-5)


def test_saturation_counts_pairs_beyond_four():
    assert saturated(torch.tensor([0.1, -0.1, 0.01]), beta=50.0).tolist() == [1.0, 1.0, 0.0]


def test_quarters_average_their_own_pairs():
    values, levels = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.2, 0.999])
    assert by_quarter(values, levels) == [2.0, None, None, 5.0]
