"""The commands as their users meet them: help, answers, files, and errors without a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from small_studies import write_built
from tiny_studies import environment, fedseg, tiny_plan, write_plan

from fedseg.modelfile import load_model
from fedseg.plan import StudyPlan, load_plan
from fedseg.planfile import initial_path
from fedseg.result import StudyResult, mean_of

COMMANDS = [
    ("fedseg", "plan new"),
    ("fedseg", "plan check"),
    ("fedseg", "plan show"),
    ("fedseg", "plan build"),
    ("fedseg", "audit privacy"),
    ("fedseg", "pretrain"),
    ("fedseg", "demo"),
    ("fedseg", "federation"),
    ("fedseg", "phantoms"),
    ("fedseg", "simulate"),
    ("fedseg", "evaluate"),
    ("fedseg", "predict"),
    ("sites", "check"),
    ("sites", "cache purge"),
    ("sites", "init"),
    ("sites", "join"),
    ("sites", "studies"),
    ("sites", "doctor"),
    ("sites", "run"),
    ("sites", "status"),
    ("sites", "pause"),
    ("sites", "resume"),
    ("sites", "stop"),
    ("sites", "trainer"),
    ("sites", "relay"),
    ("sites", "train-local"),
    ("sites", "finetune"),
    ("sites", "models"),
    ("sites", "accept"),
    ("sites", "reject"),
    ("sites", "predict"),
    ("sites", "validate"),
    ("sites", "leave"),
    ("sites", "plan show"),
    ("sites", "plan approve"),
    ("sites", "plan refuse"),
    ("sites", "audit show"),
    ("sites", "audit verify"),
    ("sites", "backup restored"),
    *(
        ("sites", f"ledger {name}")
        for name in (
            *("show", "budget", "verify", "export"),
            *("restore", "link", "withdraw", "close"),
        )
    ),
    ("sites", "egress list"),
    ("sites", "egress show"),
    ("coordinator", "init"),
    ("coordinator", "enrol"),
    ("coordinator", "revoke"),
    ("coordinator", "renew"),
    ("coordinator", "sites"),
    ("coordinator", "run"),
    ("coordinator", "status"),
    ("coordinator", "dashboard"),
    ("coordinator", "pause"),
    ("coordinator", "resume"),
    ("coordinator", "stop"),
    ("coordinator", "logs"),
    ("coordinator", "proxy"),
    ("coordinator", "audit show"),
    ("coordinator", "audit verify"),
    ("coordinator", "backup restored"),
]
NAMES = {"fedseg": "fedseg", "sites": "fedseg-site", "coordinator": "fedseg-coordinator"}


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process, by the entry point that pyproject names."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def ran(*arguments: object, module: str = "fedseg") -> Ran:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", [NAMES[module], *map(str, arguments)])
        status = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                import_module(f"{module}.cli").main()
            except SystemExit as stop:
                status = int(stop.code or 0)
        return Ran(status, out.getvalue(), err.getvalue())

    return ran


def _refused(ran: Ran, *words: str) -> None:
    """One message, no traceback, exit status 1."""
    assert ran.status == 1
    assert "Traceback" not in ran.err
    assert ran.err.strip()
    assert all(word in ran.err for word in words), ran.err


@pytest.mark.parametrize(("module", "command"), COMMANDS)
def test_every_command_shows_an_example(module: str, command: str, run: Any) -> None:
    ran = run(*command.split(), "--help", module=module)
    assert ran.status == 0
    assert f"{NAMES[module]} {command} " in ran.out.partition("Usage:")[2].partition("\n")[2]
    assert not [c for c in ran.out if ord(c) > 0xFFFF], "a word between colons became a picture"


@pytest.mark.parametrize("module", NAMES)
def test_the_commands_list_what_they_can(module: str) -> None:
    done = fedseg("--help", module=module)
    assert done.returncode == 0
    for owner, command in COMMANDS:
        assert owner != module or command.split()[0] in done.stdout


def test_every_command_is_in_the_list_above() -> None:
    found = set()
    for module in NAMES:
        app = import_module(f"{module}.cli").app
        found |= {(module, c.name or c.callback.__name__) for c in app.registered_commands}
        for group in app.registered_groups:
            names = [
                c.name or c.callback.__name__ for c in group.typer_instance.registered_commands
            ]
            found |= {(module, f"{group.name} {name}") for name in names}
    assert found == set(COMMANDS)


def test_a_plan_is_written_checked_shown_and_built(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    assert run("plan", "new", path).status == 0
    assert "not built yet" in run("plan", "check", path).out
    comments = [line for line in path.read_text().splitlines() if "#" in line]
    built = run("plan", "build", path)
    assert built.status == 0
    plan = load_plan(path)
    assert plan.digest in built.out
    assert load_model(initial_path(path))[0].model_digest == plan.built.digest
    assert set(comments) <= set(path.read_text().splitlines())
    shown = run("plan", "show", path, "--json").out
    assert shown.strip().encode() == plan.canonical_bytes
    assert plan.study in run("plan", "show", path).out
    again = run("plan", "build", path)
    assert plan.digest in again.out
    _refused(run("plan", "new", path), "study.yaml is there already")


@pytest.mark.parametrize("example", ["mr-3d", "ct-2d"])
def test_every_example_plan_holds(example: str, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    assert run("plan", "new", path, "--example", example).status == 0
    assert run("plan", "check", path).status == 0


def test_a_wrong_plan_is_told_by_field(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    run("plan", "new", path)
    path.write_text(path.read_text().replace("  rounds:", "  round:"))
    _refused(run("plan", "check", path), "aggregation.round: unknown field")
    _refused(run("plan", "check", tmp_path / "none.yaml"), "cannot read the plan")


def test_phantoms_are_written_and_all_is_well_with_them(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"
    assert run("phantoms", folder, "--sites", 2, "--patients", 3).status == 0
    assert len(list((folder / "images").iterdir())) == len(list((folder / "labels").iterdir())) == 6
    checked = run("check", folder, "--json", "--html", tmp_path / "check.html", module="sites")
    assert checked.status == 0
    assert json.loads(checked.out)["findings"] == []
    assert (tmp_path / "check.html").read_text().startswith("<!")
    _refused(run("phantoms", folder), "not empty")


def test_simulate_prints_the_result_as_json(run: Any, data: Path, tmp_path: Path) -> None:
    plan = tiny_plan(aggregation={"rounds": 2})
    path, out = write_plan(tmp_path / "study.yaml", plan), tmp_path / "out"
    ran = run("simulate", path, "--data", data, "--out", out, "--json")
    assert ran.status == 0
    printed = json.loads(ran.out)
    assert printed == json.loads((out / "result.json").read_bytes())
    assert "round 2/2 evaluate" in ran.err


def test_simulate_shows_rounds_a_table_and_where_the_report_is(
    run: Any, data: Path, tmp_path: Path
) -> None:
    path = write_plan(tmp_path / "study.yaml", tiny_plan(aggregation={"rounds": 2}))
    out = tmp_path / "out"
    command = ("simulate", path, "--data", data, "--out", out, "--fault", "hospital_b:nan@1")
    ran = run(*command)
    assert ran.status == 0
    assert re.search(r"round 1/2 train  loss \d\.\d+ .*hospital_b: not_finite", ran.out)
    assert "hospital" in ran.out.partition("Dice on `val`")[2]
    assert str(out / "report.html") in ran.out
    _refused(run(*command), "go on with --resume")


def test_simulate_starts_from_the_built_model(run: Any, data: Path, tmp_path: Path) -> None:
    """Also where the plan's seed would give another one here."""
    path = write_plan(tmp_path / "study.yaml", tiny_plan(aggregation={"rounds": 2}))
    assert run("plan", "build", path).status == 0
    ran = run("simulate", path, "--data", data, "--out", tmp_path / "out", "--json")
    assert json.loads(ran.out)["plan_digest"] == load_plan(path).digest
    initial_path(path).write_bytes(b"no model")
    _refused(run("simulate", path, "--data", data, "--out", tmp_path / "other"), "safetensors")


