"""Shards are written while the next ones are drawn, each whole, two in memory at most."""

import threading

import pytest
from accelerate import Accelerator
from PIL import Image

from spin_diffusion.samples.drawn import draw_samples, picture_shards, read_index, requests_of, sample_files
from spin_diffusion.samples.sampling import Sampling
from spin_diffusion.samples.shards import draw_shards
from spin_diffusion.store import files
from spin_diffusion.store.files import read_rows, write_rows

NAMES = [f"{number:05d}-of-00003.parquet" for number in range(3)]


@pytest.fixture
def data(tmp_path):
    for number, name in enumerate(NAMES):
        write_rows(tmp_path / "data" / "samples" / name, [{"id": f"{number}", "prompt": "fox"}], {})
    return tmp_path


def drawn_with(data, draw):
    def ask(shard, rows):
        return [row | {"place": 0, "k": 0} for row in rows]

    return draw_shards(
        data / "data", data / "drawn", ask, draw, {"round": "1"}, ("id", "prompt"),
        Accelerator(cpu=True), lambda done, text: None,
    )  # fmt: skip


def test_the_next_shard_is_drawn_before_the_last_one_is_written_and_no_further(data, monkeypatch):
    second_is_drawn, write, events = threading.Event(), files.write_rows, []

    def slow(path, rows, metadata):
        if path.name == NAMES[0]:
            assert second_is_drawn.wait(30)
        write(path, rows, metadata)
        events.append(f"wrote {rows[0]['id']}")

    def draw(rows, done):
        events.append(f"drew {rows[0]['id']}")
        if rows[0]["id"] == "1":
            second_is_drawn.set()
        return rows

    monkeypatch.setattr(files, "write_rows", slow)
    assert drawn_with(data, draw) == 3
    assert events.index("drew 1") < events.index("wrote 0") < events.index("drew 2")
    assert [read_rows(data / "drawn" / name)[0]["id"] for name in NAMES] == ["0", "1", "2"]


def test_a_shard_that_cannot_be_written_ends_the_drawing(data, monkeypatch):
    def full(path, rows, metadata):
        raise OSError(28, "No space left on device")

    drew = []
    monkeypatch.setattr(files, "write_rows", full)
    with pytest.raises(OSError, match="No space"):
        drawn_with(data, lambda rows, done: drew.append(rows[0]["id"]) or rows)
    assert drew == ["0", "1"] and not (data / "drawn" / NAMES[0]).exists()


def test_pictures_in_other_shards_take_the_place_of_those_that_were_there(tmp_path):
    wanted = requests_of([{"prompt": f"fox {number}"} for number in range(10)], 1, 0)
    protocol = Sampling("ddim", 1, 3.0, 8).in_protocol() | {"guidance_scales": [3.0]}

    def draw(prompts, seeds, sampling, told):
        return [Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for seed in seeds]

    drawn = []
    for per_shard in (64, 4):
        shards = picture_shards(wanted, tmp_path, protocol, "a model", draw, per_shard)
        draw_samples(shards, Accelerator(cpu=True), lambda scale, total: lambda done, text: None)
        files = sample_files(tmp_path / "guidance-3")
        assert len(files) == -(-10 // per_shard)
        drawn.append([(row["id"], row["sha256"]) for file in files for row in read_index(file)])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 10
