"""Real SIGKILLs at random instants of a real run: the final weights are those of a run that nothing disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from spin_diffusion.store.run_dir import file_hash

ROOT = Path(__file__).resolve().parents[1]
KILLS = 8


def start(config: Path, output_dir: Path) -> subprocess.Popen:
    script = str(ROOT / "training" / "train_spin_sdxl.py")
    return subprocess.Popen(
        [sys.executable, script, "--config", str(config), "--output_dir", str(output_dir)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(output_dir: Path) -> list[str]:
    names = ["unet", "round-1/unet", "round-2/unet", "compare-sft/round-2/unet"]
    return [file_hash(output_dir / name / "diffusion_pytorch_model.safetensors") for name in names]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_kills_at_random_instants_change_no_bit(sdxl_dir, tiny_parquet, tiny_prompts, tmp_path):
    config = tmp_path / "config.yaml"
    settings = {
        "pretrained_model_name_or_path": str(sdxl_dir), "dataset_name": str(tiny_parquet), "resolution": 32,
        "rounds": 2, "max_train_steps": 40, "train_batch_size": 4, "checkpointing_steps": 3, "learning_rate": 1e-4,
        "beta": 2000, "num_inference_steps": 6, "guidance_scale": 3, "samples_per_shard": 4,
        "validation_prompts": str(tiny_prompts), "scorers": ["sharpness"], "compare_with": ["sft"],
        "use_ema": True, "preview_every": 0, "report_to": "none",
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    began = time.monotonic()
    unbroken = start(config, tmp_path / "unbroken")
    assert unbroken.wait() == 0, unbroken.stderr.read()[-3000:]
    whole_s = time.monotonic() - began

    seed = int.from_bytes(os.urandom(4), "big")
    print(f"kills are drawn from seed {seed}")
    rng = random.Random(seed)
    killed = finished = 0
    while True:
        run = start(config, tmp_path / "killed")
        # Anywhere from the imports on; the run gets through once it has had its kills
        patience = rng.uniform(0.15, 0.9) * whole_s if killed < KILLS else None
        try:
            code = run.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
            continue
        assert code == 0, run.stderr.read()[-3000:]
        if killed >= KILLS:
            break
        # It finished before it was killed often enough: compare, and start over in an empty folder
        if weights(tmp_path / "killed") != weights(tmp_path / "unbroken"):
            break
        finished += 1
        whole_s *= 0.8  # the machine is less busy than it was: kill sooner
        (tmp_path / "killed").rename(tmp_path / f"finished-{finished}")
    assert weights(tmp_path / "killed") == weights(tmp_path / "unbroken")
