"""A whole study without Flower, torch or time: sites that answer by arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small_plans import answer, body_of, withheld_body

from fedseg.aggregation.robust import combiner
from fedseg.aggregation.rounds import (
    Outcome,
    StudyState,
    close_stage,
    open_stage,
    require_attempts_left,
    weight_of,
)
from fedseg.errors import RoundError
from fedseg.plan import StudyPlan
from fedseg.result import SiteAnswer, SiteFailure
from fedseg.updates import Trained, open_answer, open_task, task_digest

SITES = ("site_a", "site_b", "site_c")


def train(site: str, round_: int, model: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """A delta that depends on site, round and model, as training does."""
    seed = int.from_bytes(hashlib.sha256(f"{site}/{round_}".encode()).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    steps = {k: 0.1 * rng.normal(size=model[k].shape) - 0.1 * model[k] for k in sorted(model)}
    return {name: np.asarray(step, np.float32) for name, step in steps.items()}


def reply(task: bytes, site: str, plan: StudyPlan) -> bytes:
    """What a good site answers; the number of its patients follows from its name.

    Under a guarantee it tells no number at all.
    """
    header, model = open_task(task, plan)
    body = body_of(header.stage, ord(site[-1]) - ord("a") + 2, header.model)
    if plan.private:
        body = withheld_body(header.stage, plan, header.model)
    delta = train(site, header.round, model) if header.stage == "train" else None
    return answer(task_digest(task), site, body, delta)


def answers_of(
    state: StudyState,
    plan: StudyPlan,
    sites: Sequence[str],
    failing: Sequence[str] = (),
    scratch: Path | None = None,
) -> Outcome:
    """Ask every site the open stage's task and fold what they answer."""
    assert state.position is not None
    stage = state.position.stage
    task = open_stage(state, plan)
    total = combiner(plan, scratch) if stage == "train" else None
    answers = []
    for site in sites:
        data = reply(task, site, plan)
        model = open_task(task, plan)[0].model
        header, delta = open_answer(
            data, plan, task=task_digest(task), stage=stage, site=site, model=model
        )
        if total is not None and isinstance(header.body, Trained):
            total.fold(delta, weight_of(header.body, plan), site)
        answers.append(SiteAnswer(site=site, patients=2, bytes_up=len(data)))
    failures = tuple(SiteFailure(site=site, code="timeout", reason="late") for site in failing)
    return Outcome(len(task) * len(sites), tuple(answers), failures, total)


def run_purely(
    state: StudyState,
    plan: StudyPlan,
    *,
    order: Callable[[list[str]], list[str]] = list,
    failing: Callable[[StudyState], Sequence[str]] = lambda _state: (),
    most_stages: int = 100,
    scratch: Path | None = None,
) -> list[StudyState]:
    """Every state of a study from this one on, the first included; stops where it cannot go on."""
    states = [state]
    while state.position is not None and len(states) <= most_stages:
        try:
            require_attempts_left(state, plan)
        except RoundError:
            break
        gone = failing(state)
        there = order([site for site in SITES if site not in gone])
        state = close_stage(state, plan, answers_of(state, plan, there, gone, scratch))
        states.append(state)
    return states
