"""The pictures of a simulated study: best, median and worst patient of every hospital."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fedseg.evaluation.evaluate import labelled
from fedseg.evaluation.inference import predict_mask
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort, Split
from fedseg.reports.figures import Overlay, choose_patients
from fedseg.result import StudyResult


def overlays_of(
    result: StudyResult,
    network_at: Callable[[str], nn.Module],
    cohorts: Sequence[Cohort],
    cache: CaseCache,
    split: Split,
) -> list[Overlay]:
    """Image, truth and prediction of the patients to show; a patient's first case by name.

    Args:
        network_at: the network of a hospital, by its name.
    """
    federated = result.arm("federated")
    assert federated is not None
    found = []
    for cohort in cohorts:
        scores = federated.of_site(cohort.site)
        cases = dict(labelled(cohort.split(split)).by_patient())
        network = network_at(cohort.site)
        for rank, patient in choose_patients(scores).items():
            case = cache.load(cases[patient][0], cohort.label_map)
            mask = predict_mask(network, case, result.plan.task, result.plan.evaluation.overlap)
            assert case.label is not None
            found.append(
                Overlay(
                    site=cohort.site,
                    patient=patient,
                    rank=rank,
                    dice=next(s.mean_dice for s in scores if s.patient == patient),
                    image=case.image[0],
                    truth=case.label,
                    prediction=mask,
                    spacing_mm=case.spacing_mm,
                )
            )
    return found
