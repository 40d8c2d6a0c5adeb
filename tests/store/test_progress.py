"""The bar of a phase on a terminal."""

import io
import sys
from types import SimpleNamespace

import pytest

from spin_diffusion.store.progress import Bars, in_bar, span, tell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_with_a_text_shows_all_of_it_in_80_columns(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    update = Bars().phase("spin round 10: train", 500)
    text = f"r_real {in_bar(1.234e-4)} r_generated {in_bar(-0.00034)} loss 0.65"
    update(250, text)
    update(500, text)
    last = terminal.getvalue().rsplit("\r", 1)[-1].rstrip()
    assert last == "spin round 10: train 500/500 <00:00 r_real +1.2e-4 r_generated -3.4e-4 loss 0.65"
    assert len(last) <= 80
    assert terminal.getvalue().count("500/500") == 1, "a bar that is over is shown once"


def test_lines_on_a_terminal_are_no_wider_than_it_and_are_said_by_the_main_process_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    tell("Objective  spin, opponent latest, drawn at guidance 3, 10 steps\nspin round 1: drawn in 3 s, so and so long")
    tell("nothing", SimpleNamespace(is_main_process=False))
    assert terminal.getvalue().splitlines() == [
        "Objective  spin, opponent latest, drawn",
        "           at guidance 3, 10 steps",
        "spin round 1: drawn in 3 s, so and so",
        "  long",
    ]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "+0.00"), (-12.345, "-12.35"), (0.1, "+0.10"), (-1e-12, "-1.0e-12")]
)
def test_numbers_in_a_bar_are_short_and_have_a_sign(value, shown):
    assert in_bar(value) == shown


def test_times_are_for_people():
    assert [span(119), span(120), span(7199), span(7200)] == ["119 s", "2 min", "120 min", "2.0 h"]
