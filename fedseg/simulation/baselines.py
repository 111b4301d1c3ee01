"""What a federation is compared with: everybody's patients in one place, and each hospital alone.

A baseline is a federation of one site: the same code, checkpoints and seeds, with nothing to
average. The server's learning rate and momentum are switched off, because they are tuned for many.
Baselines of a private study train the same parameters from the same start, without any guarantee.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fedseg.alone import plan_alone
from fedseg.imaging.cases import Cohort
from fedseg.simulation.federation import Federation

Baseline = Literal["pooled", "local"]


def baselines_of(
    whole: Federation, out: Path, wanted: Sequence[Baseline]
) -> Iterator[tuple[str, Federation]]:
    """The wanted baselines by name: `pooled`, and `local:SITE` for every hospital.

    Pooled takes as many gradient steps as all hospitals of the federation together, each local one
    as many as its own share.
    """
    steps = whole.plan.training.steps_per_round
    if "pooled" in wanted:
        yield "pooled", pooled(whole, out / "pooled", steps * len(whole.cohorts))
    if "local" in wanted:
        for cohort in whole.cohorts:
            yield f"local:{cohort.site}", alone(whole, cohort, out / "local" / cohort.site, steps)


def pooled(whole: Federation, folder: Path, steps_per_round: int) -> Federation:
    """One site that has the patients of all."""
    cases = tuple(case for cohort in whole.cohorts for case in cohort.cases)
    cohort = Cohort("pooled", cases, whole.cohorts[0].label_map)
    single = alone(whole, cohort, folder, steps_per_round)
    longer = whole.plan.aggregation.round_timeout_s * len(whole.cohorts)
    aggregation = single.plan.aggregation.model_copy(update={"round_timeout_s": longer})
    return replace(single, plan=single.plan.model_copy(update={"aggregation": aggregation}))


def alone(whole: Federation, cohort: Cohort, folder: Path, steps_per_round: int) -> Federation:
    """One site that trains without the others; its optimiser is never reset."""
    return replace(
        whole,
        plan=plan_alone(whole.plan, steps_per_round),
        cohorts=(cohort,),
        folder=folder,
        faults=(),
        every_label=False,
    )
