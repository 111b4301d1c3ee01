"""Whether a model is as often right as it is sure, on the voxels that matter.

The expected calibration error (Guo et al., ICML 2017) of the predicted label's softmax in ten bins
of equal width. Background would hide everything, being nearly all voxels and easy, so only voxels
count that truth or prediction calls foreground (as Mehrtash et al., IEEE TMI 2020, count those
around the organ). Voxels of a patient hang together, so the error is a patient's, then averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fedseg.evaluation.estimates import estimate
from fedseg.evaluation.evidence import Calibration, ReliabilityBin
from fedseg.frozen import Frozen, Natural, NotNegative

BINS = 10
EDGES = tuple(i / BINS for i in range(BINS + 1))


class BinCount(Frozen):
    """What fell into one bin.

    Attributes:
        voxels: how many.
        confidence: their sum.
        right: of how many the label is right.
    """

    voxels: Natural
    confidence: NotNegative
    right: Natural


Reliability = tuple[BinCount, ...]


def reliability(
    confidence: NDArray[np.floating], right: NDArray[np.bool_], counted: NDArray[np.bool_]
) -> Reliability:
    """Sort voxels into bins (low, high] of confidence.

    Args:
        confidence: of the predicted label, in (0, 1].
        right: whether that label is the true one; of the same shape, as `counted`.
        counted: which voxels count.

    Returns:
        One count for each of the `BINS` bins.
    """
    sure, correct = np.asarray(confidence[counted], np.float64), right[counted]
    which = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    voxels = np.bincount(which, minlength=BINS)
    sums = np.bincount(which, weights=sure, minlength=BINS)
    hits = np.bincount(which, weights=correct, minlength=BINS)
    return tuple(
        BinCount(voxels=int(n), confidence=float(c), right=int(h))
        for n, c, h in zip(voxels, sums, hits, strict=True)
    )


def together(parts: Iterable[Reliability]) -> Reliability:
    """The voxels of several images of one patient."""
    return tuple(
        BinCount(
            voxels=sum(b.voxels for b in same),
            confidence=sum(b.confidence for b in same),
            right=sum(b.right for b in same),
        )
        for same in zip(*parts, strict=True)
    )


def calibration_error(bins: Reliability) -> float | None:
    """Distance of accuracy from confidence, weighed by voxels; None without voxels."""
    whole = sum(b.voxels for b in bins)
    return min(1.0, sum(abs(b.confidence - b.right) for b in bins) / whole) if whole else None


def calibration(candidate: str, patients: Sequence[Reliability]) -> Calibration:
    """A candidate's calibration over patients, each of whom counts the same."""
    excess = [_excess(bins) for bins in patients]
    return Calibration(
        candidate=candidate,
        error=estimate(calibration_error(bins) for bins in patients),
        overconfident=estimate(excess),
        bins=tuple(_mean_bin(i, patients) for i in range(BINS)),
    )


def _excess(bins: Reliability) -> float | None:
    """Mean confidence less accuracy of one patient."""
    whole = sum(b.voxels for b in bins)
    return sum(b.confidence - b.right for b in bins) / whole if whole else None


def _mean_bin(i: int, patients: Sequence[Reliability]) -> ReliabilityBin:
    """One bin, by patient first."""
    known = [bins for bins in patients if sum(b.voxels for b in bins)]
    filled = [bins[i] for bins in known if bins[i].voxels]
    shares = [bins[i].voxels / sum(b.voxels for b in bins) for bins in known]
    return ReliabilityBin(
        low=EDGES[i],
        high=EDGES[i + 1],
        share=fmean(shares) if shares else 0.0,
        confidence=min(1.0, fmean(b.confidence / b.voxels for b in filled)) if filled else None,
        accuracy=fmean(b.right / b.voxels for b in filled) if filled else None,
    )
