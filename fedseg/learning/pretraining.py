"""An initial model from public patients or from phantoms, so that a study need not start from zero.

Network, task, loss and augmentation are the plan's; all parameters are trained, with settings that
fit a start from random weights and have nothing to do with the study's. Nothing here is private:
what a model is pre-trained on is not covered by the study's guarantee. Equal arguments give equal
bits on a CPU at one thread, also when stopped and gone on with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedseg.arrays import Arrays
from fedseg.errors import DataError
from fedseg.evaluation.inference import predict_mask
from fedseg.evaluation.metrics import score_case
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort
from fedseg.imaging.randomised import Anatomy, randomised_case
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.lazy import LazyCases
from fedseg.learning.local import train_round
from fedseg.learning.sampling import Patients
from fedseg.models.devices import require_device
from fedseg.models.zoo import build_network, initial_model, load_tensors, state_tensors
from fedseg.plan import StudyPlan
from fedseg.promise import NoPrivacy
from fedseg.result import mean_of
from fedseg.strategy import Aggregation
from fedseg.task import Task
from fedseg.training import Optimiser, Schedule

CHUNK = 50
SITE = "pretraining"


@dataclass(frozen=True)
class State:
    """Pre-training after so many chunks of steps.

    Attributes:
        chunks: done, of 50 steps each.
        model: the network's tensors.
        optimiser: as in RoundOutcome.
    """

    chunks: int
    model: Mapping[str, NDArray[Any]]
    optimiser: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def pretraining_plan(
    plan: StudyPlan,
    *,
    steps: int,
    seed: int,
    learning_rate: float = 0.005,
    batch_size: int = 4,
) -> StudyPlan:
    """The plan by which a model for a study is pre-trained: its network, without adapters.

    Args:
        plan: of the study; built or not, private or not.
        steps: of the optimiser, rounded up to whole chunks of 50.
        seed: of the first weights and of every draw.
        learning_rate: of AdamW, at its highest.
        batch_size: patches a step.
    """
    chunks = -(-steps // CHUNK)
    training = plan.training.model_copy(
        update={
            "optimiser": Optimiser(learning_rate=learning_rate, weight_decay=1e-4, state="keep"),
            "schedule": Schedule(warmup_rounds=min(2.0, chunks / 10)),
            "steps_per_round": CHUNK,
            "batch_size": batch_size,
            "gradient_clip_norm": 1.0,
            "trainable": "all",
            "seed": seed,
        }
    )
    changed = {
        "model": plan.model.model_copy(update={"adapters": None}),
        "training": training,
        "aggregation": Aggregation(rounds=chunks, minimum_sites=1),
        "privacy": NoPrivacy(),
        "initial": None,
        "calibrated": None,
    }
    return StudyPlan.model_validate(plan.model_copy(update=changed).model_dump(mode="json"))


def pretrain(
    plan: StudyPlan, patients: Patients, *, start: State | None = None, device: str = "cpu"
) -> Iterator[State]:
    """Pre-train, giving the state after each chunk.

    Args:
        plan: from `pretraining_plan`.
        patients: labelled cases.
        start: what to go on from; None begins anew.
        device: of torch.

    Raises:
        DataError: see `train_round`.
        NotFiniteError: training ran away.
    """
    state = start or State(0, initial_model(plan)[1])
    network = build_network(plan.model, plan.task).to(require_device(device))
    load_tensors(network, state.model)
    for chunk in range(state.chunks + 1, plan.aggregation.rounds + 1):
        outcome = train_round(
            network,
            patients,
            plan,
            round_=chunk,
            site=SITE,
            optimiser_state=state.optimiser,
        )
        state = State(chunk, state_tensors(network), outcome.optimiser_state)
        yield state


def dice_of(plan: StudyPlan, model: Arrays, patients: Patients, device: str = "cpu") -> float:
    """Mean Dice over patients, on the prepared grid.

    Raises:
        DataError: no patient has a label that could be measured.
    """
    network = build_network(plan.model, plan.task).to(require_device(device))
    load_tensors(network, model)
    means = [
        np.mean(found)
        for cases in patients.values()
        if (found := [d for case in cases if (d := _dice(plan, network, case)) is not None])
    ]
    if not means:
        raise DataError("no held-back patient has a label to measure against")
    return float(np.mean(means))


def phantom_patients(
    task: Task, seed: int, numbers: range, anatomy: Anatomy = "chain"
) -> dict[str, Sequence[PreparedCase]]:
    """Phantoms by domain randomisation, made when first asked for and then kept."""
    return {
        f"phantom_{number:06d}": LazyCases(
            [cache(partial(randomised_case, task, seed, number, anatomy=anatomy))]
        )
        for number in numbers
    }


def cohort_patients(cohort: Cohort, prepared: CaseCache) -> dict[str, Sequence[PreparedCase]]:
    """A public cohort's patients; a case is read from the cache each time that it is drawn."""
    return {
        patient: LazyCases([partial(prepared.load, case, cohort.label_map) for case in cases])
        for patient, cases in cohort.by_patient()
    }


def _dice(plan: StudyPlan, network: Any, case: PreparedCase) -> float | None:
    """Mean Dice over the labels that one case is annotated with."""
    if case.label is None:
        return None
    mask = predict_mask(network, case, plan.task, plan.evaluation.overlap)
    tolerance = plan.evaluation.tolerance_mm
    labels, annotated = plan.task.labels, case.annotated
    scores = score_case(mask, case.label, case.spacing_mm, labels, ("dice",), tolerance, annotated)
    return mean_of(scores["dice"])
