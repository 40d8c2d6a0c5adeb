"""Exports: a player of a run between base and itself, in every form, and what is not replaced."""

import fcntl
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spin_diffusion.diffusion.base import Base, load_checkpoint
from spin_diffusion.diffusion.lora import PLAYER, WEIGHTS
from spin_diffusion.store.files import read_json, write_json
from spin_diffusion.store.folder import release
from spin_diffusion.store.hashes import file_hashes
from spin_diffusion.store.run_dir import MARKER, file_hash, part_of, settle
from tests.diffusion.test_lora import LORA, move, prediction
from tests.playing import make_game

EXPORT = Path(__file__).parents[2] / "training" / "export.py"


def export(run, *words) -> int:
    return runpy.run_path(str(EXPORT))["main"]([str(run), *map(str, words)])


def a_run(base, folder, lora=None):
    """A run's folder as far as an export reads it, and the game whose player lies in it."""
    game = make_game(base, lora=lora)
    if lora is not None:
        move(game, size=0.2)
    else:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in game.player.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    game.save(folder / "round-2", prove=False)
    write_json(folder / "manifest.json", {"base": game.base.as_dict() | {"weights": game.base_hash}})
    return game


@pytest.mark.parametrize("base", ["sd1_dir", "sdxl_dir"])
def test_a_player_goes_from_its_base_as_far_as_it_is_told(base, request, tmp_path):
    folder = request.getfixturevalue(base)
    game = a_run(folder, tmp_path / "run")
    player = game.player.state_dict()
    of_base = load_checkpoint(str(folder))[1].unet.state_dict()
    for strength in (0, 0.7, 1):
        words = ("--round", 2, "--dtype", "fp32", "--strength", strength)
        assert export(tmp_path / "run", "--format", "diffusers", *words) == 0
        name = "run-round-2" if strength == 1 else f"run-round-2@{strength}"
        found = load_checkpoint(str(tmp_path / "run" / "export" / name))[1].unet.state_dict()
        for key, weight in found.items():
            expected = of_base[key].double() + strength * (player[key].double() - of_base[key].double())
            assert torch.allclose(weight.double(), expected, rtol=0, atol=1e-7), key
            assert strength == 0.7 or torch.equal(weight, (of_base if strength == 0 else player)[key])
    for form in ("unet_file", "single_file"):
        assert export(tmp_path / "run", "--round", 2, "--format", form, "-o", tmp_path / form) == 0
        with safe_open(tmp_path / form, framework="pt") as file:
            said, names = file.metadata(), set(file.keys())
        stored = load_file(tmp_path / form)["model.diffusion_model.out.2.weight"]
        assert torch.equal(stored, player["conv_out.weight"].half())
        assert any(name.startswith("first_stage_model.") for name in names) == (form == "single_file")
        assert said["spin_diffusion.manifest"] == file_hash(tmp_path / "run" / "manifest.json")
        assert (said["spin_diffusion.run"], said["spin_diffusion.round"]) == ("run", "2")
        assert said["modelspec.architecture"].startswith("stable-diffusion-")


def test_an_adapter_is_scaled_or_fused(sdxl_dir, tmp_path):
    game = a_run(sdxl_dir, tmp_path / "run", replace(LORA, lora_target_modules=["to_q", "proj_in", "conv1"]))
    with torch.no_grad():  # what fp16 has
        for parameter in game.models.parameters(PLAYER):
            parameter.copy_(parameter.half())
    game.save(tmp_path / "run" / "round-2", prove=False)
    expected = DiffusionPipeline.from_pretrained(sdxl_dir)
    untouched = prediction(expected.unet, game)
    expected.load_lora_weights(tmp_path / "run/round-2/lora", adapter_name="player")
    expected.set_adapters("player", 0.7)
    words = ("--round", 2, "--strength", 0.7)
    assert export(tmp_path / "run", *words, "--format", "kohya") == 0
    assert export(tmp_path / "run", *words, "--format", "diffusers", "--dtype", "fp32") == 0
    scaled = DiffusionPipeline.from_pretrained(sdxl_dir)
    scaled.load_lora_weights(tmp_path / "run/export", weight_name="run-round-2@0.7-kohya.safetensors")
    fused = DiffusionPipeline.from_pretrained(tmp_path / "run/export/run-round-2@0.7")
    for made in (scaled, fused):
        assert torch.allclose(prediction(made.unet, game), prediction(expected.unet, game), atol=1e-5)
    assert (prediction(expected.unet, game) - untouched).abs().max() > 1e-3


