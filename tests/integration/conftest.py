"""Phantoms and one finished study, made once for all integration tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_studies import tiny_plan

from fedseg.imaging.phantoms import write_phantoms
from fedseg.plan import StudyPlan
from fedseg.result import StudyResult
from fedseg.simulation import Options, simulate


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hospitals, one of them with an oblique grid; four patients each."""
    folder = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(folder, sites=4, patients_per_site=(4, 3, 4, 3), shape=(24, 24, 24))


@pytest.fixture(scope="session")
def plan() -> StudyPlan:
    """The tiny plan."""
    return tiny_plan()


@pytest.fixture(scope="session")
def undisturbed(
    data: Path, plan: StudyPlan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StudyResult]:
    """A study that nothing happened to, with both baselines: its folder and its result."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, simulate(plan, data, out, Options(baselines=("pooled", "local")))
