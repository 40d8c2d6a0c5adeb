"""The scripts as a user runs them: the whole path, and one clear line with exit code 2 for everything that is wrong."""

import errno
import fcntl
import json
import os
import re
import runpy
import shutil
import signal
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spin_diffusion.cli.command import run_command
from spin_diffusion.diffusion.base import load_checkpoint
from spin_diffusion.diffusion.config import parse_config
from spin_diffusion.diffusion.cost import count_units
from spin_diffusion.diffusion.single_file import write_single_file
from spin_diffusion.evaluation.records import read_results
from spin_diffusion.runs.start import round_lines
from spin_diffusion.store import run_dir
from spin_diffusion.store.files import read_json, weights_hash
from spin_diffusion.store.folder import release, take_folder
from spin_diffusion.store.run_dir import MARKER, file_hash

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *argv: str) -> int:
    return runpy.run_path(str(ROOT / "training" / script))["main"](list(argv))


@pytest.fixture
def settings(sdxl_dir, tiny_parquet, tiny_prompts, tmp_path) -> dict:
    return {
        "pretrained_model_name_or_path": str(sdxl_dir),
        "dataset_name": str(tiny_parquet),
        "max_train_samples": 8,
        "resolution": 32,
        "rounds": 1,
        "max_train_steps": 2,
        "train_batch_size": 4,
        "learning_rate": [1e-4, 5e-5],
        "beta": 2000,
        "num_inference_steps": 2,
        "sampler": "ddim",
        "guidance_scale": 3,
        "validation_prompts": str(tiny_prompts),
        "validation_guidance_scales": [3],
        "scorers": ["sharpness"],
        "preview_every": 0,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }


SMALL = """
import numpy as np, torch
def load(device):
    def embed(images):
        open(__file__ + ".calls", "a").write("x" * len(images))
        return torch.tensor(np.stack([np.asarray(image.resize((2, 2))).reshape(-1) for image in images])).float()
    return embed
"""
"""An embedding that counts what it is asked."""


@pytest.fixture
def unevaluated(settings) -> dict:
    """For what happens before or beside the evaluation, which takes longer than so small a training."""
    return settings | {"validation_prompts": None, "scorers": None}


def play(tmp_path: Path, settings: dict, *argv: str, script: str = "train_spin_sdxl.py") -> int:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    return run(script, "--config", str(config), *argv)


def refused(capsys, code: int, *parts: str) -> None:
    """Exit code 2, and one line on stderr that holds every part."""
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(error) == 1, error
    for part in parts:
        assert part in error[0]


RATES = ("0.0001", "0.0003", "0.001", "0.003")


