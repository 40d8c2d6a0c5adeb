"""What is beside a folder of shards, what makes a finished one be made again, and what is refused in one."""

from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator

from spin_diffusion.samples import real as samples
from spin_diffusion.samples.real import prepare
from spin_diffusion.samples.scores import KeepsScores, score_shards
from spin_diffusion.samples.shards import Part, merge_shards, some_pairs
from spin_diffusion.samples.shards import shards as shards_of
from spin_diffusion.selfplay.game import Game
from spin_diffusion.store.files import (
    read_rows,
    read_tensors,
    rows_metadata,
    tensors_metadata,
    write_rows,
    write_tensors,
)
from spin_diffusion.store.input_error import InputError

NAMES = [f"{number:05d}-of-00003" for number in range(3)]


@pytest.fixture
def data(tmp_path):
    """Twelve real rows in three shards."""
    for number, name in enumerate(NAMES):
        rows = [{"id": f"{i}", "prompt": f"fox {i}"} for i in range(4 * number, 4 * number + 4)]
        write_rows(tmp_path / "samples" / f"{name}.parquet", rows, {})
    return tmp_path


def test_a_folder_that_lacks_a_shard_is_refused(data):
    assert [path.stem for path in shards_of(data / "samples", ".parquet")] == NAMES
    (data / "samples" / f"{NAMES[1]}.parquet").unlink()
    with pytest.raises(InputError, match="it has 2 of its shards"):
        shards_of(data / "samples", ".parquet")
    with pytest.raises(InputError, match="it has 0 of its shards"):
        shards_of(data / "nowhere", ".parquet")


def test_shards_that_were_merged_of_other_samples_or_for_another_opponent_are_merged_again(tmp_path):
    sources = [tmp_path / name for name in ("a", "b")]
    write_rows(sources[0] / "00000-of-00001.parquet", [{"place": 0, "who": "a"}, {"place": 2, "who": "a"}], {})
    write_rows(sources[1] / "00000-of-00001.parquet", [{"place": 1, "who": "b"}], {})

    def merged(opponent: str) -> list[str]:
        merge_shards(sources, tmp_path / "all", lambda row: row["place"], {"opponent": opponent}, Accelerator(cpu=True))
        return [row["who"] for row in read_rows(tmp_path / "all" / "00000-of-00001.parquet")]

    target = tmp_path / "all" / "00000-of-00001.parquet"
    assert merged("x") == ["a", "b", "a"]
    first = target.stat().st_mtime_ns
    assert merged("x") == ["a", "b", "a"] and target.stat().st_mtime_ns == first
    assert merged("y") == ["a", "b", "a"] and rows_metadata(target)["opponent"] == "y"
    write_rows(sources[1] / "00000-of-00001.parquet", [{"place": 3, "who": "c"}], {})
    assert merged("y") == ["a", "a", "c"]


def test_a_score_that_is_not_finite_is_refused_and_anothers_scores_are_computed_again(data):
    for name in NAMES:
        write_tensors(data / "encoded" / f"{name}.safetensors", {"x": torch.ones(4)}, {})
    scores = {"now": 1.0}
    game = create_autospec(KeepsScores, instance=True)
    game.opponent_scores.side_effect = lambda tensors: torch.full((len(tensors["x"]),), scores["now"])

    def score(opponent: str):
        score_shards(data / "encoded", data / "scores", game, Part(1, 2), "", opponent, Accelerator(cpu=True),
                     lambda done, text: None)  # fmt: skip
        path = data / "scores" / f"{NAMES[2]}.safetensors"
        return tensors_metadata(path)["opponent"], read_tensors(path)["opponent_score"].tolist()

    assert score("first") == ("first", [1.0, 1.0])
    scores["now"] = 2.0
    assert score("first")[1] == [1.0, 1.0] and score("second") == ("second", [2.0, 2.0])
    scores["now"] = float("nan")
    with pytest.raises(FloatingPointError, match=r"00000-of-00003.safetensors: the opponent's score of a sample"):
        score("third")


@pytest.mark.parametrize("part", [Part(), Part(1, 2)])
def test_some_pairs_come_evenly_from_the_whole_part_each_with_its_first_sample(part, data):
    for path in shards_of(data / "samples", ".parquet"):
        drawn = [
            {"place": place, "k": k, "text": f"{row['id']}.{k}"}
            for place, row in enumerate(read_rows(path)[part.places]) for k in (0, 1)
        ]  # fmt: skip
        write_rows(data / "drawn" / path.name, drawn, {})
    real, generated = some_pairs(data, data / "drawn", part, 3)
    assert [row["id"] for row in real] == {1: ["0", "4", "8"], 2: ["1", "5", "9"]}[part.of]
    assert [row["text"] for row in generated] == [f"{row['id']}.0" for row in real]
    assert len(some_pairs(data, data / "drawn", part, 100)[0]) == 12 // part.of


def test_the_real_samples_are_there_only_with_what_was_left_out_of_them(tmp_path, monkeypatch):
    commit, there = samples.commit, []

    def seen(path):
        there.append((tmp_path / "left_out.json").is_file())
        commit(path)

    monkeypatch.setattr(samples, "commit", seen)
    (tmp_path / "samples.spin-part").mkdir()  # as a kill left it
    (tmp_path / "samples.spin-part" / "00007.parquet").write_text("half")
    game = create_autospec(Game, instance=True)
    game.encode.side_effect = lambda rows: {"x": torch.ones(len(rows))}
    game.encoder_hash.return_value = "an encoder"
    rows = [{"id": f"{i}", "image": b"a"} for i in range(7)]
    manifest = prepare(
        tmp_path, lambda: iter(rows), {"seed": 1}, 3, game, Accelerator(cpu=True), report=lambda: {"x": 2}
    )
    assert there == [True] and manifest["left_out"] == {"x": 2} and manifest["rows"] == 7
    assert [len(read_rows(path)) for path in shards_of(tmp_path / "samples", ".parquet")] == [3, 3, 1]
    # Its hash is that of the content
    others = [row | {"image": b"b"} for row in rows]
    other = prepare(tmp_path / "other", lambda: iter(others), {"seed": 1}, 3, game, Accelerator(cpu=True))
    same = prepare(tmp_path / "same", lambda: iter(rows), {"seed": 2}, 3, game, Accelerator(cpu=True))
    assert manifest["hash"] == same["hash"] != other["hash"]
