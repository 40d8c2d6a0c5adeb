"""Two processes against one: the same answers to the token, the same losses, the same weights under SGD."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from spin_diffusion.evaluation.records import read_results
from spin_diffusion.store.files import read_json, read_rows
from tests.llm.playing import LANGUAGE
from tests.test_processes import play, start


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
        "checkpointing_steps": 2, "judges": ["log_likelihood"], "select_every": 3,
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
    first = sorted((one / "round-1").rglob("samples/*.parquet"))
    second = sorted((one / "round-2" / "samples").glob("*.parquet"))
    assert first and second
    for path in first:
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
    for path in second:
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
    selections = [read_json(out / "round-1" / "round.json")["training"]["selection"] for out in (one, two)]
    assert selections[0]["step"] == selections[1]["step"] and len(selections[0]["curve"]) == 3
    for mine, other in zip(selections[0]["curve"], selections[1]["curve"], strict=True):
        assert mine["mean"] == pytest.approx(other["mean"], abs=1e-4)
    gaps = [read_json(out / "round-2" / "round.json")["held_out_gap"] for out in (one, two)]
    assert gaps[0]["num_samples"] == gaps[1]["num_samples"] == 24
    assert gaps[0]["mean"] == pytest.approx(gaps[1]["mean"], abs=1e-4)
    means = [[entry["mean"] for entry in read_results(out / "results.json")["results"]] for out in (one, two)]
    assert means[0] == pytest.approx(means[1], abs=1e-3)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A round with checkpoints, on one process, and what it came to. The output layer is the embedding."""
    config = {
        "model_name_or_path": str(LANGUAGE / "base"), "dataset_name": str(LANGUAGE / "data" / "train.jsonl"),
        "max_train_samples": 32, "rounds": 1, "max_train_steps": 8, "max_length": 48, "max_new_tokens": 24,
        "samples_per_shard": 16, "optimizer": "sgd", "learning_rate": 1e-2, "lr_scheduler": "linear",
        "report_to": "none", "checkpointing_steps": 2,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("steps")
    play(config | {"train_batch_size": 8}, folder / "one", 1, "train_space_llm.py")
    return config | {"train_batch_size": 4}, weights_in(folder / "one")


def weights_in(folder):
    return load_file(folder / "out" / "model" / "model.safetensors")


def ends_alike(one, two) -> None:
    base = load_file(LANGUAGE / "base" / "model.safetensors")
    moved = max((one[name] - base[name]).abs().max() for name in one)
    assert moved > 0 and max((one[name] - two[name]).abs().max() for name in one) < 1e-3 * moved


def test_a_player_in_parts_goes_on_from_its_checkpoint_and_ends_where_one_process_does(steps, tmp_path):
    config, one = steps
    config = config | {"fully_shard": True}
    run = start(config, tmp_path, 2, "train_space_llm.py")
    until = time.monotonic() + 120
    while not (tmp_path / "out" / "round-1" / "checkpoint-4").is_dir():
        assert run.poll() is None and time.monotonic() < until, run.communicate()[1]
        time.sleep(0.01)
    run.terminate()
    run.communicate(timeout=60)
    # A faster machine may have come to the end of the round by then
    state = read_json(tmp_path / "out" / "round-1" / "round.json")["state"]
    said = play(config, tmp_path, 2, "train_space_llm.py")
    assert state != "CACHED" or "Resuming from round-1/checkpoint-" in said
    ends_alike(one, weights_in(tmp_path))
