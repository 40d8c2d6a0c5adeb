"""The run folder: seeds, hashes, atomic writes."""

import os

import pytest
import torch

from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay import run_dir


def test_seeds_are_the_same_everywhere_and_differ_by_every_part():
    seeds = {run_dir.seed_from(*parts) for parts in [(0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (1, 1, "a"), ("0", 1, "a")]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    run_dir.write_json(path, {"old": 1})

    def failing(part):
        part.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run_dir.write_file(path, failing)
    assert run_dir.read_json(path) == {"old": 1}


def test_bytes_are_on_the_disk_before_their_name_and_the_name_afterwards(tmp_path, monkeypatch):
    path, events = tmp_path / "a.json", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("named") or replace(*paths))
    run_dir.write_json(path, {"new": 1})
    assert events == [path.stat().st_ino, "named", tmp_path.stat().st_ino]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_folder_that_is_replaced_is_never_lost(tmp_path, monkeypatch, killed_at):
    path, renames = tmp_path / "unet", []
    path.mkdir()
    (path / "a").write_text("old")
    run_dir.part_of(path).mkdir()
    (run_dir.part_of(path) / "a").write_text("new")
    replace = os.replace

    def dying(*paths):
        renames.append(paths)
        if len(renames) == killed_at:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            run_dir.commit(path)
    run_dir.settle(tmp_path)
    assert (path / "a").read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["unet"]


def test_settling_removes_parts_and_gives_a_replaced_folder_back(tmp_path):
    (tmp_path / "deep" / "a.parquet.part").parent.mkdir()
    (tmp_path / "deep" / "a.parquet.part").write_text("half")
    (tmp_path / "unet.part").mkdir()
    (tmp_path / "unet.old").mkdir()  # killed between the two renames of a replacement
    (tmp_path / "unet.old" / "weights").write_text("good")
    run_dir.settle(tmp_path)
    assert (tmp_path / "unet" / "weights").read_text() == "good"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "unet", "weights"]


def test_a_folder_replaces_a_folder_whole(tmp_path):
    for content in ("one", "two"):
        part = run_dir.part_of(tmp_path / "unet")
        part.mkdir()
        (part / content).write_text(content)
        run_dir.commit(tmp_path / "unet")
    assert [path.name for path in (tmp_path / "unet").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def test_rows_come_back_with_their_metadata_and_damage_is_found(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"id": str(i), "image": bytes([i] * 500)} for i in range(4)]
    run_dir.write_rows(path, rows, {"opponent": "abc"})
    assert run_dir.read_rows(path) == rows
    assert run_dir.rows_metadata(path) == {"opponent": "abc", "rows": "4"}
    damaged = bytearray(path.read_bytes())
    damaged[60] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="rows.parquet is damaged"):
        run_dir.read_rows(path)


def test_no_bit_of_the_samples_changes_unseen(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"image": bytes(range(i, i + 40))} for i in range(4)]
    run_dir.write_rows(path, rows, {})
    whole, found = path.read_bytes(), 0
    first = whole.index(bytes(range(20)))  # in the data, which no decoder checks
    for place in range(first, first + 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="rows.parquet is damaged"):
            run_dir.read_rows(path)
        found += 1
    assert found == 20


def test_a_shared_file_is_on_the_disk_before_its_name_and_has_a_part_for_each_writer(tmp_path, monkeypatch):
    path, events, tensors = tmp_path / "shared" / "a.safetensors", [], {"a": torch.ones(2)}
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_ino) or fsync(file))

    def interrupted(part, target):
        events.append(part.name)
        if len(events) == 2:  # another program writes the same file just now
            run_dir.write_shared_tensors(path, tensors, "a key")
        replace(part, target)

    monkeypatch.setattr(os, "replace", interrupted)
    run_dir.write_shared_tensors(path, tensors, "a key")
    synced, named = events[::2], events[1::2]
    assert len(set(synced)) == len(set(named)) == 2 and path.stat().st_ino == synced[0]
    assert all(name.endswith(".part") for name in named) and [found.name for found in path.parent.iterdir()] == [
        path.name
    ]


def test_tensors_come_back_with_their_metadata_and_no_bit_of_their_file_changes_unseen(tmp_path, capsys):
    path, tensors = tmp_path / "a.safetensors", {"a": torch.arange(6.0).view(2, 3).half(), "b": torch.ones(3).bool()}
    run_dir.write_tensors(path, tensors, {"key": "k", "opponent": "abc"})
    found = run_dir.read_tensors(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert run_dir.tensors_metadata(path) == {"key": "k", "opponent": "abc"}
    assert run_dir.is_built(path, "k") and not run_dir.is_built(path, "l")
    assert not run_dir.is_built(tmp_path / "b.safetensors", "k") and capsys.readouterr().out == ""
    whole = path.read_bytes()
    for damaged in (
        *(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :] for place in range(len(whole))),
        *(whole[:length] for length in range(0, len(whole), 7)),
    ):
        path.write_bytes(damaged)
        try:  # in the header a bit may be spare: the blank that fills it up, the name of the format
            same = run_dir.read_tensors(path)
        except InputError as error:
            assert "a.safetensors is damaged" in str(error) and not run_dir.is_built(path, "k")
            continue
        assert same.keys() == tensors.keys() and all(torch.equal(same[name], tensors[name]) for name in tensors)
    assert capsys.readouterr().out.count("a.safetensors is damaged: it is made anew") > len(whole) / 2


def test_rows_are_built_only_with_their_key_and_whole(tmp_path, capsys):
    path = tmp_path / "rows.parquet"
    run_dir.write_rows(path, [{"score": 1.5}], {"key": "k"})
    assert run_dir.is_built(path, "k") and not run_dir.is_built(path, "l") and capsys.readouterr().out == ""
    path.write_bytes(path.read_bytes()[:-9])
    assert not run_dir.is_built(path, "k") and "rows.parquet is damaged" in capsys.readouterr().out


def test_a_hash_that_differs_names_the_file(tmp_path):
    (tmp_path / "a").write_text("content")
    hashes = run_dir.file_hashes([tmp_path / "a"], tmp_path)
    run_dir.verify_hashes(hashes, tmp_path)
    (tmp_path / "a").write_text("content.")
    with pytest.raises(InputError, match="a is damaged"):
        run_dir.verify_hashes(hashes, tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(InputError, match="a is missing"):
        run_dir.verify_hashes(hashes, tmp_path)


def test_the_weights_hash_sees_one_bit_of_one_weight_and_no_memory_layout():
    torch.manual_seed(0)
    module = torch.nn.Conv2d(4, 4, 3)
    before = run_dir.weights_hash(module)
    module.to(memory_format=torch.channels_last)
    assert run_dir.weights_hash(module) == before
    with torch.no_grad():
        module.bias[0] = torch.nextafter(module.bias[0], torch.tensor(1e9))
    assert run_dir.weights_hash(module) != before


def test_the_weights_hash_sees_names_shapes_and_dtypes():
    def hash_of(name: str, tensor: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.register_buffer(name, tensor)
        return run_dir.weights_hash(module)

    zeros = torch.zeros(2, 6)
    named = [("a", zeros), ("b", zeros), ("a", zeros.view(3, 4)), ("a", zeros.int()), ("a", torch.zeros(4, 6).half())]
    assert len({hash_of(name, tensor) for name, tensor in named}) == 5
