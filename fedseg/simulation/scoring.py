"""Measuring finished models on the hospitals' held-back patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from fedseg.aggregation.rounds import StudyState
from fedseg.arrays import Arrays
from fedseg.evaluation.evaluate import evaluate_cohort
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort, Split
from fedseg.models.zoo import build_network, load_tensors
from fedseg.plan import StudyPlan
from fedseg.result import PatientScores
from fedseg.simulation.federation import Federation


def released(state: StudyState, plan: StudyPlan) -> dict[str, NDArray[Any]]:
    """The model that a finished study releases."""
    return state.server.released(plan.aggregation)


def split_to_measure(cohorts: Sequence[Cohort]) -> Split:
    """`test` where every hospital has test patients, else `val`."""
    return "test" if all(cohort.split("test").cases for cohort in cohorts) else "val"


class Scorer:
    """Measures models at every hospital of a federation, in each image's own geometry."""

    def __init__(self, federation: Federation, split: Split) -> None:
        self.federation, self.split = federation, split
        self.cache = CaseCache(federation.cache, federation.plan.task)
        self.network = build_network(federation.plan.model, federation.plan.task)
        self.network.to(federation.device)

    def __call__(self, model: Arrays, site: str) -> list[PatientScores]:
        """Per-patient metrics of one model at one hospital."""
        plan = self.federation.plan
        load_tensors(self.network, model)
        cohort = next(c for c in self.federation.cohorts if c.site == site)
        held_back = cohort.split(self.split)
        return evaluate_cohort(
            self.network, held_back, self.cache, plan, plan.evaluation.metrics, native=True
        )
