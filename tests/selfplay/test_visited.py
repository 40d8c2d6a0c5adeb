"""A round draws for the pairs that its training visits, and trains as if it had drawn for all."""

import shutil
from dataclasses import replace

import pytest

from spin_diffusion.samples.pairs import find_visited
from spin_diffusion.samples.shards import Part, shards
from spin_diffusion.selfplay import health
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.run_dir import file_hash
from tests.playing import SAMPLING, TRAINING, drawing_for_all, make_game, play_all
from tests.selfplay.test_rounds import Killed

TWO_STEPS = replace(TRAINING, max_train_steps=2)  # of two pairs, out of ten


def drawn(output_dir, k: int) -> dict[tuple[str, int], bytes]:
    """(id, number of the sample) -> the picture's file."""
    rows = (row for path in shards(output_dir / f"round-{k}" / "samples", ".parquet") for row in read_rows(path))
    return {(row["id"], row["k"]): row["image"] for row in rows}


def weights(output_dir) -> str:
    return file_hash(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "options, visits",
    [
        ({"num_generated": 2, "opponent": "pool"}, 4),
        ({"real_parts": 2}, 4),
        ({"beta": "auto"}, 4),
    ],
)
def test_only_what_is_visited_is_drawn_and_the_player_is_that_of_a_drawing_for_all(options, visits, sdxl_dir, tmp_path):
    def play(folder: str) -> list[dict]:
        # One by one: a CPU may round the picture of a smaller batch in another way
        game = make_game(sdxl_dir, sampling=replace(SAMPLING, generation_batch_size=1))
        return play_all(sdxl_dir, tmp_path / folder, TWO_STEPS, game, **options)

    records = play("visited")
    copies = options.get("num_generated", 1)
    for k, record in enumerate(records, 1):
        assert record["visits"] == visits and sum(record["drawn"].values()) == visits * copies
        assert len(drawn(tmp_path / "visited", k)) == visits * copies
        assert record["ledger"]["generated"]["samples"] == visits * copies
    if "beta" in options:  # found from the first pairs of the stream, of which these are fewer
        return
    with drawing_for_all():
        play("all")
    for k in (1, 2):
        every = drawn(tmp_path / "all", k)
        assert len(every) == (10 // options.get("real_parts", 1)) * copies
        assert drawn(tmp_path / "visited", k).items() <= every.items()
    assert weights(tmp_path / "visited") == weights(tmp_path / "all")


@pytest.mark.parametrize("options", [{"rounds": 1}, {"rounds": 2, "opponent": "pool"}])  # of whose round 2 two draw
def test_a_round_whose_batches_have_become_larger_draws_what_it_lacks(options, sdxl_dir, tmp_path, monkeypatch):
    def dying(*args, **kwargs):
        raise Killed

    last = options["rounds"]
    if last > 1:
        play_all(sdxl_dir, tmp_path / "a", TWO_STEPS, **options | {"rounds": last - 1})
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(health, "check_finite", dying)
        with pytest.raises(Killed):
            play_all(sdxl_dir, tmp_path / "a", TWO_STEPS, **options)
    assert len(drawn(tmp_path / "a", last)) == 4
    larger = replace(TWO_STEPS, train_batch_size=4)
    record = play_all(sdxl_dir, tmp_path / "a", larger, **options)[-1]
    assert record["visits"] == len(drawn(tmp_path / "a", last)) == 8
    play_all(sdxl_dir, tmp_path / "b", larger, **options)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_what_was_not_drawn_for_cannot_be_paired(sdxl_dir, tmp_path):
    play_all(sdxl_dir, tmp_path, TWO_STEPS, rounds=1)
    visited = find_visited(tmp_path / "data", Part(), 4, 1, 1)
    assert visited.number == 4 and len(visited.places) == 3
    shard, place = next((s, p) for s in range(3) for p in range(2) if p not in visited.places[s])
    with pytest.raises(AssertionError, match=f"nothing was drawn for row {place} of shard {shard}"):
        visited.row(shard, place)
