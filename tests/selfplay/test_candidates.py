"""Self-labelled candidates: who is drawn, judged and chosen, against plain references, and after a kill."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from spin_diffusion.samples import candidates as candidates_module
from spin_diffusion.samples.candidates import Candidates, best_and_worst, choose, judge_shards, summary
from spin_diffusion.samples.pairs import Side, open_pairs
from spin_diffusion.samples.sample import CHOICES
from spin_diffusion.samples.shards import Part, encode_shards
from spin_diffusion.selfplay.train import train
from spin_diffusion.store import run_dir
from spin_diffusion.store.files import read_json, read_rows, write_json, write_rows
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.playing import TRAINING, make_game, play_all


class Killed(BaseException):
    """Stands for a SIGKILL: no handler may catch it."""


def by_bytes(rows) -> list[float]:
    """A judge without a taste, which tells any two images apart."""
    return [int(hashlib.sha256(row["image"]).hexdigest()[:8], 16) / 2**32 for row in rows]


def candidates(num: int = 3, share: float = 1.0, judge=by_bytes) -> Candidates:
    return Candidates(num, share, "by bytes", lambda: judge)


def weights_of(folder) -> str:
    return file_hash(folder / "unet" / "diffusion_pytorch_model.safetensors")


def rows_of(folder) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in read_rows(path)]


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def entries(folder) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "pairs_per_second"} for entry in found]


class OneOf(Accelerator):
    """An accelerator as process `index` of `count` sees it; it waits for nobody."""

    process_index = num_processes = 0

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes = index, count

    def wait_for_everyone(self) -> None:
        pass


def silent(done: int, text: str) -> None:
    """Shows no progress."""


# The choice itself


def test_the_best_and_the_worst_are_the_first_of_equal_ones():
    assert best_and_worst([0.0, 2.0, -1.0, 2.0, -1.0]) == (1, 2)
    assert best_and_worst([-3.0, -5.0]) == (0, 1)
    assert best_and_worst([1.0, 1.0, 1.0]) is None


def drawn(*counts: int) -> list[dict]:
    """Samples of prompts with so many candidates each."""
    return [{"id": f"p{p}", "place": p, "k": k} for p, count in enumerate(counts) for k in range(count)]


def test_a_shard_is_judged_where_there_are_candidates_and_nowhere_else():
    asked = []

    def judge(rows):
        asked.extend((row["place"], row["k"]) for row in rows)
        return [{(0, 0): 1.0, (0, 1): 3.0, (0, 2): 2.0}.get((row["place"], row["k"]), 7.0) for row in rows]

    chosen = choose(drawn(3, 1, 2), judge)
    assert asked == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert [(row["real"], row["generated"]) for row in chosen] == [(1, 0), (None, 0), (None, None)]
    assert [row["scores"] for row in chosen] == [[1.0, 3.0, 2.0], None, [7.0, 7.0]]


def test_the_share_of_the_prompts_is_a_function_of_seed_round_and_id():
    found = candidates(4, 0.25)
    counts = {(seed, k): [found.drawn_for(seed, k, str(i)) for i in range(2000)] for seed in (0, 1) for k in (1, 2)}
    for drawn_ in counts.values():
        assert set(drawn_) == {1, 4} and drawn_.count(4) == pytest.approx(500, abs=80)  # four standard deviations
    assert len({tuple(drawn_) for drawn_ in counts.values()}) == 4
    assert sum(counts[0, 1]) / 2000 == pytest.approx(found.drawn_on_average, abs=0.12)
    assert {candidates(4, 1.0).drawn_for(0, 1, str(i)) for i in range(100)} == {4}


def test_choices_do_not_depend_on_processes_and_another_judges_are_made_again(tmp_path, monkeypatch):
    def taking_turns(things, accelerator):
        return things[accelerator.process_index :: accelerator.num_processes]

    monkeypatch.setattr("spin_diffusion.store.files.shared_out", taking_turns)
    for number in range(3):
        rows = [row | {"image": f"{number} {row}".encode()} for row in drawn(3, 1, 3)]
        write_rows(tmp_path / "samples" / f"{run_dir.shard_name(number, 3)}.parquet", rows, {})
    judge_shards(tmp_path / "samples", tmp_path / "one", by_bytes, {"judge": "a"}, OneOf(0, 1), silent)
    for index, files in ((1, 1), (0, 3)):
        judge_shards(tmp_path / "samples", tmp_path / "two", by_bytes, {"judge": "a"}, OneOf(index, 2), silent)
        assert len(files_of(tmp_path / "two")) == files
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") and len(files_of(tmp_path / "one")) == 3

    def never(rows):
        raise AssertionError("judged twice")

    judge_shards(tmp_path / "samples", tmp_path / "one", never, {"judge": "a"}, OneOf(0, 1), silent)
    judge_shards(
        tmp_path / "samples", tmp_path / "two", lambda rows: [-s for s in by_bytes(rows)], {"judge": "b"},
        OneOf(0, 1), silent,
    )  # fmt: skip
    for first, second in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        if first["scores"] is not None:
            assert (first["real"], first["generated"]) == (second["generated"], second["real"])


def test_what_the_choices_come_to_is_counted_over_all_prompts_with_candidates(tmp_path):
    rows = [{"real": 1, "generated": 0, "scores": [1.0, 4.0]}, {"real": None, "generated": None, "scores": [2.0, 2.0]},
            {"real": None, "generated": 0, "scores": None}]  # fmt: skip
    write_rows(tmp_path / "00000-of-00001.parquet", rows, {})
    assert summary(tmp_path) == {
        "pairs": 2, "self_labelled": 2, "ties_left_out": 0.5, "mean_best": 3.0, "mean_worst": 1.5,
    }  # fmt: skip


# Whole rounds


@pytest.fixture(scope="module")
def unbroken(sdxl_dir, tmp_path_factory):
    """Two rounds with half of the prompts self-labelled, that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("unbroken")
    play_all(sdxl_dir, output_dir, candidates=candidates(3, 0.5))
    return output_dir


