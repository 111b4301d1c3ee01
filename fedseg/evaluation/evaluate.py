"""A model measured on a cohort, patient by patient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from fedseg.errors import DataError
from fedseg.evaluation.inference import predict_mask
from fedseg.evaluation.metrics import score_case, score_patient
from fedseg.imaging.cases import Case, Cohort
from fedseg.learning.repeatable import repeatable
from fedseg.measures import Metric
from fedseg.plan import StudyPlan
from fedseg.result import PatientScores, Scores

if TYPE_CHECKING:
    from fedseg.imaging.cache import CaseCache


def evaluate_cohort(
    network: nn.Module,
    cohort: Cohort,
    cache: CaseCache,
    plan: StudyPlan,
    metrics: Sequence[Metric],
    *,
    native: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[PatientScores]:
    """Predict every case of a cohort and score it against its label.

    Args:
        network: holds the model, on the device that is to be used.
        cohort: labelled cases of one site.
        cache: gives the prepared cases.
        plan: task, overlap of the windows, tolerance of NSD, threads.
        metrics: which to compute.
        native: measure on the image's own grid, where the label was drawn (final figures), and not
            on the prepared one (quick, for learning curves).
        progress: called with the name of each case once it is measured.

    Returns:
        One a patient, sorted by patient; equal models and data give equal scores on CPU.

    Raises:
        DataError: a case cannot be read, or has no label.
    """

    def measured(case: Case) -> dict[Metric, Scores]:
        scores = _score(network, case, cohort, cache, plan, metrics, native)
        if progress:
            progress(case.name)
        return scores

    return [
        score_patient(cohort.site, patient, [measured(case) for case in cases])
        for patient, cases in cohort.by_patient()
    ]


def labelled(cohort: Cohort) -> Cohort:
    """The cases that can be measured; test cases need not have a label."""
    return cohort.without(case.name for case in cohort.cases if case.label is None)


def _score(
    network: nn.Module,
    case: Case,
    cohort: Cohort,
    cache: CaseCache,
    plan: StudyPlan,
    metrics: Iterable[Metric],
    native: bool,
) -> dict[Metric, Scores]:
    """The metrics of one case."""
    prepared = cache.load(case, cohort.label_map)
    truth, spacing_mm = prepared.label, prepared.spacing_mm
    if truth is None:
        raise DataError("a case to be measured has no label map: label it, or leave it out")
    device = next(network.parameters()).device
    with repeatable(plan.training.threads, 0, device):
        mask = predict_mask(network, prepared, plan.task, plan.evaluation.overlap)
    if native:
        from fedseg.imaging.readers import read_case
        from fedseg.imaging.transforms import restore

        volume = read_case(case, plan.task, cohort.label_map)
        assert volume.label is not None  # the prepared case has one
        truth = volume.label
        mask = restore(mask, prepared, truth.shape, volume.affine_ras)
        x, y, z = np.linalg.norm(volume.affine_ras[:3, :3], axis=0).tolist()
        spacing_mm = (x, y, z)
    tolerance = plan.evaluation.tolerance_mm
    labels, annotated = plan.task.labels, case.annotated
    return score_case(mask, truth, spacing_mm, labels, metrics, tolerance, annotated)
