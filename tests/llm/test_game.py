"""LanguageGame: scores, sides, opponents, adapters, what is saved."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_diffusion.llm.game import ADAPTER, MODEL, OPPONENT, PLAYER
from spin_diffusion.samples.sample import Batch
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.objectives import space, spin
from spin_diffusion.store.files import read_rows, weights_hash
from tests.llm.playing import LANGUAGE, TRAINING, examples, make_game, play_all


def batch_of(game, count: int = 6, copies: int = 1) -> Batch:
    """Real answers with as many drawn ones, and the opponent's scores of both."""
    rows = [game.real_row(example) for example in examples(count)]
    game.promote()
    drawn = game.generate([row for row in rows for _ in range(copies)], list(range(count * copies)))
    sides = []
    for side in (rows, drawn):
        tensors = game.encode(side)
        sides.append(tensors | {"opponent_score": game.opponent_scores(tensors)})
    return Batch([row["id"] for row in rows], [row["prompt"] for row in rows], *sides, list(range(count)))


@pytest.fixture(params=[False, True], ids=["full", "lora"])
def use_lora(request):
    return request.param


def test_it_is_a_game(use_lora):
    assert isinstance(make_game(use_lora=use_lora), Game)


def test_at_step_0_every_r_is_0(use_lora):
    game = make_game(use_lora=use_lora)
    scores = game.scores(game.player, batch_of(game)).scores
    assert scores.r_real.abs().max() < 1e-4 and scores.r_generated.abs().max() < 1e-4
    assert spin(scores).mean().item() == pytest.approx(math.log(2), abs=1e-4)
    assert space(scores, mu=3.0).mean().item() == pytest.approx(math.log(4) + 3 * math.log(4 / 3), abs=1e-3)


def test_a_score_is_the_sum_of_log_probabilities_of_the_answers_tokens_with_the_end_token():
    game = make_game()
    # Without its full stop: the end token is then no foregone conclusion
    example = examples(1)[0]
    row = game.real_row(replace(example, completion=example.completion.rstrip(".")))
    model = AutoModelForCausalLM.from_pretrained(LANGUAGE / "base").double()
    ids = row["prompt_ids"] + row["tokens"]
    assert row["tokens"][-1] == game.tokenizer.eos_token_id
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    expected = sum(log_p[place - 1, ids[place]].item() for place in range(len(row["prompt_ids"]), len(ids)))
    game.promote()
    assert game.opponent_scores(game.encode([row]))[0].item() == pytest.approx(expected, abs=1e-4)