def test_the_choices_are_the_plain_best_and_worst_of_the_samples(unbroken):
    for k in (1, 2):
        folder = unbroken / f"round-{k}"
        by_id: dict[str, list[dict]] = {}
        for row in rows_of(folder / "samples"):
            by_id.setdefault(row["id"], []).append(row)
        choices = rows_of(folder / CHOICES)
        assert [row["id"] for row in choices] == [row["id"] for row in rows_of(unbroken / "data" / "samples")]
        assert {len(rows) for rows in by_id.values()} == {1, 3}
        for row in choices:
            rows = by_id[row["id"]]
            if len(rows) == 1:
                assert (row["real"], row["generated"], row["scores"]) == (None, 0, None)
                continue
            ranked = sorted(zip(by_bytes(rows), range(3), strict=True))
            assert (row["real"], row["generated"]) == (ranked[-1][1], ranked[0][1])
        said = read_json(folder / "round.json")["candidates"]
        scores = [by_bytes(rows) for rows in by_id.values() if len(rows) == 3]
        assert said["self_labelled"] == len(scores) and said["pairs"] == 10 and said["ties_left_out"] == 0
        assert said["mean_best"] == pytest.approx(sum(map(max, scores)) / len(scores))
        assert said["mean_worst"] == pytest.approx(sum(map(min, scores)) / len(scores))
        assert f"round-{k}/{CHOICES}/00000-of-00003.parquet" in read_json(folder / "round.json")["files"]
    assert not (unbroken / CHOICES).exists()


