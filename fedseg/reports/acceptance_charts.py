"""Charts of an acceptance report as SVG: patients, differences, volumes and confidence.

As in `fedseg.reports.charts`, equal input gives equal bytes and names are text. A candidate has the
same colour and the same mark in every chart, so that a grey print tells them apart too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedseg.evaluation.evidence import Agreement, Calibration, Comparison, Estimate
from fedseg.evaluation.observations import PatientValidation
from fedseg.evaluation.validation import ValidationResult
from fedseg.reports.charts import INK, RULE, drawing_style, short_name, svg_of

COLOURS = ("#0b5f9e", "#b4630a", "#1f7a56", "#7a3e9d", "#6b7280", "#a33b63")
MARKS = ("o", "s", "D", "^", "v", "P")
POINT = 0.01
_FAILED = "#a32020"
_PANELS = 3


def looks(result: ValidationResult) -> dict[str, tuple[str, str]]:
    """Candidate -> colour and mark."""
    names = [candidate.name for candidate in result.candidates]
    return dict(zip(names, zip(cycle(COLOURS), cycle(MARKS), strict=False), strict=False))


def patients_chart(result: ValidationResult) -> bytes:
    """SVG: every patient's Dice under every candidate, a line a patient, the mean in bold.

    A cross marks a prediction that is empty or wild.
    """
    names = [candidate.name for candidate in result.candidates]
    look = looks(result)
    by_patient: dict[str, dict[str, PatientValidation]] = {}
    for patient in result.patients:
        by_patient.setdefault(patient.patient, {})[patient.candidate] = patient
    with drawing_style():
        figure = Figure(figsize=(1.6 + 1.5 * len(names), 3.3))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        for own in by_patient.values():
            known = [
                (k, found.dice, found.failed)
                for k, name in enumerate(names)
                if (found := own.get(name)) is not None and found.dice is not None
            ]
            axes.plot(
                [k for k, *_ in known], [v for _, v, _ in known], color="#9aa5b1", linewidth=0.8
            )
            for k, dice, failed in known:
                _dot(axes, (k, dice), failed, look[names[k]])
        for k, name in enumerate(names):
            mean = result.summary(name).dice
            if mean.mean is not None:
                axes.hlines(mean.mean, k - 0.22, k + 0.22, color=INK, linewidth=3, zorder=5)
        axes.set_xticks(range(len(names)), [short_name(name) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylabel("Dice of a patient")
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.tick_params(length=0)
        return svg_of(figure)


def forest_chart(comparisons: Sequence[Comparison], margin: float) -> bytes:
    """SVG: paired differences of Dice in points with 95 % intervals, and the margin as a line."""
    with drawing_style():
        figure = Figure(figsize=(4.6, 0.8 + 0.34 * len(comparisons)))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        for row, comparison in enumerate(comparisons):
            _whisker(axes, comparison.difference, row)
        axes.axvline(0, color=INK, linewidth=1)
        axes.axvline(-margin / POINT, color=_FAILED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(
            range(len(comparisons)),
            [f"{short_name(c.a)} less {short_name(c.b)}" for c in comparisons],
        )
        axes.set_ylim(len(comparisons) - 0.4, -0.6)
        axes.set_xlabel("Difference of Dice in points (0.01), mean over patients")
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.tick_params(length=0)
        return svg_of(figure)


def volumes_chart(
    result: ValidationResult, candidate: str, agreements: Sequence[Agreement]
) -> bytes:
    """SVG: Bland and Altman's plot of each label's volume, predicted less true."""
    columns = min(_PANELS, max(1, len(agreements)))
    rows = max(1, ceil(len(agreements) / columns))
    patients = result.patients_of(candidate)
    with drawing_style():
        figure = Figure(figsize=(3.1 * columns, 2.9 * rows), layout="constrained")
        for place, agreement in enumerate(agreements):
            axes = figure.add_subplot(rows, columns, place + 1)
            own = [p.labels[agreement.label] for p in patients if agreement.label in p.labels]
            both = np.array([(s.volume_ml, s.predicted_ml) for s in own], dtype=float)
            both = both.reshape(-1, 2)
            colour, mark = looks(result)[candidate]
            axes.scatter(
                both.mean(axis=1),
                both[:, 1] - both[:, 0],
                s=18,
                color=colour,
                marker=mark,
                alpha=0.7,
                linewidths=0,
            )
            _agreement_lines(axes, agreement)
            axes.set_title(short_name(agreement.label), fontsize=9.5, loc="left")
            axes.set_xlabel("Mean of both volumes in ml")
            axes.set_ylabel("Predicted less true, ml" if place % columns == 0 else "")
            axes.grid(color=RULE, linewidth=0.5)
            axes.tick_params(length=0)
        return svg_of(figure)


def reliability_chart(result: ValidationResult, found: Sequence[Calibration]) -> bytes:
    """SVG: how often the model is right where it is so sure, against the line where both agree."""
    with drawing_style():
        figure = Figure(figsize=(3.6, 3.4))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for calibration in found:
            colour, mark = looks(result)[calibration.candidate]
            known = [
                (b.confidence, b.accuracy, b.share)
                for b in calibration.bins
                if b.confidence is not None and b.accuracy is not None
            ]
            sure, right = [k[0] for k in known], [k[1] for k in known]
            axes.plot(sure, right, color=colour, linewidth=1.3)
            axes.scatter(
                sure,
                right,
                s=[14 + 90 * share for *_, share in known],
                color=colour,
                marker=mark,
                label=short_name(calibration.candidate),
                linewidths=0,
            )
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("Confidence of the model")
        axes.set_ylabel("Share that is right")
        axes.grid(color=RULE, linewidth=0.6)
        axes.tick_params(length=0)
        legend = axes.legend(loc="upper left", markerscale=1.0)
        for handle in legend.legend_handles:
            if handle is not None and hasattr(handle, "set_sizes"):
                handle.set_sizes([30])
        return svg_of(figure)


def colours_of(result: ValidationResult) -> Mapping[str, str]:
    """Candidate -> colour, for the page's own marks."""
    return {name: colour for name, (colour, _) in looks(result).items()}


