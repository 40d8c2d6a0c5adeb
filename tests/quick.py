"""What tests leave out because it takes time and changes nothing that they look at."""

import gc
import os
from collections.abc import Callable

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def settle_memory() -> None:
    """Look no more through the million objects of the imports: every round of a run ends in a full collection, and
    those that Python starts by itself take an eighth of a small run's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def no_fsync(descriptor: int) -> None:
    """`os.fsync` without the waiting for the disk, which costs a small run as long as its training; what it protects
    from, the tests of killed runs do not show anyway."""


def sketch(key: str, label: str, draw: Callable[[Axes], None]) -> Markup:
    """`plots._svg` as far as our own code goes: matplotlib takes longer to write the charts of a page than a small run
    takes to train. `tests/evaluation/report` has them written."""
    draw(Figure().add_subplot())
    return Markup(f'<svg aria-label="{escape(label)}"></svg>')


def leave_out() -> None:
    """All of it, for the rest of this process."""
    from spin_diffusion.evaluation.report import plots

    os.fsync, plots._svg = no_fsync, sketch
    settle_memory()
