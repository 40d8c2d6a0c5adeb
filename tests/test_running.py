"""What a run with changed settings is held against."""

from dataclasses import fields

from spin_diffusion import config
from spin_diffusion.running import HARMLESS, changes


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
