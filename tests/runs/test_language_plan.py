"""The plan of a language run: its arithmetic, and what its probe measures on a real model."""

import numpy as np
import pytest
import torch

from spin_diffusion.llm.config import parse_language_config
from spin_diffusion.runs import language_plan
from spin_diffusion.runs.language_plan import expected_longest, probe, works
from spin_diffusion.runs.plan import Rates, Sizes, disk, predict
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress
from tests.llm.playing import LANGUAGE, examples, make_game

ANSWER = 2.0
RATES = Rates(
    prepare=0.1, draw=ANSWER, encode=0.0, score=0.25, pair=2.0, update=3.0, real_bytes=110,
    sample_bytes=10, shown_bytes=10, encoded_bytes=100, player_bytes=1000, checkpoint_bytes=3000, drawing_memory=1,
    training_memory=2,
)  # fmt: skip
SIZES = Sizes(rows=12)


def config(*flags: str):
    return parse_language_config(
        ["--model_name_or_path", str(LANGUAGE / "base"), "--dataset_name", str(LANGUAGE / "data" / "train.jsonl"),
         "--max_train_steps", "4", "--train_batch_size", "2", "--rounds", "3", "--generation_batch_size", "4",
         "--max_length", "48", "--max_new_tokens", "20", *flags]
    )  # fmt: skip


def seconds(settings, sizes: Sizes = SIZES, world: int = 1) -> list[dict[str, float | int]]:
    """What is predicted of the rounds."""
    return predict(settings, RATES, sizes, works(settings, sizes, world), world)


def size(settings, sizes: Sizes = SIZES) -> int:
    """What is predicted of the run's folder."""
    return disk(settings, RATES, sizes, works(settings, sizes, 1))


def test_seconds_are_rates_times_how_often_the_settings_ask():
    rounds = seconds(config())
    assert [entry.pop("round") for entry in rounds] == [1, 2, 3]
    each = {
        "generated": 8 * ANSWER,  # to the prompts that 4 steps of 2 pairs visit
        "cached": (12 + 8) * 0.25,
        "trained": 4 * 2 * 2.0 + 4 * 3.0,
        "looked": 0,
        "evaluated": 0,
    }
    assert all(entry == pytest.approx(each) for entry in rounds)


def test_processes_share_the_answers_and_each_trains_its_own_pairs():
    alone, shared = (seconds(config("--max_train_steps", "6"), world=world)[0] for world in (1, 4))
    assert shared["generated"] == pytest.approx(alone["generated"] / 4)
    assert shared["cached"] == pytest.approx(alone["cached"] / 4) and shared["trained"] == alone["trained"]


@pytest.mark.parametrize(
    ("flags", "drawn", "scored"),
    [
        (["--objective", "sft"], 0, 12),
        (["--objective", "dpo"], 0, 24),
        (["--num_generated", "3"], 24, 36),
        (["--real_parts", "3"], 4, 8),
    ],
)
def test_every_source_of_answers_is_counted(flags, drawn, scored):
    entry = seconds(config(*flags))[0]
    assert entry["generated"] == pytest.approx(drawn * ANSWER) and entry["cached"] == pytest.approx(scored * 0.25)


def test_every_member_of_a_mixture_scores_and_together_they_draw_once():
    for flags, anchors in (
        (["--opponent", "last_two"], [1, 2, 2]),
        (["--opponent", "pool"], [1, 2, 3]),
        (["--opponent", "pool", "--anchor", "base"], [1, 1, 1]),
    ):
        rounds = seconds(config(*flags))
        assert [entry["cached"] for entry in rounds] == pytest.approx([20 * 0.25 * number for number in anchors])
        assert [entry["generated"] for entry in rounds] == pytest.approx([8 * ANSWER] * 3)


def test_held_out_answers_are_drawn_for_scored_told_apart_and_evaluated():
    without, held = (seconds(config(), Sizes(12, number, number))[0] for number in (0, 8))
    assert held["generated"] - without["generated"] == pytest.approx(8 * ANSWER)
    assert held["cached"] - without["cached"] == pytest.approx(16 * 0.25)
    assert held["trained"] - without["trained"] == pytest.approx(16 * 0.25)
    assert held["evaluated"] == pytest.approx(8 * ANSWER + 8 * 0.25)
    seldom = seconds(config("--eval_every_round", "false"), Sizes(12, 8, 8))
    assert [entry["evaluated"] > 0 for entry in seldom] == [False, False, True]


