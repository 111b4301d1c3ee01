"""The learning rate of every step of a study: a function of the plan alone."""

from __future__ import annotations

from math import cos, fsum, pi

from fedseg.plan import StudyPlan


def learning_rate(plan: StudyPlan, round_: int, step: int) -> float:
    """Learning rate of one step: linear warm-up over the first rounds, then the plan's schedule.

    Args:
        plan: its schedule runs over all `aggregation.rounds`.
        round_: from 1.
        step: of this round, from 0.
    """
    schedule, steps = plan.training.schedule, plan.training.steps_per_round
    position = round_ - 1 + step / steps
    share = 1.0
    if position < schedule.warmup_rounds:
        share = min(1.0, (position + 1 / steps) / schedule.warmup_rounds)
    elif schedule.name == "cosine":
        left = plan.aggregation.rounds - schedule.warmup_rounds
        share = 0.5 * (1 + cos(pi * min(1.0, (position - schedule.warmup_rounds) / left)))
    return plan.training.optimiser.learning_rate * share


def summed_rate(plan: StudyPlan, round_: int) -> float:
    """The learning rates of one round's steps, summed: how far plain SGD goes with a gradient."""
    steps = range(plan.training.steps_per_round)
    return fsum(learning_rate(plan, round_, step) for step in steps)
