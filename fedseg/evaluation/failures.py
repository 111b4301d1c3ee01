"""Predictions that nobody would use: empty where something is, or wild.

Wild is a volume below a third or above three times the true one, a part that lies farther than
20 mm from all of the truth and is at least a tenth of its size, or a label where the truth has
none. Fewer than ten voxels are specks, not wild. The thresholds are conventions of fedseg, the same
for every study; they find what to look at, and the pictures tell whether it matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.evaluation.lesions import components
from fedseg.evaluation.observations import Failure

WILD_RATIO = 3.0
FAR_MM = 20.0
FAR_SHARE = 0.1
SPECK_VOXELS = 10
Mask = NDArray[np.bool_]


def failures_of(
    prediction: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    spacing_mm: Sequence[float],
    labels: Mapping[str, int],
) -> tuple[Failure, ...]:
    """What is empty or wild in one case.

    Args:
        prediction: label values, (X, Y, Z).
        truth: as the prediction, on the same grid.
        spacing_mm: distance between voxels along the three axes.
        labels: name -> value; others are not looked at.
    """
    return tuple(
        failure
        for name, value in labels.items()
        for failure in _of_label(name, prediction == value, truth == value, spacing_mm)
    )


def _of_label(
    name: str, prediction: Mask, truth: Mask, spacing_mm: Sequence[float]
) -> Iterator[Failure]:
    """The failures of one label."""
    predicted, true = int(prediction.sum()), int(truth.sum())
    if true and not predicted:
        yield Failure(label=name, kind="empty", reason=f"no {name} was predicted")
        return
    if not true:
        if predicted >= SPECK_VOXELS:
            reason = f"{name} was predicted, and the truth has none"
            yield Failure(label=name, kind="invented", reason=reason)
        return
    ratio = predicted / true
    if max(predicted, true) >= SPECK_VOXELS and not 1 / WILD_RATIO <= ratio <= WILD_RATIO:
        reason = f"{name} has {ratio:.2g} times its true volume"
        yield Failure(label=name, kind="volume", reason=reason)
    distance = _farthest_mm(prediction, truth, spacing_mm)
    if distance > FAR_MM:
        reason = f"a part of {name} lies {distance:.0f} mm away from it"
        yield Failure(label=name, kind="far", reason=reason)


def _farthest_mm(prediction: Mask, truth: Mask, spacing_mm: Sequence[float]) -> float:
    """Distance to the truth of the farthest part that is large enough to matter."""
    box = _box(prediction | truth)
    prediction, truth = prediction[box], truth[box]
    numbered, count = components(prediction)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)
    touching = np.bincount(numbered[truth], minlength=count + 1) > 0
    least = max(SPECK_VOXELS, FAR_SHARE * int(truth.sum()))
    apart = [i for i in range(1, count + 1) if sizes[i] >= least and not touching[i]]
    if not apart:
        return 0.0
    away = ndimage.distance_transform_edt(~truth, sampling=tuple(spacing_mm))
    return float(max(away[numbered == i].min() for i in apart))


def _box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box that holds a mask."""
    found: tuple[slice, ...] = ndimage.find_objects(mask.astype(np.uint8))[0]
    return found