def test_a_plan_says_whether_fine_tuning_still_gains_in_a_folder_beside_the_runs(settings, tmp_path, capsys):
    settings |= {
        "max_train_samples": None,
        "num_held_out": 8,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "candidates": {"number": 2, "scorer": "sharpness"},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert run("plan.py", "--plateau", "--config", str(config)) == 0
    said = capsys.readouterr().out
    records = [read_json(tmp_path / "out-plateau" / f"round-{k}" / "round.json") for k in range(1, 5)]
    assert not (tmp_path / "out").exists() and {record["training"]["steps"] for record in records} == {6}
    assert {(record["parent"], record["state"]) for record in records} == {(0, "REJECTED")}, "each from the base"
    assert records[2]["held_out_gap"]["low"] > 0, "a base of noise has everything to learn"
    gained = [record["held_out_gap"]["mean"] for record in records]
    assert all(f"  rate {rate:<8} {mean:+.4f} [" in said for rate, mean in zip(RATES, gained, strict=True))
    assert "and 0.003, so supervised training has not finished" in said and "of 8 held-out real samples" in said


def test_one_command_plays_evaluates_and_compares(settings, tmp_path, capsys):
    settings |= {"compare_with": ["sft"], "rounds": 2, "report_to": "tensorboard"}
    settings |= {"num_validation_images": 2, "validation_guidance_scales": [1, 3]}
    settings["distribution_features"] = str(tmp_path / "small.py")
    (tmp_path / "small.py").write_text(SMALL)
    assert play(tmp_path, settings) == 0
    out = tmp_path / "out"
    names = {"config.yaml", "manifest.json", "samples.png", "unet", "logs", "round-1", "round-2", "base"}
    names |= {"table.md", "table.tex", "results.csv"}
    names |= {"report.html", "results.json", "scores.parquet", "images.parquet", "README.md"}
    assert names <= {path.name for path in out.iterdir()}
    printed = capsys.readouterr().out
    for part in ("4 pairs a step", "round 2: 2 steps at lr 5e-05", "spin round 2", "sft, same steps", "samples.png"):
        assert part in printed
    told = EventAccumulator(str(next((out / "logs").rglob("events.out.tfevents*")).parent)).Reload()
    tags = told.Tags()["scalars"]
    for tag in ("spin/round-2/train_loss", "spin/ledger/trained/seconds"):
        assert tag in tags
    entries = [entry for entry in read_results(out / "results.json")["results"] if entry["aggregate"] == "mean"]
    means = {(entry["model"], entry["guidance_scale"]): entry["mean"] for entry in entries}
    shown = [event.value for tag in tags if "sharpness" in tag and "ledger" not in tag for event in told.Scalars(tag)]
    assert any(value == pytest.approx(means["spin round 2", 3.0]) for value in shown)
    lineage = json.loads((out / "manifest.json").read_text())["rounds"]
    assert [told["started_from"] for told in lineage] == [0, 1] and lineage[1]["drawn"] == {"1": 8}
    pipeline = DiffusionPipeline.from_pretrained(
        settings["pretrained_model_name_or_path"], unet=UNet2DConditionModel.from_pretrained(out / "unet")
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a fox", height=32, width=32, num_inference_steps=1).images
    shows_every_model(out)
    compared, embedded = read_results(out / "results.json")["distribution"], (tmp_path / "small.py.calls").read_text()
    assert compared["num_real"] == 8 and "8 real ones" in compared["left_out"] in (out / "report.html").read_text()
    # Once more: nothing to do, the same table
    assert play(tmp_path, settings) == 0
    assert (tmp_path / "small.py.calls").read_text() == embedded
    assert "spin round 2" in capsys.readouterr().out


def shows_every_model(out: Path) -> None:
    """The results, the page and the card name the base, both rounds and the rival."""
    results = read_results(out / "results.json")
    roles = {model["name"]: model["role"] for model in results["models"]}
    assert roles == {"base": "baseline", "spin round 1": "round", "spin round 2": "round", "sft, same steps": "rival"}
    assert results["headline"] == {"model": "spin round 2", "guidance_scale": 3.0}
    assert {alarm["id"] for alarm in results["alarms"]} >= {"goodhart", "diversity_over_seeds", "stagnation"}
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for name in roles:
        assert name in page and name in card
    assert card.startswith("---\n") and "library_name: diffusers" in card
    assert "[SPIN-Diffusion](https://arxiv.org/abs/2402.10210): in each round" in card
    # A round is judged against its opponent
    of_round = read_results(out / "round-2" / "evaluation" / "results.json")
    assert [model["name"] for model in of_round["models"]] == ["spin round 1", "spin round 2"]
    assert read_json(out / "round-2" / "round.json")["metrics"]["sharpness@3"] > 0


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_was_given_with_the_base_is_used_by_all_that_comes_after(
    use_lora, unevaluated, sd1_dir, tmp_path, monkeypatch, capsys
):
    """A base of which only fp16 weights are there, with a VAE that makes nothing finite beside one that does."""
    base, out, prompts = tmp_path / "fp16", tmp_path / "out", tmp_path / "prompts.txt"
    pipeline = DiffusionPipeline.from_pretrained(sd1_dir).to(torch.float16)
    for coder in (pipeline.vae.encoder, pipeline.vae.decoder):
        coder.conv_out.weight.data.fill_(float("inf"))
    pipeline.save_pretrained(base, variant="fp16")
    given = {"pretrained_model_name_or_path": str(base), "variant": "fp16", "use_lora": use_lora, "rank": 2}
    given["pretrained_vae_model_name_or_path"] = str(sd1_dir / "vae")
    assert play(tmp_path, unevaluated | given, script="train_spin_sd.py") == 0
    printed = capsys.readouterr().out
    said = json.loads((out / "manifest.json").read_text())["base"]
    vae = {"vae": given["pretrained_vae_model_name_or_path"]}
    hashes = {key: said[key] for key in ("weights", "parts")}
    assert said == {"name": str(base), "revision": None, "variant": "fp16"} | vae | hashes
    # The evaluation of the round draws with them
    prompts.write_text("a red fox\na blue cat\na dog\n")
    argv = [
        "--models",
        f"base={sd1_dir}",
        f"round1={out / 'round-1'}",
        "--prompts",
        str(prompts),
        "--scorers",
        "sharpness",
    ]
    argv += ["--resolution", "32", "--num_inference_steps", "2", "--guidance_scale", "1", "--images_per_prompt", "1"]
    evaluate = runpy.run_path(str(ROOT / "evaluation" / "evaluate.py"))["main"]
    assert evaluate([*argv, "--output_dir", str(tmp_path / "evaluation")]) == 0
    results = read_results(tmp_path / "evaluation" / "results.json")
    assert not results["failures"]
    assert results["models"][1]["base"] == f"{base} (variant fp16, VAE {vae['vae']})"
    # The lines of the terminal load it from anywhere, those of the card in its folder; what they load draws
    text = (out / "README.md").read_text()
    assert str(tmp_path) not in text
    (tmp_path / "elsewhere").mkdir()
    for name, place in (("fp16", base), ("vae", sd1_dir / "vae")):  # the card has their names alone
        (out / name).symlink_to(place)
    lines = textwrap.dedent(re.search(r"load it with\n((?:  .*\n)+)", printed)[1])
    for folder, code in ((tmp_path / "elsewhere", lines), (out, text.split("```python\n")[1].split("```")[0])):
        found: dict = {}
        monkeypatch.chdir(folder)
        exec(code, found)
        found["pipeline"].set_progress_bar_config(disable=True)
        drawn = found["pipeline"]("a fox", height=32, width=32, num_inference_steps=1, output_type="pt").images
        assert drawn.isfinite().all() and drawn.std() > 0


def test_a_run_of_a_single_file_goes_on_with_a_folder_of_the_same_weights(unevaluated, sd2_dir, tmp_path, capsys):
    file, out, folder = tmp_path / "base.safetensors", tmp_path / "out", str(sd2_dir)
    pipeline = load_checkpoint(folder)[1]
    write_single_file(file, pipeline, torch.float32, {})
    unevaluated |= {"base_config": folder, "pretrained_model_name_or_path": str(file), "rounds": 1}
    assert play(tmp_path, unevaluated, script="train_spin_sd.py") == 0
    assert "v_prediction, as the file says" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["base"]["config"] == folder
    as_folder = unevaluated | {"pretrained_model_name_or_path": folder, "base_config": None, "rounds": 2}
    assert play(tmp_path, as_folder, script="train_spin_sd.py") == 0 and (out / "round-2" / "round.json").is_file()
    pipeline.vae.decoder.conv_out.weight.data += 1
    write_single_file(file, pipeline, torch.float32, {})
    refused(capsys, play(tmp_path, unevaluated, script="train_spin_sd.py"), "was encoded by other weights")
    file.write_bytes(file.read_bytes()[:-4])
    refused(capsys, play(tmp_path, unevaluated, script="train_spin_sd.py"), str(file), "cut short or damaged")


def test_the_header_says_which_values_of_a_list_have_no_round(settings):
    argv = [
        word
        for key in ("pretrained_model_name_or_path", "train_batch_size")
        for word in (f"--{key}", str(settings[key]))
    ]
    config = parse_config([*argv, "--rounds", "2", "--beta", "[1, 2, 3, 4]", "--learning_rate", "[1e-4, 1e-5]"])
    lines = round_lines(config, 24, Accelerator(cpu=True))
    assert [line.split()[1] for line in lines[1:3]] == ["1:", "2:"] and "lr 1e-05, beta 2" in lines[2]
    assert lines[3:] == ["           of the 4 values of --beta the last 2 have no round: --rounds 2"]


def test_a_tracker_that_is_not_installed_is_refused(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("spin_diffusion.runs.start.get_available_trackers", lambda: [])
    refused(capsys, play(tmp_path, settings | {"report_to": "wandb"}), "--report_to wandb", "spin-diffusion[wandb]")
    refused(capsys, play(tmp_path, settings | {"report_to": "tensorboard"}), "pip install tensorboard")
    assert not (tmp_path / "out").exists()


def test_a_plan_before_the_run_and_what_it_took_afterwards(settings, tmp_path, capsys, monkeypatch):
    settings |= {"rounds": 2}
    monkeypatch.setattr("spin_diffusion.runs.image_run.matrix_rate", lambda device, dtype: 1e12)
    assert play(tmp_path, settings, script="plan.py") == 0
    printed = capsys.readouterr().out
    assert "Time" in printed and "for 8 real samples on 1 process" in printed
    assert "free in" in printed and "of this machine" in printed
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {MARKER, "plan.json"}
    assert play(tmp_path, settings) == 0
    planned = {entry["round"]: entry for entry in read_json(out / "plan.json")["rounds"]}
    told = read_results(out / "results.json")["ledger"]
    phases = ["generated", "cached", "probed", "trained", "evaluated", "overhead"]
    assert [(entry["round"], entry["phase"]) for entry in told] == [(k, phase) for k in (1, 2) for phase in phases]
    samples = {"generated": 8, "cached": 8, "probed": 8, "trained": 2 * 4}
    for entry in told:
        assert entry["seconds"] > 0 and entry["predicted_seconds"] == planned[entry["round"]].get(entry["phase"])
        of_memory = {"generated": "drawing", "trained": "training"}.get(entry["phase"])
        assert entry["predicted_memory_bytes"] == read_json(out / "plan.json")["memory_bytes"].get(of_memory)
        assert entry["samples"] == samples.get(entry["phase"])
        if entry["phase"] != "overhead":
            assert entry["predicted_disk_bytes"] == read_json(out / "plan.json")["disk_bytes"]
        if entry["phase"] in samples:
            assert entry["peak_memory_bytes"] > 1e8
        if entry["phase"] in samples and entry["phase"] != "probed":  # a moment's linear algebra, which nobody counts
            assert entry["samples_per_second"] == pytest.approx(entry["samples"] / entry["seconds"], rel=0.05)
            assert entry["matrix_share"] == pytest.approx(entry["flops"] / entry["seconds"] / 1e12, rel=0.05)
    rounds = [read_json(out / f"round-{k}" / "round.json")["ledger"] for k in (1, 2)]
    # What no phase took is told as well: the phases and it are the whole of the round's time
    for k in (1, 2):
        seconds = read_json(out / f"round-{k}" / "round.json")["seconds"]
        [overhead] = [entry["seconds"] for entry in told if (entry["round"], entry["phase"]) == (k, "overhead")]
        assert 0 < seconds["between"] < overhead
        assert sum(seconds.values()) == pytest.approx(
            sum(entry["seconds"] for entry in told if entry["round"] == k), abs=0.01
        )
    # A step is a player's forward and backward pass and an opponent's forward pass over both images of its pairs
    unit = count_units(*load_checkpoint(settings["pretrained_model_name_or_path"]), 32)
    assert rounds[0]["trained"]["flops"] == 2 * 4 * 2 * (2 * unit.unet + unit.unet_backward)
    assert rounds[0]["generated"]["flops"] == rounds[1]["generated"]["flops"]
    page = (out / "report.html").read_text()
    assert "Time and work" in page and "draw the opponent\u2019s samples" in page and "everything else" in page
    # The folder, too, held about what it was to hold: at the end of a round, before its encodings were removed
    held, planned = max(entry.get("disk_bytes") or 0 for entry in told), read_json(out / "plan.json")["disk_bytes"]
    assert 0.5 * planned < held < 1.5 * planned
    assert f"held at most {held / 1e6:,.1f} MB (planned {planned / 1e6:,.1f} MB)" in page


def test_with_eval_every_round_off_only_the_last_round_is_evaluated(settings, tmp_path):
    assert play(tmp_path, settings | {"rounds": 2, "eval_every_round": False}) == 0
    names = [model["name"] for model in read_results(tmp_path / "out" / "results.json")["models"]]
    assert names == ["base", "spin round 2"]


def test_a_round_that_is_not_improved_is_rejected_and_said_so(settings, tmp_path, capsys):
    assert play(tmp_path, settings, "--promote_if", "improved") == 0  # sharpness can improve nothing
    assert read_json(tmp_path / "out" / "round-1" / "round.json")["state"] == "REJECTED"
    printed = capsys.readouterr().out
    assert "round 1 is rejected" in printed and "No round was promoted" in printed
    assert not (tmp_path / "out" / "unet").exists()


def test_promotion_by_a_scorer_that_cannot_run_is_refused_before_any_round(settings, tmp_path, capsys):
    settings |= {"scorers": [f"pickscore={tmp_path / 'nowhere'}"]}
    refused(capsys, play(tmp_path, settings, "--promote_if", "improved"), "pickscore", "nowhere")
    assert not (tmp_path / "out" / "round-1").exists()


def test_a_hub_that_cannot_be_reached_loses_nothing(settings, tmp_path, capsys, request):
    argv = ["--push_to_hub", "--hub_model_id", "someone/some-model"]
    refused(
        capsys, play(tmp_path, settings, *argv), "--push_to_hub", "someone/some-model", "run the same command again"
    )
    assert (tmp_path / "out" / "unet").is_dir()
    hub = request.getfixturevalue("hub")
    assert play(tmp_path, settings, *argv) == 0
    assert "Uploaded to https://huggingface.co/someone/some-model" in capsys.readouterr().out
    names = {path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()}
    weights = {"unet/diffusion_pytorch_model.safetensors", "unet/config.json"}
    assert names == weights | {
        "README.md",
        "config.yaml",
        "manifest.json",
        "report.html",
        "results.json",
        "samples.png",
    }
    assert UNet2DConditionModel.from_pretrained(hub, subfolder="unet")


def test_the_sd_script_plays_sd(unevaluated, sd2_dir, tmp_path):
    unevaluated |= {"pretrained_model_name_or_path": str(sd2_dir)}
    assert play(tmp_path, unevaluated, script="train_spin_sd.py") == 0


def test_the_command_line_wins_over_the_file(unevaluated, tmp_path):
    assert play(tmp_path, unevaluated, "--use_ema", "--max_train_steps", "1", "--beta", "[100, 200]") == 0
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (saved["max_train_steps"], saved["beta"], saved["learning_rate"]) == (1, [100.0, 200.0], [1e-4, 5e-5])
    assert saved["use_ema"] is True


def test_what_is_damaged_of_a_finished_run_and_can_be_made_anew_is_made_anew(settings, tmp_path, capsys):
    assert play(tmp_path, settings) == 0
    out, shard = tmp_path / "out", "00000-of-00001"
    names = [f"base/scores/sharpness/guidance-3/{shard}.parquet", f"base/images/guidance-3/{shard}.jsonl",
             f"round-1/evaluation/scores/sharpness/guidance-3/{shard}.parquet"]  # fmt: skip
    kept = {path: (out / path).read_bytes() for path in [*names, "scores.parquet"]}
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-40] + bytes(40)), lambda path: path.unlink()):
        for name in names:
            damage(out / name)
        for name in ("base/model.json", "results.json", "plan.json", "round-1/metrics.jsonl"):
            (out / name).write_text("{}")
        capsys.readouterr()
        assert play(tmp_path, settings) == 0
        said = capsys.readouterr().out
        assert " anew" in said and "metrics.jsonl is damaged" in said and "plan.json is damaged" in said
        assert {path: (out / path).read_bytes() for path in kept} == kept
    assert read_results(out / "results.json")["models"]


