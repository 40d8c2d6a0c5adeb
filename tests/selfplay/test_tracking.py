"""Trackers get every step of every round."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from spin_diffusion.selfplay.tracking import log_step, name_axis
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


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_run_tells_every_step_of_every_round_from_1_on(name, sdxl_dir, tmp_path):
    game, tracker = make_game(sdxl_dir), Recorder(name)
    game.accelerator.trackers = [tracker]
    play_all(sdxl_dir, tmp_path, game=game)
    rounds = [f"spin/round-{k}" for k in (1, 2)]
    if name == "wandb":
        assert tracker.axes == [(f"{round_}/*", f"{round_}/step") for round_ in rounds]
        steps = [[values[f"{r}/step"] for _, values in tracker.told if f"{r}/step" in values] for r in rounds]
    else:
        steps = [[step for step, values in tracker.told if any(key.startswith(r) for key in values)] for r in rounds]
    assert steps == [[1, 2, 3, 4]] * 2
