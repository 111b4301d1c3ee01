"""A simulated federation as a value: its plan, its hospitals' data, and what it asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedseg.aggregation.server import Model
from fedseg.errors import DataError, PlanError
from fedseg.imaging.cases import Cohort
from fedseg.plan import StudyPlan
from fedseg.simulation.attacks import RETRAINING
from fedseg.simulation.rehearsal import Fault

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Federation:
    """Everything that one simulated study needs.

    Attributes:
        plan: built.
        initial: the tensors whose digest the plan holds.
        cohorts: one a site.
        left_out: unusable cases by site, already removed from the cohorts.
        folder: the study's own place; the coordinator's checkpoint and each site's state.
        cache: prepared cases, shared by all sites of a simulation.
        device: of torch, for every trainer.
        faults: rehearsed ones.
        noise_seed: repeats the noise of a private plan, which then protects nobody.
        every_label: the plan's labels must each be annotated by a site; False for a baseline.
    """

    plan: StudyPlan
    initial: Model
    cohorts: tuple[Cohort, ...]
    folder: Path
    cache: Path
    left_out: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"
    faults: tuple[Fault, ...] = ()
    noise_seed: int | None = None
    every_label: bool = True

    @property
    def checkpoint(self) -> Path:
        """Where the coordinator's state lies."""
        return self.folder / CHECKPOINT


def site_folder(folder: Path, site: str) -> Path:
    """One site's own place in a simulated study."""
    return folder / "sites" / site


def require_sites(federation: Federation) -> None:
    """Check that the data have the sites that are asked for.

    Raises:
        PlanError: the plan wants more sites than there are, or a fault one that is not there.
        DataError: too few of the sites have a patient to train on.
    """
    names = [cohort.site for cohort in federation.cohorts]
    needed = federation.plan.aggregation.minimum_sites
    if len(names) < needed:
        raise PlanError(
            f"aggregation.minimum_sites is {needed}, but the data have {len(names)} "
            "sites: lower it, or divide the data with --partition iid --sites N"
        )
    idle = [c.site for c in federation.cohorts if not c.split("train").cases]
    if len(names) - len(idle) < needed:
        raise DataError(
            f"{len(names) - len(idle)} of {len(names)} sites have a usable training patient, the "
            f"plan needs {needed}; none at {', '.join(idle)}: `fedseg-site check` names each case "
            "with its remedy"
        )
    rounds = federation.plan.aggregation.rounds
    never = [fault for fault in federation.faults if fault.round and fault.round > rounds]
    if never:
        raise PlanError(f"the fault {never[0]} would never happen: the plan has {rounds} rounds")
    _require_paid(federation)
    strangers = sorted({fault.site for fault in federation.faults} - set(names))
    if strangers:
        raise PlanError(
            f"a fault is rehearsed at {strangers[0]}, but the sites are {', '.join(names)}"
        )


def _require_paid(federation: Federation) -> None:
    """Refuse attacks that train beside the ledger of a private plan."""
    unpaid = [fault for fault in federation.faults if fault.kind in RETRAINING]
    if federation.plan.private is not None and unpaid:
        raise PlanError(
            f"the attack {unpaid[0]} trains a second time, which no ledger pays for: under a "
            "guarantee rehearse sign_flip or scaled_noise"
        )
