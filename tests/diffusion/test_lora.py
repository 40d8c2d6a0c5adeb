"""LoRA: two adapters on one UNet, which of them is trained, what is saved and how it loads."""

import gc
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spin_diffusion.diffusion.base import load_checkpoint
from spin_diffusion.diffusion.lora import CONFIG, KOHYA_WEIGHTS, OPPONENT, PLAYER, WEIGHTS, load_adapter
from spin_diffusion.runs.image_lines import trained_line
from spin_diffusion.selfplay import train as train_module
from spin_diffusion.selfplay.objectives import spin
from spin_diffusion.selfplay.train_settings import LoraSettings
from spin_diffusion.store.files import read_json, weights_hash, write_json
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import file_hash
from tests.diffusion.test_game import batch_of
from tests.playing import TRAINING, make_game, play_all

LORA = LoraSettings(use_lora=True, rank=4, lora_alpha=6.0)
QUICK = replace(TRAINING, learning_rate=1e-3)


def move(game, size: float = 0.05, seed: int = 3) -> None:
    """The player's adapter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in game.models.parameters(PLAYER):
            parameter += size * torch.randn(parameter.shape, generator=generator)


def prediction(unet, game) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 4, 16, 16, generator=generator)
    conditioning = game.prompts.conditioning(["a fox"], [False], torch.tensor([[32, 32, 0, 0, 32, 32]]))
    inputs = {"encoder_hidden_states": conditioning.tokens}
    if conditioning.added:
        inputs["added_cond_kwargs"] = conditioning.added
    with torch.no_grad():
        return unet(x_t, torch.tensor([500]), **inputs).sample


def damage(folder, change) -> None:
    """Apply a function to the tensors of a saved adapter."""
    file = folder / WEIGHTS
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=said)


def lose_both(tensors) -> None:
    """Of one layer both matrices: nothing would be left of what it learned."""
    name = next(name for name in tensors if ".lora_A." in name)
    del tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(next(iter(tensors))), "lacks some of them"),
        (lose_both, "lacks"),
        (lambda tensors: tensors.update({"unet.elsewhere.lora_A.weight": torch.zeros(4, 4)}), "other layers"),
        (lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("nan")), "not finite"),
        (lambda tensors: tensors.update({name: t[:2] for name, t in tensors.items() if "_A" in name}), "another rank"),
    ],
)
def test_a_saved_adapter_is_whole_wherever_it_is_loaded(change, words, sdxl_dir, tmp_path):
    game = make_game(sdxl_dir, lora=LORA)
    move(game)
    game.save(tmp_path, prove=False)
    fresh = load_checkpoint(str(sdxl_dir))[1]
    load_adapter(fresh, tmp_path / "lora")
    assert torch.allclose(prediction(fresh.unet, game), prediction(game.player, game), atol=1e-5)
    damage(tmp_path / "lora", change)
    fresh = load_checkpoint(str(sdxl_dir))[1]
    with pytest.raises(InputError, match=words if "rank" not in words else "another rank|cannot load") as error:
        load_adapter(fresh, tmp_path / "lora")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=words):
        game.restore(tmp_path)


def test_an_adapter_of_another_base_is_not_put_on_this_one(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir, lora=LORA)
    game.save(tmp_path, prove=False)
    other = load_checkpoint(str(sdxl_dir))[1]
    other.unet.conv_out.bias.data += 1
    with pytest.raises(InputError, match="was trained on another base .*: give that base$"):
        load_adapter(other, tmp_path / "lora")


def test_only_the_player_s_adapter_is_trained_and_there_is_one_unet(sdxl_dir):
    gc.collect()  # what earlier tests left must not vanish between the two counts
    before = sum(isinstance(found, UNet2DConditionModel) for found in gc.get_objects())
    game = make_game(sdxl_dir, lora=LORA)
    assert game.opponent is game.player
    assert sum(isinstance(found, UNet2DConditionModel) for found in gc.get_objects()) - before == 1
    trainable = [parameter for parameter in game.player.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in game.models.parameters(PLAYER)} and trainable
    assert not {id(p) for p in trainable} & {id(p) for p in game.models.parameters(OPPONENT)}


def test_the_player_s_parameters_stay_the_same_objects(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir, lora=LORA)
    first = [id(parameter) for parameter in game.models.parameters(PLAYER)]

    def same() -> bool:
        now = game.models.parameters(PLAYER)
        return [id(p) for p in now] == first and all(p.requires_grad for p in now)

    move(game)
    game.save(tmp_path)
    assert same()
    game.promote()
    assert same()
    game.restore(None)
    assert same()
    game.restore(tmp_path)
    assert same()
    game.scores(game.player, batch_of(game)).scores.player_real.sum().backward()
    assert same() and not any(p.requires_grad for p in game.models.parameters(OPPONENT))
    with pytest.raises(ZeroDivisionError), game.models.as_opponent():
        assert same() and not any(p.requires_grad for p in game.models.parameters(OPPONENT))
        raise ZeroDivisionError
    assert same()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_r_is_zero_in_the_first_and_a_later_round(sdxl_dir, precision):
    game = make_game(sdxl_dir, precision, lora=LORA, proportion_empty_prompts=0.5)
    wrapped = game.accelerator.prepare_model(game.player)
    for _ in range(2):
        scores = game.scores(wrapped, batch_of(game)).scores
        assert scores.r_real.abs().max() <= 1e-6 and scores.r_generated.abs().max() <= 1e-6
        move(game)
        assert game.scores(wrapped, batch_of(game)).scores.r_real.abs().max() > 1e-4
        game.promote()


def test_the_opponent_is_not_the_base_after_a_round(sdxl_dir):
    game = make_game(sdxl_dir, lora=LORA)
    first, base = game.opponent_hash(), prediction(game.player, game)
    move(game)
    game.promote()
    assert game.opponent_hash() != first and game.distance() == 0
    with game.models.as_opponent():
        assert (prediction(game.player, game) - base).abs().max() > 1e-4
    move(game, seed=4)
    assert game.opponent_hash() == game.opponent_hash() != game.player_hash() and game.distance() > 0


def test_the_change_of_adapter_predicts_to_the_bit_what_peft_s_own_does(sdxl_dir):
    game = make_game(sdxl_dir, lora=LORA)
    move(game)
    player = prediction(game.player, game)
    with game.models.as_opponent():
        opponent = prediction(game.player, game)
    assert torch.equal(prediction(game.player, game), player) and not torch.equal(player, opponent)
    for name, ours in ((OPPONENT, opponent), (PLAYER, player)):
        game.player.set_adapter(name)
        assert torch.equal(prediction(game.player, game), ours)


def test_adapters_are_fp32_on_a_bf16_base(sdxl_dir):
    game = make_game(sdxl_dir, "bf16", lora=LORA)
    for name in (PLAYER, OPPONENT):
        assert {parameter.dtype for parameter in game.models.parameters(name)} == {torch.float32}
    linear = [p.dtype for name, p in game.player.named_parameters() if name.endswith("base_layer.weight")]
    assert set(linear) == {torch.bfloat16}


def test_the_base_s_hash_does_not_depend_on_the_adapter(sdxl_dir):
    plain, game = make_game(sdxl_dir), make_game(sdxl_dir, lora=LORA)
    assert plain.base_hash == game.base_hash == weights_hash(plain.player)


def gradients(game, batch) -> list[torch.Tensor]:
    game.player.zero_grad()
    spin(game.scores(game.player, batch).scores, 100.0).sum().backward()
    return [parameter.grad.clone() for parameter in game.player.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("lora", [LORA, None])
def test_gradient_checkpointing_changes_no_gradient_and_is_at_work(sdxl_dir, lora):
    games = [make_game(sdxl_dir, lora=lora, gradient_checkpointing=on) for on in (False, True)]
    batch, found, calls = batch_of(games[0]), [], []
    for game in games:
        if lora is not None:
            move(game)
            game.promote()  # so that recomputing with the opponent's adapter would show
            move(game, seed=5)
        block = game.player.up_blocks[-1].resnets[0]
        count = []
        block.register_forward_pre_hook(lambda *args, count=count: count.append(1))
        found.append(gradients(game, batch))
        calls.append(len(count))
    for plain, recomputed in zip(*found, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-7)
    assert calls[1] == calls[0] + 1


def test_alpha_is_the_rank_unless_it_is_given():
    assert LoraSettings(rank=8).alpha == 8.0 and LoraSettings(rank=8, lora_alpha=2.0).alpha == 2.0


@pytest.mark.parametrize("base", ["sd1_dir", "sdxl_dir"])
def test_it_loads_in_a_fresh_pipeline_with_its_alpha(base, request, tmp_path):
    folder = request.getfixturevalue(base)
    game = make_game(folder, lora=LORA)
    untouched = prediction(game.player, game)
    move(game)
    game.save(tmp_path)
    fresh = DiffusionPipeline.from_pretrained(folder)
    fresh.load_lora_weights(tmp_path / "lora")
    expected = prediction(game.player, game)
    assert torch.allclose(prediction(fresh.unet, game), expected, atol=1e-5)
    assert (expected - untouched).abs().max() > 1e-3


def test_the_opponent_and_the_round_s_change_make_the_player(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir, lora=LORA)
    move(game)
    game.promote()
    game.save(tmp_path / "first")
    move(game, seed=5)
    game.save(tmp_path / "second")
    said = read_json(tmp_path / "second" / "lora_round" / CONFIG)
    assert (said["rank"], said["lora_alpha"]) == (2 * LORA.rank, 2 * LORA.alpha)
    fresh = DiffusionPipeline.from_pretrained(sdxl_dir)
    fresh.load_lora_weights(tmp_path / "first" / "lora", adapter_name="before")
    fresh.load_lora_weights(tmp_path / "second" / "lora_round", adapter_name="change")
    fresh.set_adapters(["before", "change"])
    assert torch.allclose(prediction(fresh.unet, game), prediction(game.player, game), atol=1e-5)
    fresh.set_adapters(["before"])
    assert not torch.allclose(prediction(fresh.unet, game), prediction(game.player, game), atol=1e-3)


def test_saved_bytes_depend_on_the_weights_alone(sdxl_dir, tmp_path):
    for name in ("one", "other"):
        game = make_game(sdxl_dir, lora=LORA)
        move(game)
        game.save(tmp_path / name, prove=False)
    for file in (WEIGHTS, KOHYA_WEIGHTS):
        assert file_hash(tmp_path / "one/lora" / file) == file_hash(tmp_path / "other/lora" / file)


def test_two_rounds_and_a_killed_run_ends_with_the_same_bytes(sdxl_dir, tmp_path, monkeypatch):
    def play(folder, game=None):
        return play_all(sdxl_dir, tmp_path / folder, QUICK, game or make_game(sdxl_dir, lora=LORA))

    records = play("whole")
    assert [record["state"] for record in records] == ["PROMOTED", "PROMOTED"]
    assert records[1]["opponent"]["hash"] != records[0]["opponent"]["hash"]
    take_step = train_module._take_step
    for left in (3, 6):
        steps = [left]

        def dies(*args, steps=steps):
            steps[0] -= 1
            if not steps[0]:
                raise KeyboardInterrupt
            return take_step(*args)

        monkeypatch.setattr(train_module, "_take_step", dies)
        with pytest.raises(KeyboardInterrupt):
            play("killed")
    monkeypatch.setattr(train_module, "_take_step", take_step)
    # After the resume the optimizer still holds the active adapter, and moves it
    game = make_game(sdxl_dir, lora=LORA)
    first = [id(parameter) for parameter in game.models.parameters(PLAYER)]
    seen = []

    def watching(step, trainee, *args):
        seen.append([id(parameter) for group in trainee.optimizer.param_groups for parameter in group["params"]])
        before = prediction(trainee.game.player, trainee.game)
        found = take_step(step, trainee, *args)
        assert not torch.equal(prediction(trainee.game.player, trainee.game), before)
        return found

    monkeypatch.setattr(train_module, "_take_step", watching)
    play("killed", game)
    assert seen and all(ids == first for ids in seen)
    for k in (1, 2):
        for kind in (f"lora/{WEIGHTS}", f"lora_round/{WEIGHTS}", f"lora/{KOHYA_WEIGHTS}"):
            name = f"round-{k}/{kind}"
            assert file_hash(tmp_path / "whole" / name) == file_hash(tmp_path / "killed" / name), name
    assert (tmp_path / "killed" / "lora" / WEIGHTS).is_file()


def test_unknown_layers_and_other_ranks_are_refused(sdxl_dir, tmp_path):
    with pytest.raises(InputError, match="--lora_target_modules to_x.*to_out.0"):
        make_game(sdxl_dir, lora=replace(LORA, lora_target_modules=["to_q", "to_x"]))
    make_game(sdxl_dir, lora=LORA).save(tmp_path, prove=False)
    with pytest.raises(InputError, match="another rank"):
        make_game(sdxl_dir, lora=replace(LORA, rank=2)).restore(tmp_path)


def test_an_adapter_of_another_base_is_refused_in_one_line(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir, lora=LORA)
    game.save(tmp_path, prove=False)
    for folder in ("lora", "lora_round"):
        assert read_json(tmp_path / folder / CONFIG)["base"] == game.base_hash
    other = DiffusionPipeline.from_pretrained(sdxl_dir)
    with torch.no_grad():
        other.unet.conv_in.bias.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    game = make_game(tmp_path / "other", lora=LORA)
    move(game)
    before = game.player_hash()
    with pytest.raises(InputError, match=r"was trained on another base .*another --output_dir$") as error:
        game.restore(tmp_path)
    assert "\n" not in str(error.value) and game.player_hash() == before
    AcceleratorState._reset_state()
    make_game(sdxl_dir, lora=LORA, precision="bf16").restore(tmp_path)  # the same base, held in another dtype
    written = read_json(tmp_path / "lora" / CONFIG)
    del written["base"]  # as an earlier version wrote it
    write_json(tmp_path / "lora" / CONFIG, written)
    game.restore(tmp_path)
    assert game.player_hash() != before


def test_the_header_counts_base_and_adapter_apart(sdxl_dir):
    game = make_game(sdxl_dir, lora=LORA)
    line = trained_line(game)
    base = UNet2DConditionModel.from_pretrained(sdxl_dir, subfolder="unet").num_parameters()
    adapter = sum(parameter.numel() for parameter in game.models.parameters(PLAYER))
    assert f"{adapter / 1e6:.2g} M" in line and f"{base / 1e6:.1f} M" in line
    assert game.player.num_parameters() == base + 2 * adapter


def test_adding_both_adapters_says_nothing(sdxl_dir, recwarn):
    make_game(sdxl_dir, lora=LORA)
    assert not [str(one.message) for one in recwarn if "peft_config" in str(one.message)]
