"""What a run says of its time while it goes on."""

import json
from pathlib import Path

import pytest

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.runs import live
from spin_diffusion.runs.live import Left, Stage, guessed_paces, stages_of, status_line, time_left
from spin_diffusion.selfplay.one_round import Costs

RUN = "--pretrained_model_name_or_path base --dataset_name data --rounds 2 --max_train_steps [8,4]".split()


@pytest.fixture
def out(monkeypatch) -> Path:
    """A run of two rounds whose second one was drawn; the first was killed at step 6 of 8, and went on."""
    out, training = Path("out"), {"steps": 8, "resumed_from": 6}
    seconds = {"opponent": 1.0, "generated": 30.0, "cached": 9.0, "trained": 3.0, "previewed": 1.0, "evaluated": 7.0}
    records = {
        out / "round-1": {"state": "PROMOTED", "training": training, "seconds": seconds},
        out / "round-2": {"state": "CACHED", "seconds": seconds},
    }
    monkeypatch.setattr(live, "find_record", records.get)
    return out


def test_what_is_left_goes_at_the_pace_of_what_was_timed(out):
    config = parse_config([*RUN, "--compare_with", "[sft]"])
    stages = stages_of(config, out, pairs=10, world=1, evaluates=True)
    # A step takes 2 s: 4 steps of round 2, 8 and 4 of sft's, which draws nothing; each one's last is evaluated
    assert time_left(stages, {}) == Left(2.0 * (4 + 8 + 4) + 7.0 * 2)
    assert stages[0].seconds == 40.0 and stages[1] == Stage(out / "round-1", "TRAINED", 2, 4.0)
    assert time_left(stages[3:], {}) is None  # without round 1 nobody knows what a step takes
    assert time_left(stages[3:], {"TRAINED": 3.0, "EVALUATED": 5.0}) == Left(3.0 * 16 + 5.0 * 2, is_rough=True)
    assert time_left(stages_of(config, out, 10, 1, evaluates=False), {}) == Left(2.0 * 16)


def test_before_a_step_was_timed_its_pace_is_guessed_by_the_plan_or_by_its_flops(tmp_path, monkeypatch):
    ledger = {"generated": {"seconds": 8.0, "flops": 4_000}}
    monkeypatch.setattr(live, "find_record", {tmp_path / "round-1": {"ledger": ledger}}.get)
    costs = Costs(lambda k, phase, samples: 100 * samples if (k, phase) == (1, "trained") else None, 1e9)
    config = parse_config([*RUN, "--output_dir", str(tmp_path), "--train_batch_size", "8"])
    # 16 pairs on two processes are 1,600 FLOPs, and drawing did 500 of them a second
    assert guessed_paces(config, 40, 2, costs) == {"TRAINED": 3.2}
    assert guessed_paces(config, 40, 2, None) == {}
    planned = {"generated": 20.0, "cached": 5.0, "trained": 40.0, "looked": 2.0, "evaluated": 6.0}
    (tmp_path / "plan.json").write_text(json.dumps({"rounds": [{"round": 1} | planned]}))
    assert guessed_paces(config, 40, 2, costs) == {"CACHED": 25.0, "TRAINED": 42.0 / 8, "EVALUATED": 6.0}


def test_a_status_line_fits_a_terminal():
    trained = Stage(Path(), "TRAINED", 8, 7000.0)
    line = status_line("winner-preserving round 10", trained, Left(400_000.0))
    assert line.startswith("winner-preserving round 10: trained in 117 min; some 111.1 h left, until ")
    for left in (None, Left(0.0), Left(400_000.0), Left(400_000.0, is_rough=True)):
        assert len(status_line("space round 10", trained, left)) < 80
    assert status_line("spin round 2", trained, Left(0.0)) == "spin round 2: trained in 117 min"
    assert status_line("spin round 2", trained, Left(90.0, True)).endswith("; roughly 90 s left, a guess")
