"""Every command on a GPU, as far as a pretended one can tell: nothing is left on the CPU, or read without a copy."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGES = [
    "training/train_spin_sdxl.py", "--config", "training/configs/toy_sdxl.yaml", "--max_train_samples", "8",
    "--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_train_steps", "2", "--rounds", "2",
    "--num_inference_steps", "2", "--validation_guidance_scales", "[3.0]",
    "--compare_with", "[]", "--preview_every", "0", "--report_to", "none", "--lr_warmup_steps", "0",
]  # fmt: skip
UNSEEN = ["--validation_prompts", "null", "--scorers", "null"]
ANSWERS = [
    "training/train_space_llm.py", "--config", "training/configs/toy_llm.yaml", "--max_train_samples", "32",
    "--real_parts", "1", "--samples_per_shard", "32", "--train_batch_size", "4", "--gradient_accumulation_steps", "2",
    "--max_train_steps", "2",
    "--rounds", "2", "--held_out_dataset_name", "null", "--compare_with", "[]", "--report_to", "none",
    "--lr_warmup_steps", "0",
]  # fmt: skip
WAYS = {
    "evaluated": [*IMAGES, "--max_validation_prompts", "2", "--use_ema", "true"],
    "adapter": [*IMAGES, *UNSEEN, "--use_lora", "true", "--objective", "space", "--fixed_draws", "2"],
    "options": [
        *IMAGES, *UNSEEN, "--opponent", "pool", "--score_weighting", "min_snr", "--vae_round_trip", "true",
        "--proportion_empty_prompts", "0.5", "--random_flip", "true", "--gradient_checkpointing", "true",
    ],
    "answers": ANSWERS,
    "answers_adapter": [*ANSWERS, "--use_lora", "true", "--opponent", "last_two"],
    "evaluate": [
        "evaluation/evaluate.py", "--config", "evaluation/configs/toy.yaml", "--models", "base=assets/toy_world/sloppy",
        "plus=assets/toy_world/plateau", "--max_prompts", "2", "--num_inference_steps", "2",
        "--guidance_scale", "[3.0]",
    ],
    "plan": ["training/plan.py", "--config", "training/configs/toy_sdxl.yaml"],
    "plan_answers": ["training/plan.py", "--config", "training/configs/toy_llm.yaml"],
}  # fmt: skip


SOONER = ["evaluated", "adapter", "answers", "evaluate"]
LATER = [name for name in WAYS if name not in SOONER]


def run_all(folder: Path, names: list[str]) -> str:
    """What they print, in one process."""
    commands = [[*WAYS[name], "--output_dir", str(folder / name)] for name in names]
    run = subprocess.run(
        [sys.executable, "tests/pretend_gpu.py", json.dumps(commands)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


IN_A_STEP = Counter({
    "copy to the host in spin_diffusion/selfplay/train.py, _take_step": 1,
    "_local_scalar_dense in spin_diffusion/selfplay/train.py, _take_step": 1,
    "copy to the host in spin_diffusion/selfplay/trainee.py, update": 1,  # of the pretence: torch's is on the GPU
})  # fmt: skip
IN_A_FORWARD_PASS = Counter({"_local_scalar_dense in spin_diffusion/llm/logprobs.py, answer_logprobs": 1})
"""transformers' search for packed sequences, which nothing but a mask turns off; flash attention knows no mask."""


def check_waits(said: str) -> None:
    """The host waits for the GPU at the end of an optimizer step, whatever the number of its batches."""
    for line in said.splitlines():
        if line.startswith("waits of training/train"):
            script, found = line.removeprefix("waits of ").split(maxsplit=1)
            allowed = IN_A_STEP + IN_A_STEP  # one of each round's two
            if "llm" in script:
                for _ in range(2 * 2):
                    allowed += IN_A_FORWARD_PASS
            assert json.loads(found) == allowed


def check_runs(said: str, runs: int) -> None:
    """All were on the GPU, their players moved, and no batch waited for it."""
    check_waits(said)
    assert said.count("x 1 process on cuda") == runs
    lines = [line for line in said.splitlines() if "over the last ones r_real" in line]
    assert len(lines) == 2 * runs and not any("r_real +0.00e+00" in line for line in lines)


def test_images_adapters_answers_and_evaluations_on_a_gpu(tmp_path):
    said = run_all(tmp_path, SOONER)
    check_runs(said, 3)
    assert "evaluate/report.html" in said


@pytest.mark.slow
def test_what_else_there_is_on_a_gpu(tmp_path):
    said = run_all(tmp_path, LATER)
    check_runs(said, len(LATER) - 2)
    assert said.count("of the GPU") == 2
