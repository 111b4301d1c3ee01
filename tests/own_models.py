"""Studies that measure hospitals' own models, by arithmetic: what a good site answers."""

from __future__ import annotations

from typing import Any

from pure_studies import SITES, train
from small_parties import Party
from small_plans import answer, body_of, built_plan, tiny_model

from fedseg.aggregation.ownmodels import own_model
from fedseg.arrays import digest_of
from fedseg.plan import StudyPlan
from fedseg.security.consent import Consent
from fedseg.updates import Evaluated, TaskHeader, Trained, open_task, task_digest

PLAN = built_plan(evaluation__own_models=True)
ROUNDS = PLAN.aggregation.rounds


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
    asked = plan.evaluation.own_models
    return asked and (header.round, header.stage) == (plan.aggregation.rounds, "train")


def expected_own(server_model: dict[str, Any], site: str) -> str:
    """Digest of a site's own model after the last round."""
    return digest_of(own_model(server_model, train(site, ROUNDS, server_model)))


__all__ = ["PLAN", "ROUNDS", "SITES", "consent_of", "expected_own", "last", "measured", "reply",
           "tiny_model"]  # fmt: skip
