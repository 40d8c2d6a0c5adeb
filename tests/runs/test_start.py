"""What a run with changed settings is held against."""

import re

import pytest
from accelerate import Accelerator

from spin_diffusion.comparing.settings import CompareSettings
from spin_diffusion.diffusion import config
from spin_diffusion.llm.config import LanguageConfig
from spin_diffusion.runs.start import changes, check_run_folder, take_run_folder, write_manifest
from spin_diffusion.store.files import write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.parsing import sections_of, types_of
from spin_diffusion.store.replaced import REPLACED
from spin_diffusion.store.run_dir import MARKER
from spin_diffusion.store.settings import harmless


def test_a_setting_is_changed_whichever_side_knows_it():
    given = config.parse_config(["--pretrained_model_name_or_path", "base", "--beta", "3", "--debug"])
    old = given.flat() | {"beta": 1.0, "gone": 2, "debug": False}
    del old["guidance_scale"]
    assert changes(old, given) == ["beta: 1.0 -> 3.0", "gone: 2 -> None", "guidance_scale: None -> 7.5"]
    assert changes(given.flat(), given) == []


def test_no_setting_of_the_game_itself_is_harmless():
    names = {name: harmless([section]) for name, section in sections_of(config.Config).items() if harmless([section])}
    assert names.pop("run") == {
        "output_dir", "report_to", "tracker_project_name", "push_to_hub",
        "hub_model_id", "debug",
    }  # fmt: skip
    assert names.pop("training") == {
        "checkpointing_steps", "resume_from_checkpoint", "train_batch_size", "gradient_accumulation_steps",
    }  # fmt: skip
    assert names == {
        "rounds": {"rounds", "keep_rounds", "probe"},
        "evaluation": {"preview_every"},
    }


def test_every_old_setting_is_answered_with_what_to_use_instead():
    base = ["--pretrained_model_name_or_path", "base"]
    settings = (config.Config, LanguageConfig, CompareSettings)
    known = {name for kind in settings for name in types_of(kind)}
    for old, instead in REPLACED.items():
        with pytest.raises(InputError) as error:
            config.parse_config([*base, f"--{old}", "1"])
        assert str(error.value) == f"unknown setting {old!r}: {instead}" and "\n" not in instead
        assert not (named := set(re.findall(r"--([a-z_]+)", instead)) - known), named


def test_the_keys_that_differ_are_named():
    def of(*flags):
        return config.parse_config(["--pretrained_model_name_or_path", "base", *flags])

    old, new = of("--candidates", "{number: 2, scorer: a.py}"), of("--candidates", "{number: 3, scorer: a.py}")
    assert changes(old.flat(), new) == ["candidates number: 2 -> 3"]
    assert changes(old.flat(), of("--candidates", "{number: 2, scorer: a.py}", "--probe", "{samples: 64}")) == []


BASE = {"name": "base", "weights": "w", "parts": "p"}


def test_a_player_is_taken_over_to_its_own_base_alone_wherever_that_was_loaded_from(tmp_path):
    before, out, accelerator = tmp_path / "before", tmp_path / "out", Accelerator(cpu=True)
    first = config.parse_config(["--pretrained_model_name_or_path", "folder"])
    take_run_folder(first, before, "image training", BASE, accelerator)
    write_json(before / "manifest.json", {"base": BASE})
    write_json(before / "unet" / "config.json", {})
    given = config.parse_config(["--pretrained_model_name_or_path", "a.safetensors", "--continue_from", str(before)])
    check_run_folder(given, out, "image training")
    with pytest.raises(InputError, match=f"--continue_from {before}: its base .base. had other weights"):
        take_run_folder(given, out, "image training", BASE | {"weights": "other"}, accelerator)
    assert not (out / "start").exists()
    take_run_folder(given, out, "image training", BASE | {"name": "a.safetensors"}, accelerator)
    assert (out / "start" / "unet" / "config.json").is_file()