def test_both_rounds_begin_with_ln_2_and_another_choice_of_prompts(unbroken):
    chosen = []
    for k in (1, 2):
        first = entries(unbroken / f"round-{k}")[0]
        assert first["loss"] == pytest.approx(0.693147, abs=1e-4) and first["r_real"] == 0
        chosen.append({row["id"] for row in rows_of(unbroken / f"round-{k}" / CHOICES) if row["scores"]})
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("share, parts, judge", [
    (0.13, 2, by_bytes), (1.0, 1, by_bytes),
    (0.6, 1, lambda rows: [float(int(row["id"][0], 16) < 8 and row["k"] == 1) for row in rows]),
])  # fmt: skip
def test_each_pair_holds_the_tensors_of_the_chosen_images(sdxl_dir, tmp_path, share, parts, judge):
    """Against the plain way: encode the two images that the choice names, one by one."""
    game = make_game(sdxl_dir)
    training = replace(TRAINING, train_batch_size=1)
    found = {}

    def keep_pairs(game_, pairs, plan, *args):
        if plan.round_ < parts:  # look at the last part
            return train(game_, pairs, plan, *args)
        places = range(len(pairs.ids))
        found["ids"], found["sides"] = pairs.ids, pairs.fetch(list(places)[::-1])
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("spin_diffusion.selfplay.trained.train", keep_pairs)
        play_all(sdxl_dir, tmp_path, training, game, candidates(3, share, judge), rounds=parts, real_parts=parts)

    folder = tmp_path / f"round-{parts}"
    real = {row["id"]: row for row in rows_of(tmp_path / "data" / "samples")}
    samples = {(row["id"], row["k"]): row for row in rows_of(folder / "samples")}
    expected = []
    for row in rows_of(folder / CHOICES):
        if row["generated"] is not None:
            best = real[row["id"]] if row["real"] is None else samples[row["id"], row["real"]]
            expected.append((row["id"], best, samples[row["id"], row["generated"]]))
    ties = read_json(folder / "round.json")["candidates"]["ties_left_out"]
    assert (ties > 0) == (judge is not by_bytes)
    assert found["ids"] == [id_ for id_, _, _ in expected] and len(expected) > 2
    places = {row["place"] for row in rows_of(folder / CHOICES) if row["scores"] is None}
    assert share == 1.0 or places > {0}, "some real image that is not the first of its shard"
    for place, (_, *rows) in enumerate(expected[::-1]):
        for side, row in zip(found["sides"], rows, strict=True):
            for name, tensor in game.encode([row]).items():
                assert torch.allclose(side[name][place].float(), tensor[0].float(), atol=2e-3), (place, name)


