"""What of an evaluation is not what was written is removed, and nothing else."""

import json

import pytest

from spin_diffusion.evaluation.mending import records_in, remove_damaged
from spin_diffusion.store.files import write_json, write_json_lines, write_rows
from spin_diffusion.store.run_dir import file_hashes

INDEX, SCORES = "images/guidance-3/00000-of-00001.jsonl", "scores/oracle/guidance-3/00000-of-00001.parquet"
RECORDS = (INDEX, SCORES, "images/protocol.json", "scores/oracle/scorer.json", "model.json")


@pytest.fixture
def folder(tmp_path):
    """An evaluation that came to its end."""
    row = {"id": "0", "k": 0, "prompt": "a cat", "category": "", "seed": 1, "file": None, "sha256": None, "state": "x"}
    write_json_lines(tmp_path / INDEX, [row], "a key")
    write_rows(tmp_path / SCORES, [{"id": "0", "k": 0, "score": 1.0}], {"source": "oracle"})
    write_json(tmp_path / "images" / "protocol.json", {"id": "abc"})
    write_json(tmp_path / "scores" / "oracle" / "scorer.json", {"name": "oracle", "state": "run", "reason": ""})
    (tmp_path / "images" / "guidance-3" / "0-0.png").write_bytes(b"a picture")
    write_json(tmp_path / "results.json", {})
    files = file_hashes(records_in(tmp_path), tmp_path)
    assert sorted(files) == sorted(set(RECORDS) - {"model.json"})
    write_json(tmp_path / "model.json", {"name": "base", "weights_sha256": None, "files": files})
    return tmp_path


def left(folder) -> set[str]:
    return {name for name in RECORDS if (folder / name).is_file()}


def test_nothing_of_a_whole_one_is_removed_nor_said(folder, capsys):
    remove_damaged(folder)
    assert left(folder) == set(RECORDS) and capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"{}", b"[]", b"", b"\0", b"\xff\xfe", b"abc", b"[" * 100000, b"PAR1", None])
@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_removed_and_its_evaluation_is_to_be_done_again(folder, name, content, capsys):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    remove_damaged(folder)
    drawn_anew = {INDEX} if name in ("model.json", "images/protocol.json") else set()
    assert left(folder) == set(RECORDS) - {name, "model.json"} - drawn_anew
    assert f"{path} is damaged" in (said := capsys.readouterr().out) and "made anew" in said
    assert (folder / "images" / "guidance-3" / "0-0.png").is_file() and (folder / "results.json").is_file()


@pytest.mark.parametrize("name", [INDEX, SCORES, "scores/oracle/scorer.json"])
def test_a_record_that_is_gone_or_says_something_else_is_seen_by_its_hash(folder, name, capsys):
    if name.endswith("scorer.json"):
        said = json.loads((folder / name).read_text()) | {"state": "not run"}
        (folder / name).write_text(json.dumps(said))
    else:
        (folder / name).unlink()
    remove_damaged(folder)
    assert left(folder) == set(RECORDS) - {name, "model.json"}
    assert f"{folder / name} is " in capsys.readouterr().out


def test_a_users_own_files_stay_whatever_they_hold(folder):
    names = (
        "notes.json",
        "images/notes.json",
        "images/guidance-3/mine.jsonl",
        "scores/oracle/mine.parquet",
        "my.jsonl",
    )
    for name in names:
        (folder / name).write_text("[1, 2]")
    assert not set(names) & {path.relative_to(folder).as_posix() for path in records_in(folder)}
    (folder / "images" / "protocol.json").write_text("[1, 2]")  # all pictures are drawn anew
    remove_damaged(folder)
    assert [(folder / name).read_text() for name in names] == ["[1, 2]"] * len(names)
