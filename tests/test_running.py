"""What a run with changed settings is held against."""

from dataclasses import fields

import pytest
from accelerate import Accelerator

from spin_diffusion import config
from spin_diffusion.input_error import InputError
from spin_diffusion.run_settings import HARMLESS
from spin_diffusion.running import _forget_false_start, changes, write_config, write_manifest


def test_a_setting_is_changed_whichever_side_knows_it():
    old, new = (
        {"beta": 1.0, "gone": 2, "seed": 0, "debug": False},
        {"beta": 3.0, "added": [4], "seed": 0, "debug": True},
    )
    assert changes(old, new) == ["added: None -> [4]", "beta: 1.0 -> 3.0", "gone: 2 -> None"]
    assert changes(old, old) == []


def test_no_setting_of_the_game_itself_is_harmless():
    names = {name: {field.name for field in fields(kind)} & HARMLESS for name, kind in config.SECTIONS.items()}
    playing = {name: found for name, found in names.items() if name not in ("run", "training") and found}
    assert playing == {
        "rounds": {"rounds"}, "images": {"vae_encode_batch_size"}, "caches": {"encodings_dir"},
        "probe": {"probe_samples", "on_shortcut"}, "data": {"cache_dir"},
    }  # fmt: skip
    assert names["training"] == {
        "checkpointing_steps", "checkpoints_total_limit", "keep_checkpoints", "resume_from_checkpoint",
        "train_batch_size", "gradient_accumulation_steps",
    }  # fmt: skip


def test_a_run_goes_on_with_its_own_base_and_global_batch_alone(tmp_path):
    data, accelerator = {"rows": 4, "hash": "d", "left_out": {}}, Accelerator(cpu=True)

    def begin(weights: str = "w", *flags: str) -> None:
        settings = ["--pretrained_model_name_or_path", "base", "--max_train_steps", "1", "--train_batch_size", "4"]
        write_manifest(tmp_path, "base", weights, data, config.parse_config([*settings, *flags]), accelerator)

    begin()
    written = (tmp_path / "manifest.json").read_bytes()
    begin("w", "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    with pytest.raises(InputError, match="the weights of base are not the ones that this run was started with"):
        begin("other")
    with pytest.raises(InputError, match="started with 4 pairs in each optimizer step, this command has 8"):
        begin("w", "--train_batch_size", "8")
    assert (tmp_path / "manifest.json").read_bytes() == written


def test_what_a_refused_command_prepared_is_forgotten_once_its_settings_change(tmp_path):
    settings = config.parse_config(["--pretrained_model_name_or_path", "base", "--max_train_steps", "1"])
    write_config(settings, tmp_path / "config.yaml")
    folders = [tmp_path / name for name in ("base", "data", "held_out")]
    for folder in folders:
        folder.mkdir()
    _forget_false_start(settings, tmp_path)
    assert all(folder.is_dir() for folder in folders)
    other = config.parse_config(["--pretrained_model_name_or_path", "base", "--max_train_steps", "2"])
    _forget_false_start(other, tmp_path)
    assert not any(folder.is_dir() for folder in folders)
    folders[0].mkdir()
    (tmp_path / "manifest.json").write_text("{}")  # a run that has begun is not touched
    _forget_false_start(other, tmp_path)
    assert folders[0].is_dir()
