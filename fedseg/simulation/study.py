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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from coordinator.rounds.events import Event
from fedseg.arrays import digest_of
from fedseg.durable import write_atomically
from fedseg.errors import DataError, MissingExtraError, PlanError, RoundError, UntaughtLabelError
from fedseg.frozen import SiteName
from fedseg.imaging.cases import Cohort, Manifest, Split
from fedseg.imaging.cohorts import usable_cohorts
from fedseg.imaging.fingerprint import fingerprint
from fedseg.imaging.manifests import read_manifest
from fedseg.learning.finetune import Finetuning
from fedseg.learning.finetuned import save_finetuned
from fedseg.modelfile import LOCAL, save_model
from fedseg.models.devices import require_device
from fedseg.models.zoo import initial_model, require_start
from fedseg.plan import StudyPlan
from fedseg.result import (
    Arm,
    ArmName,
    GuaranteeRecord,
    PatientScores,
    Run,
    SiteSummary,
    StudyResult,
)
from fedseg.simulation.baselines import Baseline, baselines_of
from fedseg.simulation.federation import (
    Engine,
    Federation,
    Finished,
    require_sites,
    run_federation,
)
from fedseg.simulation.finetuning import SIMULATED, OwnModels, finetune_everywhere
from fedseg.simulation.folder import pin, refuse_occupied
from fedseg.simulation.overlays import overlays_of
from fedseg.simulation.partial import withheld
from fedseg.simulation.rehearsal import Fault
from fedseg.simulation.scoring import (
    Scorer,
    released,
    require_measurable,
    split_to_measure,
    used_at,
)

_VERSIONS = ("fedseg", "flwr", "torch", "monai", "numpy")


@dataclass(frozen=True)
class Options:
    """How a study is simulated; none of it changes what the plan asks for.

    Attributes:
        engine: `inprocess`, or `ray` for several workers at once.
        resume: go on with what lies in the output folder.
        baselines: which arms to train beside the federation.
        faults: hospitals that fail on purpose.
        table: which CSV of the data folder to read.
        partition: divide data that name no sites: `iid` or `dirichlet:ALPHA`.
        sites: how many sites to divide them into; 5 where it is not said.
        device: of torch.
        initial: start from this model instead of the plan's seed (its digest is the plan's).
        noise_seed: repeats the noise of a private plan: everything is marked as not private.
        without: (site, label): what a hospital is trained as if it did not annotate. Models are
            still measured on all that is drawn there.
        finetune: how each hospital fine-tunes in the end; None leaves it out.
    """

    engine: Engine = "inprocess"
    resume: bool = False
    baselines: tuple[Baseline, ...] = ()
    faults: tuple[Fault, ...] = ()
    table: str | None = None
    partition: str | None = None
    sites: int | None = None
    device: str = "cpu"
    initial: Mapping[str, NDArray[Any]] | None = None
    noise_seed: int | None = None
    without: tuple[tuple[str, str], ...] = ()
    finetune: Finetuning | None = SIMULATED


@dataclass(frozen=True)
class Progress:
    """An event of one arm; `arm` is federated, pooled or local:SITE."""

    arm: str
    event: Event | str


