"""The program that makes the toy world: a whole build in small, and one that is interrupted and goes on."""

import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

TOY_WORLD = Path(__file__).resolve().parents[2] / "assets" / "toy_world"
SMALL = {
    "rows": 6, "prompts": 3, "bank": 12, "vae_steps": 4, "step_scale": 0.0001, "batch_size": 4, "save_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("tested_toy_world_build", TOY_WORLD / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.reconstruction_score = functools.partial(module.reconstruction_score, number=4)
    return module


def build(builder, folder: Path, **settings) -> Path:
    words = [word for name, value in (SMALL | settings).items() for word in (f"--{name}", str(value))]
    builder.main(["--output_dir", str(folder / "out"), "--work_dir", str(folder / "work"), *words])
    return folder / "out"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_a_build_that_was_killed_goes_on_to_the_weights_of_an_unbroken_one(builder, tmp_path, monkeypatch):
    whole = build(builder, tmp_path / "whole")
    for name in ("sloppy", "plateau", "confused"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(whole / name)
        assert pipeline.unet.config.addition_embed_type == "text_time" and pipeline.tokenizer_2 is not None
    assert pq.read_table(whole / "data" / "train.parquet").num_rows == SMALL["rows"]
    assert set(json.loads((whole / "hashes.json").read_text())) >= {"prompts.jsonl", "data/train.parquet"}

    class Killed(Exception):
        pass

    monkeypatch.setattr(builder, "pipeline_parts", lambda *given: {})  # the first build has scored
    for state, steps in (("vae.pt", 1), ("plateau.pt", 1)):

        def killed(path, write, kept=builder.write_file, state=state):
            kept(path, write)
            if path.name == state:
                raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(builder, "write_file", killed)
            build(builder, tmp_path / "killed")
        assert torch.load(tmp_path / "killed" / "work" / state, weights_only=True)["step"] == steps
    continued, unbroken = weights(build(builder, tmp_path / "killed")), weights(whole)
    assert unbroken and continued.keys() == unbroken.keys()
    assert all(torch.equal(continued[name], unbroken[name]) for name in unbroken)
    with pytest.raises(SystemExit, match="'seed': 0.*'seed': 1"):
        build(builder, tmp_path / "killed", seed=1)


def test_a_bank_has_pictures_of_every_size_and_says_what_was_cut_of_them(builder):
    entries = builder.draw_bank(np.random.default_rng(0), 200, builder.Stage(None, 0, 0, 0))
    frames = {tuple(frame) for _, _, frame in entries}
    assert {(64, 64, 0, 0, 64, 64), (48, 80, 0, 0, 48, 80), (80, 48, 0, 0, 80, 48)} <= frames
    cut = [(picture, frame) for _, picture, frame in entries if frame[:2] != frame[4:]]
    assert 10 < len(cut) and all(picture.size == (64, 64) and frame[4:] == [64, 64] for picture, frame in cut)
    assert not any(builder.world.is_held_out(caption) for caption, _, _ in entries)


def test_somebodys_folder_is_not_written_into(builder, tmp_path, capsys):
    for name in ("out", "work"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "train.parquet").write_text("mine")
        with pytest.raises(SystemExit):
            build(builder, tmp_path)
        assert f"{name} is not empty and has no .spin-diffusion.json" in capsys.readouterr().err
        (tmp_path / name).rename(tmp_path / "away")
        assert (tmp_path / "away" / "data" / "train.parquet").read_text() == "mine"
        shutil.rmtree(tmp_path / "away")


def test_what_the_builder_draws_first_is_what_is_shipped(builder, tmp_path):
    builder.write_prompts(tmp_path / "prompts.jsonl", 200, seed=0)
    assert (tmp_path / "prompts.jsonl").read_bytes() == (TOY_WORLD / "prompts.jsonl").read_bytes()
    shipped = pq.read_table(TOY_WORLD / "data" / "train.parquet", columns=["caption"]).column("caption").to_pylist()
    captions = builder.sample_captions(np.random.default_rng((0, 2)), len(shipped), held_out=False, distinct=True)
    assert captions == shipped
