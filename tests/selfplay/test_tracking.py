"""Trackers get every step of every round."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from spin_diffusion.selfplay.tracking import log_phase, log_step, name_axis, start_trackers
from tests.playing import make_game, play_all


class Recorder:
    """A tracker that keeps what it is told, and refuses steps that fall, as wandb does."""

    def __init__(self, name: str) -> None:
        self.name, self.told, self.axes = name, [], []
        self.tracker = SimpleNamespace(define_metric=lambda of, step_metric: self.axes.append((of, step_metric)))

    def log(self, values, step=None):
        self.told.append((step, values))


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_the_second_round_is_told_like_the_first(name):
    tracker = Recorder(name)
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [tracker]
    for round_ in ("spin/round-1", "spin/round-2"):
        name_axis(round_, accelerator)
        for step in (1, 2):
            log_step(round_, {f"{round_}/train_loss": 0.5}, step, accelerator)
    if name == "wandb":
        assert tracker.axes == [(f"spin/round-{k}/*", f"spin/round-{k}/step") for k in (1, 2)]
        assert [step for step, _ in tracker.told] == [None] * 4  # its own count goes on
        assert tracker.told[2][1] == {"spin/round-2/train_loss": 0.5, "spin/round-2/step": 1}
    else:
        assert tracker.axes == [] and [step for step, _ in tracker.told] == [1, 2, 1, 2]


def test_a_run_that_goes_on_goes_on_in_its_trackers(tmp_path, monkeypatch):
    opened = []
    accelerator = Accelerator(cpu=True)
    told = lambda project, config, init_kwargs: opened.append((project, config, init_kwargs))  # noqa: E731
    monkeypatch.setattr(accelerator, "init_trackers", told)
    for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    for run in ("first", "first", "second"):
        start_trackers("spin", {"beta": 1.0}, tmp_path / run, tmp_path / run / "logs", accelerator)
    first, again, second = (kwargs for _, _, kwargs in opened)
    assert first == again and opened[0][:2] == ("spin", {"beta": 1.0})
    assert first["wandb"]["resume"] == first["trackio"]["resume"] == "allow"
    assert first["wandb"]["name"] == "first" and first["trackio"]["name"].startswith("first-")
    assert first["wandb"]["id"] != second["wandb"]["id"] and first["trackio"]["name"] != second["trackio"]["name"]
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    start_trackers("spin", {}, tmp_path / "first", tmp_path / "first" / "logs", accelerator)
    assert opened[-1][2]["wandb"] == {"name": "first", "resume": "allow"}


def test_what_a_phase_took_is_told_over_the_rounds():
    tracker, accelerator = Recorder("tensorboard"), Accelerator(cpu=True)
    accelerator.trackers = [tracker]
    log_phase("spin", 2, "trained", {"seconds": 3.5, "flops": None, "samples": 8}, accelerator)
    assert tracker.told == [(2, {"spin/ledger/trained/seconds": 3.5, "spin/ledger/trained/samples": 8})]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_run_tells_every_step_of_every_round_from_1_on(name, sdxl_dir, tmp_path):
    game, tracker = make_game(sdxl_dir), Recorder(name)
    game.accelerator.trackers = [tracker]
    play_all(sdxl_dir, tmp_path, game=game)
    rounds = [f"spin/round-{k}" for k in (1, 2)]
    if name == "wandb":
        axes = [axis for axis in tracker.axes if "ledger" not in axis[0]]
        assert axes == [(f"{round_}/*", f"{round_}/step") for round_ in rounds]
        steps = [[values[f"{r}/step"] for _, values in tracker.told if f"{r}/step" in values] for r in rounds]
    else:
        steps = [[step for step, values in tracker.told if any(key.startswith(r) for key in values)] for r in rounds]
    assert steps == [[1, 2, 3, 4]] * 2
