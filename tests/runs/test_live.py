"""What a run says of its time while it goes on."""

from pathlib import Path

import pytest

from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.runs import live
from spin_diffusion.runs.live import Stage, seconds_left, stages_of, status_line

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
    assert seconds_left(stages) == pytest.approx(2.0 * (4 + 8 + 4) + 7.0 * 2)
    assert stages[0].seconds == 40.0 and stages[1] == Stage(out / "round-1", "TRAINED", 2, 4.0)
    assert seconds_left(stages[3:]) is None  # without round 1 nobody knows what a step takes
    assert seconds_left(stages_of(config, out, 10, 1, evaluates=False)) == pytest.approx(2.0 * 16)


def test_a_status_line_fits_a_terminal():
    trained = Stage(Path(), "TRAINED", 8, 7000.0)
    line = status_line("winner-preserving round 10", trained, 400_000.0)
    assert line.startswith("winner-preserving round 10: trained in 117 min; some 111.1 h left, until ")
    for left in (None, 0.0, 400_000.0):
        assert len(status_line("space round 10", trained, left)) < 80
    assert status_line("spin round 2", trained, 0.0) == "spin round 2: trained in 117 min"