def test_an_adapter_names_the_one_that_it_lies_on(sdxl_dir, tmp_path, capsys):
    words, given = ("--round", 2, "--format", "kohya", "-o"), tmp_path / "style.safetensors"
    a_run(sdxl_dir, tmp_path / "first", LORA)
    assert export(tmp_path / "first", *words, given) == 0
    a_run(Base(str(sdxl_dir), lora=f"{given}@0.5"), tmp_path / "run", LORA)
    assert export(tmp_path / "run", *words, tmp_path / "on_top.safetensors") == 0
    said = []
    for path in (given, tmp_path / "on_top.safetensors"):
        with safe_open(path, framework="pt") as file:
            said.append(file.metadata().get("spin_diffusion.init_lora"))
    assert said == [None, "style.safetensors@0.5"]
    (tmp_path / "run/round-2/lora" / WEIGHTS).unlink()
    for form in ("kohya", "diffusers"):
        assert export(tmp_path / "run", "--round", 2, "--format", form) == 2
        error = capsys.readouterr().err.strip()
        assert "cannot load the adapter" in error and WEIGHTS in error and "\n" not in error


def test_what_is_no_export_stays_and_what_cannot_be_is_one_line(sd1_dir, tmp_path, capsys):
    a_run(sd1_dir, tmp_path / "run")
    mine = tmp_path / "mine.safetensors"
    save_file({"x": torch.zeros(1)}, mine, metadata={"format": "pt"})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "text.safetensors").write_text("mine")
    before = {path: path.read_bytes() for path in (mine, tmp_path / "folder/mine.txt", tmp_path / "text.safetensors")}
    of_round = ("--round", 2, "--format")
    write_json(tmp_path / "run" / "round-1" / "round.json", {"weights_removed_after": 2})
    for words, said in [
        ((*of_round, "unet_file", "-o", mine), "is there and is no export"),
        ((*of_round, "unet_file", "-o", tmp_path / "text.safetensors"), "is there and is no export"),
        ((*of_round, "diffusers", "-o", tmp_path / "folder"), "somebody else's"),
        ((*of_round, "kohya"), "give unet_file or single_file"),
        ((*of_round, "unet_file", "-o", tmp_path / "folder"), "is a folder"),
        (("--round", 3, "--format", "unet_file"), "there is no player of round 3 (there are round-2)"),
        (("--format", "unet_file"), "no round was promoted yet"),
        (("--round", 2, "--merge"), "export it with --format"),
        ((*of_round, "unet_file", "--strength", "nan"), "--strength nan must be a number"),
        (("--round", 1, "--format", "unet_file"), "round-1: its weights were removed when round 2 was finished"),
    ]:
        assert export(tmp_path / "run", *words) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error, error
    assert export(tmp_path / "run" / "round-2", "--format", "unet_file") == 2
    assert "is no run" in capsys.readouterr().err
    assert all(path.read_bytes() == data for path, data in before.items())
    manifest = read_json(tmp_path / "run" / "manifest.json")
    write_json(tmp_path / "run" / "manifest.json", {"base": manifest["base"] | {"weights": "of another base"}})
    assert export(tmp_path / "run", *of_round, "unet_file", "--strength", 0.7) == 2
    assert "was trained from another base" in capsys.readouterr().err
    write_json(tmp_path / "run" / "manifest.json", manifest)
    for _ in range(2):  # an own one is replaced
        assert export(tmp_path / "run", *of_round, "unet_file", "-o", tmp_path / "own.safetensors") == 0


def test_an_export_and_a_run_that_starts_again_leave_each_other_alone(sd1_dir, tmp_path, capsys):
    a_run(sd1_dir, tmp_path / "run")
    words, folder = ("--round", 2, "--format", "unet_file"), tmp_path / "run" / "export"
    assert export(tmp_path / "run", *words) == 0
    part = part_of(folder / "other.safetensors")
    part.write_text("half")
    settle(tmp_path / "run")
    assert part.exists()
    release(folder)
    with open(folder / MARKER) as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        assert export(tmp_path / "run", *words) == 2
        assert "another command works in" in capsys.readouterr().err and part.exists()
    assert export(tmp_path / "run", *words) == 0 and not part.exists()


def test_a_folder_is_an_earlier_export_or_the_new_one_and_its_users_files_stay(sd1_dir, tmp_path, monkeypatch):
    a_run(sd1_dir, tmp_path / "run")
    place = tmp_path / "link"
    place.symlink_to(tmp_path / "pipeline")
    (tmp_path / "pipeline").mkdir()
    words = ("--round", 2, "--format", "diffusers", "-o", place)
    assert export(tmp_path / "run", *words) == 0
    (place / "notes.txt").write_text("mine")
    index = place / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("of the shards of larger weights")
    about = read_json(place / "export.json")
    write_json(place / "export.json", about | {"files": [*about["files"], f"unet/{index.name}"]})
    hashes = file_hashes([place], place)

    def killed(self, folder, **options):
        (folder / "model_index.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionPipeline, "save_pretrained", killed)
        assert export(tmp_path / "run", *words) == 130
    assert file_hashes([place], place) == hashes
    assert export(tmp_path / "run", *words, "--dtype", "fp32") == 0
    assert DiffusionPipeline.from_pretrained(place) is not None and not index.exists()
    assert place.is_symlink() and (place / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "link", "pipeline"}
