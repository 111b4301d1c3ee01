"""What must hold before a simulated study begins: packages, plan, and data that can be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from fedseg.arrays import digest_of
from fedseg.errors import DataError, MissingExtraError, PlanError
from fedseg.frozen import SiteName
from fedseg.imaging.cases import Cohort, Manifest
from fedseg.imaging.cohorts import usable_cohorts
from fedseg.models.zoo import initial_model, require_start
from fedseg.plan import StudyPlan
from fedseg.simulation.engines import Engine


def require_packages(engine: Engine) -> None:
    """Miss what a study needs at its end before it begins.

    Raises:
        MissingExtraError: Ray or TensorBoard is not installed.
    """
    for module in ("tensorboard", *(("ray",) if engine == "ray" else ())):
        if find_spec(module) is None:
            raise MissingExtraError("simulation", module)


def built(
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


def cohorts_of(
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
