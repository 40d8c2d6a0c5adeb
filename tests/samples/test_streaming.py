"""Data sets longer than memory: what is held of them does not grow with them."""

import pytest
import torch

from spin_diffusion.samples import pairs as samples
from spin_diffusion.samples.pairs import Column, Side, open_pairs
from spin_diffusion.samples.sample import CONDITION, ENCODED, KIND
from spin_diffusion.samples.shards import Part
from spin_diffusion.store.files import write_rows, write_tensors

SIZES = (3, 1, 4, 2)


@pytest.fixture
def data(tmp_path):
    """Ten real rows in four shards; row i is named and said i, and its tensor is i."""
    first = 0
    for number, size in enumerate(SIZES):
        name = f"{number:05d}-of-{len(SIZES):05d}"
        rows = [{"id": f"id {i}", "prompt": f"prompt {i}"} for i in range(first, first + size)]
        write_rows(tmp_path / "samples" / f"{name}.parquet", rows, {})
        values = torch.arange(first, first + size, dtype=torch.float32)[:, None]
        write_tensors(tmp_path / ENCODED / f"{name}.safetensors", {"x": values}, {})
        first += size
    return tmp_path


@pytest.mark.parametrize("part", [Part(), Part(0, 2), Part(1, 2), Part(2, 3)])
def test_a_column_is_the_text_of_every_row_of_its_part(data, part, monkeypatch):
    monkeypatch.setattr(samples, "IN_MEMORY", 2)
    every, first = [], 0
    for size in SIZES:  # a part takes its places of each shard
        every += list(range(first, first + size))[part.places]
        first += size
    column = Column(data, "prompt", part)
    assert len(column) == len(every) == part.count(data)
    assert list(column) == [f"prompt {i}" for i in every]
    assert [column[i] for i in range(len(column) - 1, -1, -1)] == [f"prompt {i}" for i in every[::-1]]
    assert column[1:3] == [f"prompt {i}" for i in every[1:3]]
    with pytest.raises(IndexError):
        column[len(every)]
    pairs = open_pairs(data, Side(data / ENCODED), None, part, 1)
    real, _ = pairs.fetch(list(range(len(every)))[::-1])
    assert real["x"].squeeze(1).tolist() == every[::-1]


def test_only_some_shards_are_open_at_a_time(data, monkeypatch):
    monkeypatch.setattr(samples, "IN_MEMORY", 2)
    opened: list[str] = []
    safe_open = samples.safe_open

    def counting(path, framework):
        opened.append(path.name[:5])
        return safe_open(path, framework=framework)

    monkeypatch.setattr(samples, "safe_open", counting)
    pairs = open_pairs(data, Side(data / ENCODED), None, Part(), 1)
    assert opened == ["00000"]  # for the tensors' names
    for index in (0, 3, 4, 9, 0):
        pairs.fetch([index])
    assert opened == ["00000", "00001", "00002", "00003", "00000"]


def test_choices_of_other_samples_are_no_choices(data):
    for number, size in enumerate(SIZES):
        name, first = f"{number:05d}-of-{len(SIZES):05d}", sum(SIZES[:number])
        choices = [{"id": f"id {first + place}", "place": place, "real": None, "generated": 0} for place in range(size)]
        write_rows(data / "choices" / f"{name}.parquet", choices, {})
    side = Side(data / ENCODED)
    assert open_pairs(data, side, side, Part(), 1, data / "choices").ids == [f"id {i}" for i in range(10)]
    write_rows(data / "choices" / f"{name}.parquet", choices[::-1], {})
    with pytest.raises(AssertionError, match="does not answer"):
        open_pairs(data, side, side, Part(), 1, data / "choices")


def test_a_chosen_pair_has_the_kind_of_its_own_real_sample(data):
    for number, size in enumerate(SIZES):
        name, first = f"{number:05d}-of-{len(SIZES):05d}", sum(SIZES[:number])
        kinds = {CONDITION + KIND: torch.arange(first, first + size, dtype=torch.int32), "x": torch.zeros(size, 1)}
        write_tensors(data / "kinds" / f"{name}.safetensors", kinds, {})
        choices = [
            {"id": f"id {first + place}", "place": place, "real": None, "generated": None if place == 1 else 0}
            for place in range(size)
        ]
        write_rows(data / "choices" / f"{name}.parquet", choices, {})
    side = Side(data / "kinds")
    pairs = open_pairs(data, side, side, Part(), 1, data / "choices")
    assert [f"id {kind}" for kind in pairs.kinds.tolist()] == pairs.ids and len(pairs.ids) == 7


def test_an_epoch_is_a_permutation_that_takes_eight_bytes_a_row(data):
    pairs = open_pairs(data, Side(data / ENCODED), None, Part(), 1)
    seen = [pairs.batch([position], 0, 1).ids[0] for position in range(20)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(f"id {i}" for i in range(10)) and seen[:10] != seen[10:]
    assert all(order.dtype == torch.int64 and len(order) == 10 for order in pairs.epochs.values())
