"""Lesions found, missed and invented: connected components, matched by how much of them overlaps.

A lesion is what hangs together through faces, edges or corners. A true lesion is found where at
least a tenth of it is predicted; a predicted one is right where at least a tenth of it is true (the
tenth of Commowick et al., Scientific Reports 2018). Several true lesions that one predicted blob
covers are each found; the blob counts once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedseg.evaluation.observations import Detection

OVERLAP = 0.1
Mask = NDArray[np.bool_]


def detect(prediction: Mask, truth: Mask, *, overlap: float = OVERLAP) -> Detection:
    """Count the lesions of one image.

    Args:
        prediction: bool (X, Y, Z).
        truth: bool, of the same shape.
        overlap: the least share of a lesion that must be covered, in (0, 1].

    Raises:
        ValueError: the masks have different shapes.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"masks of shape {prediction.shape} and {truth.shape} cannot be compared")
    lesions, found = _covered(truth, prediction, overlap)
    predicted, right = _covered(prediction, truth, overlap)
    return Detection(lesions=lesions, found=found, predicted=predicted, right=right)


def components(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Number each component of a mask, from 1; 0 is outside."""
    numbered, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    return numbered, int(count)


def summed(detections: Iterable[Detection]) -> Detection:
    """The counts of several images together."""
    parts = [detection.model_dump() for detection in detections]
    names = Detection.model_fields
    return Detection.model_validate({name: sum(part[name] for part in parts) for name in names})


def sensitivity(detection: Detection) -> float | None:
    """Found lesions as a share of all; None without lesions."""
    return detection.found / detection.lesions if detection.lesions else None


def precision(detection: Detection) -> float | None:
    """Right ones as a share of the predicted lesions; None where none is predicted."""
    return detection.right / detection.predicted if detection.predicted else None


def _covered(lesions: Mask, by: Mask, overlap: float) -> tuple[int, int]:
    """How many components there are, and of how many enough is covered."""
    numbered, count = components(lesions)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    inside = np.bincount(numbered[by], minlength=count + 1)[1:]
    return count, int((inside >= overlap * sizes).sum())
