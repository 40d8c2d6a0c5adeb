"""Weights in several files beside an index, as transformers saves what is large: read and checked like one file."""

import json
from pathlib import Path

import pytest
import torch

from spin_diffusion.evaluation.scorers import load_scorer
from spin_diffusion.store.input_error import InputError
from tests.evaluation.scorers.tiny_models import (
    PROMPTS,
    head_tensors,
    imagereward_tensors,
    open_clip_tensors,
    pictures,
    rewrite,
    shard,
    write_aesthetics,
    write_clip,
    write_hps,
    write_imagereward,
)

FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def write(name: str, folder: Path) -> str:
    """Write a tiny checkpoint of the scorer in a layout that can be in shards; returns the file's name."""
    if name == "aesthetics":
        write_aesthetics(folder, head_tensors())
    elif name == "imagereward":
        weights = write_imagereward(folder, imagereward_tensors())
        from safetensors.torch import save_file

        save_file(torch.load(weights, weights_only=True), folder / "model.safetensors")
        weights.unlink()
    else:
        write_clip(folder)
    return "model.safetensors"


@pytest.mark.parametrize(
    "name", ["pickscore", "clip_h14", "clip_l14", "hps_v2_0", "hps_v2_1", "aesthetics", "imagereward"]
)
def test_shards_give_the_scores_of_one_file(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path)
    images, prompts = pictures(3), PROMPTS[:3]
    one = load_scorer(f"{name}={tmp_path}", "cpu")
    expected, loaded = one(images, prompts), set(one.checkpoint)
    del one
    index = shard(tmp_path, name=file)
    scorer = load_scorer(f"{name}={tmp_path}", "cpu")
    torch.testing.assert_close(scorer(images, prompts), expected, rtol=0, atol=1e-5)
    shards = {path.name for path in tmp_path.glob("model-0000*")}
    assert len(shards) == 3 and set(scorer.checkpoint) == loaded - {file} | shards | {index.name}
    if name != "aesthetics":  # whose path is the head's
        again = load_scorer(f"{name}={index}", "cpu")(images, prompts)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_shards_of_torchs_format_are_read(tmp_path: Path) -> None:
    path = write_hps(tmp_path, {}, "pytorch_model.bin")  # the tokenizer
    torch.save(open_clip_tensors(), path)
    expected = load_scorer(f"clip_h14={tmp_path}", "cpu")(pictures(2), PROMPTS[:2])
    shard(tmp_path, name="pytorch_model.bin")
    assert torch.equal(load_scorer(f"clip_h14={tmp_path}", "cpu")(pictures(2), PROMPTS[:2]), expected)


def damage(folder: Path, what: str) -> None:
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    key = next(key for key, file in said["weight_map"].items() if file == SECOND)
    if what == "shard":
        (folder / SECOND).unlink()
    elif what == "cut shard":
        (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:100])
    elif what == "key of the index":
        rewrite(folder / SECOND, lambda tensors: tensors.pop(key))
    elif what == "key":
        rewrite(folder / SECOND, lambda tensors: tensors.pop(key))
        del said["weight_map"][key]
    elif what == "extra key":
        rewrite(folder / SECOND, lambda tensors: tensors.update(extra=torch.zeros(1)))
    elif what == "shape":
        rewrite(folder / SECOND, lambda tensors: tensors.update({key: torch.zeros(1, 2, 3)}))
    elif what == "place":
        said["weight_map"][key] = f"../{folder.name}/{SECOND}"
    elif what == "number":
        said["weight_map"][key] = 2
    elif what == "map":
        said = {"weights": {}}
    elif what == "list":
        said = []
    index.write_text("{" if what == "json" else json.dumps(said))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shard", f"model.safetensors.index.json: its shard {SECOND} is missing"),
        ("cut shard", f"{SECOND} is no readable file of tensors"),
        ("key of the index", f"{SECOND}: key .* is missing, which model.safetensors.index.json says is there"),
        ("key", "model.safetensors.index.json: key .* is missing; is it another model's file"),
        ("extra key", "model.safetensors.index.json: key extra is not expected"),
        ("shape", r"model.safetensors.index.json: .* has shape \(1, 2, 3\), not"),
        ("place", rf"its shard \.\./.*{SECOND} is missing"),
        ("number", "its shard 2 is missing"),
        ("map", "must hold a 'weight_map'"),
        ("list", "must hold a 'weight_map'"),
        ("json", "must hold a 'weight_map'"),
    ],
)
def test_what_is_missing_or_wrong_is_named_in_one_line(what: str, message: str, tmp_path: Path) -> None:
    write_clip(tmp_path)
    shard(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(InputError, match=message) as caught:
        load_scorer(f"pickscore={tmp_path}", "cpu")
    assert "\n" not in str(caught.value)


def test_shards_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path)
    expected = load_scorer(f"pickscore={tmp_path}", "cpu")(pictures(2), PROMPTS[:2])
    shard(tmp_path)

    def download(repository: str, file: str) -> str:
        if not (tmp_path / file).is_file():
            raise FileNotFoundError(f"{file} is not there")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert torch.equal(load_scorer("pickscore=some/port", "cpu")(pictures(2), PROMPTS[:2]), expected)
    (tmp_path / FIRST).unlink()
    with pytest.raises(InputError, match=f"its shard {FIRST} is missing"):
        load_scorer("pickscore=some/other", "cpu")
