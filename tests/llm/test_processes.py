"""Two processes against one: the same answers to the token, the same losses, the same weights under SGD."""

import json

import pytest
import torch
from safetensors.torch import load_file

from spin_diffusion.evaluation.report.reading import read_results
from spin_diffusion.selfplay.run_dir import read_json, read_rows
from tests.llm.playing import LANGUAGE
from tests.test_processes import play


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same run on one process and on two, with the same global batch."""
    config = {
        "model_name_or_path": str(LANGUAGE / "base"), "dataset_name": str(LANGUAGE / "data" / "train.jsonl"),
        "max_train_samples": 64, "keep_repeated": True,
        "held_out_dataset_name": str(LANGUAGE / "data" / "held_out.jsonl"),
        "num_held_out": 24, "held_out_by": "row", "rounds": 2, "max_train_steps": 4, "max_length": 48,
        "max_new_tokens": 24, "samples_per_shard": 16, "num_generated": 2, "opponent": "last_two",
        "optimizer": "sgd", "learning_rate": 1e-2, "lr_scheduler": "constant", "report_to": "none",
        "checkpointing_steps": 2, "judges": ["log_likelihood"],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("processes")
    said = [
        play(config | {"train_batch_size": 8}, folder / "one", 1, "train_space_llm.py"),
        play(config | {"train_batch_size": 4}, folder / "two", 2, "train_space_llm.py"),
    ]
    return said, folder / "one" / "out", folder / "two" / "out"


def test_the_process_count_is_what_was_asked_for(both):
    said, *_ = both
    assert "x 1 process on cpu" in said[0] and "x 2 processes on cpu" in said[1]


def test_answers_are_the_same_tokens(both):
    _, one, two = both
    for path in sorted((one / "round-1").rglob("samples/*.parquet")):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
    for path in sorted((one / "round-2" / "samples").glob("*.parquet")):
        tokens = [[row["tokens"] for row in read_rows(out / path.relative_to(one))] for out in (one, two)]
        assert tokens[0] == tokens[1]


def test_every_steps_loss_agrees(both):
    _, one, two = both
    losses = [
        [json.loads(line)["loss"] for line in (out / "round-1" / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4


def test_the_weights_agree(both):
    _, one, two = both
    weights = [load_file(out / "model" / "model.safetensors") for out in (one, two)]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-5), name


def test_gap_and_judgement_agree(both):
    _, one, two = both
    gaps = [read_json(out / "round-2" / "round.json")["held_out_gap"] for out in (one, two)]
    assert gaps[0]["num_samples"] == gaps[1]["num_samples"] == 24
    assert gaps[0]["mean"] == pytest.approx(gaps[1]["mean"], abs=1e-4)
    means = [[entry["mean"] for entry in read_results(out / "results.json")["results"]] for out in (one, two)]
    assert means[0] == pytest.approx(means[1], abs=1e-3)
