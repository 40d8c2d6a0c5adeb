"""What is computed once: text embeddings, kept by content and found again."""

import pytest
import torch

from spin_diffusion.diffusion import prompts
from tests.diffusion.test_game import batch_of
from tests.playing import make_game

PROMPTS = ["a fox", "a hen", "a fox", "an owl"]
FRAMES = torch.tensor([[40, 32, 4, 0, 32, 32]] * 4)


@pytest.fixture
def base(sdxl_dir):
    return sdxl_dir


def counted_embeddings(game, monkeypatch) -> list[str]:
    """All texts that the encoders are given from now on."""
    texts: list[str] = []
    embed = game.family.embed

    def counting(pipeline, prompts):
        texts.extend(prompts)
        return embed(pipeline, prompts)

    monkeypatch.setattr(game.family, "embed", counting)
    return texts


def keep(game, folder, prompts=PROMPTS, dtype=torch.float32):
    game.prompts.keep(folder, prompts, game.accelerator, dtype)


@pytest.mark.parametrize("of_family", ["sd1_dir", "sdxl_dir"])
def test_kept_prompts_are_the_encoders_own_and_dropped_ones_the_samplers(of_family, request, tmp_path):
    game = make_game(request.getfixturevalue(of_family))
    dropped = [False, True, False, False]
    direct = game.prompts.conditioning(PROMPTS, dropped, FRAMES)
    keep(game, tmp_path)
    kept = game.prompts.conditioning(PROMPTS, dropped, FRAMES)
    assert kept.tokens.shape == direct.tokens.shape and len(kept.tokens) == 4
    assert torch.allclose(kept.tokens, direct.tokens, atol=1e-6)
    for name in direct.added:
        assert torch.allclose(kept.added[name], direct.added[name], atol=1e-6)
    assert not torch.equal(kept.tokens[0], kept.tokens[1]) and torch.equal(kept.tokens[0], kept.tokens[2])


def test_of_many_prompts_each_finds_its_own(base, tmp_path):
    # Found by hash, kept in the order of the data: enough of them that one order does not pass for its inverse
    prompts = [f"a fox number {number}" for number in range(12)]
    game = make_game(base)
    keep(game, tmp_path, prompts)
    frames = FRAMES[:1].repeat(len(prompts), 1)
    kept = game.prompts.conditioning(prompts, [False] * len(prompts), frames)
    fresh = make_game(base).prompts.conditioning(prompts, [False] * len(prompts), frames)
    assert torch.allclose(kept.tokens, fresh.tokens, atol=1e-6)
    apart = torch.cdist(fresh.tokens.flatten(1), fresh.tokens.flatten(1)) + torch.eye(len(prompts))
    assert apart.min() > 1e-3


def test_under_autocast_a_kept_prompt_gives_the_denoiser_the_same_bits(sdxl_dir, tmp_path):
    game = make_game(sdxl_dir, precision="bf16")
    x_t, t = torch.randn(1, 4, 16, 16), torch.tensor([500])

    def predicted():
        with torch.no_grad(), game.accelerator.autocast():
            told = game.prompts.conditioning(["a fox"], [False], FRAMES[:1])
            return game.player(x_t, t, told.tokens, added_cond_kwargs=told.added).sample

    direct = predicted()
    keep(game, tmp_path, ["a fox"], torch.bfloat16)
    assert game.prompts.conditioning(["a fox"], [False], FRAMES[:1]).tokens.dtype == torch.bfloat16
    assert torch.equal(predicted(), direct)


def test_each_distinct_prompt_is_encoded_once_and_found_by_the_next_run(base, tmp_path, monkeypatch):
    game = make_game(base)
    texts = counted_embeddings(game, monkeypatch)
    keep(game, tmp_path)
    assert texts == ["a fox", "a hen", "an owl"]
    game.prompts.conditioning(PROMPTS, [False] * 4, FRAMES)
    another = make_game(base)
    texts.clear()
    keep(another, tmp_path)
    another.prompts.conditioning(PROMPTS, [False] * 4, FRAMES)
    assert texts == []
    keep(another, tmp_path, [*PROMPTS, "a dog"])
    assert "a dog" in texts


