"""Which checkpoint is taken up, what a round keeps of itself, and what going back to a snapshot puts back."""

from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from spin_diffusion.selfplay.checkpoints import (
    Checkpoints,
    Snapshots,
    _wanted_checkpoints,
    commit_listed,
    first_whole,
    remove_checkpoints,
)
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.selfplay.trainee import Average, Trainee
from spin_diffusion.store.files import write_json
from spin_diffusion.store.hashes import file_hashes
from spin_diffusion.store.input_error import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-11.spin-part",
        "healthy",
        "unet",
        "checkpoint-notes",
    ):
        (tmp_path / name).mkdir()
    return tmp_path


def test_the_newest_whole_checkpoint_is_taken_up_or_the_one_that_is_named(folder, tmp_path):
    assert [path.name for path in _wanted_checkpoints(folder, "latest")] == ["checkpoint-10", "checkpoint-9"]
    for named in ("checkpoint-9", str(folder / "checkpoint-9"), "elsewhere/checkpoint-9/"):
        assert _wanted_checkpoints(folder, named) == [folder / "checkpoint-9"]
    with pytest.raises(InputError, match="checkpoint-8: .* has checkpoint-9, checkpoint-10; give one of these"):
        _wanted_checkpoints(folder, "checkpoint-8")
    # A round that has none yet, as all are after the one that was meant
    assert _wanted_checkpoints(folder / "unet", "checkpoint-9") == []
    assert _wanted_checkpoints(folder / "unet", "latest") == []


def test_of_what_a_round_wrote_while_it_was_trained_nothing_stays_but_what_is_its_users(folder):
    written = [folder / "checkpoint-9", folder / "checkpoint-10", folder / "healthy" / "20"]
    for path in written:
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "weights").write_text("")
        write_json(path / "hashes.json", file_hashes([path], path))
    (folder / "checkpoint-9" / "notes.txt").write_text("mine")
    (folder / "healthy" / "notes").mkdir()
    (folder / "healthy" / "notes" / "mine").write_text("mine")
    remove_checkpoints(folder)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
        "checkpoint-11.spin-part", "checkpoint-9", "checkpoint-9/notes.txt", "checkpoint-notes", "healthy",
        "healthy/notes", "healthy/notes/mine", "unet",
    ]  # fmt: skip


def test_going_back_puts_player_parts_ema_and_average_back(tmp_path):
    done: list[str] = []
    game, trainee, average = (create_autospec(kind, instance=True) for kind in (Game, Trainee, Average))
    game.save.side_effect = lambda target, prove: (
        done.append(f"saved {target.name}"),
        target.mkdir(parents=True),
        (target / "weights").write_text(target.name),
    )
    game.restore.side_effect = lambda source: done.append(f"restored {source.name}")
    trainee.game, trainee.accelerator, trainee.ema = game, Accelerator(cpu=True), create_autospec(EMAModel)
    trainee.gather.side_effect = lambda: done.append("gathered")
    trainee.scatter.side_effect = lambda: done.append("scattered")
    snapshots = Snapshots(tmp_path, trainee, average)
    for step in (0, 20, 40, 60, 80):
        trainee.ema.shadow_params, average.weights = [torch.tensor([step])], [torch.tensor([-step])]
        snapshots.take(step)
    assert sorted(int(path.name) for path in (tmp_path / "healthy").iterdir()) == [0, 40, 60, 80]
    assert done == [word for step in (0, 20, 40, 60, 80) for word in ("gathered", f"saved {step}.spin-part")]
    done.clear()
    assert snapshots.go_back(before=79) == 60 and done == ["restored 60", "scattered"]
    assert (trainee.ema.shadow_params[0].item(), average.weights[0].item()) == (60, -60)
    assert snapshots.go_back(before=60) == 60 and snapshots.go_back(before=-5) == 0
    done.clear()
    snapshots.take(60)  # as a resumed run comes by it again
    assert done == []


def test_going_back_passes_by_a_snapshot_that_is_damaged(tmp_path, capsys):
    game, trainee = (create_autospec(kind, instance=True) for kind in (Game, Trainee))
    game.save.side_effect = lambda target, prove: (target.mkdir(parents=True), (target / "weights").write_text("w"))
    trainee.game, trainee.accelerator, trainee.ema = game, Accelerator(cpu=True), None
    directory = tmp_path / "round-2"
    snapshots = Snapshots(directory, trainee, None)
    for step in (0, 20, 40):
        snapshots.take(step)
    (directory / "healthy" / "40" / "weights").write_text("v")
    (directory / "healthy" / "20" / "hashes.json").write_text("{}")
    assert snapshots.go_back(before=45) == 0
    game.restore.assert_called_once_with(directory / "healthy" / "0")
    said = capsys.readouterr().out
    assert "healthy/40/weights is damaged" in said and "healthy/20/hashes.json is damaged" in said
    (directory / "healthy" / "0" / "weights").unlink()
    with pytest.raises(InputError, match="no snapshot to go back to is whole.*delete round-2 in .* and run the same"):
        snapshots.go_back(before=45)


def test_what_a_killed_attempt_listed_is_not_listed_again(tmp_path):
    part = tmp_path / "checkpoint-1.spin-part"
    part.mkdir()
    (part / "weights").write_text("w")
    write_json(part / "hashes.json", {"weights": "of before"})
    commit_listed(part, tmp_path / "checkpoint-1")
    assert first_whole([tmp_path / "checkpoint-1"], Accelerator(cpu=True)) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "in parts"}, "holds the player in parts, this run trains it whole: launch it as before"),
        ({"global_batch": 8}, "was made with 8 pairs in each optimizer step, this run has 4"),
    ],
)
def test_a_checkpoint_of_another_way_of_training_is_refused(changed, said, tmp_path):
    path = tmp_path / "checkpoint-1"
    state = {
        "step": 1,
        "kind": "whole",
        "global_batch": 4,
        "lr": 1e-4,
        "ema_steps": 0,
        "selection": None,
        "history": [],
    }
    write_json(path / "trainer.json", state | changed)
    write_json(path / "hashes.json", file_hashes([path], path))
    trainee = create_autospec(Trainee, instance=True)
    trainee.kind, trainee.game, trainee.accelerator, trainee.settings = (
        "whole",
        create_autospec(Game, instance=True),
        Accelerator(cpu=True),
        TrainSettings(),
    )
    with pytest.raises(InputError, match=said):
        Checkpoints(tmp_path, trainee, None, 4).load("latest")
    trainee.load.assert_not_called()
