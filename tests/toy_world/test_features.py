"""The toy world's features see what its oracle sees, and what it cannot see: that something is never drawn."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFilter

from spin_diffusion.evaluation.distribution import Replicates, interval, measure
from spin_diffusion.evaluation.embeddings import load_embedding
from spin_diffusion.evaluation.records import Metric

TOY_WORLD = Path(__file__).resolve().parents[2] / "assets" / "toy_world"
NUMBER = 120


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[Metric, Replicates]]:
    """What is measured of several sets of pictures against careful drawings."""
    embedding = load_embedding(str(TOY_WORLD / "features.py"), "cpu")
    world = sys.modules["toy_world_world"]
    rng = np.random.default_rng(3)

    def drawn(style: str = "careful", only=lambda scene: True) -> list:
        scenes = (world.parse_caption(world.sample_caption(rng)) for _ in range(100 * NUMBER))
        wanted = (scene for scene in scenes if only(scene))
        return [world.draw(next(wanted), rng, style) for _ in range(NUMBER)]

    real = embedding(drawn())
    sets = {
        "careful": drawn(),
        "sloppy": drawn("sloppy"),
        "blurred": [picture.filter(ImageFilter.GaussianBlur(1.5)) for picture in drawn()],
        "circles": drawn(only=lambda scene: scene.shape == "circle"),
        "centred": drawn(only=lambda scene: scene.place == "in the center"),
    }
    return {name: measure(embedding(pictures)[:, None], real) for name, pictures in sets.items()}


def test_another_style_and_soft_edges_are_far_from_careful_drawings(measured) -> None:
    for name in ("sloppy", "blurred"):
        assert interval("kid", measured[name]["kid"], measured["careful"]["kid"]).low > 0, name
    assert measured["sloppy"]["precision"].whole < 0.1 < 0.8 < measured["careful"]["precision"].whole


def test_a_shape_or_place_that_is_never_drawn_is_missed_in_recall(measured) -> None:
    for name in ("circles", "centred"):
        assert measured[name]["precision"].whole > 0.8, name
        assert interval("recall", measured[name]["recall"], measured["careful"]["recall"]).high < 0, name