def test_more_rounds_may_be_added_to_a_finished_run(unevaluated, tmp_path):
    assert play(tmp_path, unevaluated) == 0
    before = file_hash(tmp_path / "out" / "round-1" / "round.json")
    assert play(tmp_path, unevaluated, "--rounds", "2") == 0
    assert file_hash(tmp_path / "out" / "round-1" / "round.json") == before
    assert (tmp_path / "out" / "round-2" / "unet").is_dir()


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--learing_rate", "1e-5"], ["'learing_rate'", "did you mean 'learning_rate'"]),
        (["--learning_rate", "fast"], ["--learning_rate fast", "float"]),
        (["--rounds", "1.5"], ["--rounds 1.5", "int"]),
        (["--rounds", "0"], ["--rounds 0", "between 1 and 10,000"]),
        (["--objective", "spinn"], ["--objective spinn", "space"]),
        (["--max_train_steps", "[5, 0]"], ["--max_train_steps 0", "at least 1"]),
        (["--beta", "[1, -2]"], ["--beta -2", "above 0"]),
        (["--resolution", "30"], ["--resolution 30", "multiple of 8"]),
        (["--jpeg_quality", "90"], ["unknown setting 'jpeg_quality'", "--image_format png"]),
        (["--winner_preserving_mu", "1"], ["--winner_preserving_mu 1", "below 1"]),
        (["--health", "{saturation: 2}"], ["--health saturation 2", "at most 1"]),
        (["--promote_if", "improved", "--scorers", "[]"], ["--promote_if improved", "--scorers"]),
        (["--compare_with", "['sftt']"], ["sftt", "did you mean 'sft'"]),
        (["--scorers", "['sharp']"], ["sharp", "sharpness"]),
        (["--validation_prompts", "nowhere.txt"], ["nowhere.txt", "no such file"]),
        (["--pretrained_model_name_or_path", "./nowhere"], ["./nowhere", "does not exist"]),
        (["--pretrained_model_name_or_path", "someone/some-model"], ["someone/some-model", "neither a local folder"]),
        (["--dataset_name", "nowhere/train.parquet"], ["nowhere/train.parquet"]),
        (["--dataset_name", "someone/some-data"], ["someone/some-data"]),
        (["--caption_column", "captoin"], ["captoin", "caption"]),
        (["--train_batch_size", "64"], ["8 pairs are fewer than one batch of 64"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--report_to", "carrier_pigeon"], ["carrier_pigeon"]),
        (["--use_lora", "true", "--rank", "0"], ["--rank 0", "at least 1"]),
        (["--use_lora", "true", "--lora_target_modules", "[to_x]"], ["--lora_target_modules to_x", "to_out.0"]),
        (["--health", "{distance: rollback}"], ["health", "distance: expected", "roll_back"]),
        (["--health", "{distance: [-1, stop]}"], ["--health distance -1", "at least 0"]),
        (["--max_aspect_ratio", "0.5"], ["--max_aspect_ratio 0.5", "at least 1"]),
        (["--max_aspect_ratio", "2", "--compile", "blocks"], ["--max_aspect_ratio 2", "--compile blocks"]),
        (
            ["--max_aspect_ratio", "2", "--fully_shard", "true", "--train_batch_size", "2"],
            ["--max_aspect_ratio 2", "--train_batch_size 1"],
        ),
        (["--mixed_precision", "fp16"], ["--mixed_precision fp16", "give bf16 or no"]),
        (["--variant", "fp16"], ["--variant fp16", "leave --variant out"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_exit_code_2(argv, parts, settings, tmp_path, capsys):
    refused(capsys, play(tmp_path, settings, *argv), *parts)


def test_what_a_rule_of_health_says_is_on_the_page(settings, tmp_path, capsys):
    argv = ["--health", "{distance: [roll_back, 1e-9]}"]
    assert play(tmp_path, settings, *argv) == 0
    assert "round 1 is rejected (it was rolled back to its start, distance" in capsys.readouterr().out
    out = tmp_path / "out"
    events = json.loads((out / "results.json").read_text())["training_events"]
    assert [(event["rule"], event["action"], event["weights_from_step"]) for event in events] == [
        ("distance", "roll_back", 0)
    ]
    page = (out / "report.html").read_text()
    for part in ("What the rules of health said", "rolled back to the round", "of their length away"):
        assert part in page


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_run_starts_from_the_last_player_of_another_and_keeps_its_base(adapter, settings, sdxl_dir, tmp_path, capsys):
    settings |= {"use_lora": adapter, "rank": 2, "rounds": 1, "compare_with": []}
    file = tmp_path / "base.safetensors"  # of the same weights
    write_single_file(file, load_checkpoint(str(sdxl_dir))[1], torch.float32, {})
    first, second, saved = tmp_path / "out", tmp_path / "second", "lora" if adapter else "unet"
    argv = ["--continue_from", str(first), "--output_dir", str(second), "--learning_rate", "3e-5"]
    argv += ["--pretrained_model_name_or_path", str(file), "--base_config", str(sdxl_dir)]
    refused(capsys, play(tmp_path, settings, *argv), "--continue_from", "there is no run")
    assert play(tmp_path, settings) == 0
    refused(capsys, play(tmp_path, settings, *argv, "--rank", "3", "--use_lora"), "of another kind", "-> 3")
    refused(capsys, play(tmp_path, settings, "--continue_from", str(first)), "is the --output_dir")
    assert not second.exists()
    assert play(tmp_path, settings, *argv) == 0
    weights = "pytorch_lora_weights.safetensors" if adapter else "diffusion_pytorch_model.safetensors"
    assert file_hash(second / "start" / saved / weights) == file_hash(first / saved / weights)
    assert file_hash(second / saved / weights) != file_hash(first / saved / weights)
    # Round 1 was played by that player, and the pictures of the base were not drawn again
    played = [read_json(run / "round-1" / "round.json")["opponent"]["members"][0]["hash"] for run in (first, second)]
    assert played[0] != played[1]
    if not adapter:
        assert played[1] == weights_hash(UNet2DConditionModel.from_pretrained(first / "unet"))
    pictures = [path.relative_to(first) for path in (first / "base").rglob("*.png")]
    assert pictures
    assert all((first / path).stat().st_mtime_ns == (second / path).stat().st_mtime_ns for path in pictures)
    assert read_json(second / "manifest.json")["continued_from"]["run"] == str(first)
    # It needs the other run no more, and is one that started there
    shutil.rmtree(first)
    before = file_hash(second / saved / weights)
    assert play(tmp_path, settings, *argv) == 0 and file_hash(second / saved / weights) == before
    refused(capsys, play(tmp_path, settings, *argv[2:]), "other settings", "continue_from")
    shutil.copy(second / saved / weights, second / "start" / saved / weights)
    refused(capsys, play(tmp_path, settings, *argv), "is not the player that was copied from", "restore it")


def test_an_adapter_is_trained_saved_and_evaluated(settings, tmp_path, capsys):
    settings |= {"use_lora": True, "rank": 2, "lora_alpha": 3, "learning_rate": 1e-3}
    assert play(tmp_path, settings) == 0
    out = tmp_path / "out"
    assert "load_lora_weights" in capsys.readouterr().out and "load_lora_weights" in (out / "README.md").read_text()
    assert not (out / "unet").exists() and (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    pipeline = DiffusionPipeline.from_pretrained(settings["pretrained_model_name_or_path"])
    pipeline.load_lora_weights(out / "lora")
    argv = ["--models", f"base={settings['pretrained_model_name_or_path']}", f"round1={out / 'round-1'}"]
    argv += ["--prompts", settings["validation_prompts"], "--scorers", "sharpness", "--num_inference_steps", "2"]
    argv += ["--resolution", "32", "--output_dir", str(tmp_path / "evaluated")]
    assert runpy.run_path(str(ROOT / "evaluation" / "evaluate.py"))["main"](argv) == 0
    models = json.loads((tmp_path / "evaluated" / "results.json").read_text())["models"]
    assert len({model["weights_sha256"] for model in models}) == 2


def test_an_unknown_key_in_the_file_names_the_nearest(settings, tmp_path, capsys):
    refused(capsys, play(tmp_path, settings | {"num_inference_step": 3}), "did you mean 'num_inference_steps'")


def test_numbers_that_yaml_reads_as_text_are_numbers(unevaluated, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(unevaluated | {"learning_rate": None}).replace("learning_rate: null", "learning_rate: 1e-6")
    )
    assert run("train_spin_sdxl.py", "--config", str(config)) == 0
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["learning_rate"] == 1e-6


def test_neither_or_both_kinds_of_data_are_refused(settings, tmp_path, capsys):
    refused(capsys, play(tmp_path, settings | {"dataset_name": None}), "--dataset_name", "--train_data_dir")
    refused(capsys, play(tmp_path, settings | {"train_data_dir": str(tmp_path)}), "--dataset_name", "--train_data_dir")


def test_a_checkpoint_of_another_family_names_the_right_script(settings, sd1_dir, tmp_path, capsys):
    settings |= {"pretrained_model_name_or_path": str(sd1_dir)}
    refused(capsys, play(tmp_path, settings), "StableDiffusionPipeline", "train_spin_sd.py")


def test_an_unsupported_pipeline_names_what_is_supported(settings, tmp_path, capsys):
    other = tmp_path / "flux"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    settings |= {"pretrained_model_name_or_path": str(other)}
    refused(capsys, play(tmp_path, settings), "FluxPipeline", "StableDiffusionXLPipeline")


def test_a_folder_without_captions_shows_what_a_caption_file_looks_like(settings, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    from PIL import Image

    Image.new("RGB", (32, 32)).save(folder / "a.png")
    refused(capsys, play(tmp_path, settings | {"dataset_name": None, "train_data_dir": str(folder)}), "metadata.jsonl")


def test_changed_settings_are_refused_with_the_difference(unevaluated, tmp_path, capsys):
    assert play(tmp_path, unevaluated) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    refused(capsys, play(tmp_path, unevaluated, "--beta", "100"), "beta: 2000.0 -> 100.0", "another --output_dir")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("wrong", [{"dataset_name": "nowhere.parquet"}, {"max_train_samples": 2}])
def test_a_command_that_was_refused_can_be_corrected_in_the_same_folder(wrong, unevaluated, tmp_path):
    assert play(tmp_path, unevaluated | wrong) == 2
    assert play(tmp_path, unevaluated) == 0


def test_the_global_batch_of_a_begun_run_is_kept_and_its_make_up_is_not(unevaluated, tmp_path, capsys):
    batch = unevaluated["train_batch_size"]
    assert play(tmp_path, unevaluated) == 0
    refused(
        capsys, play(tmp_path, unevaluated, "--train_batch_size", str(batch + 1)),
        f"{batch} pairs in each optimizer step, this command has {batch + 1}", "--gradient_accumulation_steps",
    )  # fmt: skip
    assert play(tmp_path, unevaluated, "--train_batch_size", "1", "--gradient_accumulation_steps", str(batch)) == 0


def test_a_folder_of_something_else_is_not_touched(settings, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    refused(capsys, play(tmp_path, settings), "is not empty and has no .spin-diffusion.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_said_and_the_same_command_goes_on_later(unevaluated, tmp_path, capsys, monkeypatch):
    plain, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir.os, "fsync", full)
        refused(capsys, play(tmp_path, unevaluated), "No space left on device", "make room")
    assert play(tmp_path, unevaluated) == 0


def test_a_loss_that_is_not_finite_is_said_with_step_and_samples(unevaluated, tmp_path, capsys):
    unevaluated |= {"max_train_steps": 4}
    refused(capsys, play(tmp_path, unevaluated, "--learning_rate", "1e30"), "round 1, step", "samples")


def test_debug_shows_the_traceback(settings, tmp_path, capsys):
    assert play(tmp_path, settings, "--dataset_name", "nowhere.parquet", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_of_the_program_keeps_its_traceback():
    from spin_diffusion.cli.command import run_command

    def defect(argv: list[str]) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_command(defect, [])


def test_a_folder_of_odd_names_captions_and_links_is_trained_on_and_what_is_left_out_is_said(
    unevaluated, tmp_path, capsys
):
    """Names that are not UTF-8, half a character, links that lead to nothing and back, and a file of another format."""
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    (tmp_path / "elsewhere").mkdir()
    data.mkdir()
    for number, name in enumerate([b"a.png", b"b\xff.png", b"../elsewhere/c.png", b"d.png", b"e.png"]):
        path = Path(os.fsdecode(os.fsencode(data) + b"/" + name))
        Image.new("RGB", (32, 32), (40 * number, 90, 200)).save(path)
        path.with_suffix(".txt").write_bytes(b"caf\xe9" if name == b"d.png" else b"picture %d" % number)
    (data / "e.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    for name, target in (("linked", "../elsewhere"), ("back", ".."), ("gone", "nowhere")):
        (data / name).symlink_to(target)
    argv = ["--train_data_dir", str(data), "--max_bad_share", "1", "--report_to", "tensorboard"]
    played = unevaluated | {"dataset_name": None, "max_train_steps": 1, "train_batch_size": 1}
    for _ in range(2):
        assert play(tmp_path, played, *argv) == 0
    said = capsys.readouterr().out
    assert "read 7 rows: used 3, left out 4" in said
    for line in (
        "corrupt image: 1\n    e.png: not a PNG, JPEG, WebP, GIF, BMP or TIFF picture\n",
        "broken characters in the text: 1\n    d.png: character 4 of d.txt is half of one",
        "link to nothing: 1\n    gone: it leads to nowhere, which does not exist\n",
        f"link to a folder that is read already: 1 (first: back: it leads to {tmp_path}",
    ):
        assert line in said
    manifest = read_json(tmp_path / "out" / "data" / "manifest.json")
    assert sum(manifest["left_out"]["left_out"].values()) == 4


def test_a_name_that_a_library_does_not_take_is_said_in_a_line(capsys):
    def command(argv):
        os.fsdecode(b"/models/caf\xe9").encode()

    refused(capsys, run_command(command, []), "/models/caf\\udce9 is not UTF-8", "rename it")

    def defect(argv):
        "\u65e5\u672c".encode("ascii")

    with pytest.raises(UnicodeEncodeError):
        run_command(defect, [])


def test_every_script_is_thin():
    for script in [*(ROOT / "training").glob("*.py"), *(ROOT / "evaluation").glob("*.py")]:
        assert len(script.read_text().splitlines()) <= 50


def test_two_commands_do_not_work_in_one_folder(unevaluated, tmp_path, capsys):
    out = tmp_path / "out"
    assert play(tmp_path, unevaluated | {"max_train_steps": 1}) == 0
    release(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with open(out / MARKER, "r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(
            capsys, play(tmp_path, unevaluated | {"max_train_steps": 1}), "another command works in", "--output_dir"
        )
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert play(tmp_path, unevaluated | {"max_train_steps": 1}) == 0


@pytest.mark.parametrize("program", ["evaluation", "comparison", "language training"])
def test_the_folder_of_another_program_is_left_alone(program, unevaluated, tmp_path, capsys):
    out = tmp_path / "out"
    take_folder(out, program)
    for name in ("config.yaml", "data/manifest.json", "base/model.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    refused(capsys, play(tmp_path, unevaluated), f"says {program}, not image training", "give another")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_nothing_is_written_before_the_base_is_known_to_be_good(unevaluated, tmp_path, capsys):
    bad = unevaluated | {"pretrained_model_name_or_path": str(tmp_path / "nowhere")}
    refused(capsys, play(tmp_path, bad), "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_said(unevaluated, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, play(tmp_path, unevaluated | {"output_dir": str(tmp_path / "file" / "out")}), "cannot be made")


def test_after_ctrl_c_it_is_said_that_the_same_command_goes_on(capsys, monkeypatch):
    monkeypatch.setattr("spin_diffusion.cli.command.end_bars", lambda: os.kill(os.getpid(), signal.SIGINT))  # again

    def command(argv):
        raise KeyboardInterrupt

    assert run_command(command, []) == 130
    said = capsys.readouterr().err
    assert "Ctrl-C" in said and "the same command goes on" in said and "Traceback" not in said


@pytest.mark.parametrize("rate, said", [(1e30, "what the player says is not finite"), (3e38, "weights are not finite")])
def test_a_player_that_the_last_step_destroyed_is_said(rate, said, unevaluated, tmp_path, capsys):
    settings = unevaluated | {"max_train_steps": 1, "learning_rate": rate, "max_grad_norm": 0}
    refused(capsys, play(tmp_path, settings), "round", said, "--learning_rate")
    assert read_json(tmp_path / "out" / "round-1" / "round.json")["state"] == "CACHED"


def test_the_number_of_fixed_draws_is_settled_by_the_run(unevaluated, tmp_path, capsys):
    settings = unevaluated | {"fixed_draws": "auto", "max_train_steps": 8, "max_train_samples": 4}
    assert play(tmp_path, settings) == 0
    assert "2 visits of each of the pairs' fixed draws" in capsys.readouterr().out
    [scores] = (tmp_path / "out" / "round-1" / "scores" / "real").glob("*.safetensors")
    assert load_file(scores)["opponent_score"].shape == (4, 4)
    assert play(tmp_path, settings) == 0
    assert play(tmp_path, settings | {"output_dir": str(tmp_path / "plan")}, script="plan.py") == 0
    assert read_json(tmp_path / "plan" / "plan.json")["rates"]["score"] > 0


def test_a_plan_is_refused_where_its_run_would_be(unevaluated, tmp_path, capsys):
    code = play(tmp_path, unevaluated | {"fully_shard": True}, script="plan.py")
    refused(capsys, code, "--fully_shard", "launch two or more")


def test_a_precision_that_the_device_has_not_is_refused_in_a_plan_too(unevaluated, tmp_path, capsys):
    refused(capsys, play(tmp_path, unevaluated, "--mixed_precision", "fp16", script="plan.py"), "give bf16 or no")
