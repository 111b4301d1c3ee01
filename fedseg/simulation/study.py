"""A whole study: check the data, run the federation and its baselines, measure, write it down.

Baselines are federations of one site: `pooled` has the patients of all hospitals and takes as many
gradient steps as all of them together, `local` is each hospital alone with its own share of steps.
Every arm starts from the same initial model and is measured on the same held-back patients. In the
end each hospital fine-tunes the shared model for itself, which is an arm of its own.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedseg.arrays import digest_of
from fedseg.errors import RoundError, UntaughtLabelError
from fedseg.imaging.cases import Cohort, Split
from fedseg.learning.finetune import Finetuning
from fedseg.plan import StudyPlan
from fedseg.reports.ownmodels import own_models, recorded
from fedseg.result import ArmName, GuaranteeRecord, Run, SiteSummary, StudyResult
from fedseg.simulation.arms import arm_of, finetuned_arm, initial_arm
from fedseg.simulation.baselines import baselines_of
from fedseg.simulation.federation import Federation
from fedseg.simulation.finetuning import OwnModels, finetune_everywhere
from fedseg.simulation.options import Options, Progress, Watcher
from fedseg.simulation.preparation import prepare
from fedseg.simulation.products import write_products
from fedseg.simulation.running import Finished, run_federation
from fedseg.simulation.scoring import Scorer, released, split_to_measure, used_at

_VERSIONS = ("fedseg", "flwr", "torch", "monai", "numpy")


def simulate(
    plan: StudyPlan,
    data: Path | str,
    out: Path | str,
    options: Options | None = None,
    watch: Watcher = lambda _progress: None,
) -> StudyResult:
    """Simulate a study and write model, result, curves and report into a folder.

    Args:
        plan: built or not; without an initial model it is built from its seed.
        data: a data folder as `fedseg-site check` reads it.
        out: made where it does not exist; holds everything, prepared cases (patient data) too.
        watch: is told of every event, for a progress display.

    Returns:
        What OUT/result.json holds.

    Raises:
        PlanError: the plan does not fit the data or the network.
        DataError: the data cannot be used, or OUT has a finished or begun study.
        RoundError: too few sites answered; go on with `resume`.
        MissingExtraError: Ray or TensorBoard is not installed.
    """
    options, out = options or Options(), Path(out)
    started, clock = datetime.now(UTC), time.monotonic()
    whole, drawn = prepare(plan, Path(data), out, options, watch)
    plan = whole.plan
    trained = {"federated": _run(whole, "federated", options, watch)}
    for name, alone in baselines_of(whole, out, options.baselines):
        trained[name] = _run(alone, name, options, watch)
    split = split_to_measure(drawn)
    final = released(trained["federated"].state, plan)
    own = _finetuned(whole, final, options.finetune, split, out, watch)
    watch(Progress("federated", "measuring"))
    scorer = Scorer(replace(whole, cohorts=drawn), split)
    names: tuple[ArmName, ...] = ("federated", *options.baselines)
    arms = tuple(arm_of(name, trained, scorer) for name in names)
    if own is not None:
        arms += (finetuned_arm(own, final, scorer),)
    if plan.private is not None:
        arms += (initial_arm(whole.initial, scorer),)
    result = StudyResult(
        plan=plan,
        plan_digest=plan.digest,
        model_digest=digest_of(final),
        split=split,
        rehearsed_faults=tuple(str(fault) for fault in options.faults),
        sites=tuple(_summary(c, whole.left_out.get(c.site, 0)) for c in whole.cohorts),
        stages=trained["federated"].state.history,
        arms=arms,
        own_models=recorded(
            own_models(plan, trained["federated"].state.history),
            trained["federated"].state.history,
        ),
        guarantee=_guarantee(whole, trained["federated"]),
        run=Run(
            engine=options.engine,
            started=started.isoformat(timespec="seconds"),
            versions={name: version(name) for name in _VERSIONS}
            | {"python": platform.python_version()},
            cores=os.cpu_count() or 1,
            wall_s=round(time.monotonic() - clock, 2),
            compute_s=_compute(trained) | ({} if own is None else {"finetuned": own.cpu_s}),
            stage_s=trained["federated"].stage_s,
        ),
    )
    watch(Progress("federated", "writing the report"))
    write_products(result, trained, own, whole, scorer, out)
    return result


def _run(federation: Federation, arm: str, options: Options, watch: Watcher) -> Finished:
    """Run one arm; baselines always in this process."""
    engine = options.engine if arm == "federated" else "inprocess"
    try:
        return run_federation(
            federation,
            engine=engine,
            resume=options.resume,
            observe=lambda event: watch(Progress(arm, event)),
        )
    except UntaughtLabelError:
        raise
    except RoundError as error:
        raise RoundError(f"{error} (each site's reasons: {federation.folder}/sites)") from error


def _finetuned(
    whole: Federation,
    final: Mapping[str, NDArray[Any]],
    settings: Finetuning | None,
    split: Split,
    out: Path,
    watch: Watcher,
) -> OwnModels | None:
    """Every hospital's own model, where they fine-tune."""
    if settings is None:
        return None
    return finetune_everywhere(
        whole,
        lambda site: used_at(whole, site, final),
        settings,
        final=split,
        folder=out / "finetuned",
        say=lambda text: watch(Progress("finetuned", text)),
    )


def _guarantee(whole: Federation, finished: Finished) -> GuaranteeRecord | None:
    """What the federation guaranteed and spent; None where the plan has no guarantee."""
    if whole.plan.private is None:
        return None
    from fedseg.privacy.promised import record_of

    return record_of(whole.plan, finished.state.history, private=whole.noise_seed is None)


def _summary(cohort: Cohort, left_out: int) -> SiteSummary:
    """What one site brought."""
    parts = {name: cohort.split(name) for name in ("train", "val", "test")}
    return SiteSummary(
        name=cohort.site,
        patients={name: len(part.patients) for name, part in parts.items()},
        cases={name: len(part.cases) for name, part in parts.items()},
        left_out=left_out,
        annotated=cohort.annotated,
    )


def _compute(trained: Mapping[str, Finished]) -> dict[str, float]:
    """CPU seconds of training by arm."""
    seconds: dict[str, float] = {}
    for key, finished in trained.items():
        name = key.split(":")[0]
        seconds[name] = round(seconds.get(name, 0.0) + finished.cpu_s, 2)
    return seconds
