"""YAML that two readers could read differently is refused; what is written is read back equal."""

import math
import os

import pytest

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.yaml_files import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            "a: no\nb: yes\nc: on\nd: off\ne: n\nf: y",
            {"a": "no", "b": "yes", "c": "on", "d": "off", "e": "n", "f": "y"},
        ),
        ("a: 1e-6", {"a": 1e-6}),
        ("a: -.5E+3", {"a": -500.0}),
        ("a: 1.", {"a": 1.0}),
        ("a: +7", {"a": 7}),
        ("a: 0o17", {"a": 15}),
        ("a: 0x1f", {"a": 31}),
        ("a: 0", {"a": 0}),
        ("a: -0.5", {"a": -0.5}),
        ("a: 1_000", {"a": "1_000"}),
        ("a: 12:30", {"a": "12:30"}),
        ("a: 2020-01-01", {"a": "2020-01-01"}),
        ("a: 0b11", {"a": "0b11"}),
        ("a: ~\nb: null\nc:", {"a": None, "b": None, "c": None}),
        ("a: True\nb: FALSE", {"a": True, "b": False}),
        ("a: '010'\nb: \"no\"", {"a": "010", "b": "no"}),
        ("\ufeffa: 1", {"a": 1}),
        ("", None),
        ("# nothing", None),
        ("[1, [2, {b: c}]]", [1, [2, {"b": "c"}]]),
        ('{"a": [1e-5, "x"], "b": {}}', {"a": [1e-5, "x"], "b": {}}),
        ("no: 1", {"no": 1}),
        ("a: {b: 1}\n<<: {c: 1}", {"a": {"b": 1}, "<<": {"c": 1}}),
    ],
)
def test_a_word_means_what_yaml_1_2_says(text, value):
    found = parse_yaml(text, "here")
    assert found == value and repr(found) == repr(value)  # 1 is not True, nor 1.0


def test_numbers_that_are_not_finite_are_read_as_such():
    found = parse_yaml("[.inf, -.Inf, .nan]", "here")
    assert found[:2] == [math.inf, -math.inf] and math.isnan(found[2])


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x: 1\nseed: 010", "here line 2: 010 is read as octal by some programs"),
        ("a: -007", "leading 0"),
        ("seed: 1\nbeta: 2\nseed: 3", "line 3: seed stands there twice (first in line 1)"),
        ("a: {b: 1, b: 1}", "b stands there twice"),
        ("x: 1\na:\n  b: 1\n  'b': 2", "line 4: b stands there twice"),
        (BOMB, "here line 1: anchors and aliases"),
        ("a: *b", "aliases"),
        ("a: &b 1", "anchors"),
        ("&b a: 1", "anchors"),
        ("a: !!python/object/apply:os.system [ls]", "tags"),
        ("a: !!int '3'", "tags"),
        ("a: !!bool maybe", "tags"),
        ("a: !!timestamp 2001-01-01", "tags"),
        ("a: ! 1", "tags"),
        ("!x {a: 1}", "tags"),
        ("[" * 100000, "too many lists and mappings in each other"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: 1\nb: [1", "not YAML"),
        ("a: 1\n\tb: 2", "line 2 is not YAML"),
        ("a: b: c", "not YAML"),
        ("a: \0", "not YAML"),
        ("a: \x07", "not YAML"),
        ("a: \ud800", "not YAML"),
        ("a: @b", "not YAML"),
        ("1: 2", "a name must be a text"),
        ("null: 2", "a name must be a text"),
        ("? [a]\n: 1", "a name must be a text"),
        ("a: " + "9" * 5000, "5000 digits"),
    ],
)
def test_what_can_be_read_differently_or_unfolds_is_refused_in_one_line(text, words):
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "here")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a: \xff", "not UTF-8"), ("a: b".encode("utf-16"), "not UTF-8"), (b"#" * (2 << 20), "bytes"), (None, "pipe")],
)
def test_a_file_that_is_no_settings_file_is_refused(tmp_path, content, words):
    path = tmp_path / "a.yaml"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_yaml(path)


TEXTS = [
    "no",
    "1e-6",
    "010",
    "0o7",
    "<<",
    "~",
    "",
    "1_000",
    "12:30",
    "2020-01-01",
    " a",
    "a ",
    "a\nb",
    "a: b",
    "# a",
    "\u2028",
    "\x85",
    "\xe9",
    "\U0001f600",
    "\ufeffx",
    "\t",
    "- a",
    "[",
    "*a",
    "&a",
    "!a",
    "null",
    "True",
    ".inf",
    "=",
    "0x1F",
    "\x07",
    "a\udce9",
    "'",
    '"',
    "%",
    "@x",
    "`",
    "1.",
    "+1",
    "-.5",
    "?",
    "---",
    "...",
    "a\r\nb",
    "\r",
    "\0",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_is_read_back_equal(text):
    shared = [text, 1e-5, 1e22, 0.1, math.inf, -3, True, None, [], {}]
    content = {"a": text, "b": shared, "c": shared, text or "-": {"d": shared}}
    assert parse_yaml(dump_yaml(content), "here") == content
