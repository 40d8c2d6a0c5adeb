"""Two processes against one: the same samples to the bit, the same losses, the same predictions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from spin_diffusion.evaluation.records import read_results
from tests.ranks import run_ranks
from tests.tiny import write_parquet

ROOT = Path(__file__).resolve().parents[1]


def start(config: dict, folder: Path, processes: int, script: str = "train_spin_sdxl.py") -> subprocess.Popen:
    """The training script under a real launcher, in its own processes."""
    path = write_config(config, folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(ROOT / "training" / script), "--config", str(path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def write_config(config: dict, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"output_dir": str(folder / "out")}))
    return path


def learning_rates(run: Path) -> list[float]:
    """Of every step of the first round."""
    return [json.loads(line)["lr"] for line in (run / "round-1" / "metrics.jsonl").read_text().splitlines()]


def play(config: dict, folder: Path, processes: int, script: str = "train_spin_sdxl.py") -> str:
    """As `start`, in processes that are forked; returns what they printed."""
    return run_ranks(ROOT / "training" / script, ["--config", str(write_config(config, folder))], processes)


def play_by_torchrun(config: dict, folder: Path, processes: int) -> str:
    run = start(config, folder, processes)
    said, complained = run.communicate(timeout=300)
    assert run.returncode == 0, complained[-6000:]
    return said


@pytest.fixture(scope="module")
def both(sdxl_dir, tiny_parquet, tmp_path_factory):
    """The same run on one process and on two, with the same global batch."""
    folder = tmp_path_factory.mktemp("processes")
    prompts = folder / "prompts.txt"  # two batches of pictures, one for each process
    prompts.write_text("".join(f"a fox number {number}\n" for number in range(6)))
    # An untrained network's scores are near -0.5, where fp32 rounds by 3e-8: a beta of 2000 would make 3e-5 of that
    config = {
        "pretrained_model_name_or_path": str(sdxl_dir), "dataset_name": str(tiny_parquet), "resolution": 32,
        "rounds": 1, "max_train_steps": 4, "beta": 100, "num_inference_steps": 2, "guidance_scale": 3,
        "samples_per_shard": 8, "proportion_empty_prompts": 0.3, "report_to": "none", "checkpointing_steps": 2,
        "learning_rate": 1e-4, "validation_prompts": str(prompts), "num_validation_images": 2,
        "scorers": ["sharpness"], "preview_every": 0,
    }  # fmt: skip
    # By a real launcher, under which every process has its own hash seed
    said = [
        play(config | {"train_batch_size": 4}, folder / "one", 1),
        play_by_torchrun(config | {"train_batch_size": 2}, folder / "two", 2),
    ]
    return said, folder / "one" / "out", folder / "two" / "out"


def test_the_process_count_is_what_was_asked_for(both):
    said, *_ = both
    assert "x 1 process on cpu" in said[0] and "x 2 processes on cpu" in said[1]


def test_samples_are_the_same_bytes(both):
    *_, one, two = both
    shards = sorted((one / "round-1" / "samples").glob("*.parquet"))
    assert shards
    for path in shards:
        assert path.read_bytes() == (two / "round-1" / "samples" / path.name).read_bytes()


def test_every_steps_loss_agrees(both):
    *_, one, two = both
    losses = [
        [json.loads(line)["loss"] for line in (out / "round-1" / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4


def test_predictions_agree_to_a_hundredth_of_what_training_changed(both, sdxl_dir):
    _, one, two = both
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    predictions = []
    for folder in (sdxl_dir / "unet", one / "unet", two / "unet"):
        unet = UNet2DConditionModel.from_pretrained(folder)
        width = unet.config.cross_attention_dim
        tokens = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(1))
        pooled = torch.randn(2, unet.config.projection_class_embeddings_input_dim - 48)
        added = {"text_embeds": pooled * 0, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
        with torch.no_grad():
            predictions.append(unet(x, torch.tensor([100, 700]), tokens, added_cond_kwargs=added).sample)
    base, single, double = predictions
    assert (single - double).norm() <= 0.01 * (single - base).norm()


def test_pictures_and_scores_of_the_base_are_the_same_bytes_and_every_round_is_judged(both):
    _, one, two = both
    indices = sorted((one / "base" / "images" / "guidance-3").glob("*.jsonl"))
    assert len(indices) == 2
    for path in indices:  # with the pictures' hashes
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
    scores = list((one / "base" / "scores").rglob("*.parquet"))
    assert scores
    for path in scores:
        assert pq.read_table(path).equals(pq.read_table(two / path.relative_to(one)))
    results = [read_results(out / "results.json") for out in (one, two)]
    assert results[0]["protocol"] == results[1]["protocol"]
    means = [[entry["mean"] for entry in found["results"]] for found in results]
    assert means[0] == pytest.approx(means[1], abs=1e-3) and len(means[0]) >= 2
    assert (two / "report.html").is_file()


def test_the_record_says_what_each_process_did(both):
    _, one, two = both
    alone, shared = (json.loads((out / "round-1" / "round.json").read_text()) for out in (one, two))
    assert "shares" not in alone
    for phase in ("generated", "cached", "trained"):
        shares, entry = shared["shares"][phase], shared["ledger"][phase]
        assert len(shares) == 2 and sum(share["samples"] for share in shares) == entry["samples"]
        assert entry["samples"] == alone["ledger"][phase]["samples"]
        assert all(0 < share["seconds"] <= entry["seconds"] + 1 for share in shares)


UNUSUAL = {
    "timestep_sampling": "sections", "score_weighting": "v",
    "dropped_captions": "real", "proportion_empty_prompts": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "saved"),
    [
        ({"fixed_draws": 1, **UNUSUAL}, "unet/diffusion_pytorch_model.safetensors"),
        (
            {"use_lora": True, "rank": 2, "gradient_checkpointing": True, **UNUSUAL},
            "lora/pytorch_lora_weights.safetensors",
        ),
        (
            {
                "fully_shard": True,
                "use_ema": True,
                "gradient_checkpointing": True,
                "gradient_accumulation_steps": 2,
                "rounds": 2,
            },
            "unet/diffusion_pytorch_model.safetensors",
        ),
        ({"max_aspect_ratio": 2.0, "random_flip": True}, "unet/diffusion_pytorch_model.safetensors"),
    ],
    ids=["fixed_draws", "lora", "in_parts", "sizes"],
)
def test_every_way_of_training_ends_where_one_process_does(mode, saved, sdxl_dir, tiny_parquet, tmp_path):
    config = {
        "pretrained_model_name_or_path": str(sdxl_dir), "dataset_name": str(tiny_parquet), "resolution": 32,
        "rounds": 1, "max_train_steps": 3, "beta": 100, "num_inference_steps": 2, "guidance_scale": 1,
        "samples_per_shard": 8, "report_to": "none", "optimizer": "sgd", "learning_rate": 1e-3,
    } | mode  # fmt: skip
    if "max_aspect_ratio" in mode:
        config["dataset_name"] = str(write_parquet(tmp_path / "sizes.parquet", shapes=[(40, 40), (64, 40), (32, 80)]))
    play(config | {"train_batch_size": 4, "fully_shard": False}, tmp_path / "one", 1)
    said = play(config | {"train_batch_size": 2}, tmp_path / "two", 2)
    assert ("Sizes      " in said) == ("max_aspect_ratio" in mode)
    assert "x 2 processes on cpu" in said
    one, two = (load_file(tmp_path / name / "out" / saved) for name in ("one", "two"))
    if "use_lora" in mode:
        moved = max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name or "lora.up" in name)
    else:
        base = load_file(sdxl_dir / "unet" / "diffusion_pytorch_model.safetensors")
        moved = max((one[name] - base[name].float()).abs().max() for name in one)
    assert moved > 0 and max((one[name] - two[name]).abs().max() for name in one) < 0.01 * moved


def test_one_process_of_a_launcher_trains_in_parts_too(sdxl_dir, tiny_parquet, tmp_path):
    """The sharded path on a machine with one GPU."""
    config = {
        "pretrained_model_name_or_path": str(sdxl_dir), "dataset_name": str(tiny_parquet), "resolution": 32,
        "rounds": 1, "max_train_steps": 2, "beta": 100, "num_inference_steps": 2, "guidance_scale": 1,
        "report_to": "none", "optimizer": "sgd", "learning_rate": 1e-3, "train_batch_size": 4,
    }  # fmt: skip
    play(config, tmp_path / "whole", 1)
    path = write_config(config | {"fully_shard": True}, tmp_path / "parts")
    run_ranks(ROOT / "training" / "train_spin_sdxl.py", ["--config", str(path)], 1, alone=False)
    saved = "out/unet/diffusion_pytorch_model.safetensors"
    whole, parts = (load_file(tmp_path / name / saved) for name in ("whole", "parts"))
    base = load_file(sdxl_dir / "unet" / "diffusion_pytorch_model.safetensors")
    moved = max((whole[name] - base[name].float()).abs().max() for name in whole)
    assert moved > 0 and max((whole[name] - parts[name]).abs().max() for name in whole) < 0.01 * moved


def test_in_parts_player_and_opponent_score_alike_under_autocast_too(sdxl_dir, tiny_parquet, tmp_path):
    config = {
        "pretrained_model_name_or_path": str(sdxl_dir), "dataset_name": str(tiny_parquet), "resolution": 32,
        "rounds": 2, "max_train_steps": 3, "beta": 100, "num_inference_steps": 2, "guidance_scale": 1,
        "samples_per_shard": 8, "report_to": "none", "optimizer": "sgd", "learning_rate": 1e-3,
        "mixed_precision": "bf16", "gradient_accumulation_steps": 2, "fully_shard": True,
    }  # fmt: skip
    # At the first step of a round it asserts that they do
    said = play(config | {"train_batch_size": 2}, tmp_path / "two", 2)
    assert "x 2 processes on cpu" in said
    two = load_file(tmp_path / "two" / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    base = load_file(sdxl_dir / "unet" / "diffusion_pytorch_model.safetensors")
    moved = max((two[name] - base[name].float()).abs().max() for name in two)
    assert moved > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["whole", "in_parts"])
def test_a_killed_process_ends_the_job_and_any_number_of_processes_goes_on(how, sdxl_dir, tiny_parquet, tmp_path):
    in_parts = how == "in_parts"
    config = {
        "pretrained_model_name_or_path": str(sdxl_dir), "dataset_name": str(tiny_parquet), "resolution": 32,
        "rounds": 1, "max_train_steps": 24, "beta": 100, "num_inference_steps": 2, "guidance_scale": 1,
        "samples_per_shard": 8, "report_to": "none", "optimizer": "sgd", "learning_rate": 1e-4, "max_grad_norm": 0,
        "checkpointing_steps": 3, "fully_shard": in_parts,
        "lr_scheduler": "linear", "lr_warmup_steps": 2,
    }  # fmt: skip
    run = start(config | {"train_batch_size": 2}, tmp_path / "two", 2)
    training = tmp_path / "two" / "out" / "round-1"
    until = time.monotonic() + 120
    while not (training / "checkpoint-3").is_dir():
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True)
    killed = int(found.stdout.split()[1])
    os.kill(killed, signal.SIGKILL)
    _, complained = run.communicate(timeout=60)
    assert run.returncode != 0
    # The other one notices first, or is told first
    assert "another process of this job ended" in complained or "told to stop (SIGTERM)" in complained
    assert "the same command goes on from there" in complained and "Traceback" not in complained.split("torch/dist")[0]
    assert f"exitcode  : -9 (pid: {killed})" in complained  # the launcher names the one that died
    names = {path.name for path in next(training.glob("checkpoint-*[0-9]")).iterdir()}
    # Every process leaves its own: its part of the weights, or its random state beside the whole ones
    file = "shard-0000{}-model-00001-of-00001.safetensors" if in_parts else "random_states_{}.pkl"
    own = {file.format(rank + in_parts) for rank in (0, 1)}
    assert own | {"trainer.json"} <= names, names
    assert in_parts or {"optimizer.bin", "unet"} <= names
    # The same global batch on other numbers of processes; one in parts needs a launcher, below
    shared = {"two_again": (2, 2), "four": (4, 1)} if how != "whole" else {"one": (1, 4), "four": (4, 1)}
    for name in {*shared, "one"}:
        shutil.copytree(tmp_path / "two", tmp_path / name)
    assert json.loads((training / "round.json").read_text())["state"] == "CACHED"
    other = start(config | {"train_batch_size": 3}, tmp_path / "one", 1)
    refused = other.communicate(timeout=120)[1]
    assert other.returncode != 0 and "4 pairs in each optimizer step, this command has 3" in refused
    for name, (processes, batch) in shared.items():
        said = play(config | {"train_batch_size": batch}, tmp_path / name, processes)
        assert "Resuming from round-1/checkpoint-" in said
        assert f"4 pairs a step = {batch} x 1 accumulation x {processes} process" in said
    if in_parts:
        other = start(config | {"train_batch_size": 4}, tmp_path / "one", 1)
        assert "Resuming from round-1/checkpoint-" in other.communicate(timeout=300)[0] and other.returncode == 0
        shared["one"] = (1, 4)
    play(config | {"train_batch_size": 4, "fully_shard": False}, tmp_path / "unbroken", 1)
    saved = "unet/diffusion_pytorch_model.safetensors"
    unbroken = load_file(tmp_path / "unbroken" / "out" / saved)
    base = load_file(sdxl_dir / saved)
    moved = max((unbroken[name] - base[name].float()).abs().max() for name in unbroken)
    rates = {name: learning_rates(tmp_path / name / "out") for name in {*shared, "unbroken"}}
    for name in shared:
        assert rates[name] == rates["unbroken"] and len(rates[name]) == 24
        ended = load_file(tmp_path / name / "out" / saved)
        assert moved > 0 and max((unbroken[key] - ended[key]).abs().max() for key in ended) < 0.01 * moved, name


def test_the_best_step_is_the_same_one_on_two_processes_in_parts(sdxl_dir, tiny_parquet, tmp_path):
    scorer = tmp_path / "brightness.py"
    scorer.write_text(
        "import torch\ndef load(device):\n    def score(images, prompts):\n        return torch.tensor("
        "[float(image.convert('L').resize((1, 1)).getpixel((0, 0))) for image in images])\n    return score\n"
    )
    config = {
        "pretrained_model_name_or_path": str(sdxl_dir), "dataset_name": str(tiny_parquet), "resolution": 32,
        "rounds": 1, "max_train_steps": 4, "beta": 100, "num_inference_steps": 2, "guidance_scale": 3,
        "samples_per_shard": 8, "report_to": "none", "optimizer": "sgd", "learning_rate": 1e-1, "use_ema": True,
        "ema_decay": 0.5, "num_held_out": 5, "select_every": 2, "preview_every": 2, "select_by": str(scorer),
    }  # fmt: skip
    play(config | {"train_batch_size": 4}, tmp_path / "one", 1)
    play(config | {"train_batch_size": 2, "fully_shard": True}, tmp_path / "two", 2)
    one, two = (json.loads((tmp_path / name / "out/round-1/round.json").read_text()) for name in ("one", "two"))
    curves = [[entry["mean"] for entry in record["training"]["selection"]["curve"]] for record in (one, two)]
    # A picture's brightness is a whole number, which rounding may move by one
    assert curves[0] == pytest.approx(curves[1], abs=1.1) and len(curves[0]) == 3
    assert one["training"]["selection"]["step"] == two["training"]["selection"]["step"]
    assert one["ledger"]["judged"]["samples"] == two["ledger"]["judged"]["samples"] == 15
    first = "out/round-1/previews/step-000000/images/guidance-3/00000-0.png"
    assert (tmp_path / "one" / first).read_bytes() == (tmp_path / "two" / first).read_bytes()