def test_sides_are_not_swapped():
    """A player that likes the real answers more has r_real above 0, and it is r_real that it has."""
    game = make_game()
    batch = batch_of(game)
    optimizer = torch.optim.Adam(game.player.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        (-game.scores(game.player, batch).scores.player_real.mean()).backward()
        optimizer.step()
    scores = game.scores(game.player, batch).scores
    assert scores.r_real.mean() > 0.5 and scores.r_real.mean() > scores.r_generated.mean()


def test_scores_do_not_depend_on_what_they_are_batched_with(use_lora):
    game = make_game(use_lora=use_lora)
    batch = batch_of(game)
    together = game.scores(game.player, batch).scores
    for place in range(len(batch.ids)):
        only = slice(place, place + 1)
        sides = ({name: tensor[only] for name, tensor in side.items()} for side in (batch.real, batch.generated))
        alone = Batch(batch.ids[only], batch.prompts[only], *sides, batch.seeds[only])
        scores = game.scores(game.player, alone).scores
        assert scores.player_real[0].item() == pytest.approx(together.player_real[place].item(), abs=1e-4)
        assert scores.player_generated[0].item() == pytest.approx(together.player_generated[place].item(), abs=1e-4)


def test_several_generated_answers_make_as_many_pairs():
    game = make_game()
    batch = batch_of(game, count=4, copies=3)
    scores = game.scores(game.player, batch).scores
    assert scores.player_real.shape == scores.player_generated.shape == (12,)
    assert torch.equal(scores.player_real[:3], scores.player_real[0].expand(3))
    assert len(set(scores.player_generated.tolist())) > 4
    assert scores.r_generated.abs().max() < 1e-4


def test_generated_answers_are_stored_as_the_tokens_that_are_scored(tmp_path):
    game = make_game()
    play_all(tmp_path, game=game, rounds=1)
    rows = [row for path in (tmp_path / "round-1" / "samples").glob("*.parquet") for row in read_rows(path)]
    assert rows
    for row in rows:
        encoded = game.encode([row])
        begin, end = int(encoded["begin"][0]), int(encoded["end"][0])
        assert encoded["tokens"][0, begin:end].tolist() == row["tokens"]
        assert (row["tokens"][-1] == game.tokenizer.eos_token_id) == (row["finish"] == "stop")
        assert json.loads(row["sampler"])["temperature"] == 1.0


def test_the_opponent_is_needed_only_until_the_player_is_trained():
    game = make_game()
    batch = batch_of(game)
    game.scores(game.player, batch).scores.player_real.sum().backward()
    with pytest.raises(AssertionError, match="not the opponent's any more"):
        game.opponent_scores(batch.real)
    with pytest.raises(AssertionError, match="not the opponent's any more"):
        game.generate([game.real_row(examples(1)[0])], [0])


def test_the_opponents_adapter_is_a_copy_that_does_not_move():
    game = make_game(use_lora=True)
    batch = batch_of(game)
    before = game.opponent_hash()
    trained = [p for p in game.player.parameters() if p.requires_grad]
    assert trained and {id(p) for p in trained} == {
        id(p) for name, p in game.player.named_parameters() if f".{PLAYER}." in name
    }
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        space(game.scores(game.player, batch).scores).mean().backward()
        optimizer.step()
        game.generate([game.real_row(examples(1)[0])], [0])  # switches to the opponent and back
        assert [id(p) for p in game.player.parameters() if p.requires_grad] == [id(p) for p in trained]
    assert game.opponent_hash() == before and game.player_hash() != before
    # In the second round the opponent is the trained player, not the base
    after_one = game.player_hash()
    game.promote()
    assert game.opponent_hash() == after_one
    again = batch_of(game)
    assert game.scores(game.player, again).scores.r_real.abs().max() < 1e-4
    with game.model.disable_adapter():
        of_base = game._score(game.player, [again.real])
    assert (of_base - again.real["opponent_score"]).abs().max() > 1e-2
    assert OPPONENT in game.model.peft_config


def test_dropout_is_off_in_training_mode_too():
    game = make_game(checkpointing=True, dropout=0.5)
    assert game.model.training
    batch = batch_of(game)
    assert game.scores(game.player, batch).scores.r_real.abs().max() < 1e-4


def test_recomputed_activations_give_the_same_gradient(use_lora):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        game = make_game(checkpointing=checkpointing, use_lora=use_lora)
        space(game.scores(game.player, batch_of(game)).scores).mean().backward()
        gradients.append([p.grad.clone() for p in game.player.parameters() if p.requires_grad and p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_what_is_saved_loads_as_users_load_it(use_lora, tmp_path):
    torch.manual_seed(0)
    game = make_game(use_lora=use_lora)
    play_all(tmp_path, game=game, rounds=1)
    folder = tmp_path / (ADAPTER if use_lora else MODEL)
    if use_lora:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(LANGUAGE / "base"), folder)
        assert set(load_file(folder / "adapter_model.safetensors")) == {
            name for name in load_file(folder / "adapter_model.safetensors") if PLAYER not in name
        }
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, game.model(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).chat_template == game.tokenizer.chat_template


def test_restoring_puts_the_weights_into_the_same_parameters(use_lora, tmp_path):
    torch.manual_seed(0)
    game = make_game(use_lora=use_lora)
    base, parameters = game.player_hash(), [id(p) for p in game.player.parameters()]
    play_all(tmp_path, game=game, rounds=1)
    trained = game.player_hash()
    game.restore(None)
    assert game.player_hash() == base != trained
    game.restore(tmp_path / "round-1")
    assert game.player_hash() == trained and [id(p) for p in game.player.parameters()] == parameters


def test_bfloat16_starts_at_0_too():
    game = make_game("bf16")
    scores = game.scores(game.player, batch_of(game)).scores
    tolerance = game.start_tolerance["bf16"] * scores.player_real.abs().max()
    assert scores.r_real.abs().max() <= tolerance and scores.player_real.dtype == torch.float32


def test_the_base_is_not_changed_by_a_game_with_adapters(tmp_path):
    game = make_game(use_lora=True)
    before = weights_hash(copy.deepcopy(game.model.get_base_model().model.embed_tokens))
    play_all(tmp_path, TRAINING, game, rounds=1)
    assert weights_hash(game.model.get_base_model().model.embed_tokens) == before


def test_equal_rows_are_answered_each_from_a_seed_of_its_own(tmp_path):
    example = examples(1)[0]
    rows = [make_game().real_row(replace(example, where=f"row {place}")) for place in range(3)]
    assert len({row["id"] for row in rows}) == 3 and rows[0]["tokens"] == rows[1]["tokens"]


def test_answers_to_another_prompt_are_not_scored_as_a_pair():
    game = make_game()
    batch = batch_of(game)
    shifted = {name: tensor.roll(1, dims=0) for name, tensor in batch.generated.items()}
    with pytest.raises(AssertionError, match="other prompts"):
        game.scores(game.player, replace(batch, generated=shifted))
