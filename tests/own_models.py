"""Studies that measure hospitals' own models, by arithmetic: sites and a coordinator in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from memory_grid import Kept, MemoryGrid, Time
from pure_studies import SITES, train
from small_parties import Party
from small_plans import answer, body_of, built_plan, tiny_model

from coordinator.rounds.events import Event
from coordinator.rounds.study import Study
from fedseg.aggregation.ownmodels import own_model
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.arrays import digest_of
from fedseg.plan import StudyPlan
from fedseg.security.consent import Consent
from fedseg.updates import Evaluated, TaskHeader, Trained, open_task, task_digest

PLAN = built_plan(evaluation__own_models=True)
ROUNDS = PLAN.aggregation.rounds
Reply = Callable[[bytes], bytes]


def consent_of(site: str, model: str, of: StudyPlan = PLAN, **changes: Any) -> Consent:
    """An unsigned consent, some fields changed."""
    good = Consent(study=of.study, plan=of.digest, site=site, model=model)
    return good.model_copy(update=changes)


def measured(owner: str | None, site: str) -> float:
    """The Dice that a site finds: another one for each model and each site."""
    first = 0.5 if owner is None else 0.1 * (1 + SITES.index(owner))
    return first + 0.01 * SITES.index(site)


def reply(
    task: bytes,
    site: str,
    plan: StudyPlan = PLAN,
    *,
    consents: bool = True,
    party: Party | None = None,
    forged: dict[str, Any] | None = None,
) -> bytes:
    """What a good site answers.

    Args:
        consents: it lets its own model go.
        party: signs the consent.
        forged: fields of the consent that are changed after that.
    """
    header, model = open_task(task, plan)
    body = body_of(header.stage, ord(site[-1]) - ord("a") + 2, header.model)
    delta = train(site, header.round, model) if header.stage == "train" else None
    if header.stage in ("evaluate", "own"):
        dice = measured(header.owner, site)
        body = Evaluated(patients=9, scores={"dice": dict.fromkeys(plan.task.labels, dice)})
    if isinstance(body, Trained) and delta is not None and consents and last(header, plan):
        consent = consent_of(site, digest_of(own_model(model, delta)), plan)
        consent = consent if party is None else consent.signed(party.signing)
        body = body.model_copy(update={"consent": consent.model_copy(update=forged or {})})
    return answer(task_digest(task), site, body, delta)


def last(header: TaskHeader, plan: StudyPlan = PLAN) -> bool:
    """The training of the last round, of a plan that measures own models."""
    return header.stage == "train" and plan.lets_own_models_go(header.round)


def expected_own(server_model: dict[str, Any], site: str) -> str:
    """Digest of a site's own model after the last round."""
    return digest_of(own_model(server_model, train(site, ROUNDS, server_model)))


class Runner:
    """A study over a Grid in memory; it can be started again and again."""

    def __init__(self, folder: Path, plan: StudyPlan = PLAN, **replies: Reply) -> None:
        self.folder, self.plan, self.time, self.kept = folder, plan, Time(), Kept()
        good = {site: partial(reply, site=site, plan=plan) for site in SITES}
        sites = {11 + n: (good | replies)[site] for n, site in enumerate(SITES)}
        self.grid = MemoryGrid(sites, self.time)
        self.events: list[Event] = []

    @property
    def own(self) -> Path:
        return self.folder / "own"

    def run(self, state: StudyState | None = None, **options: Any) -> StudyState:
        study = Study(
            self.grid,
            self.plan,
            self.kept,
            nodes=3,
            clock=self.time.clock,
            scratch=self.folder / "scratch",
            own_models=self.own,
            **({"observe": self.events.append} | options),
        )
        return study.run(state or first_state(self.plan, tiny_model()))


def own_stages(state: StudyState) -> dict[str, dict[str, float | None]]:
    """Owner -> site -> Dice."""
    return {
        record.owner: {answer.site: answer.mean_dice for answer in record.answers}
        for record in state.history
        if record.owner is not None
    }


def before_last_round(kept: Kept) -> dict[str, Any]:
    """The shared model that the last round was trained from."""
    place = (ROUNDS, "train", None)
    found = next(s for s in kept.states if s.position is not None and s.position.place == place)
    return dict(found.server.model)
