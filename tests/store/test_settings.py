"""The rules of a setting stand at its field and are read by one checker."""

from dataclasses import dataclass

import pytest

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.settings import PerRound, Settings, harmless, help_texts, per_round, setting


@dataclass(frozen=True)
class Pace(Settings):
    """How fast it goes."""

    rate: PerRound[float] = setting(1.0, above=0)
    """The rate,
    of each round."""
    share: float | None = setting(None, minimum=0, maximum=1)
    decay: float = setting(0.9, minimum=0, below=1)
    steps: PerRound[int] | None = setting(None, minimum=1, maximum=10_000, harmless=True)
    names: list[str] | None = None
    """Names."""


@dataclass(frozen=True)
class Slower(Pace):
    """The same, slower."""

    rate: PerRound[float] = 0.5
    """Another rate."""


@pytest.mark.parametrize("kind", [Pace, Slower])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 0.0}, "--rate 0.0 must be above 0"),
        ({"rate": [1.0, -2.0]}, "--rate -2.0 must be above 0"),
        ({"rate": []}, "--rate is an empty list: give one value, or one per round"),
        ({"share": 1.5}, "--share 1.5 must be between 0 and 1"),
        ({"decay": 1.0}, "--decay 1.0 must be at least 0 and below 1"),
        ({"steps": [1, 10_001]}, "--steps 10001 must be between 1 and 10,000"),
    ],
)
def test_a_value_out_of_its_range_is_refused_in_subclasses_too(kind, given, message):
    with pytest.raises(InputError) as refused:
        kind(**given)
    assert str(refused.value) == message


def test_a_value_at_its_bounds_is_taken():
    pace = Pace(rate=[1e-9], share=1.0, decay=0.0, steps=[1, 10_000], names=[])
    assert (pace.share, pace.decay, pace.steps) == (1.0, 0.0, [1, 10_000])
    assert (Pace().rate, Slower().rate, Slower().share) == (1.0, 0.5, None)


def test_what_stands_at_the_field_is_known_of_the_class():
    assert per_round(Pace) == per_round(Slower) == {"rate", "steps"}
    assert harmless([Pace]) == harmless([Slower]) == {"steps"}
    assert help_texts(Pace)["rate"] == "The rate, of each round." and help_texts(Slower)["rate"] == "Another rate."
    assert help_texts(Slower)["names"] == "Names."
