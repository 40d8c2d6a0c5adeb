"""The command line and the settings file are read alike, and nothing is guessed."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from spin_diffusion.data.settings import DataSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.parsing import parse as parse_settings
from spin_diffusion.store.parsing import saved_settings
from spin_diffusion.store.settings import Settings as Section
from spin_diffusion.store.settings import setting
from spin_diffusion.store.yaml_files import dump_yaml


@dataclass(frozen=True)
class Watch:
    """A mapping whose keys are known."""

    limit: float = setting(1.0, minimum=0)
    action: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True)
class Settings(Section):
    """Of every type that a setting has."""

    seed: int = 0
    """A number."""
    rate: float | list[float] = 1.0
    limit: int | None = None
    draws: int | Literal["auto"] = "auto"
    precision: Literal["no", "fp16"] | None = None
    objective: Literal["spin", "dpo"] | list[Literal["spin", "dpo"]] = "spin"
    ema: bool = False
    name: str = "a"
    revision: str | None = "main"
    names: list[str] | None = None
    options: dict[str, float] | None = None
    worlds: dict[str, dict[str, Any]] | None = None
    watch: Watch = Watch()


def parse(*words: str) -> Settings:
    return parse_settings(Settings, words, listed=("names",))


def from_file(tmp_path, text: str, *words: str) -> Settings:
    (tmp_path / "c.yaml").write_text(text)
    return parse(*words, "--config", str(tmp_path / "c.yaml"))


GOOD = [
    ("seed", "3", 3),
    ("seed", "0x10", 16),
    ("rate", "1e-6", 1e-6),
    ("rate", "2", 2.0),
    ("rate", "[1, 2e-5]", [1.0, 2e-5]),
    ("limit", "null", None),
    ("limit", "~", None),
    ("limit", "5", 5),
    ("draws", "auto", "auto"),
    ("draws", "4", 4),
    ("precision", "no", "no"),
    ("precision", "null", None),
    ("objective", "dpo", "dpo"),
    ("ema", "true", True),
    ("ema", "False", False),
    ("objective", "[spin, dpo]", ["spin", "dpo"]),
    ("objective", "['spin']", ["spin"]),
    ("name", "no", "no"),
    ("name", "a b", "a b"),
    ("revision", "null", None),
    ("revision", "12:30", "12:30"),
    ("names", "[a, b=c]", ["a", "b=c"]),
    ("names", "[]", []),
    ("options", '{"a": 1}', {"a": 1.0}),
    ("options", "{a: 1e-3}", {"a": 1e-3}),
    ("watch", "{limit: 2}", Watch(limit=2.0)),
    ("watch", "{action: stop, limit: 0.5}", Watch(0.5, "stop")),
    ("watch", "{}", Watch()),
    ("worlds", "{w: {methods: [a], x: no}}", {"w": {"methods": ["a"], "x": "no"}}),
]


@pytest.mark.parametrize(("name", "word", "value"), GOOD)
def test_a_word_means_the_same_on_the_command_line_and_in_the_file(tmp_path, name, word, value):
    for settings in (parse(f"--{name}", word), parse(f"--{name}={word}"), from_file(tmp_path, f"{name}: {word}")):
        found = getattr(settings, name)
        assert found == value and type(found) is type(value)


BAD = [
    ("seed", "010", "octal"),
    ("seed", "1_000", "a whole number"),
    ("seed", "12:30", "a whole number"),
    ("seed", "1.0", "seed 1.0: expected a whole number"),
    ("seed", "true", "seed true: expected"),
    ("seed", "null", "seed null: expected"),
    ("seed", "'3'", "seed 3: expected"),
    ("rate", ".inf", "a number"),
    ("rate", ".nan", "a number"),
    ("rate", "1e999", "a number"),
    ("rate", "[1, x]", "[1]: expected a number (float), not 'x'"),
    ("rate", "[1, .nan]", "expected a number"),
    ("limit", "2020-01-01", "or null"),
    ("precision", "off", "give one of no, fp16"),
    ("precision", "false", "one of no"),
    ("objective", "spim", "did you mean 'spin'"),
    ("ema", "yes", "ema yes: expected true or false"),
    ("ema", "no", "true or false"),
    ("ema", "1", "ema 1: expected true or false"),
    ("names", "{a: b}", "a list"),
    ("options", "{a: b}", "a: expected a number"),
    ("options", "{a: 1, a: 2}", "a stands there twice"),
    ("watch", "{limt: 2}", "unknown key 'limt', did you mean 'limit'?"),
    ("watch", "{limit: true}", "limit: expected a number (float), not true"),
    ("watch", "{limit: -1}", "--watch limit -1.0 must be at least 0"),
    ("watch", "{action: sto}", "action: expected one of warn, stop, not 'sto'"),
    ("watch", "3", "expected names with values"),
    ("watch", "null", "expected names with values"),
    ("worlds", "{w: 3}", "w: expected names with values"),
    ("worlds", "&w {a: {}}", "anchors"),
    ("worlds", "[" * 40, "is not YAML"),
    ("draws", "outo", "outo: expected a whole number (int) or one of auto"),
]


@pytest.mark.parametrize(("name", "word", "words"), BAD)
def test_what_is_no_value_of_the_setting_is_said_and_not_guessed(tmp_path, name, word, words):
    calls = [lambda: from_file(tmp_path, f"{name}: {word}")]
    if name != "names":
        calls += [lambda: parse(f"--{name}", word), lambda: parse(f"--{name}={word}")]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert name in str(caught.value) or "c.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["name: 1.10", "name: true", "revision: 2020", "name: 'a\\0b'", 'name: "a\\0b"'])
def test_a_text_in_the_file_is_text_or_is_put_into_quotes(tmp_path, text):
    if text.endswith("\\0b'"):  # in single quotes there are no escapes
        assert from_file(tmp_path, text).name == "a\\0b"
        return
    with pytest.raises(InputError, match="expected a text"):
        from_file(tmp_path, text)


def test_the_command_line_wins_wherever_it_stands(tmp_path):
    assert from_file(tmp_path, "seed: 1\nrate: 5", "--seed", "2") == Settings(seed=2, rate=5.0)
    (tmp_path / "d.yaml").write_text("seed: 4")
    assert from_file(tmp_path, "", f"--config={tmp_path / 'd.yaml'}").seed == 4


def test_on_the_command_line_a_setting_puts_aside_the_one_of_a_file_that_it_stands_for(tmp_path):
    (tmp_path / "c.yaml").write_text("dataset_name: somebody/pictures\nmax_train_samples: 5")
    file = ["--config", str(tmp_path / "c.yaml")]
    data = parse_settings(DataSettings, [*file, "--train_data_dir", "mine"])
    assert (data.dataset_name, data.train_data_dir, data.max_train_samples) == (None, "mine", 5)
    with pytest.raises(InputError, match="are both given"):
        parse_settings(DataSettings, [*file, "--train_data_dir", "mine", "--dataset_name", "somebody/pictures"])


def test_a_mapping_on_the_command_line_changes_the_keys_that_it_names(tmp_path):
    assert from_file(tmp_path, "watch: {limit: 2, action: stop}", "--watch", "{limit: 3}").watch == Watch(3.0, "stop")
    assert parse("--watch", "{limit: 3}", "--watch", "{action: stop}").watch == Watch(3.0, "stop")


def test_an_old_setting_is_answered_with_what_replaced_it(tmp_path):
    for call in (lambda: parse("--max_distance", "1"), lambda: from_file(tmp_path, "max_distance: 1")):
        with pytest.raises(InputError, match="unknown setting 'max_distance': give --health '{distance: SHARE}'$"):
            call()


def test_words_of_a_listed_setting_may_stand_one_after_the_other():
    assert parse("--names", "a=x", "b=y,c", "--seed", "1") == Settings(seed=1, names=["a=x", "b=y", "c"])
    assert parse("--names=a,b").names == ["a", "b"] and parse("--ema").ema and parse("--ema", "--seed", "1").ema


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sed", "1"], "unknown setting 'sed', did you mean 'seed'?"),
        (["1"], "'1' belongs to no setting"),
        (["--seed"], "--seed has no value"),
        (["--seed", "--ema"], "--seed has no value"),
        (["--config"], "no value"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be opened"),
        (["--config", "{seed: 1}"], "cannot be opened"),
        (["-x"], "'-x' belongs to no setting"),
        (["--seed.a", "1"], "unknown setting"),
        (["--seed", "-1", "-2"], "'-2'"),
    ],
)
def test_a_command_line_that_is_none_is_refused_in_one_line(argv, words):
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("abc", "settings by name"), ("[1]", "settings by name"), ("sed: 1", "unknown setting 'sed'")]
)
def test_a_settings_file_holds_settings(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        from_file(tmp_path, text)


def test_help_and_the_settings_as_they_are_can_be_printed(tmp_path, capsys):
    for flag, said in (
        ("--help", "--seed INT\n      A number. (default: 0)"),
        ("--print_config", "seed: 7\nrate: 1.0"),
    ):
        with pytest.raises(SystemExit) as ended:
            parse("--seed", "7", flag)
        assert ended.value.code == 0 and said in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"abc", b"[1]", b"a: [", b"\0", b"", b"\xff", b"a: 1\na: 2", b"{"])
def test_damaged_saved_settings_say_what_can_be_done(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match="config.yaml.*restore it, or start in another --output_dir$"):
        saved_settings(tmp_path / "config.yaml")


def test_saved_settings_come_back_as_they_were(tmp_path):
    content = {"seed": 3, "rate": [1e-5], "name": "1e-6", "revision": "no", "precision": None}
    (tmp_path / "config.yaml").write_text(dump_yaml(content))
    assert saved_settings(tmp_path / "config.yaml") == content
