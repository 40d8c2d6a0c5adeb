"""The stream of pairs: which pair stands where is a function of the seed and the place alone."""

import threading

import pytest

from spin_diffusion.samples.pairs import ReadAhead
from spin_diffusion.selfplay.train import Pairs, TrainSettings, _positions


def stream(count: int = 10) -> Pairs:
    return Pairs([str(i) for i in range(count)], ["p"] * count, lambda indices: ({}, {}))


def test_every_epoch_shows_every_pair_once_in_an_order_of_its_own():
    batches = [stream().batch(list(range(10 * epoch, 10 * epoch + 10)), seed=0, round_=1).ids for epoch in (0, 1)]
    assert sorted(batches[0]) == sorted(batches[1]) == [str(i) for i in range(10)]
    assert batches[0] != batches[1]


def test_a_place_holds_the_same_pair_whatever_was_asked_before():
    pairs, forward = stream(), stream()
    expected = {place: forward.batch([place], 0, 1).ids for place in range(40)}
    for place in (15, 9, 10, 35, 25, 3, 39, 0):
        assert pairs.batch([place], 0, 1).ids == expected[place]


def test_noise_depends_on_seed_round_and_place():
    seeds = {tuple(stream().batch([place], seed, k).seeds) for place in (0, 10) for seed in (0, 1) for k in (1, 2)}
    assert len(seeds) == 8


@pytest.mark.parametrize("world, size, accumulation", [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_a_step_covers_the_same_places_for_any_split_of_the_batch(world, size, accumulation):
    settings = TrainSettings(train_batch_size=size, gradient_accumulation_steps=accumulation)
    places = [
        place
        for micro in range(accumulation)
        for rank in range(world)
        for place in _positions(3, micro, settings, rank, world)
    ]
    assert sorted(places) == list(range(24, 32))


def test_reading_ahead_gives_the_same_batches_and_has_the_next_one_ready():
    read: list[list[int]] = []
    pairs = stream()
    pairs.fetch = lambda indices: read.append(indices) or ({}, {})
    ahead = ReadAhead(pairs, stride=4, end=48)
    for start in (0, 4, 8, 12, 40, 44):  # in the middle it goes on elsewhere
        batch = ahead.batch([start, start + 1], 0, 1)
        expected = stream().batch([start, start + 1], 0, 1)
        assert (batch.ids, batch.seeds) == (expected.ids, expected.seeds)
    ahead.close()
    assert len(read) == 7  # six that were asked for, and 16; at 48 is the end
    assert pairs.ids_at([0, 1], 0, 1) == stream().batch([0, 1], 0, 1).ids


def test_a_batch_is_read_while_the_last_one_is_worked_on():
    begun, pairs = threading.Event(), stream()
    ahead = ReadAhead(pairs, stride=2, end=10)
    ahead.batch([0, 1], 0, 1)
    pairs.fetch = lambda indices: begun.set() or ({}, {})
    ahead.batch([2, 3], 0, 1)
    assert begun.wait(10)  # though nobody asks for [4, 5]
    ahead.close()


def test_what_goes_wrong_in_reading_is_raised_where_the_batch_is_asked_for():
    pairs = stream()
    ahead = ReadAhead(pairs, stride=2, end=10)
    pairs.fetch = lambda indices: ({}, {}) if len(indices) == 1 else {}["no such shard"]
    ahead.batch([0], 0, 1)
    with pytest.raises(KeyError, match="no such shard"):
        ahead.batch([0, 1], 0, 1)