def test_the_longest_of_a_batch_is_what_drawing_batches_gives():
    lengths = [3, 3, 4, 7, 30]
    drawn = np.random.default_rng(0).choice(lengths, (200_000, 4)).max(axis=1).mean()
    assert expected_longest(lengths, 4) == pytest.approx(drawn, rel=0.005)
    assert expected_longest(lengths, 1) == pytest.approx(np.mean(lengths))
    assert expected_longest([5], 64) == 5


def test_the_disk_holds_every_round_and_the_checkpoints_of_one():
    settings = config("--checkpointing_steps", "1")
    assert size(settings) == 12 * 110 + 3 * (8 * 10 + 1000) + 1000 + 8 * 100 + (2 + 1) * 3000
    rival = config("--checkpointing_steps", "1", "--compare_with", "[sft]")
    assert size(rival) - size(settings) == 3 * 1000 + 1000
    seldom = config("--checkpointing_steps", "4")
    assert size(settings) - size(seldom) == 3 * 3000
    held = Sizes(12, 8, 4)
    assert size(settings, held) - size(settings) == 8 * 110 + 3 * (8 + 4) * 10 + 8 * 100


@pytest.mark.parametrize("flags", [(), ("--num_generated", "2"), ("--objective", "sft"), ("--use_lora", "true")])
def test_the_probe_measures_a_real_game_and_leaves_its_player_alone(flags):
    game = make_game(use_lora="--use_lora" in flags)
    player = [parameter for parameter in game.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in player]
    rows = [game.real_row(example) for example in examples(3)]
    rates = probe(config(*flags), game, rows)
    assert min(rates.draw, rates.score, rates.pair, rates.update) > 0
    trained = 4 * sum(parameter.numel() for parameter in player)
    assert rates.player_bytes == trained and 2 * trained <= rates.checkpoint_bytes < 2.1 * trained
    tokens = max(len(row["prompt_ids"] + row["tokens"]) for row in rows)
    assert rates.encoded_bytes == 4 * (tokens + 2)
    assert max((old - new).abs().max().item() for old, new in zip(before, player, strict=True)) < 1e-8
    assert game.generation.max_new_tokens == 20


def test_the_time_of_a_token_is_what_longer_answers_take_more(monkeypatch):
    game, asked = make_game(), []
    answers = {language_plan.SHORT: 8, 20: 18}

    def drawn(prompts, seeds):
        asked.append(answers[game.generation.max_new_tokens])
        return [type("Answer", (), {"ids": [0] * asked[-1]})() for _ in prompts]

    monkeypatch.setattr(game, "draw", drawn)
    monkeypatch.setattr(language_plan, "seconds_of", lambda call, device: [call(), 5.0 + 2.0 * asked[-1]][1])
    rows = [game.real_row(example) for example in examples(2)]
    assert language_plan._probe_drawing(config(), game, rows) == (5.0, 2.0)
    answers[20] = 8
    assert language_plan._probe_drawing(config(), game, rows) == (0.0, (5.0 + 2.0 * 8) / 8)


def test_rows_that_cannot_be_used_are_not_planned_for():
    game = make_game(max_length=48)
    few, sizes, took = language_plan._read(config("--max_train_samples", "30"), game, Progress())
    assert (len(few), sizes.rows, sizes.shown) == (30, 30, 0) and took > 0
    short = make_game(max_length=2)
    with pytest.raises(InputError, match="of the first 30 rows none has a prompt within --max_length 48"):
        language_plan._read(config("--max_train_samples", "30"), short, Progress())


def test_a_batch_that_does_not_fit_is_one_line(monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(language_plan, "_probe", full)
    with pytest.raises(InputError, match=r"20\.00 GiB.*lower --train_batch_size.*--use_lora"):
        probe(config(), make_game(), [])
