"""The best step of a round: what is judged, what is kept of it, what is promoted, and what a kill leaves."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from spin_diffusion.selfplay.looks import Judge, Judged, Preview, paired_change, preview_steps
from spin_diffusion.selfplay.record import Better
from spin_diffusion.selfplay.train_settings import LoraSettings
from spin_diffusion.selfplay.watching import best_of
from spin_diffusion.store.files import read_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.playing import TRAINING, drawing_for_all, make_game, play_all

SELECTING = replace(TRAINING, max_train_steps=4, checkpointing_steps=2, select_every=1, select_by="made up")
PEAK = [0.0, 1.0, 3.0, 2.0, 1.0]
"""What `judge_by` says of the steps of a round that peaks and decays."""


def weights(folder: Path) -> str:
    return file_hash(folder / "unet" / "diffusion_pytorch_model.safetensors")


def judge_by(means: list[float], key: str = "made up", better: Better = "higher") -> Judge:
    """A judge of two samples, whose mean at each step is known."""

    def judge(folder: Path) -> Judged:
        torch.rand(3)  # a judge may disturb what is random
        mean = means[int(folder.name.removeprefix("step-"))]
        return Judged([10 + mean, 20 + mean], ["a", "b"], 2)

    return Judge("made up", key, judge, better=better)


def test_a_change_is_the_paired_difference_to_the_start() -> None:
    start, values = [1.0, 5.0, 2.0, 7.0], [1.5, 5.1, 2.9, 7.7]
    expected = stats.ttest_rel(values, start).confidence_interval()
    found = paired_change(values, start, ["a", "b", "c", "d"])
    assert found == pytest.approx({"mean": 0.55, "low": expected.low, "high": expected.high})
    assert paired_change([None, 5.1], [1.0, 5.0], ["a", "b"]) is None, "the player spoilt a sample"
    assert paired_change([float("nan"), 5.1], [1.0, 5.0], ["a", "b"]) is None
    only = paired_change([2.0, None, 5.5, 1.0], [1.0, None, 5.0, 1.0], ["a", "b", "c", "d"])
    assert only is not None and only["mean"] == pytest.approx(0.5), "what the start spoilt is left out"


def test_the_first_of_the_best_steps_after_the_start_is_the_best() -> None:
    curve = [{"step": step, "mean": mean, "low": None, "high": None} for step, mean in enumerate([9.0, 1, 3, None, 3])]
    assert best_of(curve, "higher")["step"] == 2 and best_of(curve, "lower")["step"] == 1
    assert best_of(curve[:1], "higher") is None


def test_where_lower_is_better_the_lowest_step_below_the_start_is_promoted(sdxl_dir, tmp_path, capsys):
    falls = judge_by([0, -1, -3, 2, -3], better="lower")
    (record,) = play_all(sdxl_dir, tmp_path / "falls", SELECTING, judge=falls, rounds=1)
    assert record["state"] == "PROMOTED" and record["training"]["selection"]["step"] == 2
    assert "best step 2 of 4, by made up (lower is better) -3.0000" in capsys.readouterr().out
    rises = judge_by([0, 4, 3, 2, 1], better="lower")
    (record,) = play_all(sdxl_dir, tmp_path / "rises", SELECTING, judge=rises, rounds=1)
    assert record["state"] == "REJECTED" and record["training"]["selection"]["step"] == 4


@pytest.fixture(scope="module")
def peaked(sdxl_dir, tmp_path_factory) -> Path:
    """A run whose round is at its best after two of four steps."""
    out = tmp_path_factory.mktemp("peaked")
    with drawing_for_all():
        play_all(sdxl_dir, out, SELECTING, judge=judge_by(PEAK), rounds=1)
    return out


@drawing_for_all()
def test_the_best_step_is_promoted_as_if_the_round_had_ended_there(peaked, sdxl_dir, tmp_path):
    play_all(sdxl_dir, tmp_path, replace(TRAINING, max_train_steps=2), rounds=1)
    assert weights(peaked) == weights(peaked / "round-1") == weights(tmp_path)
    record = read_json(peaked / "round-1" / "round.json")
    selection = record["training"]["selection"]
    assert [entry["mean"] for entry in selection["curve"]] == PEAK and selection["step"] == 2
    assert record["decision"] == "promoted" and record["ledger"]["judged"]["samples"] == 10
    assert not (peaked / "round-1" / "best").exists()


@drawing_for_all()
def test_of_a_moving_average_it_is_the_average_of_that_step(sdxl_dir, tmp_path):
    averaged = {"use_ema": True, "ema_decay": 0.5}
    play_all(sdxl_dir, tmp_path / "selected", replace(SELECTING, **averaged), judge=judge_by(PEAK), rounds=1)
    play_all(sdxl_dir, tmp_path / "ended", replace(TRAINING, max_train_steps=2, **averaged), rounds=1)
    assert weights(tmp_path / "selected") == weights(tmp_path / "ended")


def test_a_round_that_is_never_better_than_its_start_is_rejected_with_its_best_step(sdxl_dir, tmp_path, capsys):
    (record,) = play_all(sdxl_dir, tmp_path, SELECTING, judge=judge_by([0, -3, -1, -2, -4]), rounds=1)
    assert record["state"] == "REJECTED" and record["training"]["selection"]["step"] == 2
    assert "no step is better than its start: best step 2 of 4, by made up -1.0000" in record["rejected_because"]
    assert not (tmp_path / "unet").exists()
    assert max(map(len, capsys.readouterr().out.splitlines())) < 200


def test_looking_changes_nothing_else(sdxl_dir, tmp_path):
    game, looked_at = make_game(sdxl_dir), []

    def draw(folder: Path, name: str, step: int) -> int:
        looked_at.append((folder.name, name, step))
        torch.rand(3)  # whoever looks may disturb what is random
        return len(game.draw(game.player, ["a fox"], [step], game.opponent_sampling))

    last_is_best = judge_by([0, 1, 2, 3, 4])
    play_all(sdxl_dir, tmp_path / "judged", SELECTING, game, judge=last_is_best, preview=Preview(3, draw), rounds=1)
    assert looked_at == [("step-000000", "spin/round-1", 0), ("step-000003", "spin/round-1", 3)]
    play_all(sdxl_dir, tmp_path / "not", TRAINING, rounds=1)
    assert weights(tmp_path / "judged") == weights(tmp_path / "not")


@pytest.mark.parametrize("how", [{}, {"fixed_draws": 1}, {"lora": LoraSettings(use_lora=True, rank=2)}])
def test_by_the_gap_the_step_is_kept_that_tells_held_out_pictures_apart_best(how, sdxl_dir, tmp_path, capsys):
    by_gap = replace(SELECTING, select_by="gap", select_every=2, max_train_steps=5)
    (record,) = play_all(sdxl_dir, tmp_path, by_gap, make_game(sdxl_dir, **how), held_out=4, rounds=1)
    selection, gap = record["training"]["selection"], record["held_out_gap"]
    assert [entry["step"] for entry in selection["curve"]] == [0, 2, 4, 5], "the last step is judged in any case"
    best = max(selection["curve"][1:], key=lambda entry: entry["mean"])
    assert selection["step"] == best["step"]
    # The gap of the round is that of the step that was kept: it was judged by the same pairs at the same noise
    assert gap["mean"] == pytest.approx(best["mean"], abs=1e-6)
    lines = [line for line in capsys.readouterr().out.splitlines() if "best step" in line]
    assert len(lines) == 1 + (best["mean"] <= 0) and len(lines[0]) <= 80


class Killed(BaseException):
    """Stands for a SIGKILL: no handler may catch it."""


@drawing_for_all()
def test_killed_at_any_rename_of_its_training_a_round_ends_with_the_same_bytes(peaked, sdxl_dir, tmp_path, monkeypatch):
    rename, game, until_death = os.replace, make_game(sdxl_dir), [0]

    def dying(source: Path, target: Path) -> None:
        if (
            Path(target).parent.name == "round-1"
            and "best" in str(target) + str(source)
            or "checkpoint-" in Path(target).name
        ):
            until_death[0] -= 1
            if until_death[0] == 0:
                raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "replace", dying)
    expected = read_json(peaked / "round-1" / "round.json")["training"]
    for death in range(1, 100):
        out = tmp_path / str(death)
        until_death[0] = death
        try:
            play_all(sdxl_dir, out, SELECTING, make_game(sdxl_dir), judge=judge_by(PEAK), rounds=1)
            break
        except Killed:
            play_all(sdxl_dir, out, SELECTING, game, judge=judge_by(PEAK), rounds=1)
        found = read_json(out / "round-1" / "round.json")["training"]
        assert weights(out) == weights(peaked) and found["selection"] == expected["selection"], death
        shutil.rmtree(out)
    assert death > 4


def test_another_judge_in_the_middle_of_a_round_is_refused(sdxl_dir, tmp_path, monkeypatch):
    dies = judge_by([0, 1, 3])  # it has nothing to say of the third step
    with pytest.raises(IndexError):
        play_all(sdxl_dir, tmp_path, SELECTING, judge=dies, rounds=1)
    with pytest.raises(InputError, match="its steps so far were judged by another made up .*made up, now other"):
        play_all(sdxl_dir, tmp_path, SELECTING, judge=judge_by(PEAK, "other"), rounds=1)


def test_previews_come_early_and_at_the_end_of_a_round_unless_they_are_asked_for():
    assert sorted(preview_steps(None, 500)) == [0, 32, 125, 500]
    assert sorted(preview_steps(None, 1)) == [0, 1]
    assert list(preview_steps(200, 500)) == [0, 200, 400] and not preview_steps(0, 500)
