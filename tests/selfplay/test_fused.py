"""Updates in the backward pass end where updates after it do, and no gradient outlives it."""

import json
from dataclasses import replace
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from spin_diffusion.selfplay import train as train_module
from spin_diffusion.selfplay.train import TrainSettings
from spin_diffusion.selfplay.trainee import Fused, check_fused
from spin_diffusion.store.input_error import InputError
from tests.playing import TRAINING, make_game, play_all

PLAIN = replace(
    TRAINING, max_grad_norm=0.0, lr_scheduler="linear", lr_warmup_steps=1, max_train_steps=6, checkpointing_steps=3
)
UNET = "unet/diffusion_pytorch_model.safetensors"


def steps_of(round_folder):
    return [json.loads(line) for line in (round_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("optimizer", "rounds"), [("adamw", 2), ("adafactor", 1), ("rmsprop", 1), ("sgd", 1)])
def test_fused_updates_end_where_the_others_do(optimizer, rounds, sdxl_dir, tmp_path):
    settings = replace(PLAIN, optimizer=optimizer)
    play_all(sdxl_dir, tmp_path / "plain", settings, rounds=rounds)
    play_all(sdxl_dir, tmp_path / "fused", replace(settings, fused_backward=True), rounds=rounds)
    plain, fused = (load_file(tmp_path / name / UNET) for name in ("plain", "fused"))
    base = load_file(sdxl_dir / UNET)
    moved = max((plain[name] - base[name].float()).abs().max() for name in plain)
    assert moved > 0 and max((plain[name] - fused[name]).abs().max() for name in plain) <= 1e-3 * moved
    taken = [steps_of(tmp_path / name / f"round-{rounds}") for name in ("plain", "fused")]
    for one, other in zip(*taken, strict=True):
        assert one["lr"] == other["lr"] and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_resumed_round_goes_on_with_every_weights_own_state(optimizer, sdxl_dir, tmp_path, monkeypatch):
    settings = replace(PLAIN, optimizer=optimizer, fused_backward=True)
    play_all(sdxl_dir, tmp_path / "whole", settings, rounds=1)
    take_step = train_module._take_step

    def killed(step, *inputs):
        if step == 4:
            raise KeyboardInterrupt
        return take_step(step, *inputs)

    monkeypatch.setattr(train_module, "_take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        play_all(sdxl_dir, tmp_path / "resumed", settings, rounds=1)
    files = {path.name for path in (tmp_path / "resumed" / "round-1" / "checkpoint-3").iterdir()}
    assert {"optimizer.safetensors", "optimizer.json", "unet"} <= files
    monkeypatch.setattr(train_module, "_take_step", take_step)
    play_all(sdxl_dir, tmp_path / "resumed", settings, rounds=1)
    whole, resumed = (load_file(tmp_path / name / "round-1" / UNET) for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_no_gradient_is_kept(sdxl_dir):
    game = make_game(sdxl_dir)
    trainee = Fused(game, 1e-3, replace(PLAIN, fused_backward=True), game.accelerator)
    alive = []
    for weight in trainee.parameters:
        weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in trainee.parameters))
        )
    before = [weight.detach().clone() for weight in trainee.parameters]
    sum(weight.square().sum() for weight in trainee.parameters).backward()
    assert max(alive) == 0 and len(alive) == len(before)
    expected = torch.stack([(2 * weight).square().sum() for weight in before]).sum().sqrt()
    assert torch.allclose(trainee.optimizer.gradient_norm(), expected)
    assert all(
        not torch.equal(old, new) for old, new in zip(before, trainee.parameters, strict=True) if old.abs().max() > 0
    )
    trainee.finish()
    trained = next(game.player.parameters())
    after = trained.detach().clone()
    trained.sum().backward()
    assert trained.grad is not None and torch.equal(trained, after)  # the next round starts without hooks


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_grad_norm": 1.0}, "--max_grad_norm 1.0 cannot be kept: set it to 0"),
        ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps 2"),
        ({"fully_shard": True}, "several processes"),
        ({"precision": "fp16"}, "use bf16"),
        ({"processes": 2}, "several processes"),
    ],
)
def test_what_needs_all_gradients_is_refused_in_one_line(changed, said):
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.num_processes = changed.pop("processes", 1)
    accelerator.mixed_precision = changed.pop("precision", "no")
    settings = TrainSettings(**{"max_grad_norm": 0.0, "fused_backward": True} | changed)
    with pytest.raises(InputError) as refused:
        check_fused(settings, accelerator)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    check_fused(replace(settings, fused_backward=False), accelerator)
