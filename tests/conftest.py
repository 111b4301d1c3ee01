"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile(  # the same examples on every machine, however busy it is
    "fedseg", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fedseg")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real medical data, from FEDSEG_TEST_DATA or a neighbouring checkout."""
    named = os.environ.get("FEDSEG_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real medical data: set FEDSEG_TEST_DATA to their folder")
    return folder
