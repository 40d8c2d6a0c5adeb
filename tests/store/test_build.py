"""A result is kept by its key, made anew without it, and shared out piece by piece."""

import pytest
import torch
from accelerate import Accelerator

from spin_diffusion.store.files import (
    Made,
    Piece,
    build,
    build_pieces,
    build_together,
    read_json,
    read_json_lines,
    read_rows,
    read_tensors,
    rows_metadata,
)

CONTENTS = {
    "rows.parquet": [{"id": "0", "score": 1.0}],
    "tensors.safetensors": {"x": torch.arange(3.0)},
    "object.json": {"scored": 3},
    "lines.jsonl": [{"id": "0", "file": "0-0.png"}, {"id": "1", "file": None}],
}
READERS = {".parquet": read_rows, ".safetensors": read_tensors, ".json": read_json, ".jsonl": read_json_lines}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_has_its_key_stays_and_anything_else_is_made_anew(name, tmp_path):
    path, calls = tmp_path / "folder" / name, []

    def make() -> Made:
        calls.append(name)
        return Made(CONTENTS[name])

    assert build(path, "a", make) and not build(path, "a", make) and calls == [name]
    first = path.read_bytes()
    assert build(path, "b", make) and len(calls) == 2 and path.read_bytes() != first
    assert build(path, "a", make) and path.read_bytes() == first
    path.write_bytes(first[: len(first) // 2])
    assert build(path, "a", make) and path.read_bytes() == first and len(calls) == 4
    assert len(READERS[path.suffix](path)) == len(CONTENTS[name]) + (path.suffix == ".json")
    assert list(path.parent.iterdir()) == [path]


def test_a_changed_line_or_row_key_is_seen(tmp_path):
    path = tmp_path / "lines.jsonl"
    build(path, "a", lambda: Made(CONTENTS["lines.jsonl"]))
    whole = path.read_text()
    path.write_text(whole.replace("0-0.png", "0-1.png"))
    assert build(path, "a", lambda: Made(CONTENTS["lines.jsonl"])) and path.read_text() == whole


def test_what_else_a_file_says_of_itself_is_beside_its_key(tmp_path):
    build(tmp_path / "rows.parquet", "a", lambda: Made([{"id": "0"}], {"opponent": "x"}))
    assert rows_metadata(tmp_path / "rows.parquet") == {"opponent": "x", "key": "a", "rows": "1"}


def pieces_of(folder, made, beside=lambda: True):
    def piece_of(number: int) -> Piece:
        def make(tell) -> Made:
            tell(1)
            made.append(number)
            return Made([{"id": f"{number}"}])

        return Piece(folder / f"{number}.parquet", f"key {number}", 2, make, beside)

    return piece_of


def test_pieces_that_are_there_count_as_done_and_the_others_are_made(tmp_path):
    made, told = [], []
    piece_of = pieces_of(tmp_path, made)
    assert build_pieces([piece_of(1)], lambda done, text: None, 1) == 2
    assert build_together(range(3), piece_of, Accelerator(cpu=True), lambda done, text: told.append(done)) == 4
    assert made == [1, 0, 2] and told == [1, 2, 4, 5, 6]
    told.clear()
    assert build_pieces(map(piece_of, range(3)), lambda done, text: told.append(done), 4) == 0
    assert told == [8, 16, 24] and len(made) == 3


def test_a_piece_whose_other_files_are_not_whole_is_made_anew(tmp_path):
    made, whole = [], {"beside": True}
    piece_of = pieces_of(tmp_path, made, lambda: whole["beside"])
    for expected, beside in (([0], True), ([0], True), ([0, 0], False)):
        whole["beside"] = beside
        build_pieces([piece_of(0)], lambda done, text: None, 1)
        assert made == expected


def test_what_was_made_before_a_failure_is_written(tmp_path):
    def failing(number: int) -> Piece:
        if number == 1:
            raise FloatingPointError("not finite")
        return pieces_of(tmp_path, [])(number)

    with pytest.raises(FloatingPointError):
        build_together(range(2), failing, Accelerator(cpu=True), lambda done, text: None)
    assert read_rows(tmp_path / "0.parquet") == [{"id": "0"}]