def test_another_text_encoder_never_finds_them(base, tmp_path, monkeypatch):
    keep(make_game(base), tmp_path)
    other = make_game(base)
    with torch.no_grad():
        next(other.pipeline.text_encoder.parameters()).add_(1e-3)
    texts = counted_embeddings(other, monkeypatch)
    keep(other, tmp_path)
    assert texts == ["a fox", "a hen", "an owl"]


@pytest.mark.parametrize("changed", ["second encoder", "activation", "heads", "tokenizer", "dtype"])
def test_nothing_else_that_decides_an_embedding_finds_them(changed, sdxl_dir, tmp_path, monkeypatch):
    keep(make_game(sdxl_dir), tmp_path)
    other = make_game(sdxl_dir)
    if changed == "second encoder":
        with torch.no_grad():
            next(other.pipeline.text_encoder_2.parameters()).add_(1e-3)
    elif changed == "activation":
        other.pipeline.text_encoder.config.hidden_act = "relu"
    elif changed == "heads":
        other.pipeline.text_encoder.config.num_attention_heads *= 2
    elif changed == "tokenizer":
        monkeypatch.setattr(other.pipeline.tokenizer, "get_vocab", lambda: {"fox": 0})
    texts = counted_embeddings(other, monkeypatch)
    keep(other, tmp_path, dtype=torch.bfloat16 if changed == "dtype" else torch.float32)
    assert texts == ["a fox", "a hen", "an owl"]


def test_a_prompt_that_was_not_kept_is_encoded_on_the_spot(base, tmp_path):
    game = make_game(base)
    direct = game.prompts.conditioning(["a cat"], [False], FRAMES[:1])
    keep(game, tmp_path)
    assert torch.equal(game.prompts.conditioning(["a cat"], [False], FRAMES[:1]).tokens, direct.tokens)


def test_training_takes_the_encoders_off_the_device_and_drawing_brings_them_back(base, tmp_path, monkeypatch):
    game = make_game(base)
    batch = batch_of(game)
    moved = []
    monkeypatch.setattr(prompts, "move", lambda *networks, device: moved.append(device.type))
    game.scores(game.player, batch)
    assert moved == []  # nothing is kept: they are needed
    keep(game, tmp_path, batch.prompts)
    game.scores(game.player, batch)
    assert moved == ["cpu"]
    game.draw(game.player, ["a fox"], [0], game.opponent_sampling)
    assert moved == ["cpu", "cpu"]


@pytest.mark.parametrize("harm", ["flipped", "header", "cut", "empty", "another's"])
def test_damaged_encodings_are_made_anew_and_give_what_whole_ones_give(harm, sdxl_dir, tmp_path, capsys):
    first = make_game(sdxl_dir)
    keep(first, tmp_path / "prompts")
    tokens = first.prompts.conditioning(PROMPTS, [False] * 4, FRAMES).tokens.clone()  # not a view of the file
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    keep(first, tmp_path / "others", ["a dog"])
    (another,) = (tmp_path / "others").rglob("*.safetensors")
    start, flipped = int.from_bytes(whole[:8], "little") + 8, bytearray(whole)
    flipped[start + 101 if harm == "flipped" else start - 9] ^= 8
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "empty": b"", "another's": another.read_bytes()}.get(harm, flipped)
    )
    capsys.readouterr()
    second = make_game(sdxl_dir)
    keep(second, tmp_path / "prompts")
    assert torch.equal(second.prompts.conditioning(PROMPTS, [False] * 4, FRAMES).tokens, tokens)
    assert path.read_bytes() == whole
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (0 if harm == "another's" else 1)
    assert all("is damaged (" in line and "made anew" in line for line in said)