def test_what_simulate_cannot_use_is_one_message(run: Any, data: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "study.yaml", tiny_plan())
    out = ("--out", tmp_path / "out")
    _refused(run("simulate", tmp_path / "none.yaml", "--data", data, *out), "cannot read the plan")
    _refused(run("simulate", path, "--data", tmp_path / "nothing", *out), "folder")
    _refused(run("simulate", path, "--data", tmp_path, *out))
    _refused(run("simulate", path, "--data", data, *out, "--baselines", "best"), "pooled and local")
    _refused(run("simulate", path, "--data", data, *out, "--fault", "x"), "SITE:KIND")
    assert not (tmp_path / "out").exists()


def test_evaluate_finds_what_the_study_found(
    run: Any, data: Path, undisturbed: tuple[Path, StudyResult]
) -> None:
    out, result = undisturbed
    ran = run("evaluate", out / "model.safetensors", "--data", data, "--json")
    assert ran.status == 0
    measured = json.loads(ran.out)
    federated = result.arm("federated")
    assert federated is not None
    assert measured["patients"] == [p.model_dump(mode="json") for p in federated.patients]
    values = [v for v in (p.mean_dice for p in federated.patients) if v is not None]
    assert measured["mean"]["dice"] == pytest.approx(np.mean(values), abs=1e-12)
    low, high = measured["interval_95"]["dice"]
    assert low <= measured["mean"]["dice"] <= high
    assert measured["model"] == result.model_digest
    one = run(
        "evaluate", out / "model.safetensors", "--data", data, "--site", "hospital_c", "--json"
    )
    assert {p["site"] for p in json.loads(one.out)["patients"]} == {"hospital_c"}
    shown = run("evaluate", out / "model.safetensors", "--data", data).out
    assert f"dice: mean {measured['mean']['dice']:.4f}" in shown


