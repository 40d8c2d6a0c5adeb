"""Charts as SVG that lies inside of the page: no ids that could meet, no styles of their own, the page's colours.

matplotlib draws with marker colours that stand for the page's variables, so that one chart reads in light and in dark
mode. Only numbers and words of this program are drawn; names and prompts stay in HTML, where the browser sets them.
"""

import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# What matplotlib is told, and what the page makes of it
_INK, _FAINT, _RULE, _GOOD, _BAD, _DRIFT = "#010001", "#010002", "#010003", "#010004", "#010005", "#010006"
_SERIES = ["#020001", "#020002", "#020003", "#020004", "#020005", "#020006"]
_COLOURS = {
    _INK: "currentColor",
    _FAINT: "var(--faint)",
    _RULE: "var(--rule)",
    _GOOD: "var(--good)",
    _BAD: "var(--bad)",
    _DRIFT: "var(--drift)",
} | {colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)}
_MARKERS = ["o", "s", "^", "D", "v", "P"]
_DASHES: list[tuple[float, ...]] = [(), (5.0, 2.0), (1.0, 1.5), (6.0, 2.0, 1.0, 2.0), (3.0, 1.0), (8.0, 2.0)]
"""Lengths of dashes and gaps, in widths of the line; none = a line without gaps."""

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_SIZE_IN = (4.4, 2.6)
_BAR_WIDTH, _BAR_HEIGHT = 180, 18  # user units of an interval's picture


@dataclass(frozen=True)
class Panel:
    """A chart with what stands above and below it."""

    title: str
    chart: Markup
    role: str = ""
    direction: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Line:
    """Means with intervals: of one guidance scale over the rounds, of one method at its cost."""

    style: int
    """Which colour, marker and dash; the same number everywhere is the same guidance scale or method."""
    at: list[int] | list[float]
    """Rounds, strengths or GFLOPs."""
    means: list[float]
    lows: list[float]
    highs: list[float]


def round_curves(
    key: str,
    label: str,
    lines: Sequence[Line],
    ylabel: str = "difference to baseline",
    zero: bool = True,
    xlabel: str = "round",
) -> Markup:
    """A number over the rounds, or over another number, with intervals, one line per guidance scale; an interval may be
    NaN.

    Args:
        zero: whether 0 means something, and has a line.
    """

    def draw(axes: Axes) -> None:
        if zero:
            _rule_at_zero(axes)
        for number, line in enumerate(lines):
            # Side by side, so that no interval hides another
            aside = (0.06 if xlabel == "round" else 0.01) * (number - (len(lines) - 1) / 2)
            _with_intervals(axes, line, aside, linestyle=_dash(line.style), markersize=4.5)
        if xlabel == "round":
            _whole_numbers(axes, 10)
        _name_axes(axes, xlabel, ylabel)

    return _svg(key, label, draw)


def cost_scatter(key: str, label: str, lines: Sequence[Line], ylabel: str) -> Markup:
    """Scores with intervals against what they cost, one mark per method."""

    def draw(axes: Axes) -> None:
        for line in lines:
            _with_intervals(axes, line, markersize=5)
        axes.set_xlim(left=0)
        _name_axes(axes, "GFLOPs", ylabel)

    return _svg(key, label, draw)


def _with_intervals(axes: Axes, line: Line, aside: float = 0, **look: Any) -> None:
    """Marks with intervals, and the line that joins them, in the colour of its style."""
    means = np.array(line.means)
    errors = np.clip([means - line.lows, np.array(line.highs) - means], 0, None)
    look |= {"color": _colour(line.style), "marker": _marker(line.style), "linewidth": 1.5}
    axes.errorbar(np.array(line.at) + aside, means, yerr=errors, elinewidth=1.2, capsize=2.5, **look)


def _rule_at_zero(axes: Axes) -> None:
    axes.axhline(0, color=_FAINT, linewidth=0.9, linestyle=(0, (2, 2)))


