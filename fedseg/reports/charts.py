"""Charts of a report as SVG: the Dice of every patient, and learning curves.

Equal input gives equal bytes. Names are drawn as text, never as mathematics, in any script.
Colours are safe for colour-blind readers (Okabe and Ito), and markers or dashes tell the same.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

ARM_COLOURS = {
    "initial": "#7a3e9d",
    "local": "#b4630a",
    "federated": "#0b5f9e",
    "finetuned": "#0a7d5a",
    "pooled": "#6b7280",
}
ARM_MARKERS = {"initial": "D", "local": "s", "federated": "o", "finetuned": "v", "pooled": "^"}
SITE_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#8a6d00",
    "#3b9ddd",
    "#6b7280",
    "#7a3e9d",
)
SITE_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 2)))
INK, RULE = "#1f2933", "#d9dee4"


@dataclass(frozen=True)
class Curve:
    """One line of a chart: a site by round, or the mean of all (drawn bold)."""

    name: str
    rounds: tuple[int, ...]
    values: tuple[float, ...]
    bold: bool = False


def dice_chart(values: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """SVG: every patient's Dice by hospital and arm, with the mean as a bar; worst at the left.

    Args:
        values: hospital -> arm -> Dice of its patients.
    """
    arms = list(dict.fromkeys(arm for by_arm in values.values() for arm in by_arm))
    step = 0.9 / max(1, len(arms))
    with drawing_style():
        figure = Figure(figsize=(7.2, 0.9 + len(values) * (0.18 + 0.2 * len(arms))))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        rng = np.random.default_rng(0)
        for row, by_arm in enumerate(values.values()):
            for place, arm in enumerate(arms):
                own = np.asarray(by_arm.get(arm, ()), dtype=float)
                y = row + (place - (len(arms) - 1) / 2) * step * 0.8
                _draw_strip(axes, own, y, step * 0.28, arm=arm, rng=rng)
        for row in range(1, len(values)):
            axes.axhline(row - 0.5, color=RULE, linewidth=0.8)
        axes.set_yticks(range(len(values)), [short_name(name) for name in values])
        axes.set_ylim(max(1, len(values)) - 0.5, -0.5)
        axes.set_xlabel("Dice of a patient (mean over labels)")
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.tick_params(length=0)
        handles = [_handle(axes, arm) for arm in arms]
        axes.legend(
            handles, arms, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, handlelength=1.0
        )
        return svg_of(figure)


def curve_chart(curves: Sequence[Curve], ylabel: str) -> bytes:
    """SVG: one line a site by round, and the mean in bold."""
    looks = zip(cycle(SITE_COLOURS), cycle(SITE_DASHES), strict=False)
    with drawing_style():
        figure = Figure(figsize=(5.0, 3.0 + 0.17 * ((len(curves) + 1) // 2)))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        for curve, (colour, dash) in zip(curves, looks, strict=False):
            look: dict[str, Any] = {"color": colour, "linestyle": dash, "linewidth": 1.3}
            if curve.bold:
                look = {"color": INK, "linewidth": 3.0, "zorder": 5}
            few = len(curve.rounds) <= 12
            axes.plot(
                curve.rounds,
                curve.values,
                label=short_name(curve.name),
                marker="o" if few else None,
                markersize=3.5 if not curve.bold else 5,
                **look,
            )
        axes.set_xlabel("Round")
        axes.set_ylabel(ylabel)
        axes.grid(color=RULE, linewidth=0.6)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if curves:
            axes.legend(
                loc="upper left",
                bbox_to_anchor=(-0.02, -0.16),
                ncols=2,
                handlelength=2.4,
                labelspacing=0.3,
            )
        return svg_of(figure)


@contextmanager
def drawing_style() -> Iterator[None]:
    """Settings of every picture of a report; names are text, never mathematics, in any script."""
    settings: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fedseg",
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def short_name(name: str) -> str:
    """A name that fits beside a chart; never hidden from the legend by a leading underscore."""
    name = name if len(name) <= 24 else name[:23] + "…"
    return f"\u200b{name}" if name.startswith("_") else name


def svg_of(figure: Figure) -> bytes:
    """The figure as SVG with text kept as text and no date."""
    data = io.BytesIO()
    figure.savefig(
        data,
        format="svg",
        bbox_inches="tight",
        pad_inches=0.04,
        metadata={"Date": None, "Creator": None},
        transparent=True,
    )
    return data.getvalue()


def _draw_strip(
    axes: Axes,
    own: NDArray[np.float64],
    y: float,
    spread: float,
    *,
    arm: str,
    rng: np.random.Generator,
) -> None:
    """The patients of one hospital in one arm as points, their mean as an upright bar."""
    if own.size == 0:
        return
    colour = ARM_COLOURS.get(arm, INK)
    at = y + rng.uniform(-spread, spread, own.size) * (own.size > 1)
    axes.scatter(
        own, at, s=15, marker=ARM_MARKERS.get(arm, "o"), color=colour, alpha=0.5, linewidths=0
    )
    axes.vlines(own.mean(), y - spread * 1.5, y + spread * 1.5, color=colour, linewidth=2.6)


def _handle(axes: Axes, arm: str) -> Any:
    """A full-strength mark of one arm for the legend."""
    return axes.scatter(
        [], [], s=30, marker=ARM_MARKERS.get(arm, "o"), color=ARM_COLOURS.get(arm, INK)
    )