def test_a_run_goes_on_with_its_own_base_and_global_batch_alone(tmp_path, monkeypatch):
    data, accelerator = {"rows": 4, "hash": "d", "left_out": {}, "settings": {}, "files": {}}, Accelerator(cpu=True)

    def begin(weights: str = "w", *flags: str, parts: str = "p", name: str = "base") -> None:
        settings = ["--pretrained_model_name_or_path", "base", "--max_train_steps", "1", "--train_batch_size", "4"]
        given = config.parse_config([*settings, *flags])
        base = {"name": name, "weights": weights, "parts": parts}
        write_manifest(tmp_path, base, data, given, accelerator)

    begin()
    written = (tmp_path / "manifest.json").read_bytes()
    begin("w", "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    with pytest.raises(InputError, match="the weights of base are not the ones that this run was started with"):
        begin("other")
    with pytest.raises(InputError, match="base is not what this run was started with"):
        begin(parts="other")
    begin(name="the same elsewhere")
    # Another version of a library may know more keys of the same configuration
    with monkeypatch.context() as patch:
        patch.setattr("spin_diffusion.runs.start.version", lambda package: "0")
        begin(parts="other")
        with pytest.raises(InputError, match="elsewhere is not what this run was started with"):
            begin(parts="other", name="elsewhere")
    with pytest.raises(InputError, match="started with 4 pairs in each optimizer step, this command has 8"):
        begin("w", "--train_batch_size", "8")
    assert (tmp_path / "manifest.json").read_bytes() == written


def test_a_run_goes_on_with_its_own_objective_file_alone(tmp_path):
    data, accelerator = {"rows": 4, "hash": "d", "left_out": {}, "settings": {}, "files": {}}, Accelerator(cpu=True)
    mine = tmp_path / "mine.py"

    def begin(factor: int) -> None:
        mine.write_text(f"def loss(scores):\n    return {factor} * scores.margin\n")
        given = config.parse_config(["--pretrained_model_name_or_path", "base", "--objective", str(mine)])
        write_manifest(tmp_path, {"name": "base", "weights": "w", "parts": "p"}, data, given, accelerator)

    begin(1)
    begin(1)
    with pytest.raises(InputError, match="--objective .*mine.py is not the file that this run was started with"):
        begin(2)


def test_what_a_refused_command_prepared_is_made_anew_once_its_settings_change(tmp_path):
    out, accelerator = tmp_path / "out", Accelerator(cpu=True)

    def begin(*flags: str) -> None:
        settings = config.parse_config(["--pretrained_model_name_or_path", "base", "--max_train_steps", *flags])
        check_run_folder(settings, out, "image training")
        take_run_folder(settings, out, "image training", BASE, accelerator)

    def prepared() -> set[str]:
        return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {"config.yaml", MARKER}

    begin("1")
    for name in ("data/manifest.json", "data/left_out.json", "data/samples/mine.txt", "held_out/left_out.json"):
        write_json(out / name, {})
    begin("1")
    assert len(prepared()) == 4
    begin("2")
    assert prepared() == {"data/samples/mine.txt"}
    write_json(out / "manifest.json", {})
    write_json(out / "data/manifest.json", {})
    with pytest.raises(InputError, match="holds a run with other settings"):
        begin("1")
    assert len(prepared()) == 3


def test_a_run_that_another_version_began_is_refused_in_one_line(tmp_path):
    out = tmp_path / "out"
    given = config.parse_config(["--pretrained_model_name_or_path", "base"])
    take_run_folder(given, out, "image training", BASE, Accelerator(cpu=True))
    write_json(out / "manifest.json", {})
    check_run_folder(given, out, "image training")
    before = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(before.replace("\nhealth:", "\nstop_at_saturation: 0.5\nold:"))
    with pytest.raises(InputError, match="a run that another version began .its config.yaml has old, stop_at_satur"):
        check_run_folder(given, out, "image training")
