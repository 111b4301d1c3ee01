"""What must hold before a simulated study begins: packages, plan, and data that can be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from fedseg.arrays import digest_of
from fedseg.errors import DataError, MissingExtraError, PlanError
from fedseg.frozen import SiteName
from fedseg.imaging.cases import Cohort, Manifest
from fedseg.imaging.cohorts import usable_cohorts
from fedseg.imaging.fingerprint import fingerprint
from fedseg.imaging.manifests import read_manifest
from fedseg.models.devices import require_device
from fedseg.models.zoo import initial_model, require_start
from fedseg.plan import StudyPlan
from fedseg.simulation.engines import Engine
from fedseg.simulation.federation import Federation, require_sites
from fedseg.simulation.folder import pin, refuse_occupied
from fedseg.simulation.options import Options, Progress, Watcher
from fedseg.simulation.partial import withheld
from fedseg.simulation.scoring import require_measurable


def prepare(
    plan: StudyPlan, data: Path, out: Path, options: Options, watch: Watcher
) -> tuple[Federation, tuple[Cohort, ...]]:
    """Check everything, build the plan where it is not, and take the output folder for the study.

    Args:
        plan, data, out, options, watch: as `simulate` has them.

    Returns:
        The federation, its plan built; and the cohorts with all that is drawn there, on which
        models are measured.

    Raises:
        PlanError, DataError, MissingExtraError: as `simulate`.
        PrivacyError: the plan names weaker noise than its promise needs.
        StorageError: OUT cannot be written.
    """
    if options.sites is not None and options.partition is None:
        raise PlanError("--sites belongs to --partition: say how the patients are to be divided")
    if options.noise_seed is not None and plan.private is None:
        raise PlanError("--noise-seed belongs to a plan with a privacy guarantee: this has none")
    _require_packages(options.engine)
    require_device(options.device)
    plan, initial = _built(plan, options.initial)
    refuse_occupied(out, plan, resume=options.resume)
    watch(Progress("federated", "checking the data"))
    manifest = read_manifest(
        data,
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
    drawn, left_out = _cohorts_of(
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
    return whole, drawn


def _require_packages(engine: Engine) -> None:
    """Miss what a study needs at its end before it begins.

    Raises:
        MissingExtraError: Ray or TensorBoard is not installed.
    """
    for module in ("tensorboard", *(("ray",) if engine == "ray" else ())):
        if find_spec(module) is None:
            raise MissingExtraError("simulation", module)


def _built(
    plan: StudyPlan, given: Mapping[str, NDArray[Any]] | None
) -> tuple[StudyPlan, dict[str, NDArray[Any]]]:
    """The plan with its initial model, from a file or from its seed, and with calibrated noise.

    Args:
        given: the tensors of the plan's initial model; None makes them from its seed.

    Raises:
        PlanError: the initial model is not the one that the plan names.
        PrivacyError: the plan names weaker noise than its promise needs.
    """
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


def _cohorts_of(
    manifest: Manifest, plan: StudyPlan, progress: Callable[[str], None]
) -> tuple[tuple[Cohort, ...], dict[str, int]]:
    """The sites' cohorts less the cases that cannot be used, and how many those are by site.

    Args:
        progress: called with the name of each case once it is inspected.

    Raises:
        DataError: the data name no sites, or one by a name that is none.
    """
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
