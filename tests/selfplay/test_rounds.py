"""Rounds: states, resume after a fault at every write, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from spin_diffusion.diffusion.images import vae_hash
from spin_diffusion.selfplay import trained
from spin_diffusion.selfplay.record import Share
from spin_diffusion.selfplay.rounds import STEPS_FROM_TRAINING_ON, stragglers
from spin_diffusion.selfplay.train_settings import of_round
from spin_diffusion.selfplay.trainee import Trainee
from spin_diffusion.store.files import read_json, read_rows, rows_metadata, write_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.playing import TRAINING, drawing_for_all, make_game, play_all, prepare_data


class Killed(BaseException):
    """Stands for a SIGKILL: no handler may catch it."""


ONE_STEP = replace(TRAINING, max_train_steps=1)


def final_hashes(output_dir) -> list[str]:
    names = ["unet", "round-1/unet", "round-2/unet"]
    return [file_hash(output_dir / name / "diffusion_pytorch_model.safetensors") for name in names]


@pytest.fixture(scope="module")
def unbroken(sdxl_dir, tmp_path_factory):
    """A run that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("unbroken")
    play_all(sdxl_dir, output_dir)
    return output_dir


def test_a_run_leaves_the_layout_that_users_load(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {"data", "round-1", "round-2", "unet"}
    inside = {"samples", "unet", "round.json", "metrics.jsonl"}
    assert {path.name for path in (unbroken / "round-2").iterdir()} == inside
    assert final_hashes(unbroken)[0] == final_hashes(unbroken)[2]


def test_the_records_say_who_played_whom(unbroken):
    first, second = (read_json(unbroken / f"round-{k}" / "round.json") for k in (1, 2))
    assert (first["parent"], first["opponent"]["round"]) == (0, 0)
    assert (second["parent"], second["opponent"]["round"]) == (1, 1)
    assert first["opponent"]["hash"] != second["opponent"]["hash"]
    assert second["state"] == "PROMOTED" and set(second["seconds"]) >= {"generated", "trained"}


def test_each_step_logs_absolute_r_and_quarters(unbroken):
    entries = [json.loads(line) for line in (unbroken / "round-1" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert entries[0]["r_real"] == 0 and entries[0]["implicit_accuracy"] == 0.5
    assert entries[-1]["r_real"] != 0 and len(entries[-1]["r_real_by_quarter"]) == 4


def test_a_finished_run_runs_again_without_changing_a_file(unbroken, sdxl_dir):
    before = {path: (path.stat().st_mtime_ns) for path in unbroken.rglob("*") if path.is_file()}
    play_all(sdxl_dir, unbroken)
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()} == before


def test_a_kill_between_steps_resumes_from_the_checkpoint_with_the_same_bits(sdxl_dir, unbroken, tmp_path, monkeypatch):
    from spin_diffusion.selfplay import health

    plain, calls = health.check_finite, []

    def dying(*args, **kwargs):
        calls.append(kwargs["step"])
        if len(calls) == 4:
            raise Killed
        plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(health, "check_finite", dying)
        with pytest.raises(Killed):
            play_all(sdxl_dir, tmp_path)
    assert (tmp_path / "round-1" / "checkpoint-2").is_dir()
    steps = []
    monkeypatch.setattr(
        health, "check_finite", lambda *a, **k: steps.append((k["round_"], k["step"])) or plain(*a, **k)
    )
    play_all(sdxl_dir, tmp_path)
    assert steps[0] == (1, 2)
    assert final_hashes(tmp_path) == final_hashes(unbroken)


def test_resuming_is_exact_with_every_kind_of_state_at_once(sdxl_dir, tmp_path, monkeypatch):
    """The average, half a batch, the schedule and the optimizer: what any of them forgets, the last bytes show."""
    from spin_diffusion.selfplay import health

    training = replace(
        TRAINING, use_ema=True, ema_decay=0.5, gradient_accumulation_steps=2, lr_scheduler="cosine",
        optimizer="adafactor",
    )  # fmt: skip
    play_all(sdxl_dir, tmp_path / "a", training, rounds=1)
    plain = health.check_finite

    def dying(*args, **kwargs):
        if kwargs["step"] == 3:
            raise Killed
        plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(health, "check_finite", dying)
        with pytest.raises(Killed):
            play_all(sdxl_dir, tmp_path / "b", training, rounds=1)
    play_all(sdxl_dir, tmp_path / "b", training, rounds=1)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert file_hash(tmp_path / "a" / weights) == file_hash(tmp_path / "b" / weights)


def test_checkpoints_are_limited_in_number_and_go_after_promotion(sdxl_dir, tmp_path, monkeypatch):
    training = replace(TRAINING, checkpointing_steps=1)
    left = []

    def decide(round_, record):
        left.extend(sorted(path.name for path in round_.directory.glob("checkpoint-*")))
        return trained.decide(round_, record)

    monkeypatch.setitem(STEPS_FROM_TRAINING_ON, "PROMOTED", decide)
    play_all(sdxl_dir, tmp_path, training, rounds=1)
    assert left == ["checkpoint-2", "checkpoint-3"]
    assert not list((tmp_path / "round-1").glob("checkpoint-*"))


def test_a_kill_while_a_checkpoint_is_written_leaves_those_before_it(sdxl_dir, tmp_path, monkeypatch):
    training = replace(TRAINING, checkpointing_steps=1)
    save, there = Trainee.save, []

    def dying(trainee, directory):
        there.append(sorted(path.name for path in directory.parent.glob("checkpoint-?")))
        if directory.name == "checkpoint-3.spin-part":
            raise Killed
        save(trainee, directory)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "save", dying)
        with pytest.raises(Killed):
            play_all(sdxl_dir, tmp_path, training, rounds=1)
    assert there == [[], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert play_all(sdxl_dir, tmp_path, training, rounds=1)[0]["training"]["resumed_from"] == 2


def test_an_objective_of_given_pairs_draws_none(sdxl_dir, tmp_path):
    records = play_all(sdxl_dir, tmp_path, ONE_STEP, objective="dpo", rounds=1)
    assert records[0]["state"] == "PROMOTED" and not (tmp_path / "round-1" / "samples").exists()


def test_two_rounds_in_bf16_move_the_player_away_from_each_opponent(sdxl_dir, tmp_path):
    records = play_all(sdxl_dir, tmp_path, replace(TRAINING, max_train_steps=2), game=make_game(sdxl_dir, "bf16"))
    assert all(record["training"]["r_real"] != 0 for record in records)


def test_the_base_as_opponent_stays_the_opponent(sdxl_dir, tmp_path):
    records = play_all(sdxl_dir, tmp_path, ONE_STEP, opponent="base")
    assert records[0]["opponent"]["hash"] == records[1]["opponent"]["hash"]
    assert records[1]["parent"] == 1


def test_per_round_lists_repeat_their_last_value():
    assert [of_round([5, 7], k) for k in (1, 2, 3)] == [5, 7, 7]
    assert of_round(3, 9) == 3


# What is refused


@pytest.fixture
def copied(unbroken, tmp_path):
    """A finished run, with the second round taken back to just before its training."""
    output_dir = tmp_path / "copied"
    shutil.copytree(unbroken, output_dir)
    return output_dir


def back_to_generated(output_dir) -> None:
    record = read_json(output_dir / "round-2" / "round.json")
    record["files"] = {n: h for n, h in record["files"].items() if "/samples/" in n}
    (output_dir / "round-2" / "round.json").write_text(json.dumps(record | {"state": "GENERATED"}))
    shutil.rmtree(output_dir / "round-2" / "unet")


def test_a_round_taken_back_is_played_again_to_the_same_bits(copied, unbroken, sdxl_dir):
    back_to_generated(copied)
    play_all(sdxl_dir, copied)
    assert final_hashes(copied) == final_hashes(unbroken)


def test_what_a_user_loads_is_mended_before_it_is_announced(copied, unbroken, sdxl_dir, capsys):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    (copied / "unet" / "notes.txt").write_text("the user's own")
    harms = {
        "damaged": lambda: weights.write_bytes(whole[:-5] + bytes([whole[-5] ^ 8]) + whole[-4:]),
        "cut": lambda: weights.write_bytes(whole[:1000]),
        "another round's": lambda: shutil.copyfile(copied / "round-1" / "unet" / weights.name, weights),
        "removed": weights.unlink,
        "folder removed": lambda: shutil.rmtree(copied / "unet"),
    }
    for harm, do in harms.items():
        do()
        capsys.readouterr()
        play_all(sdxl_dir, copied)
        said = capsys.readouterr().out
        assert f"{weights} is not what round 2 saved (damaged, or removed): it is copied anew" in said, harm
        assert ("config.json is not" in said) == (harm == "folder removed")
        assert final_hashes(copied) == final_hashes(unbroken)
        assert (copied / "unet" / "notes.txt").exists() == (harm != "folder removed")
    play_all(sdxl_dir, copied)
    assert "copied anew" not in capsys.readouterr().out


def test_data_that_another_vae_encoded_are_refused_and_half_encoded_ones_are_encoded_anew(sdxl_dir, tmp_path):
    other = make_game(sdxl_dir)
    with torch.no_grad():
        next(other.pipeline.vae.parameters()).add_(1e-2)
    other.vae_hash = vae_hash(other.pipeline.vae)
    prepare_data(make_game(sdxl_dir), tmp_path / "data")
    encoded = tmp_path / "data" / "encoded" / "00000-of-00003.safetensors"
    first = encoded.read_bytes()
    with pytest.raises(InputError, match="was encoded by other weights or settings .* than this command has: restore"):
        prepare_data(other, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()  # as a kill in the middle leaves it
    prepare_data(other, tmp_path / "data")
    assert encoded.read_bytes() != first
    prepare_data(other, tmp_path / "alone")
    assert (tmp_path / "alone" / "encoded" / encoded.name).read_bytes() == encoded.read_bytes()


def test_samples_of_another_opponent_are_not_trained_on(copied, sdxl_dir):
    back_to_generated(copied)
    path = copied / "round-2" / "samples" / "00000-of-00003.parquet"
    rows = read_rows(path)
    rows[1]["opponent"] = "0" * 64
    write_rows(path, rows, rows_metadata(path))
    record = read_json(copied / "round-2" / "round.json")
    record["files"]["round-2/samples/00000-of-00003.parquet"] = file_hash(path)
    (copied / "round-2" / "round.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="another opponent"):
        play_all(sdxl_dir, copied)


def test_what_another_opponent_drew_by_the_same_settings_is_drawn_anew(copied, unbroken, sdxl_dir, tmp_path):
    play_all(sdxl_dir, tmp_path / "other", replace(TRAINING, learning_rate=3e-4), rounds=2)
    shutil.rmtree(copied / "round-2" / "samples")
    shutil.copytree(tmp_path / "other" / "round-2" / "samples", copied / "round-2" / "samples")
    back_to_generated(copied)
    record = read_json(copied / "round-2" / "round.json")
    (copied / "round-2" / "round.json").write_text(json.dumps(record | {"state": "OPPONENT", "files": {}}))
    play_all(sdxl_dir, copied)
    assert final_hashes(copied) == final_hashes(unbroken)


def test_a_half_drawn_set_of_samples_is_completed_not_drawn_again(copied, unbroken, sdxl_dir):
    back_to_generated(copied)
    record = read_json(copied / "round-2" / "round.json")
    (copied / "round-2" / "round.json").write_text(json.dumps(record | {"state": "OPPONENT", "files": {}}))
    gone, kept = (copied / "round-2" / "samples" / f"0000{i}-of-00003.parquet" for i in (0, 1))
    gone.unlink()
    before = kept.stat().st_mtime_ns
    play_all(sdxl_dir, copied)
    assert kept.stat().st_mtime_ns == before
    assert final_hashes(copied) == final_hashes(unbroken)


def test_what_a_killed_process_left_half_done_is_put_right_first(copied, unbroken, sdxl_dir):
    (copied / "unet").rename(copied / "unet.spin-old")  # killed between the two renames that replace a folder
    (copied / "round-2" / "unet.spin-part").mkdir()
    (copied / "round-2" / "metrics.jsonl.spin-part").write_text("half")
    play_all(sdxl_dir, copied)
    assert final_hashes(copied) == final_hashes(unbroken)
    assert not [path for pattern in ("*.spin-old", "*.spin-part") for path in copied.rglob(pattern)]


def test_other_data_under_a_running_round_is_refused(copied, sdxl_dir):
    back_to_generated(copied)
    manifest = read_json(copied / "data" / "manifest.json")
    (copied / "data" / "manifest.json").write_text(json.dumps(manifest | {"hash": "f" * 16}))
    with pytest.raises(InputError, match="other data"):
        play_all(sdxl_dir, copied)


def test_fewer_pairs_than_a_batch_is_an_error_with_both_numbers(sdxl_dir, tmp_path):
    with pytest.raises(InputError, match="10 pairs are fewer than one batch of 16"):
        play_all(sdxl_dir, tmp_path, replace(TRAINING, train_batch_size=16))


def test_an_opponent_that_changes_while_the_player_trains_stops_the_run(sdxl_dir, tmp_path, monkeypatch):
    game = make_game(sdxl_dir)
    plain = trained.train

    def meddling(game, *args, **kwargs):
        result = plain(game, *args, **kwargs)
        next(game.opponent.parameters()).data += 1e-3
        return result

    monkeypatch.setattr(trained, "train", meddling)
    with pytest.raises(AssertionError, match="opponent changed"):
        play_all(sdxl_dir, tmp_path, ONE_STEP, game)


def test_a_player_that_is_not_its_opponent_at_step_0_is_caught(sdxl_dir, tmp_path, monkeypatch):
    game = make_game(sdxl_dir)
    plain = trained.train

    def shifted(game, *args, **kwargs):
        next(game.player.parameters()).data += 0.1
        return plain(game, *args, **kwargs)

    monkeypatch.setattr(trained, "train", shifted)
    with pytest.raises(AssertionError, match="step 0"):
        play_all(sdxl_dir, tmp_path, game=game)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_round_resumable(sdxl_dir, tmp_path):
    with pytest.raises(FloatingPointError, match="round 1, step"):
        play_all(sdxl_dir, tmp_path, replace(TRAINING, learning_rate=1e30))
    assert read_json(tmp_path / "round-1" / "round.json")["state"] == "CACHED"


@drawing_for_all()
def test_several_samples_a_mixture_and_parts_of_the_real_ones(sdxl_dir, tmp_path):
    """Where scores cannot be kept, the mixture draws and its newest self anchors."""
    mixed = {"num_generated": 2, "opponent": "last_two", "real_parts": 2, "objective": "space"}
    records = play_all(sdxl_dir, tmp_path, ONE_STEP, **mixed)
    assert [m["round"] for m in records[1]["opponent"]["members"]] == [0, 1] and records[1]["opponent"]["round"] == 1
    real = [row["id"] for path in sorted((tmp_path / "data" / "samples").glob("*")) for row in read_rows(path)]
    drawn = {
        k: [row for path in sorted((tmp_path / f"round-{k}" / "samples").glob("*")) for row in read_rows(path)]
        for k in (1, 2)
    }
    ids = {k: {row["id"] for row in rows} for k, rows in drawn.items()}
    assert ids[1] | ids[2] == set(real) and not ids[1] & ids[2]
    for rows in drawn.values():
        assert [row["k"] for row in rows] == [0, 1] * (len(rows) // 2)
        assert rows[0]["image"] != rows[1]["image"] and rows[0]["id"] == rows[1]["id"]
    hashes = {m["hash"] for m in records[1]["opponent"]["members"]}
    assert {row["opponent"] for row in drawn[2]} == hashes and len(hashes) == 2
    for k in (1, 2):
        first = json.loads((tmp_path / f"round-{k}" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["r_real"] == 0 and first["loss"] == pytest.approx(3 * 0.6365142, abs=1e-4)  # mu = 2


def test_a_list_of_objectives_is_one_for_each_round(sdxl_dir, tmp_path):
    play_all(sdxl_dir, tmp_path, ONE_STEP, objective=["sft", "ddo"])
    losses = [
        json.loads((tmp_path / f"round-{k}" / "metrics.jsonl").read_text().splitlines()[0])["loss"] for k in (1, 2)
    ]
    assert losses[1] == pytest.approx(2 * 0.693147, abs=1e-4) and losses[0] != losses[1]
    assert [(tmp_path / f"round-{k}" / "samples").exists() for k in (1, 2)] == [False, True]


def test_a_process_that_is_slow_is_named():
    def shares(*of_each: tuple[float, int | None]) -> list[Share]:
        return [{"seconds": seconds, "samples": samples} for seconds, samples in of_each]

    (line,) = stragglers(shares((100, 200), (100, 210), (90, 60), (100, 200)))
    assert line == ("process 2 of 4 is slow, at 0.67 samples a second where half of them do 2 or more")
    # Nobody worked for long, or nobody counted; who had nothing to do is not slow
    assert stragglers(shares((10, 20), (9, 3))) == stragglers(shares((100, None), (100, None))) == stragglers([]) == []
    assert stragglers(shares((100, 200), (0.1, 0), (100, 150))) == []
