"""Pictures of patients for a report: one image, the truth drawn by hand, the model's prediction.

Three cuts, true to scale in mm, in the radiological convention: the patient's right is on the left
of the picture, and letters at the edges say so. Truth is a tint and prediction a line, so that the
two differ without colour; colour tells the label. Pictures are JPEG: small, and good for grey.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedseg.reports.charts import drawing_style
from fedseg.result import PatientScores

Rank = Literal["best", "median", "worst"]
RANKS: tuple[Rank, ...] = ("best", "median", "worst")

LABEL_COLOURS = (
    "#e69f00",
    "#56b4e9",
    "#2fbf94",
    "#f0e442",
    "#cc79a7",
    "#ff7a3d",
    "#9db4ff",
    "#ffffff",
)
MARGIN_MM = 15.0
PANEL_INCHES, OVERLAY_DPI = 2.0, 150


@dataclass(frozen=True)
class Overlay:
    """One held-back patient's image with the hand-drawn truth and the model's prediction.

    Attributes:
        dice: the patient's mean Dice over the labels, or None where it is undefined.
        image: first channel on the prepared grid, RAS, float32 of shape (X, Y, Z).
        truth: label values of the plan, uint8 of shape (X, Y, Z).
        prediction: like truth.
        spacing_mm: size of a voxel along X, Y, Z.
    """

    site: str
    patient: str
    rank: Rank
    dice: float | None
    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Plane:
    """A cut through a volume: the axis that it is perpendicular to, and what is at its edges."""

    name: str
    axis: int
    left: str
    right: str
    top: str
    bottom: str


PLANES = (
    Plane("axial", 2, "R", "L", "A", "P"),
    Plane("coronal", 1, "R", "L", "S", "I"),
    Plane("sagittal", 0, "A", "P", "S", "I"),
)


@dataclass(frozen=True)
class _Cut:
    """One plane at one index, within a box."""

    plane: Plane
    index: int
    box: tuple[slice, slice, slice]

    def of(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Rows and columns of the screen: R (or A) to the left, A (or S) at the top."""
        where: list[slice | int] = list(self.box)
        where[self.plane.axis] = self.index
        return np.asarray(volume[tuple(where)][::-1, ::-1].T)


