"""What a round costs a language model, against torch's counter on the real code."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spin_diffusion.llm.cost import TokenCosts, count_tokens, ledger_costs, lengths_of
from spin_diffusion.samples.sample import Batch
from tests.llm.playing import ROUNDS, make_game, play_all


def lengths(prompt: int, answer: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array([float(prompt)]), np.array([float(answer)])


def count(call) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("prompt, answer", [(7, 5), (20, 20), (3, 17)])
def test_a_score_and_its_gradient_cost_what_the_counter_counts(prompt, answer):
    game = make_game()
    unit = count_tokens(game.model, 24)
    rows = [{"prompt_ids": [1] * prompt, "tokens": [5] * answer}] * 3
    side = game.encode(rows) | {"opponent_score": torch.zeros(3)}
    game.model.zero_grad()
    game._is_opponent = True
    forward = count(lambda: game.opponent_scores(side))
    assert 3 * unit.scoring(lengths(prompt, answer)) == pytest.approx(forward, rel=1e-6)
    batch = Batch(["a"] * 3, ["a"] * 3, side, {}, [1, 2, 3])
    step = count(lambda: game.scores(game.player, batch).scores.player_real.sum().backward())
    backward = 3 * unit.backward(lengths(prompt, answer), trains_weights=True)
    assert backward == pytest.approx(step - forward, rel=0.01)


def test_adapters_need_about_one_more_forward_pass_for_their_gradient():
    game = make_game(use_lora=True, rank=1)
    unit = count_tokens(game.model, 24)
    side = game.encode([{"prompt_ids": [1] * 12, "tokens": [5] * 12}]) | {"opponent_score": torch.zeros(1)}
    batch = Batch(["a"], ["a"], side, {}, [1])
    step = count(lambda: game.scores(game.player, batch).scores.player_real.sum().backward())
    counted = unit.scoring(lengths(12, 12)) + unit.backward(lengths(12, 12), trains_weights=False)
    assert counted == pytest.approx(step, rel=0.1)


def test_an_answer_costs_what_the_counter_counts():
    game = make_game()
    unit = count_tokens(game.model, 24)
    prompts, seeds = [[1, 9, 8, 7, 6, 5]] * 4, [1, 2, 3, 4]
    game.chat.end_ids = (175,)  # hardly ever drawn: all four answers are of the longest length
    drawn = []
    found = count(lambda: drawn.extend(game.draw(prompts, seeds)))
    assert {len(answer.ids) for answer in drawn} == {20}
    assert 4 * unit.drawing(lengths(6, 20)) == pytest.approx(found, rel=1e-3)


def test_every_phase_of_the_rounds_is_counted(tmp_path):
    game = make_game()
    play_all(tmp_path, game=game, rounds=1, num_generated=2)
    costs = ledger_costs(game, tmp_path, forwards=1)(ROUNDS, tmp_path)
    assert costs.matrix_rate > 1e6 and costs.flops(1, "evaluated", 9) is None
    unit, real = count_tokens(game.model, 24), lengths_of(tmp_path / "data" / "samples")
    drawn = lengths_of(tmp_path / "round-1" / "samples")
    assert len(real[0]) == 20 and len(drawn[0]) == 40 and real[1].max() <= 20
    assert costs.flops(1, "generated", 40) == pytest.approx(40 * unit.drawing(drawn), rel=1e-6)
    pair = unit.scoring(real) + unit.scoring(drawn)
    assert costs.flops(1, "cached", 40) == pytest.approx(40 * pair, rel=1e-6)  # ROUNDS: one answer to each real one
    step = costs.flops(1, "trained", 4)
    assert step == pytest.approx(4 * (pair + unit.backward(real, True) + unit.backward(drawn, True)), rel=1e-6)
    again = ledger_costs(game, tmp_path, forwards=2)(ROUNDS, tmp_path)
    assert again.flops(1, "trained", 4) - step == pytest.approx(4 * pair, rel=1e-6)


def test_the_arithmetic_of_an_answer():
    unit = TokenCosts(token=1.0, pair=0.0, head=0.0)
    assert unit.drawing(lengths(6, 20)) == 25 and unit.scoring(lengths(6, 20)) == 26
    # The prompt's 6 tokens see one another, the 3 that follow see 7, 8 and 9
    assert TokenCosts(token=0.0, pair=1.0, head=0.0).drawing(lengths(6, 4)) == 36 + 7 + 8 + 9
    assert TokenCosts(token=0.0, pair=0.0, head=1.0).drawing(lengths(6, 4)) == 4
