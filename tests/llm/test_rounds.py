"""Rounds of a language game: objectives, mixtures, several answers, held-out gap, resume, refusals."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spin_diffusion.store import run_dir
from spin_diffusion.store.files import read_json, read_rows, rows_metadata, tensors_metadata, write_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash, seed_from
from tests.llm.playing import TRAINING, make_game, play_all


class Killed(BaseException):
    """Stands for a SIGKILL: no handler may catch it."""


def final_hashes(output_dir) -> list[str]:
    return [file_hash(output_dir / name / "model.safetensors") for name in ("model", "round-1/model", "round-2/model")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("unbroken")
    play_all(output_dir, held_out=8)
    return output_dir


def entries(output_dir, k: int = 1) -> list[dict]:
    return [json.loads(line) for line in (output_dir / f"round-{k}" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_layout_that_users_load(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {"data", "held_out", "round-1", "round-2", "model"}
    inside = {"samples", "scores", "held_out", "model", "round.json", "metrics.jsonl"}
    assert {path.name for path in (unbroken / "round-2").iterdir()} == inside
    assert final_hashes(unbroken)[0] == final_hashes(unbroken)[2]


def test_the_first_step_of_a_round_has_the_loss_of_r_0(unbroken):
    for k in (1, 2):
        assert entries(unbroken, k)[0]["loss"] == pytest.approx(1.386294, abs=1e-4)
        assert entries(unbroken, k)[0]["score_real"] < -5  # absolute log-likelihoods are logged too
    assert entries(unbroken)[-1]["r_real"] != 0


@pytest.mark.parametrize("objective", ["space", "spin", "ddo", "nca", "dpo", "sft"])
def test_every_objective_plays(objective, tmp_path):
    play_all(tmp_path, rejected=objective == "dpo", objective=objective, held_out=8)
    assert all(entry["loss"] == entry["loss"] for entry in entries(tmp_path, 2))
    assert abs(entries(tmp_path, 2)[0]["r_real"]) < 1e-4


def test_an_objective_of_each_round(tmp_path):
    play_all(tmp_path, objective=["spin", "space"], beta=[0.1, 1.0])
    assert entries(tmp_path, 1)[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert entries(tmp_path, 2)[0]["loss"] == pytest.approx(1.386294, abs=1e-4)


def test_several_answers_to_each_real_one(tmp_path):
    play_all(tmp_path, rounds=1, num_generated=3)
    rows = [row for path in sorted((tmp_path / "round-1" / "samples").glob("*")) for row in read_rows(path)]
    assert len(rows) == 3 * 16 and [row["k"] for row in rows[:3]] == [0, 1, 2]
    assert len({row["seed"] for row in rows}) == 3 * 16
    assert rows[4]["seed"] == seed_from(1, 1, rows[4]["id"], 1)
    assert entries(tmp_path)[0]["loss"] == pytest.approx(2.249341, abs=1e-4)  # mu = 3


def test_each_round_may_have_its_own_part_of_the_real_answers(tmp_path):
    play_all(tmp_path, replace(TRAINING, max_train_steps=3), rounds=2, real_parts=2)
    real = [row["id"] for path in sorted((tmp_path / "data" / "samples").glob("*")) for row in read_rows(path)]
    drawn = [
        [row["id"] for path in sorted((tmp_path / f"round-{k}" / "samples").glob("*")) for row in read_rows(path)]
        for k in (1, 2)
    ]
    assert sorted(drawn[0] + drawn[1]) == sorted(real) and not set(drawn[0]) & set(drawn[1])


def test_a_mixture_is_drawn_by_its_members_and_scored_by_its_own_density(tmp_path):
    records = play_all(tmp_path, replace(TRAINING, learning_rate=1e-2), opponent="last_two")
    members = records[1]["opponent"]["members"]
    assert [(m["round"], m["weight"]) for m in members] == [(0, 0.5), (1, 0.5)]
    assert len({m["hash"] for m in members}) == 2
    rows = [row for path in sorted((tmp_path / "round-2" / "samples").glob("*")) for row in read_rows(path)]
    by_member = {m["hash"]: [row for row in rows if row["opponent"] == m["hash"]] for m in members}
    assert len(rows) == 16 and all(by_member.values())
    # The kept score of each sample is log(1/2 p_0 + 1/2 p_1), by the models themselves
    game, scores = make_game(), []
    for folder in (None, tmp_path / "round-1"):
        game.restore(folder)
        scores.append(torch.tensor(game.log_likelihood([r["prompt_ids"] for r in rows], [r["tokens"] for r in rows])))
    expected = torch.logsumexp(torch.stack(scores), 0) - torch.tensor(2.0).log()
    from safetensors.torch import load_file

    kept = [
        load_file(path)["opponent_score"] for path in sorted((tmp_path / "round-2" / "scores" / "generated").glob("*"))
    ]
    assert torch.allclose(torch.cat(kept), expected, atol=1e-4)
    # and each sample is the one that its member draws from its seed
    game.restore(None)
    mine = by_member[members[0]["hash"]]
    again = game.draw([row["prompt_ids"] for row in mine], [row["seed"] for row in mine])
    assert [answer.ids for answer in again] == [row["tokens"] for row in mine]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_base_is_the_opponent_again_after_its_weights_were_trained(adapter, tmp_path):
    game = make_game(use_lora=adapter)
    records = play_all(tmp_path, game=game, opponent="base")
    assert [record["opponent"]["round"] for record in records] == [0, 0]
    assert records[0]["opponent"]["hash"] == records[1]["opponent"]["hash"]
    # The kept scores of the real answers are the base's in both rounds
    first, second = (
        [load_file(path)["opponent_score"] for path in sorted((tmp_path / name / "scores" / "real").iterdir())]
        for name in ("round-1", "round-2")
    )
    assert len(first) > 1 and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_held_out_gap_is_that_of_the_plain_formula(unbroken):
    gap = read_json(unbroken / "round-1" / "round.json")["held_out_gap"]
    game = make_game()
    rows = [row for path in sorted((unbroken / "held_out" / "samples").glob("*")) for row in read_rows(path)]
    folder = unbroken / "round-1" / "held_out" / "samples"
    drawn = [row for path in sorted(folder.glob("*")) for row in read_rows(path)]
    r = []
    for side in (rows, drawn):
        scores = []
        for weights in (unbroken / "round-1", None):
            game.restore(weights)
            scores.append(
                torch.tensor(game.log_likelihood([row["prompt_ids"] for row in side], [row["tokens"] for row in side]))
            )
        r.append(scores[0] - scores[1])
    softplus = torch.nn.functional.softplus
    expected = 2 * torch.log(torch.tensor(2.0)) - (softplus(-r[0]) + softplus(r[1]))
    assert gap["num_samples"] == 8 and gap["mean"] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert gap["low"] < gap["mean"] < gap["high"]


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_step_with_the_widest_held_out_gap_is_promoted(use_lora, tmp_path):
    training = replace(TRAINING, select_every=2, max_train_steps=5, num_train_epochs=None, learning_rate=1e-2)
    game = make_game(use_lora=use_lora, rank=2) if use_lora else None
    (record,) = play_all(tmp_path / "selected", training, game, held_out=8, rounds=1)
    selection, gap = record["training"]["selection"], record["held_out_gap"]
    best = max(selection["curve"][1:], key=lambda entry: entry["mean"])
    assert [entry["step"] for entry in selection["curve"]] == [0, 2, 4, 5] and selection["step"] == best["step"]
    assert gap["mean"] == pytest.approx(best["mean"], rel=1e-4, abs=1e-4)
    assert record["state"] == ("PROMOTED" if best["mean"] > 0 else "REJECTED")


def test_a_round_that_learnt_nothing_ends_the_run(tmp_path):
    training = replace(TRAINING, learning_rate=1e-12)
    records = play_all(tmp_path, training, held_out=8, rounds=3, stop_when_learnt=True)
    assert len(records) == 1 and records[0]["state"] == "REJECTED" and "held-out gap" in records[0]["rejected_because"]
    assert not (tmp_path / "model").exists()


def test_a_kill_before_or_after_any_rename_changes_nothing_in_the_end(unbroken, tmp_path, monkeypatch):
    plain, output_dir, kills = os.replace, tmp_path / "killed", 0
    for attempt in range(300):
        done = 0

        def dying(source, target, attempt=attempt):
            nonlocal done
            done += 1
            if done == attempt % 7 + 1:
                if attempt % 2 and os.path.isfile(source):
                    with open(source, "r+b") as file:
                        file.truncate(max(0, os.path.getsize(source) // 2))
                elif attempt % 2 == 0:
                    plain(source, target)
                raise Killed
            plain(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(run_dir.os, "replace", dying)
            try:
                play_all(output_dir, held_out=8)
                break
            except Killed:
                kills += 1
    assert kills >= 15
    assert final_hashes(output_dir) == final_hashes(unbroken)
    for k in (1, 2):
        records = [read_json(folder / f"round-{k}" / "round.json") for folder in (unbroken, output_dir)]
        assert records[0]["files"] == records[1]["files"] and records[0]["held_out_gap"] == records[1]["held_out_gap"]


def test_one_sample_of_another_opponent_is_refused(unbroken, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(unbroken, copied)
    record = read_json(copied / "round-2" / "round.json")
    path = sorted((copied / "round-2" / "samples").glob("*"))[0]
    rows = read_rows(path)
    rows[1]["opponent"] = "0" * 64
    write_rows(path, rows, rows_metadata(path))
    kept = ("round", "parent", "data_hash", "opponent", "generated", "seconds")
    files = {n: d for n, d in record["files"].items() if "/samples/" in n}
    files[path.relative_to(copied).as_posix()] = file_hash(path)
    (copied / "round-2" / "round.json").write_text(
        json.dumps({key: record[key] for key in kept} | {"state": "GENERATED", "files": files})
    )
    with pytest.raises(InputError, match=f"sample {rows[1]['id']} was drawn by another opponent"):
        play_all(copied, held_out=8)


def test_kept_scores_carry_the_hash_of_their_opponent(unbroken):
    for k in (1, 2):
        opponent = read_json(unbroken / f"round-{k}" / "round.json")["opponent"]["hash"]
        found = list((unbroken / f"round-{k}").rglob("scores/*/*.safetensors"))
        assert len(found) == 8 and {tensors_metadata(path)["opponent"] for path in found} == {opponent}


def with_changed_scores(unbroken, copied) -> Path:
    """A copy of a run in which a file of the second round's kept scores was changed; the file."""
    shutil.copytree(unbroken, copied)
    path = sorted((copied / "round-2" / "scores" / "real").glob("*"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    return path


def test_kept_scores_that_were_changed_are_never_trained_on_but_made_anew(unbroken, tmp_path, capsys):
    path = with_changed_scores(unbroken, tmp_path / "copied")
    record = read_json(tmp_path / "copied" / "round-2" / "round.json")
    of_later = ("training", "metrics", "rejected_because", "decision", "held_out_gap")
    files = {name: digest for name, digest in record["files"].items() if "/samples/" in name or "/scores/" in name}
    left = {key: value for key, value in record.items() if key not in of_later} | {"state": "CACHED", "files": files}
    (tmp_path / "copied" / "round-2" / "round.json").write_text(json.dumps(left))
    play_all(tmp_path / "copied", held_out=8)
    assert f"{path} is damaged" in (said := capsys.readouterr().out) and "it is made anew" in said
    assert path.read_bytes() == (unbroken / path.relative_to(tmp_path / "copied")).read_bytes()
    assert final_hashes(tmp_path / "copied") == final_hashes(unbroken)


def test_kept_scores_of_a_trained_round_that_were_changed_are_said(unbroken, tmp_path, capsys):
    path = with_changed_scores(unbroken, tmp_path / "copied")
    play_all(tmp_path / "copied", held_out=8)
    name = path.relative_to(tmp_path / "copied")
    said = f"1 files such as {name} are missing or damaged; it is trained and needs them no more"
    assert said in capsys.readouterr().out
    assert final_hashes(tmp_path / "copied") == final_hashes(unbroken)
