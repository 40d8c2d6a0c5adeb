"""What is computed once: text embeddings and latents, kept by content and found again."""

import json
from dataclasses import replace

import pytest
import torch

from spin_diffusion.diffusion import prompts
from spin_diffusion.diffusion.images import encoded_once, vae_hash
from tests.diffusion.test_game import batch_of
from tests.playing import examples, make_game

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


# Latents


def shared(base, folder, **images):
    game = make_game(base)
    return type(game)(
        game.family, game.pipeline, str(base), images=replace(game.images, **images),
        sampling=game.sampling, denoiser=game.denoiser, accelerator=game.accelerator, shared_latents=folder,
    )  # fmt: skip


def test_runs_that_encode_otherwise_find_none_of_anothers(sdxl_dir, tmp_path):
    first = shared(sdxl_dir, tmp_path)
    rows = list(first.real_rows(examples(2)))
    first.encode(rows)
    for otherwise in (
        {"random_flip": True}, {"max_aspect_ratio": 2.0}, {"vae_round_trip": True},
        {"vae_round_trip": True, "image_format": "jpeg"},
    ):  # fmt: skip
        found, its_own = (shared(sdxl_dir, folder, **otherwise).encode(rows) for folder in (tmp_path, None))
        assert found.keys() == its_own.keys() and all(torch.equal(found[name], its_own[name]) for name in found)


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_a_vae_that_scales_its_latents_otherwise_does_not_find_them(name, sdxl_dir, tmp_path):
    first, other = shared(sdxl_dir, tmp_path), make_game(sdxl_dir)
    rows = list(first.real_rows(examples(2)))
    usual = first.encode(rows)["latents"]
    other.pipeline.vae.register_to_config(**{name: 0.5})
    its_own = other.encode(rows)["latents"]
    other.shared_latents, other.vae_hash = tmp_path, vae_hash(other.pipeline.vae)
    assert torch.equal(other.encode(rows)["latents"], its_own) and not torch.equal(its_own, usual)


def test_a_second_run_finds_the_latents_and_another_vae_does_not(base, tmp_path, monkeypatch):
    first = shared(base, tmp_path)
    rows = list(first.real_rows(examples(3, losers=True)))
    expected = first.encode(rows)
    plain = make_game(base).encode(rows)
    assert expected.keys() == plain.keys() and all(torch.equal(expected[name], plain[name]) for name in plain)

    def refuse(*inputs):
        raise AssertionError("encoded again")

    second = shared(base, tmp_path)
    monkeypatch.setattr(second, "_latents", refuse)
    found = second.encode(rows)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    with pytest.raises(AssertionError, match="encoded again"):
        second.encode(rows[:2])
    changed = make_game(base)
    with torch.no_grad():
        next(changed.pipeline.vae.parameters()).add_(1e-3)
    changed = type(changed)(
        changed.family, changed.pipeline, str(base), images=changed.images, sampling=changed.sampling,
        denoiser=changed.denoiser, accelerator=changed.accelerator, shared_latents=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(changed, "_latents", refuse)
    with pytest.raises(AssertionError, match="encoded again"):
        changed.encode(rows)


@pytest.mark.parametrize("harm", ["flipped", "header", "cut", "empty", "another's"])
def test_damaged_encodings_are_made_anew_and_give_what_whole_ones_give(harm, sdxl_dir, tmp_path, capsys):
    first = shared(sdxl_dir, tmp_path / "latents")
    rows = list(first.real_rows(examples(2)))
    latents = first.encode(rows)["latents"].clone()  # not a view of the file
    keep(first, tmp_path / "prompts")
    tokens = first.prompts.conditioning(PROMPTS, [False] * 4, FRAMES).tokens.clone()
    paths = sorted(tmp_path.rglob("*.safetensors"))
    whole = {path: path.read_bytes() for path in paths}
    shared(sdxl_dir, tmp_path / "latents").encode(list(first.real_rows(examples(3)))[1:])
    another = (set(tmp_path.rglob("*.safetensors")) - set(paths)).pop().read_bytes()
    for path, content in whole.items():
        start, flipped = int.from_bytes(content[:8], "little") + 8, bytearray(content)
        flipped[start + 101 if harm == "flipped" else start - 9] ^= 8
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "another's": another}.get(harm, flipped))
    capsys.readouterr()
    second = shared(sdxl_dir, tmp_path / "latents")
    assert torch.equal(second.encode(rows)["latents"], latents)
    keep(second, tmp_path / "prompts")
    assert torch.equal(second.prompts.conditioning(PROMPTS, [False] * 4, FRAMES).tokens, tokens)
    assert {path: path.read_bytes() for path in paths} == whole
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (0 if harm == "another's" else 2)
    assert all("is damaged (" in line and "made anew" in line for line in said)


def test_what_decides_the_latents_is_in_their_name(tmp_path):
    rows = [{"image": b"1", "loser_image": b"2", "drawn": False}]
    names = set()

    def name_of(*inputs, drawn=False, prefix=""):
        before = set(tmp_path.iterdir())
        encoded_once(tmp_path, *inputs, [rows[0] | {"drawn": drawn}], lambda: torch.zeros(1), prefix)
        return (set(tmp_path.iterdir()) - before).pop()

    for inputs, options in [
        (("vae", {"round": False}), {}),
        (("other", {"round": False}), {}),
        (("vae", {"round": True}), {}),
        (("vae", {"round": False}), {"drawn": True}),
        (("vae", {"round": False}), {"prefix": "loser_"}),
    ]:
        names.add(name_of(*inputs, **options))
    assert len(names) == 5 and not list(tmp_path.glob("*.spin-part")), json.dumps([str(name) for name in names])
