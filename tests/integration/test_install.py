"""The wheel in an environment of its own, used from another directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from tiny_studies import environment, tiny_plan, write_plan

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _run(
    *arguments: object, cwd: Path, status: int = 0, timeout_s: float = 1500
) -> subprocess.CompletedProcess[str]:
    """Run a program away from the checkout and expect an exit status."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=environment(PYTHONPATH="", PIP_DISABLE_PIP_VERSION_CHECK="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == status, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what a checkout holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("fedseg", "sites", "coordinator"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
    _run(*pip, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("fedseg-*.whl")
    return built


def _environment(folder: Path, wheel: Path, extra: str, *first: str) -> Path:
    """A fresh virtual environment with fedseg and one extra; its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    pip = (programs / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    for package in first:
        _run(*pip, package, cwd=folder)
    _run(*pip, f"{wheel}{extra}", cwd=folder)
    return programs


@pytest.mark.parametrize("extra", ["", "[coordinator]"])
def test_the_light_install_is_small_and_names_what_is_missing(
    extra: str, wheel: Path, data: Path, tmp_path: Path
) -> None:
    programs = _environment(tmp_path / "venv", wheel, extra)
    there = json.loads(_run(programs / "pip", "list", "--format", "json", cwd=tmp_path).stdout)
    heavy = {"torch", "monai", "nibabel", "pydicom", "highdicom", "ray", "scipy", "matplotlib"}
    assert not {package["name"] for package in there} & heavy
    assert "Example" in _run(programs / "fedseg-coordinator", "init", "--help", cwd=tmp_path).stdout
    plan = tmp_path / "study.yaml"
    _run(programs / "fedseg", "plan", "new", plan, cwd=tmp_path)
    _run(programs / "fedseg", "plan", "check", plan, cwd=tmp_path)
    imports = "import coordinator.app, coordinator.running.service, sites.app"
    _run(programs / "python", "-c", imports, cwd=tmp_path)
    study = (plan, "--data", tmp_path, "--out", tmp_path / "out")
    told = _run(programs / "fedseg", "simulate", *study, cwd=tmp_path, status=1).stderr
    assert "pip install 'fedseg[simulation]'" in told
    assert "Traceback" not in told
    told = _run(programs / "fedseg-site", "check", data, cwd=tmp_path, status=1).stderr
    assert "pip install 'fedseg[site]'" in told


def test_the_whole_install_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    programs = _environment(tmp_path / "venv", wheel, "[simulation]", "torch==2.13.0")
    fedseg = programs / "fedseg"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import fedseg, sites, coordinator; print(fedseg.__file__)"
    printed = _run(programs / "python", "-c", where, cwd=elsewhere).stdout
    assert Path(printed.strip()).is_relative_to(tmp_path / "venv")
    _run(fedseg, "plan", "new", "study.yaml", cwd=elsewhere)
    _run(fedseg, "plan", "new", "ct.yaml", "--example", "ct-2d", cwd=elsewhere)
    _run(fedseg, "phantoms", "data", "--sites", "3", "--patients", "4", cwd=elsewhere)
    _run(programs / "fedseg-site", "check", "data", "--html", "check.html", cwd=elsewhere)
    write_plan(elsewhere / "tiny.yaml", tiny_plan(aggregation={"rounds": 2}))
    _run(fedseg, "plan", "build", "tiny.yaml", cwd=elsewhere)
    study = ("tiny.yaml", "--data", "data", "--baselines", "pooled,local")
    _run(fedseg, "simulate", *study, "--out", "out", cwd=elsewhere)
    _run(fedseg, "simulate", *study, "--out", "ray", "--engine", "ray", cwd=elsewhere)
    out = elsewhere / "out"
    assert (out / "report.html").stat().st_size > 100_000
    assert (out / "model.safetensors").read_bytes() == (
        elsewhere / "ray" / "model.safetensors"
    ).read_bytes()
    image = next((elsewhere / "data" / "images").iterdir())
    _run(fedseg, "predict", out / "model.safetensors", image, "--out", "masks", cwd=elsewhere)
    assert len(list((elsewhere / "masks").iterdir())) == 1
    measured = _run(
        fedseg, "evaluate", out / "model.safetensors", "--data", "data", "--json", cwd=elsewhere
    )
    assert 0 <= json.loads(measured.stdout)["mean"]["dice"] <= 1