def test_masks_lie_on_their_images_and_agree_with_evaluate(
    run: Any, data: Path, undisturbed: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    """One file a hospital: LPS and oblique grids too."""
    out, result = undisturbed
    federated = result.arm("federated")
    assert federated is not None
    rows = [line.split(",") for line in (data / "sites.csv").read_text().splitlines()[1:]]
    held_back = {patient: subject for subject, _, split, patient in rows if split == "val"}
    images = [data / "images" / f"{subject}.nii.gz" for subject in held_back.values()]
    ran = run("predict", out / "model.safetensors", *images, "--out", tmp_path / "masks")
    assert ran.status == 0
    assert len(ran.out.splitlines()) == len(images)
    for scores in federated.patients:
        subject = held_back[scores.patient]
        mask = nibabel.load(tmp_path / "masks" / f"{subject}_mask.nii.gz")
        image = nibabel.load(data / "images" / f"{subject}.nii.gz")
        truth = np.asarray(nibabel.load(data / "labels" / f"{subject}.nii.gz").dataobj)
        assert mask.shape == image.shape
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)
        found = np.asarray(mask.dataobj)
        dice = {
            name: 2
            * np.sum((found == v) & (truth == v))
            / (np.sum(found == v) + np.sum(truth == v))
            for name, v in result.plan.task.labels.items()
        }
        assert mean_of(dice) == pytest.approx(scores.mean_dice, abs=1e-12)


def test_a_file_that_is_no_model_is_one_message(
    run: Any, data: Path, undisturbed: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    image = next((data / "images").iterdir())
    checkpoint = undisturbed[0] / "federated" / "checkpoint.safetensors"
    model = (undisturbed[0] / "model.safetensors").read_bytes()
    (tmp_path / "changed").write_bytes(model[:-1] + bytes([model[-1] ^ 1]))
    (tmp_path / "cut").write_bytes(model[: len(model) // 2])
    for wrong in (tmp_path / "none", image, checkpoint, tmp_path / "changed", tmp_path / "cut"):
        _refused(run("evaluate", wrong, "--data", data))
        _refused(run("predict", wrong, image, "--out", tmp_path / "masks"))
    assert not (tmp_path / "masks").exists()


def test_what_cannot_be_predicted_or_measured_is_one_message(
    run: Any, data: Path, undisturbed: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    model, masks = undisturbed[0] / "model.safetensors", ("--out", tmp_path / "masks")
    _refused(run("predict", model, tmp_path / "none.nii.gz", *masks))
    _refused(run("predict", model, data / "sites.csv", *masks))
    image = next((data / "images").iterdir())
    _refused(run("predict", model, image, image, *masks), "rename")
    _refused(run("evaluate", model, "--data", data, "--split", "test"), "no usable labelled case")
    _refused(run("evaluate", model, "--data", data, "--site", "hospital_z"), "hospital_z")
    _refused(run("evaluate", model, "--data", tmp_path / "none"))
    _refused(run("sites", "--study", data, module="coordinator"), "no study folder")
    _refused(run("check", tmp_path / "none", module="sites"))


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from {module}.cli import main
main()
"""


def _without(absent: set[str], module: str, *arguments: object) -> Ran:
    """Run a command in an interpreter that lacks some packages."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(absent=absent, module=module), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=240,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("package", "options"), [("torch", ()), ("ray", ("--engine", "ray")), ("tensorboard", ())]
)
def test_simulate_names_the_missing_extra_before_anything_is_trained(
    package: str, options: tuple[str, ...], data: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    path = write_plan(tmp_path / "study.yaml", plan)
    command = ("simulate", path, "--data", data, "--out", tmp_path / "out", *options)
    ran = _without({package}, "fedseg", *command)
    _refused(ran, f"'{package}'", "pip install 'fedseg[simulation]'")
    assert not (tmp_path / "out").exists()


SITE_PACKAGES = {"torch", "monai", "nibabel", "pydicom", "highdicom", "scipy", "matplotlib", "ray"}


def test_a_site_without_its_extra_is_told_to_install_it(data: Path) -> None:
    _refused(_without(SITE_PACKAGES, "sites", "check", data), "pip install 'fedseg[site]'")


def test_the_light_half_works_without_the_heavy_packages(tmp_path: Path) -> None:
    absent = SITE_PACKAGES | {"jinja2", "tensorboard", "PIL"}
    plan = tmp_path / "study.yaml"
    assert _without(absent, "fedseg", "plan", "new", plan).status == 0
    assert _without(absent, "fedseg", "plan", "check", plan).status == 0
    built = write_built(tmp_path / "built.json")
    study = tmp_path / "study"
    ran = _without(absent, "coordinator", "init", study, "--host", "localhost", "--plan", built)
    assert ran.status == 0, ran.err
    ran = _without(absent, "coordinator", "sites", "--study", study)
    assert "version 1 of the roll" in ran.out