def _whole_numbers(axes: Axes, most: int) -> None:
    """At most so many ticks on the horizontal axis, all of them whole; and few on the other."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=most))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))


def _name_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, and rules behind the lines."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _colour(style: int) -> str:
    return _SERIES[style % len(_SERIES)]


def _dash(style: int) -> str | tuple[float, tuple[float, ...]]:
    dashes = _DASHES[style % len(_DASHES)]
    return (0.0, dashes) if dashes else "solid"


def _marker(style: int) -> str:
    """The seventh style has the first one's colour, and another marker."""
    return _MARKERS[(style + style // len(_SERIES)) % len(_MARKERS)]


def with_gaps(values: Iterable[float | None]) -> list[float]:
    """The values with NaN for None, which leaves a gap in a line."""
    return [math.nan if value is None else value for value in values]


def training_curves(
    key: str,
    label: str,
    points: Sequence[tuple[int, float | None, float | None]],
    starts: Sequence[tuple[int, int]],
    ylabel: str,
) -> Markup:
    """r of the real and of the generated samples over the steps of a run; a rule where each round begins.

    Args:
        points: (step, r of real, r of generated); None leaves a gap.
        starts: (first step, number) of each round.
    """

    def draw(axes: Axes) -> None:
        steps, *curves = zip(*points, strict=True)
        _rule_at_zero(axes)
        marker = "o" if len(points) < 3 else ""
        for style, curve in enumerate(curves):
            values, dash = with_gaps(curve), _dash(style)
            axes.plot(steps, values, color=_colour(style), linewidth=1.4, linestyle=dash, marker=marker, markersize=3)
        for number, (start, round_) in enumerate(starts):
            if number:
                axes.axvline(start, color=_RULE, linewidth=1)
            words = f"round {round_}" if len(starts) <= 6 else str(round_)
            at, frame = (start, 1), ("data", "axes fraction")
            axes.annotate(words, at, (3, 3), frame, "offset points", color=_FAINT, fontsize=8)
        _whole_numbers(axes, 6)
        _name_axes(axes, "step", ylabel)

    return _svg(key, label, draw)


def step_curve(key: str, label: str, line: Line, chosen: int | None, ylabel: str) -> Markup:
    """What the steps of a round were judged to be worth, with intervals; a ring around the one that was kept."""

    def draw(axes: Axes) -> None:
        _rule_at_zero(axes)
        _with_intervals(axes, line, markersize=3.5)
        if chosen is not None:
            at = line.at.index(chosen)
            axes.plot(line.at[at], line.means[at], "o", markersize=11, markerfacecolor="none", markeredgecolor=_INK)
        _whole_numbers(axes, 6)
        _name_axes(axes, "step", ylabel)

    return _svg(key, label, draw)


def histogram(key: str, label: str, values: Sequence[float], is_drift: bool) -> Markup:
    """How many prompts gained and lost how much; bars right and left of 0 differ in colour, ties are grey."""

    def draw(axes: Axes) -> None:
        edges, counts = _bins(np.asarray(values, dtype=np.float64))
        # A bin lies on one side of 0, but for the one that holds nothing but ties
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
            if left < 0 < right:
                colour = _FAINT
            elif is_drift:
                colour = _DRIFT
            else:
                colour = _GOOD if left >= 0 else _BAD
            gap = 0.06 * (right - left)
            axes.bar(left + gap, count, right - left - 2 * gap, align="edge", color=colour)
        axes.axvline(0, color=_INK, linewidth=1)
        axes.axvline(float(np.mean(values)), color=_INK, linewidth=1.2, linestyle=(0, (3, 2)))
        axes.set_xlabel("difference to baseline (dashed: mean)")
        axes.set_ylabel("prompts")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        if not np.any(values):  # ties alone: there is no scale to draw
            axes.set_xlim(-5, 5)
            axes.set_xticks([0])

    return _svg(key, label, draw)


def _bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts; 0 is an edge and a value of 0 is counted on its own, so that no bar mixes gains and losses."""
    reach = float(np.abs(values).max())
    if reach == 0:
        return np.array([-0.5, 0.5]), np.array([values.size])
    num = int(np.clip(math.ceil(math.sqrt(values.size)), 4, 15))
    if (values == 0).any():
        edges = np.linspace(reach / (2 * num + 1), reach, num + 1)
        edges = np.concatenate([-edges[::-1], edges])
        zero = num  # the bin around 0 is narrow: what lies in it but is not 0 goes to its neighbour
        signed = np.where(values == 0, 0, np.sign(values) * np.maximum(np.abs(values), edges[num + 1] * (1 + 1e-9)))
        counts, _ = np.histogram(signed, np.concatenate([[-np.inf], edges[1:-1], [np.inf]]))
        assert counts[zero] == (values == 0).sum()
        return edges, counts
    edges = np.linspace(-reach, reach, 2 * num + 1)
    edges[num] = 0.0
    counts, _ = np.histogram(values, np.concatenate([[-np.inf], edges[1:-1], [np.inf]]))
    return edges, counts


def interval_bar(low: float, mean: float, high: float, domain: tuple[float, float]) -> Markup:
    """A difference and its interval on the line from domain[0] to domain[1], with a rule at 0. The numbers beside it
    say the same, so that it is hidden from screen readers. An interval that leaves the domain ends in an arrow.
    """
    start, end = domain
    pad, span = 6.0, _BAR_WIDTH - 12.0

    def x(value: float) -> float:
        share = 0.5 if end <= start else (value - start) / (end - start)
        return round(pad + span * min(1.0, max(0.0, share)), 1)

    middle = _BAR_HEIGHT / 2
    parts = [f'<line class="zero" x1="{x(0.0)}" x2="{x(0.0)}" y1="0" y2="{_BAR_HEIGHT}"/>']
    if high > start and low < end or start == end:
        parts.append(f'<line class="span" x1="{x(low)}" x2="{x(high)}" y1="{middle}" y2="{middle}"/>')
    for value, edge, beyond in ((low, 1.0, low < start), (high, _BAR_WIDTH - 1.0, high > end)):
        inner = edge + (5 if edge < middle else -5)
        if beyond:
            parts.append(f'<path class="arrow" d="M{inner} {middle - 4}L{edge} {middle}L{inner} {middle + 4}z"/>')
        elif x(low) != x(high):
            parts.append(f'<line class="span" x1="{x(value)}" x2="{x(value)}" y1="{middle - 4}" y2="{middle + 4}"/>')
    if start <= mean <= end:
        parts.append(f'<circle class="mean" cx="{x(mean)}" cy="{middle}" r="3.6"/>')
    return Markup(
        f'<svg class="interval" viewBox="0 0 {_BAR_WIDTH} {_BAR_HEIGHT}" width="{_BAR_WIDTH}" height="{_BAR_HEIGHT}" '
        f'aria-hidden="true" focusable="false">{"".join(parts)}</svg>'
    )


def legend_key(style: int, marker: bool = True) -> Markup:
    """The sample of a line for a legend in HTML, with the marker that `round_curves` has."""
    colour = _COLOURS[_colour(style)]
    lengths = " ".join(f"{1.5 * part:g}" for part in _DASHES[style % len(_DASHES)])
    dashes = f' stroke-dasharray="{lengths}"' if lengths else ""
    shape = {
        "o": '<circle cx="18" cy="7" r="4"/>',
        "s": '<path d="M14 3h8v8h-8z"/>',
        "^": '<path d="M18 2.5l4.5 8.5h-9z"/>',
        "D": '<path d="M18 2l5 5-5 5-5-5z"/>',
        "v": '<path d="M18 11.5l4.5-8.5h-9z"/>',
        "P": '<path d="M16.5 3h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z"/>',
    }[_marker(style)]
    if not marker:
        shape = ""
    return Markup(
        f'<svg class="legend-key" viewBox="0 0 36 14" width="36" height="14" aria-hidden="true" fill="{colour}">'
        f'<path d="M0 7h36" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>{shape}</svg>'
    )


def _svg(key: str, label: str, draw: Callable[[Axes], None]) -> Markup:
    """`draw` on fresh axes, as SVG; `key` makes its ids its own, `label` is what a screen reader says."""
    # "default" first: a user's matplotlibrc must not change the page
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": key}]):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        draw(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ET.fromstring(written.getvalue())
    _clean(root)
    _rename_ids(root, key)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", label)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    return Markup(ET.tostring(root, encoding="unicode"))


def _clean(element: ET.Element) -> None:
    """Names without a namespace, styles as attributes (the page's policy forbids the others), no metadata."""
    element.tag = element.tag.rpartition("}")[2]
    for child in list(element):
        _clean(child)
        if child.tag in ("style", "metadata") or child.tag in ("g", "defs") and len(child) == 0:
            element.remove(child)
    if element.tag in ("svg", "g", "defs"):
        element.text = None
    element.tail = None
    styles = [part.split(":", 1) for part in element.attrib.pop("style", "").split(";") if ":" in part]
    for name, value in ((name.strip(), value.strip()) for name, value in styles):
        if name == "font":  # the shorthand is no attribute: "9px 'DejaVu Sans', ..."
            name, value = "font-size", value.split("px")[0].split()[-1]
        if name == "font-family":
            continue
        element.set(name, _COLOURS.get(value, value))
    for name, value in list(element.attrib.items()):
        if name.startswith("{"):
            del element.attrib[name]
            element.set(name.rpartition("}")[2], value)
        elif name == "d":
            element.set("d", " ".join(value.split()))
    if element.tag == "svg":
        element.set("stroke-linejoin", "round")


def _rename_ids(root: ET.Element, key: str) -> None:
    """Keep the ids that something refers to, under names of this chart."""
    text = " ".join(value for element in root.iter() for name, value in element.attrib.items() if name != "id")
    for element in root.iter():
        if (name := element.attrib.pop("id", None)) and (f"url(#{name})" in text or f"#{name}" in text.split()):
            element.set("id", f"{key}-{name}")
    for element in root.iter():
        for name, start in (("href", "#"), ("clip-path", "url(#")):
            if (value := element.get(name, "")).startswith(start):
                element.set(name, f"{start}{key}-{value.removeprefix(start)}")
