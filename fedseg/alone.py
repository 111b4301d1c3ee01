"""The plan of one hospital that trains without the others: what a study is compared with.

It is a plan like any other, for a federation of one: the same network, preparation, steps, losses
and seeds, with nothing to average. What was tuned for many is switched off: the server's learning
rate and momentum, robust rules, and parts that a hospital keeps to itself. There is no guarantee:
nothing of it leaves.
"""

from __future__ import annotations

from typing import Any

from fedseg.plan import StudyPlan
from fedseg.promise import NoPrivacy
from fedseg.strategy import Aggregation

_KEPT = ("rounds", "weighting", "round_timeout_s", "attempts", "weight_averaging")


def plan_alone(plan: StudyPlan, steps_per_round: int | None = None) -> StudyPlan:
    """The plan of a hospital that trains alone; its optimiser is never reset.

    Args:
        plan: of the study, built.
        steps_per_round: of the optimiser; by default as many as a hospital takes in the study.

    Raises:
        PlanError: the plan was not built yet.
    """
    optimiser = plan.training.optimiser.model_copy(update={"state": "keep"})
    steps = steps_per_round or plan.training.steps_per_round
    training = plan.training.model_copy(update={"steps_per_round": steps, "optimiser": optimiser})
    kept = {name: getattr(plan.aggregation, name) for name in _KEPT}
    aggregation = Aggregation(minimum_sites=1, **kept)
    evaluation = plan.evaluation.model_copy(
        update={"every_rounds": plan.aggregation.rounds, "own_models": False}
    )
    changed: dict[str, Any] = {
        "initial": plan.built.model_copy(update={"personal": ()}),
        "training": training,
        "aggregation": aggregation,
        "evaluation": evaluation,
    }
    if plan.private is not None:
        changed |= {"privacy": NoPrivacy(), "calibrated": None}
    return plan.model_copy(update=changed)
