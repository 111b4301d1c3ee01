"""Measuring finished models on the hospitals' held-back patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from torch import nn

from fedseg.aggregation.rounds import StudyState
from fedseg.arrays import Arrays
from fedseg.errors import DataError
from fedseg.evaluation.evaluate import evaluate_cohort, labelled
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort, Split
from fedseg.learning.strategies import used_here
from fedseg.models.zoo import build_network, load_tensors
from fedseg.plan import StudyPlan
from fedseg.result import PatientScores
from fedseg.simulation.federation import Federation, site_folder
from sites.state import Memories


def released(state: StudyState, plan: StudyPlan) -> dict[str, NDArray[Any]]:
    """The model that a finished study releases."""
    return state.server.released(plan.aggregation)


def used_at(federation: Federation, site: str, model: Arrays) -> dict[str, NDArray[Any]]:
    """A finished study's model as one of its hospitals uses it: with what is its own there."""
    folder = site_folder(federation.folder, site) / "state"
    rounds = federation.plan.aggregation.rounds
    return used_here(model, Memories(folder, federation.plan).before(rounds + 1))


def split_to_measure(cohorts: Sequence[Cohort]) -> Split:
    """`test` where every hospital has labelled test patients, else `val`.

    Where no hospital has a labelled `val` patient it is `test` too, for those that have one.
    """
    if all(labelled(cohort.split("test")).cases for cohort in cohorts):
        return "test"
    return "val" if any(labelled(cohort.split("val")).cases for cohort in cohorts) else "test"


def require_measurable(cohorts: Sequence[Cohort]) -> None:
    """Check before a study that its end can be measured.

    Raises:
        DataError: no hospital has a labelled patient in `val` or `test`.
    """
    split = split_to_measure(cohorts)
    if not any(labelled(cohort.split(split)).cases for cohort in cohorts):
        raise DataError(
            f"none of the {len(cohorts)} sites has a usable labelled patient in val or test, so "
            "nothing can be measured: hold some patients back in the column split, or leave the "
            "column out, and a fifth of all patients is held back"
        )


class Scorer:
    """Measures models at every hospital of a federation, in each image's own geometry.

    Cases without a label are left out.
    """

    def __init__(self, federation: Federation, split: Split) -> None:
        self.federation, self.split = federation, split
        self.cache = CaseCache(federation.cache, federation.plan.task)
        self.network = build_network(federation.plan.model, federation.plan.task)
        self.network.to(federation.device)

    def holding(self, model: Arrays) -> nn.Module:
        """The network with a model in it."""
        load_tensors(self.network, model)
        return self.network

    def __call__(self, model: Arrays, site: str) -> list[PatientScores]:
        """Per-patient metrics of one model at one hospital."""
        plan = self.federation.plan
        network = self.holding(model)
        cohort = next(c for c in self.federation.cohorts if c.site == site)
        held_back = labelled(cohort.split(self.split))
        return evaluate_cohort(
            network, held_back, self.cache, plan, plan.evaluation.metrics, native=True
        )
