"""The arms of a study, measured: the federation, its baselines, and what is made of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from fedseg.arrays import digest_of
from fedseg.result import Arm, ArmName, PatientScores
from fedseg.simulation.finetuning import OwnModels
from fedseg.simulation.running import Finished
from fedseg.simulation.scoring import Scorer, released, used_at


def arm_of(name: ArmName, trained: Mapping[str, Finished], scorer: Scorer) -> Arm:
    """Measure one arm at every hospital.

    Args:
        trained: `federated`, `pooled` and `local:SITE`, as far as they were run.
    """
    plan = scorer.federation.plan
    scores: list[PatientScores] = []
    models: dict[str, str] = {}
    steps = 0
    for cohort in scorer.federation.cohorts:
        finished = trained[f"local:{cohort.site}" if name == "local" else name]
        model = released(finished.state, plan)
        if name == "federated":
            model = used_at(scorer.federation, cohort.site, model)
        models[cohort.site] = digest_of(model)
        scores += scorer(model, cohort.site)
    for key, finished in trained.items():
        if key.split(":")[0] == name:
            steps += sum(a.steps for stage in finished.state.history for a in stage.answers)
    return Arm(name=name, models=models, gradient_steps=steps, patients=tuple(scores))


def finetuned_arm(own: OwnModels, final: Mapping[str, NDArray[Any]], scorer: Scorer) -> Arm:
    """Each hospital's own model measured there; the shared one `final` where it has none."""
    scores: list[PatientScores] = []
    models: dict[str, str] = {}
    for cohort in scorer.federation.cohorts:
        tuned = own.tuned.get(cohort.site)
        shared = used_at(scorer.federation, cohort.site, final)
        model = shared if tuned is None else tuned.model
        models[cohort.site] = digest_of(model)
        scores += scorer(model, cohort.site)
    return Arm(name="finetuned", models=models, gradient_steps=own.steps, patients=tuple(scores))


def initial_arm(initial: Mapping[str, NDArray[Any]], scorer: Scorer) -> Arm:
    """The initial model measured at every hospital."""
    sites = [cohort.site for cohort in scorer.federation.cohorts]
    digest = digest_of(initial)
    return Arm(
        name="initial",
        models=dict.fromkeys(sites, digest),
        gradient_steps=0,
        patients=tuple(score for site in sites for score in scorer(initial, site)),
    )