def choose_patients(patients: Sequence[PatientScores]) -> dict[Rank, str]:
    """Best, median and worst patient by mean Dice; ties go by name, unscored patients are left out.

    Of an even number the lower middle is the median. No patient appears twice: two patients are
    best and worst, a single one is the median.
    """
    scored = sorted((p.mean_dice, p.patient) for p in patients if p.mean_dice is not None)
    names = [name for _, name in scored]
    if len(names) < 3:
        ranks: tuple[Rank, ...] = ("best", "worst") if len(names) == 2 else ("median",)
        return dict(zip(ranks, reversed(names), strict=False))
    return {"best": names[-1], "median": names[(len(names) - 1) // 2], "worst": names[0]}


def overlay_pictures(
    overlay: Overlay, labels: Mapping[str, int], *, at_error: bool = False
) -> tuple[bytes, bytes]:
    """Two JPEGs of the same cuts: the image alone, and with truth (filled) and prediction (lines).

    The cuts are axial, coronal and sagittal through the truth's largest cross-section (the
    prediction's where the truth is empty), cropped around both, true to scale in mm.

    Args:
        at_error: cut where truth and prediction differ most instead, if they differ at all.

    Raises:
        ValueError: image, truth and prediction differ in shape or have not three axes.
    """
    if overlay.image.ndim != 3 or not (
        overlay.image.shape == overlay.truth.shape == overlay.prediction.shape
    ):
        raise ValueError("image, truth and prediction must have the same shape (X, Y, Z)")
    box = _crop(overlay)
    wrong = (overlay.truth != overlay.prediction) if at_error else None
    cuts = [_Cut(p, _cut_index(overlay, p.axis, wrong), box) for p in visible_planes(overlay)]
    window = _window(overlay.image[box])
    pictures = []
    for outlined in (False, True):
        with drawing_style():
            figure = Figure(figsize=(PANEL_INCHES * len(cuts), PANEL_INCHES), facecolor="black")
            for column, cut in enumerate(cuts):
                axes = figure.add_axes((column / len(cuts), 0.0, 1 / len(cuts), 1.0))
                _draw_image(axes, overlay, cut, window)
                _draw_edges(axes, cut.plane)
                if outlined:
                    _draw_labels(axes, overlay, cut, labels)
            pictures.append(_jpeg(figure))
    return pictures[0], pictures[1]


def visible_planes(overlay: Overlay) -> tuple[Plane, ...]:
    """The planes that are more than a line of voxels; axial alone for a single slice."""
    shape = overlay.image.shape
    thick = [p for p in PLANES if all(n > 1 for i, n in enumerate(shape) if i != p.axis)]
    return tuple(thick) or PLANES[:1]


def label_colours(labels: Mapping[str, int]) -> dict[str, str]:
    """A colour for each label; they repeat after eight."""
    return dict(zip(labels, cycle(LABEL_COLOURS), strict=False))


def _cut_index(overlay: Overlay, axis: int, first: NDArray[np.bool_] | None) -> int:
    """Where `first`, else the labels' cross-section, is largest; the middle of an empty image."""
    for mask in (*(() if first is None else (first,)), overlay.truth, overlay.prediction):
        area = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
        if area.any():
            return int(np.argmax(area))
    return int(overlay.image.shape[axis]) // 2


def _crop(overlay: Overlay) -> tuple[slice, slice, slice]:
    """The box of all labels with room around them; the whole image where nothing is labelled."""
    found = np.argwhere((overlay.truth > 0) | (overlay.prediction > 0))
    if len(found) == 0:
        return (slice(None), slice(None), slice(None))
    low, high = found.min(axis=0), found.max(axis=0) + 1
    spacing = np.asarray(overlay.spacing_mm)
    room = np.maximum(MARGIN_MM, 0.35 * float(np.max((high - low) * spacing))) / spacing
    first = np.maximum(np.floor(low - room).astype(int), 0)
    last = np.minimum(np.ceil(high + room).astype(int), overlay.image.shape)
    x, y, z = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    return (x, y, z)


def _window(image: NDArray[np.float32]) -> tuple[float, float]:
    """Grey levels from the 1st to the 99.5th percentile of what is shown."""
    known = image[np.isfinite(image)]
    if known.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(known, (1.0, 99.5))
    return float(low), float(high) if high > low else float(low) + 1.0


def _draw_image(axes: Axes, overlay: Overlay, cut: _Cut, window: tuple[float, float]) -> None:
    """The grey image of one cut, as large as its square black panel allows."""
    wide, high = (overlay.spacing_mm[a] for a in range(3) if a != cut.plane.axis)
    axes.imshow(
        np.nan_to_num(cut.of(overlay.image)),
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        aspect=high / wide,
        interpolation="bicubic",
    )
    axes.axis("off")


def _draw_edges(axes: Axes, plane: Plane) -> None:
    """The letters of the patient's directions at the edges of the panel."""
    panel = axes.get_position(original=True)
    for x, y, letter, across, up in (
        (0.015, 0.5, plane.left, "left", "center"),
        (0.985, 0.5, plane.right, "right", "center"),
        (0.5, 0.985, plane.top, "center", "top"),
        (0.5, 0.015, plane.bottom, "center", "bottom"),
    ):
        at = panel.x0 + x * panel.width
        axes.figure.text(at, y, letter, color="#fff", size=9, ha=across, va=up)


def _draw_labels(axes: Axes, overlay: Overlay, cut: _Cut, labels: Mapping[str, int]) -> None:
    """Truth as a tint and prediction as a line, one colour a label."""
    truth, prediction = (np.pad(cut.of(m), 1) for m in (overlay.truth, overlay.prediction))
    rows, columns = np.arange(truth.shape[0]) - 1.0, np.arange(truth.shape[1]) - 1.0
    limits = axes.get_xlim(), axes.get_ylim()
    colours = label_colours(labels)
    for name, value in labels.items():
        own = (truth == value).astype(float)
        if own.any():
            axes.contourf(columns, rows, own, levels=[0.5, 2], colors=[colours[name]], alpha=0.36)
        own = (prediction == value).astype(float)
        if own.any():
            axes.contour(columns, rows, own, levels=[0.5], colors=["#000000"], linewidths=2.6)
            axes.contour(columns, rows, own, levels=[0.5], colors=[colours[name]], linewidths=1.4)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _jpeg(figure: Figure) -> bytes:
    """The figure as JPEG, sharp enough for thin lines."""
    data = io.BytesIO()
    figure.savefig(
        data,
        format="jpg",
        dpi=OVERLAY_DPI,
        pil_kwargs={"quality": 82, "subsampling": 0, "optimize": True},
    )
    return data.getvalue()
