"""Keys: the hash of all that decides a file's content, and the hashes that go into it."""

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import constants

from spin_diffusion.store.keys import code_files, code_hash, key_of, known_hash, place_hash


def test_a_key_is_that_of_the_values_and_not_of_their_order():
    assert key_of(a=1, b=[1.5, None]) == hashlib.sha256(b'{"a":1,"b":[1.5,null]}').hexdigest()
    assert key_of(b=[1.5, None], a=1) == key_of(a=1, b=[1.5, None]) == key_of(a=1, b=(1.5, None))
    keys = {key_of(a=value) for value in (0, "0", None, False, [], [0], {"a": 0}, 0.5, "\ud83d", "\U0001f600", 1e-4)}
    assert len(keys) == 11
    with pytest.raises(TypeError):
        key_of(a=Path("somewhere"))  # its text says where, not what


def test_a_hash_that_was_read_once_is_read_again_when_the_file_has_changed(tmp_path):
    path = tmp_path / "weights"
    for content in (b"one", b"two", b"three"):
        path.write_bytes(content)
        assert known_hash(path) == known_hash(path) == hashlib.sha256(content).hexdigest()
    (tmp_path / "other").write_bytes(b"four!")
    (tmp_path / "other").replace(path)
    assert known_hash(path) == hashlib.sha256(b"four!").hexdigest()


def test_a_place_is_what_is_in_it_wherever_it_lies(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "weights").write_text("w")
        (tmp_path / name / "config.json").write_text("{}")
    here, there = place_hash(tmp_path / "here"), place_hash(str(tmp_path / "there"))
    assert here == there and len(here) == 64
    seen = {here}
    (tmp_path / "there" / ".cache").mkdir()
    (tmp_path / "there" / ".cache" / "lock").write_text("")
    assert place_hash(tmp_path / "there") == here
    for change in (
        lambda: (tmp_path / "there" / "unet" / "weights").write_text("v"),
        lambda: (tmp_path / "there" / "more").write_text(""),
        lambda: (tmp_path / "there" / "more").rename(tmp_path / "there" / "moved"),
        lambda: (tmp_path / "there" / "unet").rename(tmp_path / "there" / "vae"),
    ):
        change()
        seen.add(place_hash(tmp_path / "there"))
    assert len(seen) == 5


def test_a_file_of_weights_is_its_bytes_and_what_describes_them(tmp_path):
    weights = tmp_path / "head.pt"
    weights.write_bytes(b"w")
    alone = place_hash(weights)
    (tmp_path / "scores.json").write_text("{}")
    assert place_hash(weights) == alone
    (tmp_path / "config.json").write_text("{}")
    described = place_hash(weights)
    weights.write_bytes(b"v")
    assert len({alone, described, place_hash(weights)}) == 3


def test_a_hub_id_is_the_commit_that_the_cache_has(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert place_hash("org/name") is None
    (tmp_path / "models--org--name" / "refs").mkdir(parents=True)
    for commit in ("1" * 40, "2" * 40):
        (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
        assert place_hash("org/name") == commit
    for elsewhere in (tmp_path / "nowhere", "./org/name", "a/b/c", "../x"):
        assert place_hash(elsewhere) is None


def test_code_is_the_file_what_it_imports_beside_it_and_what_it_names(tmp_path):
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "import json\nimport helper\nfrom parts import inner\nfrom . import near\n"
        "HEAD = Path(__file__).parent / 'weights' / 'head.pt'\nload('world.py')\nABOUT = 'a picture'\n"
    )
    (tmp_path / "helper.py").write_text("import deeper\n")
    (tmp_path / "deeper.py").write_text("import scorer\n")  # a circle
    (tmp_path / "near.py").write_text("")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "inner.py").write_text("from . import __init__\n")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "head.pt").write_bytes(b"w")
    (tmp_path / "world.py").write_text("")
    (tmp_path / "unrelated.py").write_text("")
    names = [path.relative_to(tmp_path).as_posix() for path in code_files(scorer)]
    assert sorted(names) == [
        "deeper.py", "helper.py", "near.py", "parts/__init__.py", "parts/inner.py", "scorer.py", "weights/head.pt",
        "world.py",
    ]  # fmt: skip
    seen = {code_hash(scorer)}
    for name in names:
        with open(tmp_path / name, "a") as file:
            file.write("# changed\n")
        seen.add(code_hash(scorer))
    assert len(seen) == 1 + len(names)
    (tmp_path / "unrelated.py").write_text("changed")
    assert code_hash(scorer) in seen


def test_code_that_cannot_be_read_as_such_is_its_bytes(tmp_path):
    seen = set()
    for content in (b"def load(:\n", b"\xff\xfe", b"x = 1\n\0", b"(" * 3000):
        (tmp_path / "odd.py").write_bytes(content)
        seen.add(code_hash(tmp_path / "odd.py"))
    assert len(seen) == 4
