"""The run folder: seeds, hashes, atomic writes."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spin_diffusion.store import files, hashes, run_dir
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import MARKER


def test_seeds_are_the_same_everywhere_and_differ_by_every_part():
    seeds = {run_dir.seed_from(*parts) for parts in [(0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (1, 1, "a"), ("0", 1, "a")]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def failing(part):
        part.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run_dir.write_file(path, failing)
    assert files.read_json(path) == {"old": 1}


def test_bytes_are_on_the_disk_before_their_name_and_the_name_afterwards(tmp_path, monkeypatch):
    path, events = tmp_path / "a.json", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("named") or replace(*paths))
    files.write_json(path, {"new": 1})
    assert events == [path.stat().st_ino, "named", tmp_path.stat().st_ino]


def test_whoever_may_read_what_open_makes_may_read_every_file(tmp_path):
    (tmp_path / "opened").write_text("")
    files.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
    run_dir.write_folder(tmp_path / "unet", lambda part: save_file({"x": torch.zeros(1)}, part / "b.safetensors"))
    modes = {path.name: path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 3 and len(set(modes.values())) == 1, modes


def test_a_folder_has_nothing_of_a_command_that_was_killed_as_it_wrote_there(tmp_path):
    run_dir.part_of(tmp_path / "unet").mkdir()
    (run_dir.part_of(tmp_path / "unet") / "half").write_text("")
    run_dir.write_folder(tmp_path / "unet", lambda part: (part / "whole").write_text(""))
    assert [path.name for path in (tmp_path / "unet").iterdir()] == ["whole"]


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
    (tmp_path / "deep" / "a.parquet.spin-part").parent.mkdir()
    (tmp_path / "deep" / "a.parquet.spin-part").write_text("half")
    (tmp_path / "unet.spin-part").mkdir()
    (tmp_path / "unet.spin-old").mkdir()  # killed between the two renames of a replacement
    (tmp_path / "unet.spin-old" / "weights").write_text("good")
    run_dir.settle(tmp_path)
    assert (tmp_path / "unet" / "weights").read_text() == "good"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "unet", "weights"]


def test_settling_touches_no_name_of_the_users_and_follows_no_link(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "out"
    for kept in (
        folder / "notes.old", folder / "unet.old" / "weights", folder / "unet" / "weights", folder / "x.part",
        folder / "deep" / "download.part", folder / "spin-old" / "a", folder / "other" / MARKER,
        folder / "other" / "a.spin-part", elsewhere / "a.spin-part", elsewhere / "b.spin-old" / "c",
    ):  # fmt: skip
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("mine")
    for link in ("link", "link.old", "link.part", "link.spin-part", "new.spin-old"):
        (folder / link).symlink_to(elsewhere)
    (folder / "new").mkdir()
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    run_dir.settle(folder)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    assert sorted(path.name for path in folder.iterdir() if path.is_symlink()) == ["link", "link.old", "link.part"]


def test_a_folder_replaces_a_folder_whole(tmp_path):
    for content in ("one", "two"):
        part = run_dir.part_of(tmp_path / "unet")
        part.mkdir()
        (part / "weights").write_text(content)
        run_dir.commit(tmp_path / "unet")
    assert [path.read_text() for path in (tmp_path / "unet").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def replace_folder(folder: Path) -> None:
    """A new `unet` in place of one that its user put notes into."""
    run_dir.settle(folder)
    part = run_dir.part_of(folder / "unet")
    part.mkdir()
    (part / "weights").write_text("new")
    run_dir.commit(folder / "unet")


def test_what_a_user_put_into_a_folder_outlives_its_replacement_whenever_it_is_killed(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(real, at, calls):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                raise Killed
            return real(*args, **kwargs)

        return call

    for at in range(1, 40):
        folder, calls = tmp_path / str(at), []
        (folder / "unet" / "deep").mkdir(parents=True)
        (folder / "unet" / "weights").write_text("old")
        for name in ("notes.txt", "deep/notes.txt"):
            (folder / "unet" / name).write_text("mine")
        (folder / "unet" / "link").symlink_to(tmp_path)
        with monkeypatch.context() as patch:
            for name in ("replace", "rmdir", "unlink", "mkdir", "fsync"):
                patch.setattr(os, name, dying(getattr(os, name), at, calls))
            try:
                replace_folder(folder)
            except Killed:
                pass
        killed = len(calls) >= at
        replace_folder(folder)
        assert (folder / "unet" / "weights").read_text() == "new" and (folder / "unet" / "link").is_symlink()
        assert [(folder / "unet" / name).read_text() for name in ("notes.txt", "deep/notes.txt")] == ["mine", "mine"]
        assert [path.name for path in folder.iterdir()] == ["unet"]
        if not killed:
            assert at > 8
            return
    raise AssertionError("there are more points than were tried")


def test_a_linked_folder_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unet").symlink_to(tmp_path / "elsewhere")
    replace_folder(tmp_path / "out")
    assert (tmp_path / "elsewhere" / "weights").read_text() == "mine"
    assert (tmp_path / "out" / "unet" / "weights").read_text() == "new" and not (tmp_path / "out" / "unet").is_symlink()


def test_a_folder_does_not_replace_a_file_nor_a_file_a_folder(tmp_path):
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "mine").write_text("mine")
    (tmp_path / "unet").write_text("mine")
    with pytest.raises(InputError, match="report.html is a folder, and a file is to be written there: move it away"):
        files.write_json(tmp_path / "report.html", {})
    with pytest.raises(InputError, match="unet is a file, and a folder is to be written there: move it away"):
        replace_folder(tmp_path)
    assert (tmp_path / "report.html" / "mine").read_text() == (tmp_path / "unet").read_text() == "mine"


def test_only_files_that_are_named_are_removed(tmp_path):
    folder = tmp_path / "encoded"
    for name in ("00000-of-00002.parquet", "0/00001-of-00002.safetensors", "1/notes.txt", "1/1-of-2.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "link").symlink_to(folder / "1")
    run_dir.remove_files(folder, run_dir.is_shard)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
        "1", "1/1-of-2.parquet", "1/notes.txt", "link",
    ]  # fmt: skip
    (tmp_path / "linked").symlink_to(folder)
    for name in ("linked", "encoded", "absent"):
        run_dir.remove_files(tmp_path / name, lambda name: True)
        assert folder.is_dir() == (name == "linked")


def test_rows_come_back_with_their_metadata_and_damage_is_found(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"id": str(i), "image": bytes([i] * 500)} for i in range(4)]
    files.write_rows(path, rows, {"opponent": "abc"})
    assert files.read_rows(path) == rows
    assert files.rows_metadata(path) == {"opponent": "abc", "rows": "4"}
    damaged = bytearray(path.read_bytes())
    damaged[60] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="rows.parquet is damaged"):
        files.read_rows(path)


def test_no_bit_of_the_samples_changes_unseen(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"image": bytes(range(i, i + 40))} for i in range(4)]
    files.write_rows(path, rows, {})
    whole, found = path.read_bytes(), 0
    first = whole.index(bytes(range(20)))  # in the data, which no decoder checks
    for place in range(first, first + 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="rows.parquet is damaged"):
            files.read_rows(path)
        found += 1
    assert found == 20


def test_tensors_come_back_with_their_metadata_and_no_bit_of_their_file_changes_unseen(tmp_path, capsys):
    path, tensors = tmp_path / "a.safetensors", {"a": torch.arange(6.0).view(2, 3).half(), "b": torch.ones(3).bool()}
    files.write_tensors(path, tensors, {"key": "k", "opponent": "abc"})
    found = files.read_tensors(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert files.tensors_metadata(path) == {"key": "k", "opponent": "abc"}
    assert files.is_built(path, "k") and not files.is_built(path, "l")
    assert not files.is_built(tmp_path / "b.safetensors", "k") and capsys.readouterr().out == ""
    whole = path.read_bytes()
    for damaged in (
        *(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :] for place in range(len(whole))),
        *(whole[:length] for length in range(0, len(whole), 7)),
    ):
        path.write_bytes(damaged)
        try:  # in the header a bit may be spare: the blank that fills it up, the name of the format
            same = files.read_tensors(path)
        except InputError as error:
            assert "a.safetensors is damaged" in str(error) and not files.is_built(path, "k")
            continue
        assert same.keys() == tensors.keys() and all(torch.equal(same[name], tensors[name]) for name in tensors)
    assert capsys.readouterr().out.count("a.safetensors is damaged (") > len(whole) / 2


def test_rows_are_built_only_with_their_key_and_whole(tmp_path, capsys):
    path = tmp_path / "rows.parquet"
    files.write_rows(path, [{"score": 1.5}], {"key": "k"})
    assert files.is_built(path, "k") and not files.is_built(path, "l") and capsys.readouterr().out == ""
    path.write_bytes(path.read_bytes()[:-9])
    assert not files.is_built(path, "k") and "rows.parquet is damaged" in capsys.readouterr().out


def test_a_hash_that_differs_names_the_file(tmp_path):
    (tmp_path / "a").write_text("content")
    found = hashes.file_hashes([tmp_path / "a"], tmp_path)
    hashes.verify_hashes(found, tmp_path)
    (tmp_path / "a").write_text("content.")
    with pytest.raises(InputError, match="a is damaged"):
        hashes.verify_hashes(found, tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(InputError, match="a is missing"):
        hashes.verify_hashes(found, tmp_path)


def test_the_weights_hash_sees_one_bit_of_one_weight_and_no_memory_layout():
    torch.manual_seed(0)
    module = torch.nn.Conv2d(4, 4, 3)
    before = files.weights_hash(module)
    module.to(memory_format=torch.channels_last)
    assert files.weights_hash(module) == before
    with torch.no_grad():
        module.bias[0] = torch.nextafter(module.bias[0], torch.tensor(1e9))
    assert files.weights_hash(module) != before


def test_the_weights_hash_sees_names_shapes_and_dtypes():
    def hash_of(name: str, tensor: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.register_buffer(name, tensor)
        return files.weights_hash(module)

    zeros = torch.zeros(2, 6)
    named = [("a", zeros), ("b", zeros), ("a", zeros.view(3, 4)), ("a", zeros.int()), ("a", torch.zeros(4, 6).half())]
    assert len({hash_of(name, tensor) for name, tensor in named}) == 5


def test_a_path_that_is_not_utf_8_is_written_and_read_as_the_same_path(tmp_path):
    said = {"data": os.fsdecode(b"/data/caf\xe9"), "prompt": "\u65e5\u672c \U0001f600"}
    files.write_json(tmp_path / "a.json", said)
    assert files.read_json(tmp_path / "a.json") == said
    assert "\u65e5\u672c" in (tmp_path / "a.json").read_text(encoding="utf-8")