Watcher = Callable[[Progress], None]


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
    if options.sites is not None and options.partition is None:
        raise PlanError("--sites belongs to --partition: say how the patients are to be divided")
    if options.noise_seed is not None and plan.private is None:
        raise PlanError("--noise-seed belongs to a plan with a privacy guarantee: this has none")
    started, clock = datetime.now(UTC), time.monotonic()
    _require_packages(options.engine)
    require_device(options.device)
    plan, initial = _built(plan, options.initial)
    refuse_occupied(out, plan, resume=options.resume)
    watch(Progress("federated", "checking the data"))
    manifest = read_manifest(
        Path(data),
        plan.task,
        table=options.table,
        partition=options.partition,
        sites=options.sites or 5,
        seed=plan.training.seed,
    )
    unlisted = {f.case for f in manifest.findings if f.severity == "error"}
    unlisted -= {"", *(case.name for case in manifest.cases)}
    if unlisted:
        text = f"{len(unlisted)} cases cannot even be listed: `fedseg-site check` names each"
        watch(Progress("federated", text))
    drawn, left_out = _usable_cohorts(
        manifest, plan, lambda case: watch(Progress("federated", f"checking {case}"))
    )
    cohorts = withheld(drawn, plan.task, options.without)
    whole = Federation(
        plan=plan,
        initial=initial,
        cohorts=cohorts,
        left_out=left_out,
        folder=out / "federated",
        cache=out / "cache",
        device=options.device,
        faults=options.faults,
        noise_seed=options.noise_seed,
    )
    require_sites(whole)
    require_measurable(cohorts)
    pin(out, plan, fingerprint(cohorts), options.noise_seed)
    trained = {"federated": _run(whole, "federated", options, watch)}
    for name, alone in baselines_of(whole, out, options.baselines):
        trained[name] = _run(alone, name, options, watch)
    split = split_to_measure(drawn)
    final = released(trained["federated"].state, plan)
    own = _finetuned(whole, final, options.finetune, split, out, watch)
    watch(Progress("federated", "measuring"))
    scorer = Scorer(replace(whole, cohorts=drawn), split)
    names: tuple[ArmName, ...] = ("federated", *options.baselines)
    arms = tuple(_arm(name, trained, scorer) for name in names)
    if own is not None:
        arms += (_own_arm(own, final, scorer),)
    if plan.private is not None:
        arms += (_untrained(initial, scorer),)
    result = StudyResult(
        plan=plan,
        plan_digest=plan.digest,
        model_digest=digest_of(final),
        split=split,
        rehearsed_faults=tuple(str(fault) for fault in options.faults),
        sites=tuple(_summary(cohort, left_out.get(cohort.site, 0)) for cohort in cohorts),
        stages=trained["federated"].state.history,
        arms=arms,
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
    _write(result, trained, own, whole, scorer, out)
    return result


def _guarantee(whole: Federation, finished: Finished) -> GuaranteeRecord | None:
    """What the federation guaranteed and spent; None where the plan has no guarantee."""
    if whole.plan.private is None:
        return None
    from fedseg.privacy.promised import record_of

    return record_of(whole.plan, finished.state.history, private=whole.noise_seed is None)


def _require_packages(engine: Engine) -> None:
    """Miss what a study needs at its end before it begins."""
    for module in ("tensorboard", *(("ray",) if engine == "ray" else ())):
        if find_spec(module) is None:
            raise MissingExtraError("simulation", module)


def _built(
    plan: StudyPlan, given: Mapping[str, NDArray[Any]] | None
) -> tuple[StudyPlan, dict[str, NDArray[Any]]]:
    """The plan with its initial model, from a file or from its seed."""
    if given is not None:
        if plan.built.digest != digest_of(given):
            raise PlanError(
                "the initial model is not the one that the plan names: run `fedseg plan build`"
            )
        return _with_noise(plan), dict(given)
    require_start(plan)
    record, tensors = initial_model(plan)
    if plan.initial is not None and plan.initial != record:
        raise PlanError(
            "the plan's seed gives another initial model here than the plan names: bring the file "
            "that `fedseg plan build` wrote beside the plan (torch may differ in version)"
        )
    return _with_noise(plan.model_copy(update={"initial": record})), tensors


def _with_noise(plan: StudyPlan) -> StudyPlan:
    """A private plan with its calibrated noise, which keeps what it promises; others as they are.

    Raises:
        PrivacyError: the plan names weaker noise than its promise needs.
    """
    if plan.private is None:
        return plan
    from fedseg.privacy.promised import require_kept
    from fedseg.privacy.schedule import calibrated

    if plan.calibrated is None:
        plan = plan.model_copy(update={"calibrated": calibrated(plan)})
    require_kept(plan)
    return plan


def _usable_cohorts(
    manifest: Manifest, plan: StudyPlan, progress: Callable[[str], None]
) -> tuple[tuple[Cohort, ...], dict[str, int]]:
    """The sites' cohorts less the cases that cannot be used, and how many those are."""
    found, _ = usable_cohorts(manifest, plan.task, progress)
    for site in found:
        _check_site_name(site)
    left_out = {site: usable.left_out for site, usable in found.items()}
    return tuple(usable.cohort for usable in found.values()), left_out


def _check_site_name(site: str) -> None:
    """Sites become folder names and words in messages."""
    try:
        TypeAdapter(SiteName).validate_python(site)
    except ValidationError:
        raise DataError(
            "the data name no sites: divide them with --partition iid --sites N"
            if not site
            else f"a site may be named in letters, digits, '.', '_' and '-', not {site!r}: "
            "rename it in the manifest"
        ) from None


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


def _arm(name: ArmName, trained: Mapping[str, Finished], scorer: Scorer) -> Arm:
    """Measure one arm at every hospital."""
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


def _own_arm(own: OwnModels, final: Mapping[str, NDArray[Any]], scorer: Scorer) -> Arm:
    """Each hospital's own model measured there; the shared one where it has none."""
    scores: list[PatientScores] = []
    models: dict[str, str] = {}
    for cohort in scorer.federation.cohorts:
        tuned = own.tuned.get(cohort.site)
        shared = used_at(scorer.federation, cohort.site, final)
        model = shared if tuned is None else tuned.model
        models[cohort.site] = digest_of(model)
        scores += scorer(model, cohort.site)
    return Arm(name="finetuned", models=models, gradient_steps=own.steps, patients=tuple(scores))


def _untrained(initial: Mapping[str, NDArray[Any]], scorer: Scorer) -> Arm:
    """The initial model measured at every hospital."""
    sites = [cohort.site for cohort in scorer.federation.cohorts]
    digest = digest_of(initial)
    return Arm(
        name="initial",
        models=dict.fromkeys(sites, digest),
        gradient_steps=0,
        patients=tuple(score for site in sites for score in scorer(initial, site)),
    )


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


def _write(
    result: StudyResult,
    trained: Mapping[str, Finished],
    own: OwnModels | None,
    whole: Federation,
    scorer: Scorer,
    out: Path,
) -> None:
    """Models, result, curves and report."""
    from fedseg.reports.card import card_of_result
    from fedseg.reports.cardpage import CARD, write_card
    from fedseg.reports.curves import write_curves
    from fedseg.reports.study import write_report

    rounds = result.plan.aggregation.rounds
    for key, finished in trained.items():
        name = "model" if key == "federated" else "model-" + key.replace(":", "-")
        arm = key.partition(":")[0]
        mode = 0o600 if arm == LOCAL else 0o644
        model = released(finished.state, finished.plan)
        seeded = whole.noise_seed is not None and finished.plan.private is not None
        path = out / f"{name}.safetensors"
        save_model(path, finished.plan, model, arm=arm, rounds=rounds, seeded=seeded, mode=mode)
    for site, tuned in own.tuned.items() if own else ():
        path, released_ = out / f"model-finetuned-{site}.safetensors", result.model_digest
        save_finetuned(path, result.plan, tuned, rounds=rounds, released=released_)
    final = released(trained["federated"].state, result.plan)
    overlays = overlays_of(
        result,
        lambda site: scorer.holding(used_at(whole, site, final)),
        scorer.federation.cohorts,
        scorer.cache,
        scorer.split,
    )
    write_card(card_of_result(result), out / CARD)
    write_curves(result, out)
    write_report(result, overlays, out / "report.html")
    write_atomically(out / "result.json", result.to_json().encode())
