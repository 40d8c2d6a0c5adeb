"""Files that are none: refused at once, in one line."""

import os
import socket

import pytest

from spin_diffusion.store import input_error
from spin_diffusion.store.input_error import (
    InputError,
    broken_character,
    open_regular,
    open_text,
    printable,
    read_bytes,
    read_lines,
)


def test_a_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "file") == read_bytes(tmp_path / "link", at_most=3) == b"abc"


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("kind", "words"), [("pipe", "named pipe"), ("device", "device"), ("folder", "folder"), ("socket", "opened")]
)
def test_what_is_no_file_is_refused_without_waiting(tmp_path, kind, words):
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    with pytest.raises(InputError, match=words):
        open_regular(path)


@pytest.mark.parametrize("name", ["missing", "a\0b"])
def test_a_name_without_a_file_is_an_input_error(tmp_path, name):
    with pytest.raises(InputError, match="cannot be opened"):
        open_regular(f"{tmp_path}/{name}")


def test_more_bytes_than_wanted_are_not_read(tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 11)
    with pytest.raises(InputError, match="11 bytes, at most 10"):
        read_bytes(tmp_path / "big", at_most=10)


def test_every_string_of_a_disk_can_be_shown():
    assert printable("caf\udce9.jpg") == "caf\\udce9.jpg"
    assert printable("a smile \ud83d") == "a smile \\ud83d"
    assert printable("red \x1b[31m\n") == "red \\x1b[31m\\n"
    assert printable("é 日本 😀") == "é 日本 😀"
    printable("\udcff\ud800").encode("utf-8")


def test_broken_characters_are_found_where_they_are():
    assert broken_character("caf\u00e9 \U0001f600") is None and broken_character("") is None
    assert (
        broken_character("a smile \ud83d") == 9 and broken_character(b"caf\xe9".decode(errors="surrogateescape")) == 4
    )


def test_text_that_is_not_utf_8_comes_back_with_broken_characters(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ncaf\xe9\n")
    with open_text(tmp_path / "a.txt") as file:
        assert list(file) == ["one\r\n", "caf\udce9\n"]
    with pytest.raises(InputError, match="at most 5 are read"):
        open_text(tmp_path / "a.txt", 5)


def test_a_line_without_an_end_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(input_error, "MAX_LINE_BYTES", 5)
    (tmp_path / "a.txt").write_bytes(b"one\nsix56\n")
    with open_regular(tmp_path / "a.txt") as file, pytest.raises(InputError, match="a line of more than 5 bytes"):
        list(read_lines(file, tmp_path / "a.txt"))
