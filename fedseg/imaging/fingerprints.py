"""The same content under two names: digests of images and labels, compared over a cohort."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.imaging.cases import Case
from fedseg.imaging.findings import Finding
from fedseg.imaging.volumes import Volume


class Fingerprints:
    """Digests of images and labels, to find the same content under two patients."""

    def __init__(self) -> None:
        self._images: dict[str, list[Case]] = defaultdict(list)
        self._labels: dict[str, list[Case]] = defaultdict(list)

    def add(self, case: Case, volume: Volume) -> None:
        """Remember a case's content."""
        if np.ptp(volume.image) > 0:
            self._images[_digest(volume.image)].append(case)
        if volume.label is not None and volume.label.any():
            self._labels[_digest(volume.label)].append(case)

    def findings(self) -> list[Finding]:
        """A finding for every case that shares its content with another one."""
        found, images = [], [g for g in self._images.values() if len(g) > 1]
        for group in images:
            two = len({case.patient for case in group}) > 1
            for case in group:
                found.append(_same_image(case, [c.name for c in group if c is not case], two=two))
        known = {case.name for group in images for case in group}
        for group in self._labels.values():
            fresh = [case for case in group if case.name not in known]
            if len({case.patient for case in fresh}) > 1:
                found += [_same_label(c, [o.name for o in fresh if o is not c]) for c in fresh]
        return found


def _same_image(case: Case, others: list[str], *, two: bool) -> Finding:
    """The same voxels under two names."""
    shown = ", ".join(others[:5])
    if two:
        return Finding(
            case.name,
            "error",
            "image-copied",
            f"the image is identical to that of {shown}, which belongs to another patient",
            "find out whose image it is and remove the other case",
        )
    return Finding(
        case.name,
        "warning",
        "image-copied",
        f"the image is identical to that of {shown} of the same patient",
        "keep one of them, or it counts twice",
    )


def _same_label(case: Case, others: list[str]) -> Finding:
    """The same label on different images of two patients."""
    return Finding(
        case.name,
        "warning",
        "label-copied",
        f"the label is identical to that of {', '.join(others[:5])}, another patient's",
        "see that the label was drawn on this image",
    )


def _digest(array: NDArray[Any]) -> str:
    """Digest of shape and content."""
    content = np.ascontiguousarray(array)
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()