def test_the_players_steps_are_those_of_the_chosen_pairs(sdxl_dir, tmp_path):
    """With the judge turned round, the sides of every pair change places: the margin of each step changes its sign."""
    one_step = replace(TRAINING, max_train_steps=1, learning_rate=1e-7)
    first = play_all(sdxl_dir, tmp_path / "a", one_step, candidates=candidates(2), rounds=1)
    second = play_all(
        sdxl_dir, tmp_path / "b", one_step, rounds=1,
        candidates=candidates(2, judge=lambda rows: [-score for score in by_bytes(rows)]),
    )  # fmt: skip
    a, b = entries(tmp_path / "a" / "round-1")[0], entries(tmp_path / "b" / "round-1")[0]
    assert a["score_real"] != b["score_real"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert first[0]["candidates"]["mean_best"] == pytest.approx(-second[0]["candidates"]["mean_worst"])


def test_no_real_image_is_read_when_all_prompts_are_self_labelled(sdxl_dir, tmp_path, monkeypatch):
    records = play_all(sdxl_dir, tmp_path, candidates=candidates(2), rounds=1)
    assert records[0]["candidates"]["self_labelled"] == 10
    from spin_diffusion.samples import pairs as samples_module

    asked = []
    plain = samples_module._Tensors.rows

    def watched(self, places, scored):
        asked.append(self)
        return plain(self, places, scored)

    encoded = tmp_path / "encoded"
    encode_shards(
        tmp_path / "round-1" / "samples", encoded, make_game(sdxl_dir), OneOf(0, 1), silent,
        lambda path: candidates_module.chosen_samples(path, tmp_path / "round-1" / CHOICES / path.name),
    )  # fmt: skip
    data = Side(tmp_path / "data" / "encoded")
    pairs = open_pairs(tmp_path / "data", data, Side(encoded), Part(), 1, tmp_path / "round-1" / CHOICES)
    monkeypatch.setattr(samples_module._Tensors, "rows", watched)
    pairs.fetch(list(range(10)))
    assert len({id(tensors) for tensors in asked}) == 1


def test_candidates_of_a_pool_say_who_drew_each(sdxl_dir, tmp_path):
    records = play_all(sdxl_dir, tmp_path, candidates=candidates(3), opponent="last_two")
    known = {found["hash"] for found in records[1]["opponent"]["members"]}
    rows = rows_of(tmp_path / "round-2" / "samples")
    assert len(rows) == 30 and {row["opponent"] for row in rows} == known and len(known) == 2
    order = [(row["place"], row["k"]) for row in read_rows(next((tmp_path / "round-2" / "samples").glob("00000*")))]
    assert order == sorted(order) and len(rows_of(tmp_path / "round-2" / CHOICES)) == 10


def test_a_kill_before_or_after_any_rename_changes_no_byte(sdxl_dir, unbroken, tmp_path, monkeypatch):
    """One run is killed again and again, at its first to seventh rename in turn (a state takes up to five in one go);
    half of the kills come right after the rename, half right before it with the file cut short."""
    plain = os.replace
    kills, killed_at = 0, set()
    for attempt in range(300):
        done = 0

        def dying(source, target, attempt=attempt):
            nonlocal done
            done += 1
            if done == attempt % 7 + 1:
                killed_at.add(os.path.basename(os.path.dirname(target)))
                if attempt % 2 == 0:
                    plain(source, target)
                elif os.path.isfile(source):
                    os.truncate(source, os.path.getsize(source) // 2)
                raise Killed
            plain(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(run_dir.os, "replace", dying)
            try:
                play_all(sdxl_dir, tmp_path, candidates=candidates(3, 0.5))
                break
            except Killed:
                kills += 1
    assert kills >= 15 and CHOICES in killed_at
    assert weights_of(tmp_path) == weights_of(unbroken)
    for k in (1, 2):
        ours, theirs = tmp_path / f"round-{k}", unbroken / f"round-{k}"
        assert files_of(ours / CHOICES) == files_of(theirs / CHOICES) and weights_of(ours) == weights_of(theirs)


def test_a_changed_choice_is_never_trained_on_but_made_again(sdxl_dir, unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path / "copy")
    record = tmp_path / "copy" / "round-1" / "round.json"
    write_json(record, read_json(record) | {"state": "GENERATED"}, sealed=True)
    path = tmp_path / "copy" / "round-1" / CHOICES / "00000-of-00003.parquet"
    rows = read_rows(path)
    write_rows(path, [row | {"real": None} for row in rows], {})
    play_all(sdxl_dir, tmp_path / "copy", candidates=candidates(3, 0.5))
    assert files_of(path.parent) == files_of(unbroken / "round-1" / CHOICES)
    assert weights_of(tmp_path / "copy" / "round-1") == weights_of(unbroken / "round-1")
    assert f"{path.name} is damaged" in capsys.readouterr().out


def test_a_judge_that_finds_all_alike_leaves_nothing_to_train_on(sdxl_dir, tmp_path):
    with pytest.raises(InputError, match="round 1: 0 pairs are fewer than one batch of 2 .*100% of 10 left out"):
        play_all(sdxl_dir, tmp_path, candidates=candidates(2, judge=lambda rows: [1.0] * len(rows)), rounds=1)


def test_a_judge_that_cannot_be_loaded_is_said_before_anything_is_drawn(sdxl_dir, tmp_path):
    def missing():
        raise InputError("no weights")

    with pytest.raises(InputError, match="no weights"):
        play_all(sdxl_dir, tmp_path, candidates=Candidates(2, 1.0, "missing", missing), rounds=1)
    assert not (tmp_path / "round-1" / "samples").exists()


def test_an_objective_without_a_drawn_side_plays_with_the_real_images(sdxl_dir, tmp_path):
    plain = play_all(sdxl_dir, tmp_path / "plain", rounds=1, objective="sft")
    with_candidates = play_all(sdxl_dir, tmp_path / "with", rounds=1, objective="sft", candidates=candidates(2))
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "with")
    assert "candidates" not in with_candidates[0] and plain[0]["generated"] == "none"
