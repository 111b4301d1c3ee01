"""Who imports what: each side in an interpreter of its own, and the contracts of import-linter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "monai", "ray", "scipy", "matplotlib", "torchvision", "pandas"}
READERS = {"nibabel", "pydicom", "highdicom", "PIL", "SimpleITK", "itk"}
ROOMS = {f"fedseg.{room}" for room in ("imaging", "models", "learning", "evaluation", "simulation")}
SCRIPT = "import json, sys; {}; print(json.dumps(sorted(sys.modules)))"


def modules_after(statement: str) -> set[str]:
    """Every module that a clean interpreter holds after a statement, parents included."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(statement)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_fedseg_is_light() -> None:
    found = modules_after("import fedseg; fedseg.__version__")
    assert {name for name in found if name.startswith("fedseg")} == {"fedseg"}
    assert not found & {"numpy", "pydantic", "flwr", "yaml", *HEAVY, *READERS}


def test_the_command_starts_without_torch() -> None:
    found = modules_after("import fedseg.cli, sites.cli")
    assert not found & (HEAVY | READERS)


def test_a_plan_is_read_without_torch_and_flower() -> None:
    found = modules_after("from fedseg import StudyPlan, load_plan")
    assert not found & ({"flwr"} | HEAVY | READERS | ROOMS)


def test_the_coordinator_has_neither_torch_nor_anything_that_reads_images() -> None:
    found = modules_after("import coordinator.app, coordinator.running.service, coordinator.cli")
    assert not found & (HEAVY | READERS | ROOMS)
    assert not [name for name in found if name.partition(".")[0] == "sites"]


def test_the_coordinator_lists_its_commands_at_once() -> None:
    found = modules_after("import coordinator.cli")
    assert not found & {"flwr", "numpy", "pydantic", "cryptography", "uvicorn", "fastapi", "httpx"}


def test_the_relay_of_a_site_has_neither_torch_nor_anything_that_reads_images() -> None:
    found = modules_after("import sites.app")
    assert not found & (HEAVY | READERS | ROOMS)
    assert not found & {"sites.trainer", "sites.patients", "sites.state", "coordinator"}
    assert not found & {"fedseg.privacy", "sites.ledger", "sites.spending", "sqlite3"}


def test_the_half_with_patients_knows_no_coordinator_and_no_flower() -> None:
    found = modules_after("import sites.trainer")
    assert "torch" in found
    assert not [name for name in found if name.partition(".")[0] in {"coordinator", "flwr"}]


def test_the_contracts_of_import_linter_hold() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("import-linter is not installed here: pip install 'fedseg[dev]'")
    done = subprocess.run(
        [command, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