def _dot(axes: Axes, at: tuple[int, float], failed: bool, look: tuple[str, str]) -> None:
    """One patient under one candidate."""
    (x, dice), (colour, mark) = at, look
    if failed:
        axes.scatter([x], [dice], s=42, marker="x", color=_FAILED, linewidths=1.8, zorder=4)
    else:
        axes.scatter(
            [x], [dice], s=18, marker=mark, color=colour, alpha=0.75, linewidths=0, zorder=3
        )


def _whisker(axes: Axes, found: Estimate, row: int) -> None:
    """A mean with its interval, in points."""
    if found.mean is None:
        return
    if found.low is not None and found.high is not None:
        axes.hlines(row, found.low / POINT, found.high / POINT, color="#0b5f9e", linewidth=2)
        axes.vlines(
            [found.low / POINT, found.high / POINT], row - 0.12, row + 0.12, color="#0b5f9e"
        )
    axes.scatter([found.mean / POINT], [row], s=46, marker="D", color="#0b5f9e", zorder=4)


def _agreement_lines(axes: Axes, agreement: Agreement) -> None:
    """Zero, the bias, and the limits of agreement with their intervals."""
    axes.axhline(0, color=INK, linewidth=0.8)
    if agreement.bias_ml.mean is not None:
        axes.axhline(agreement.bias_ml.mean, color=_FAILED, linewidth=1.4)
    half = agreement.limits_half_width_ml
    for limit in (agreement.lower_limit_ml, agreement.upper_limit_ml):
        if limit is not None:
            axes.axhline(limit, color=_FAILED, linewidth=1.1, linestyle=(0, (4, 3)))
            if half:
                axes.axhspan(limit - half, limit + half, color=_FAILED, alpha=0.08, linewidth=0)
