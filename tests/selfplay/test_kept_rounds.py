"""Weights of earlier rounds that are removed: which ones, that their records say so first, and who answers for them."""

from dataclasses import replace

import pytest

from spin_diffusion.diffusion.model_sources import read_source
from spin_diffusion.selfplay import rounds
from spin_diffusion.selfplay.record import read_record
from spin_diffusion.selfplay.round_settings import RoundSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.playing import TRAINING, play_all

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Killed(BaseException):
    """Stands for a SIGKILL: no handler may catch it."""


def play(base, output_dir, **more):
    return play_all(base, output_dir, replace(TRAINING, max_train_steps=1), rounds=3, **more)


def with_weights(output_dir) -> list[str]:
    return sorted(path.parent.parent.name for path in output_dir.glob(f"round-*/unet/{WEIGHTS}"))


def test_the_last_round_stays_and_plays_as_if_all_had_also_after_a_kill(sdxl_dir, tmp_path, monkeypatch):
    def dying(folder, ours):
        if folder.name == "round-1":
            raise Killed
        return remove_files(folder, ours)

    play(sdxl_dir, tmp_path / "all")
    run, remove_files = tmp_path / "run", rounds.remove_files
    monkeypatch.setattr(rounds, "remove_files", dying)
    with pytest.raises(Killed):
        play(sdxl_dir, run, keep_rounds=1)
    # The record says so before the first file goes
    assert read_record(run / "round-1")["weights_removed_after"] == 2
    assert with_weights(run) == ["round-1", "round-2"]
    (run / "round-1" / "unet" / WEIGHTS).write_text("nobody reads it any more")
    (run / "round-1" / "unet" / "notes.txt").write_text("the user's")
    monkeypatch.undo()
    play(sdxl_dir, run, keep_rounds=1)
    assert with_weights(tmp_path / "all") == ["round-1", "round-2", "round-3"] and with_weights(run) == ["round-3"]
    assert [path.name for path in (run / "round-1" / "unet").iterdir()] == ["notes.txt"]
    assert not (run / "round-2" / "unet").exists() and (run / "round-2" / "samples").is_dir()
    assert [read_record(run / f"round-{k}").get("weights_removed_after") for k in (1, 2, 3)] == [2, 3, None]
    for folder in ("unet", "round-3/unet"):
        assert file_hash(run / folder / WEIGHTS) == file_hash(tmp_path / "all" / folder / WEIGHTS)

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    play(sdxl_dir, run, keep_rounds=1)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before

    with pytest.raises(InputError, match=r"round-1: its weights were removed when round 2 was finished, as --keep_r"):
        read_source(f"old={run / 'round-1'}")
    with pytest.raises(InputError, match=r"round-2: its weights were removed when round 3 was finished"):
        read_source(f"old={run / 'round-2' / 'unet'}")


def test_what_the_next_round_plays_with_stays(sdxl_dir, tmp_path):
    play(sdxl_dir, tmp_path / "two", keep_rounds=1, opponent="last_two")
    assert with_weights(tmp_path / "two") == ["round-2", "round-3"]
    with pytest.raises(InputError, match="--opponent pool draws from all earlier selves: leave --keep_rounds out"):
        RoundSettings(keep_rounds=3, opponent="pool")
