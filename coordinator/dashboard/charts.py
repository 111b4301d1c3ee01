"""Learning curves as inline SVG that fits any width: text never shrinks, lines never blur.

Positions are per cent of the drawing, so no script measures anything; colours and dashes are
classes of the page's style, so the page's policy needs no exception and dark mode needs no copy.
Names from the study are escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup

FEW_POINTS = 24
LEFT, RIGHT, TOP, BOTTOM = 9.0, 98.0, 4.0, 88.0
_RULE = Markup('<line class="rule" x1="{}%" x2="{}%" y1="{}%" y2="{}%"/>')
_TEXT = Markup('<text x="{}%" y="{}%" text-anchor="{}" dominant-baseline="middle">{}</text>')
_CURVE = Markup(
    '<svg viewBox="0 0 100 100" preserveAspectRatio="none">'
    '<polyline class="curve {}" points="{}" vector-effect="non-scaling-stroke"/></svg>'
)
_POINT = Markup('<circle class="point {}" cx="{}%" cy="{}%" r="{}"><title>{}</title></circle>')


@dataclass(frozen=True)
class Curve:
    """One line: a hospital by round, or the mean of all. `look` is the class of its colour."""

    name: str
    look: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chart:
    """Curves under a title, the mean last. `starts_at` None: the scale begins at the lowest."""

    key: str
    title: str
    note: str
    curves: tuple[Curve, ...]
    last_round: int
    starts_at: float | None = None

    @property
    def summary(self) -> str:
        """What the picture shows, for those who do not see it."""
        if not self.curves or not self.curves[-1].points:
            return "No values yet."
        (first, low), (last, high) = self.curves[-1].points[0], self.curves[-1].points[-1]
        lines = len(self.curves) - 1
        return (
            f"{self.title} by round, one line for each of {lines} hospitals and their mean. "
            f"The mean is {low:.3f} in round {first} and {high:.3f} in round {last}."
        )

    @property
    def svg(self) -> Markup:
        """The drawing."""
        return Markup("").join(_drawing(self))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span an interval."""
    width = max(high - low, 1e-9) / about
    size = 10.0 ** floor(log10(width))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= width * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def _drawing(chart: Chart) -> Iterator[Markup]:
    """The pieces: rules and numbers first, curves above them, the mean on top."""
    values = [value for curve in chart.curves for _, value in curve.points] or [0.0, 1.0]
    lowest = min(values) if chart.starts_at is None else chart.starts_at
    marks = ticks(lowest, max(values))
    across = _Scale(marks[0], marks[-1], BOTTOM, TOP)
    along = _Scale(1, max(2, chart.last_round), LEFT + 2, RIGHT - 1)
    yield Markup('<svg class="chart" role="img" aria-label="{}">').format(chart.summary)
    digits = 2 if marks[-1] - marks[0] < 2 else 1
    for mark in marks:
        y = across.at(mark)
        yield _RULE.format(LEFT, RIGHT, y, y)
        yield _TEXT.format(LEFT - 1.2, y, "end", f"{mark:.{digits}f}")
    for n in _whole(chart.last_round):
        yield _TEXT.format(along.at(n), BOTTOM + 8, "middle", n)
    yield from (_line(curve, along, across) for curve in chart.curves)
    for curve in chart.curves:
        if len(curve.points) <= FEW_POINTS:
            yield from _marks(curve, along, across)
    yield Markup("</svg>")


def _line(curve: Curve, along: _Scale, across: _Scale) -> Markup:
    """A line through the points; stretched with the drawing, but never its stroke."""
    places = " ".join(f"{along.at(n)},{across.at(value)}" for n, value in curve.points)
    return _CURVE.format(curve.look, places)


def _marks(curve: Curve, along: _Scale, across: _Scale) -> Iterator[Markup]:
    """A mark at each point, which says its value to a pointer."""
    size = 4 if curve.look == "mean" else 3
    for n, value in curve.points:
        said = f"{curve.name}, round {n}: {value:.3f}"
        yield _POINT.format(curve.look, along.at(n), across.at(value), size, said)


@dataclass(frozen=True)
class _Scale:
    """From values to per cent of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def _whole(last: int) -> list[int]:
    """Round numbers of rounds; the first and the last are always among them."""
    if last <= 1:
        return [1]
    step = max(1, round(ticks(0, last, 6)[1]))
    inner = [n for n in range(step, last, step) if min(n - 1, last - n) >= step * 0.6]
    return [1, *inner, last]
