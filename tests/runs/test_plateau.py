"""Whether fine-tuning still gains: what the interval means. The command is tested with the scripts."""

import pytest

from spin_diffusion.runs.plateau import verdict


@pytest.mark.parametrize(
    "low, high, begins",
    [
        (0.001, 0.002, "It still gains"),
        (-0.001, 0.002, "It gains nothing beyond chance"),
        (-0.002, -0.001, "It loses"),
        (None, None, "That says nothing yet"),
    ],
)
def test_what_the_gain_of_fine_tuning_means_for_self_play(low, high, begins):
    assert verdict(low, high).startswith(begins)
