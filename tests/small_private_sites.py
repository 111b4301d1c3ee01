"""A real hospital on phantoms that has joined a study with a guarantee."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import small_hospitals
from small_hospitals import (
    NAME,
    NOW,
    Consortium,
    Hospital,
    approved,
    copied,
    joined,
    phantoms,
    text,
)

from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.privacy.ledger import Ledger
from fedseg.privacy.schedule import calibrated
from sites.folder import SiteFolder
from sites.founding import found
from sites.ledger import open_ledger

PRIVACY: dict[str, Any] = {
    "guarantee": "local",
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "expected_patients": 4,
    "patches_per_patient": 1,
}


def private_built(weaker: float = 1.0, **changes: Any) -> tuple[StudyPlan, dict[str, Any]]:
    """A private plan on phantoms, built, and its initial model.

    Args:
        weaker: its noise is so many times what was calibrated.
        changes: of `privacy`, or `study`.
    """
    values = copy.deepcopy(small_hospitals.PLAN_VALUES)
    values["study"] = changes.pop("study", values["study"])
    values["training"] |= {"gradient_clip_norm": None, "mixed_precision": False}
    values["aggregation"] |= {"weighting": "uniform"}
    values["privacy"] = PRIVACY | changes
    plan = StudyPlan.model_validate(values)
    record, model = initial_model(plan)
    noise = calibrated(plan)
    assert noise is not None
    noise = noise.model_copy(update={"training": noise.training * weaker})
    return plan.model_copy(update={"initial": record, "calibrated": noise}), dict(model)


def private_hospital(
    path: Path, data: Path, *, approve: bool = True, policy: str = "", **changes: Any
) -> Hospital:
    """Found a site with the template's policy, have it join and, if asked, approve."""
    consortium = Consortium(*private_built(**changes))
    folder = SiteFolder(path)
    own = found(folder, NAME, text(NOW))
    if policy:
        folder.policy.write_text(policy)
    roll = consortium.roll(own)
    joined(folder, consortium, roll)
    if approve:
        approved(folder, consortium, data)
    return Hospital(folder, consortium, roll, own)


@pytest.fixture(scope="module", name="data")
def fixture_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of one hospital, two of them held back."""
    return phantoms(tmp_path_factory.mktemp("phantoms"), patients=6)


@pytest.fixture(scope="module", name="founded")
def fixture_founded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A hospital that has approved a private plan; tests have copies of it."""
    return private_hospital(tmp_path_factory.mktemp("founded") / "site", data)


@pytest.fixture(name="site")
def fixture_site(founded: Hospital, tmp_path: Path) -> Hospital:
    """A hospital that has approved a private plan and answered nothing yet."""
    return copied(founded, tmp_path / "site")


def ledger_of(site: Hospital) -> Ledger:
    """Its ledger, opened and verified."""
    return open_ledger(site.folder, site.signing, lambda: text(site.now))


def refusals(site: Hospital) -> list[str]:
    """Code and reason of every refusal in the audit, oldest first."""
    entries = site.audited("refused") + site.audited("plan_refused")
    return [f"{entry.facts.get('code')}: {entry.facts['reason']}" for entry in entries]
