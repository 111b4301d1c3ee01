"""Dice, HD95 and surface Dice of masks, in mm, and the means over a patient's cases.

The rule for empty masks, for each label by itself:

- absent from truth and prediction: None for every metric, and the label does not count;
- absent from exactly one: Dice 0, NSD 0, HD95 the diagonal of the image in mm;
- not annotated: None, whatever was predicted, since nobody knows the truth.

Masks are volumes with a spacing along all three axes, also where a network sees slices. An image of
one slice is measured as a plane: contours instead of surfaces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from statistics import fmean
from typing import cast

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from numpy.typing import NDArray
from torch import Tensor

from fedseg.measures import Metric
from fedseg.result import PatientScores, Scores

Mask = NDArray[np.uint8]


def score_case(
    prediction: Mask,
    truth: Mask,
    spacing_mm: Sequence[float],
    labels: Mapping[str, int],
    metrics: Iterable[Metric],
    tolerance_mm: float,
    annotated: Collection[str] | None = None,
) -> dict[Metric, Scores]:
    """The metrics of one case, by metric and label; the module says what empty masks give.

    Dice = 2 |A and B| / (|A| + |B|). HD95: the larger of the two directed 95th percentiles of the
    distances between border voxels, in mm. NSD: the share of both surfaces that lies within the
    tolerance of the other, sub-voxel surface elements (Nikolov et al., JMIR 2021).

    Args:
        prediction: uint8 (X, Y, Z), values as in `labels`.
        truth: as the prediction, on the same grid.
        spacing_mm: distance between voxels along the three axes.
        labels: name -> value.
        metrics: which to compute.
        tolerance_mm: of NSD.
        annotated: names of the labels that the truth marks; None is all of them.

    Raises:
        ValueError: the masks have different shapes, or not three axes.
    """
    if prediction.shape != truth.shape or truth.ndim != 3 or len(spacing_mm) != 3:
        raise ValueError(f"masks of shape {prediction.shape} and {truth.shape} cannot be compared")
    pairs = {
        name: _cropped(prediction == value, truth == value)
        for name, value in labels.items()
        if annotated is None or name in annotated
    }
    plane = truth.shape[2] == 1
    spacing = tuple(spacing_mm)[: 2 if plane else 3]
    diagonal = hypot(*(n * mm for n, mm in zip(truth.shape, spacing, strict=not plane)))
    measure = _Measure(spacing, tolerance_mm, diagonal)
    return {
        metric: {
            name: _score(metric, *pairs[name], measure) if name in pairs else None
            for name in labels
        }
        for metric in metrics
    }


def score_patient(
    site: str, patient: str, cases: Sequence[Mapping[Metric, Mapping[str, float | None]]]
) -> PatientScores:
    """Mean over a patient's cases, label by label; a case where a label is None does not count.

    Args:
        site: the patient's hospital.
        patient: the name to show, inside the hospital or in a simulation.
        cases: what `score_case` gave for each, at least one.
    """
    return PatientScores(
        site=site,
        patient=patient,
        cases=len(cases),
        dice=_mean_over("dice", cases),
        hd95_mm=_mean_over("hd95", cases),
        nsd=_mean_over("nsd", cases),
    )


def _mean_over(
    metric: Metric, cases: Sequence[Mapping[Metric, Mapping[str, float | None]]]
) -> Scores:
    """One metric by label."""
    scores = [case[metric] for case in cases if metric in case]
    names = dict.fromkeys(name for case in scores for name in case)
    known = {n: [v for case in scores if (v := case.get(n)) is not None] for n in names}
    return {name: fmean(values) if values else None for name, values in known.items()}


@dataclass(frozen=True)
class _Measure:
    """What distances in an image mean; two spacings for an image of one slice."""

    spacing_mm: tuple[float, ...]
    tolerance_mm: float
    diagonal_mm: float


def _score(
    metric: Metric, prediction: NDArray[np.bool_], truth: NDArray[np.bool_], measure: _Measure
) -> float | None:
    """One metric of one label."""
    sizes = int(prediction.sum()), int(truth.sum())
    if not any(sizes):
        return None
    if metric == "dice":
        return 2 * int((prediction & truth).sum()) / sum(sizes)
    if not all(sizes):
        return measure.diagonal_mm if metric == "hd95" else 0.0
    a, b = torch.from_numpy(prediction), torch.from_numpy(truth)
    if len(measure.spacing_mm) == 2:
        a, b = a[..., 0], b[..., 0]
    if metric == "hd95":
        return _hd95_mm(a, b, measure.spacing_mm)
    return _surface_dice(a, b, measure.spacing_mm, measure.tolerance_mm)


def _hd95_mm(a: Tensor, b: Tensor, spacing_mm: tuple[float, ...]) -> float:
    """The larger directed 95th percentile between border voxels."""
    edges_a, edges_b = get_mask_edges(a, b)
    distances = _distances_mm(edges_a, edges_b, spacing_mm)
    return max(float(distance.quantile(0.95)) for distance in distances)


def _surface_dice(
    a: Tensor, b: Tensor, spacing_mm: tuple[float, ...], tolerance_mm: float
) -> float:
    """Surface elements between voxels, weighed by their area; lengths in a plane."""
    edges_a, edges_b, areas_a, areas_b = get_mask_edges(a, b, spacing=spacing_mm)
    areas = [areas_a[edges_a].double(), areas_b[edges_b].double()]
    distances = _distances_mm(edges_a, edges_b, spacing_mm)
    near = sum(
        float(area[d <= tolerance_mm].sum()) for area, d in zip(areas, distances, strict=True)
    )
    return near / sum(float(area.sum()) for area in areas)


def _distances_mm(a: Tensor, b: Tensor, spacing_mm: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """From each edge of one mask to the nearest of the other, both ways."""
    there = get_surface_distance(a, b, spacing=spacing_mm)
    back = get_surface_distance(b, a, spacing=spacing_mm)
    return cast(Tensor, there), cast(Tensor, back)


def _cropped(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both masks, cut to the box that holds them, so that large images cost little."""
    either = prediction | truth
    if not either.any():
        return prediction, truth
    box = []
    for axis in range(3):
        line = np.flatnonzero(either.any(tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(line[0]), int(line[-1]) + 1))
    return prediction[tuple(box)].copy(), truth[tuple(box)].copy()
