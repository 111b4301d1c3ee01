"""One case under one model, measured in every way that a validation needs, and kept.

Everything is measured on the image's own grid, where the truth was drawn; only confidence is looked
at on the prepared grid, where the network was asked. Labels that the case is not annotated with are
not measured. A record depends on model, case and settings alone, and names them by a digest: a
validation that was killed goes on with the records that it finds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedseg.errors import DataError
from fedseg.evaluation.calibration import (
    BinCount,
    Reliability,
    calibration_error,
    reliability,
    together,
)
from fedseg.evaluation.failures import failures_of
from fedseg.evaluation.inference import predict_with_confidence
from fedseg.evaluation.lesions import detect, summed
from fedseg.evaluation.metrics import score_case
from fedseg.evaluation.observations import Failure, LabelScores, PatientValidation
from fedseg.frozen import Digest, Frozen, NotNegative
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Case, Cohort
from fedseg.imaging.fingerprint import fingerprint
from fedseg.imaging.readers import read_case
from fedseg.imaging.transforms import PreparedCase, restore
from fedseg.learning.repeatable import repeatable
from fedseg.plan import StudyPlan
from fedseg.result import mean_of

MEASURED = "fedseg-measured/1"


class CaseRecord(Frozen):
    """What one case gave under one model.

    Attributes:
        key: digest of all that it depends on.
        labels: those that the case is annotated with.
        reliability: of its foreground voxels.
        seconds: wall time of the inference.
    """

    format: Literal["fedseg-measured/1"] = "fedseg-measured/1"
    key: Digest
    labels: Mapping[str, LabelScores]
    reliability: tuple[BinCount, ...]
    failures: tuple[Failure, ...]
    seconds: NotNegative


@dataclass(frozen=True)
class Measuring:
    """How cases are measured.

    Attributes:
        plan: of the model: task, overlap of the windows, threads.
        label_map: of the cohort.
        lesions: labels that are lesions.
    """

    plan: StudyPlan
    label_map: tuple[tuple[int, int], ...]
    lesions: tuple[str, ...]
    tolerance_mm: float

    def key(self, model_digest: str, case: Case) -> str:
        """The digest of all that a record depends on.

        Raises:
            DataError: a file of the case cannot be read.
        """
        plan = self.plan
        parts = {
            "format": MEASURED,
            "model": model_digest,
            "case": fingerprint([Cohort("", (case,), self.label_map)])[""],
            "annotated": sorted(self.labels_of(case)),
            "task": plan.task.model_dump(mode="json"),
            "network": plan.model.model_dump(mode="json"),
            "overlap": plan.evaluation.overlap,
            "lesions": sorted(self.lesions),
            "tolerance_mm": self.tolerance_mm,
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def labels_of(self, case: Case) -> dict[str, int]:
        """The labels that a case is annotated with."""
        labels = self.plan.task.labels
        return {n: v for n, v in labels.items() if case.annotated is None or n in case.annotated}


def measure_case(
    network: nn.Module, case: Case, cache: CaseCache, measuring: Measuring, key: str
) -> CaseRecord:
    """Predict a case and measure it.

    Args:
        network: holds the model, on the device that is to be used.
        key: what the record is to be known by.

    Raises:
        DataError: the case cannot be read, or has no label.
    """
    plan, labels = measuring.plan, measuring.labels_of(case)
    prepared = cache.load(case, measuring.label_map)
    volume = read_case(case, plan.task, measuring.label_map)
    if volume.label is None or prepared.label is None:
        raise DataError("a case to be measured has no label map: label it, or leave it out")
    began = time.perf_counter()
    predicted, confidence = _predict(network, prepared, plan)
    seconds = time.perf_counter() - began
    mask = restore(predicted, prepared, volume.label.shape, volume.affine_ras)
    spacing_mm = np.linalg.norm(volume.affine_ras[:3, :3], axis=0).tolist()
    voxel_ml = abs(float(np.linalg.det(volume.affine_ras[:3, :3]))) / 1000
    metrics = score_case(
        mask, volume.label, spacing_mm, labels, ("dice", "hd95", "nsd"), measuring.tolerance_mm
    )
    scores = {
        name: LabelScores(
            dice=metrics["dice"][name],
            hd95_mm=metrics["hd95"][name],
            nsd=metrics["nsd"][name],
            volume_ml=voxel_ml * int((volume.label == value).sum()),
            predicted_ml=voxel_ml * int((mask == value).sum()),
            lesions=detect(mask == value, volume.label == value)
            if name in measuring.lesions
            else None,
        )
        for name, value in labels.items()
    }
    return CaseRecord(
        key=key,
        labels=scores,
        reliability=_reliability(predicted, prepared.label, confidence, list(labels.values())),
        failures=failures_of(mask, volume.label, spacing_mm, labels),
        seconds=seconds,
    )


def patient_of(candidate: str, patient: str, cases: Sequence[CaseRecord]) -> PatientValidation:
    """One patient, from all of their cases, at least one.

    Scores and volumes are means over the cases, lesions are summed, and a failure in one case is
    one of the patient.
    """
    names = dict.fromkeys(name for case in cases for name in case.labels)
    labels = {n: _mean([case.labels[n] for case in cases if n in case.labels]) for n in names}
    failures = {(f.label, f.kind): f for case in reversed(cases) for f in reversed(case.failures)}
    return PatientValidation(
        candidate=candidate,
        patient=patient,
        cases=len(cases),
        labels=labels,
        dice=mean_of({name: scores.dice for name, scores in labels.items()}),
        hd95_mm=mean_of({name: scores.hd95_mm for name, scores in labels.items()}),
        nsd=mean_of({name: scores.nsd for name, scores in labels.items()}),
        calibration_error=calibration_error(reliability_of(cases)),
        failures=tuple(failures[key] for key in sorted(failures)),
        seconds=fmean(case.seconds for case in cases),
    )


def reliability_of(cases: Sequence[CaseRecord]) -> Reliability:
    """A patient's voxels by confidence."""
    return together(case.reliability for case in cases)


def _predict(
    network: nn.Module, prepared: PreparedCase, plan: StudyPlan
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mask and confidence on the prepared grid; equal ones for equal models on CPU."""
    with repeatable(plan.training.threads, 0, next(network.parameters()).device):
        return predict_with_confidence(network, prepared, plan.task, plan.evaluation.overlap)


def _reliability(
    predicted: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    confidence: NDArray[np.float32],
    values: Sequence[int],
) -> Reliability:
    """Foreground by truth or prediction; a label that is not annotated can be neither."""
    counted = np.isin(truth, values) | np.isin(predicted, values)
    judged = np.isin(predicted, [0, *values])
    return reliability(confidence, predicted == truth, counted & judged)


def _mean(scores: Sequence[LabelScores]) -> LabelScores:
    """One label over a patient's cases."""
    lesions = [each.lesions for each in scores if each.lesions is not None]
    return LabelScores(
        dice=_known(each.dice for each in scores),
        hd95_mm=_known(each.hd95_mm for each in scores),
        nsd=_known(each.nsd for each in scores),
        volume_ml=fmean(each.volume_ml for each in scores),
        predicted_ml=fmean(each.predicted_ml for each in scores),
        lesions=summed(lesions) if lesions else None,
    )


def _known(values: Iterable[float | None]) -> float | None:
    """Mean of the values there are."""
    return mean_of({str(i): value for i, value in enumerate(values)})
