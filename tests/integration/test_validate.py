"""`fedseg-site validate` as a hospital meets it: real models, real phantoms, real processes."""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_hospitals import Consortium, Hospital, hospital
from tiny_studies import environment, fedseg, tiny_plan
from typer.testing import CliRunner

from fedseg.errors import DataError, FedsegError
from fedseg.evaluation.evaluate import evaluate_cohort, labelled
from fedseg.evaluation.validation import ValidationResult
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort
from fedseg.imaging.manifests import read_manifest
from fedseg.imaging.phantoms import write_phantoms
from fedseg.learning.local import train_round
from fedseg.modelfile import load_model, save_model
from fedseg.models.zoo import build_network, initial_model, load_tensors, state_tensors
from sites.acceptance import opinion_of
from sites.cli import app
from sites.patients import PreparedPatients

THRESHOLDS = "acceptance:\n  dice_at_least: 0.05\n  failures_share_at_most: 1.0\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven patients of one hospital, seven of them held back, with scanner and sex."""
    folder = write_phantoms(
        tmp_path_factory.mktemp("data") / "d",
        sites=1,
        patients_per_site=(11,),
        shape=(20, 20, 20),
    )
    rows = list(csv.DictReader((folder / "sites.csv").read_text().splitlines()))
    for i, row in enumerate(rows):
        row |= {"split": "train" if i < 4 else "test", "scanner": "B" if i > 8 else "A", "sex": ""}
    with (folder / "sites.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Consortium, Path]:
    """A study whose shared model was trained a little, and a local one trained less."""
    plan = tiny_plan(training={"steps_per_round": 25}, evaluation={"tolerance_mm": 2.0})
    record, model = initial_model(plan)
    plan = plan.model_copy(update={"initial": record})
    folder = tmp_path_factory.mktemp("models")
    network = build_network(plan.model, plan.task)
    cohort = Cohort("hospital_a", read_manifest(data, plan.task).cases).split("train")
    patients = PreparedPatients(cohort, CaseCache(folder / "cache", plan.task))
    load_tensors(network, model)
    for round_, (name, arm) in enumerate((("local", "local"), ("tiny", "federated")), start=1):
        train_round(network, patients, plan, round_=round_, site="hospital_a")
        save_model(folder / f"{name}.safetensors", plan, state_tensors(network), arm=arm, rounds=3)
    return Consortium(plan, dict(model)), folder


@pytest.fixture
def member(data: Path, study: tuple[Consortium, Path], tmp_path: Path) -> Hospital:
    """A site that approved the study, with both models and thresholds."""
    consortium, models = study
    one = hospital(tmp_path / "site", data, consortium)
    one.folder.policy.write_text(f"privacy_none: true\nsuppress_below: 3\n{THRESHOLDS}")
    for file in models.glob("*.safetensors"):
        (one.folder.models / file.name).write_bytes(file.read_bytes())
    return one


def ran(*words: object) -> str:
    """What a command says, run in this process."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def results(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/validation.json"))


def read(path: Path) -> ValidationResult:
    return ValidationResult.model_validate_json(path.read_bytes())


def without_times(result: ValidationResult) -> dict[str, Any]:
    """All but what may differ from one run to another."""
    value = result.model_dump(mode="json")
    del value["created"]
    for each in (*value["patients"], *value["summaries"]):
        del each["seconds"]
    return value


def test_a_site_compares_its_models_and_the_audit_knows(member: Hospital) -> None:
    folder = member.folder
    said = ran(
        *("validate", "tiny", "--local", folder.models / "local.safetensors"),
        *("--lesions", "head", "--site", folder.path),
    )
    (path,) = results(folder.validations)
    result = read(path)
    assert [(c.name, c.arm) for c in result.candidates] == [
        ("global", "federated"),
        ("local", "local"),
    ]
    assert (result.site, result.split, result.tolerance_mm) == ("hospital_a", "test", 2.0)
    assert len(result.patients) == 14 and result.lesion_labels == ("head",)
    assert result.thresholds is not None and result.verdict.decision in ("go", "undecided", "no-go")
    assert result.verdict.checks and result.summary("global").labels["head"].lesions is not None
    assert {(g.by, g.value, g.suppressed) for g in result.subgroups} == {
        ("scanner", "A", False),
        ("scanner", "B", True),
        ("sex", "unknown", False),
    }
    assert "--data" not in " ".join(result.warnings)
    (entry,) = member.audited("validated")
    assert entry.facts["validation"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry.facts["name"] == path.parent.name and entry.facts["patients"] == 7
    assert entry.facts["models"] == [c.model_digest for c in result.candidates]
    page = path.with_name("report.html").read_text()
    assert "data:image/jpeg;base64" in page and result.patients_of("global")[0].patient in page
    modes = {stat.S_IMODE(p.stat().st_mode) for p in folder.validations.rglob("*") if p.is_file()}
    assert modes == {0o600}
    assert "global less local: Dice" in said and path.parent.name in said.replace("\n", "")
    opinion = opinion_of(folder, result.candidates[0].model_digest)
    assert opinion is not None
    assert (opinion.name, opinion.digest) == (path.parent.name, entry.facts["validation"])


def test_patients_whom_the_site_did_not_approve_are_said_to_be_such(
    member: Hospital, data: Path
) -> None:
    ran("validate", "tiny", "--data", data, "--site", member.folder.path)
    newest = max(results(member.folder.validations), key=lambda path: read(path).created)
    assert "not those approved with the study's plan" in read(newest).warnings[0]


def test_scores_are_those_of_fedseg_evaluate(
    data: Path, study: tuple[Consortium, Path], tmp_path: Path
) -> None:
    _, models = study
    out = tmp_path / "out"
    command = ("validate", models / "tiny.safetensors", "--data", data, "--row", "hospital_a")
    ran(*command, "--out", out, "--site", tmp_path)
    result = read(out / "validation.json")
    assert result.thresholds is None and result.verdict.decision == "undecided"
    assert "no thresholds were set" in " ".join(result.verdict.reasons)
    plan = study[0].plan
    network = build_network(plan.model, plan.task)
    load_tensors(network, load_model(models / "tiny.safetensors")[1])
    cohort = labelled(Cohort("here", read_manifest(data, plan.task).cases).split("test"))
    cache = CaseCache(tmp_path / "cache", plan.task)
    scores = evaluate_cohort(network, cohort, cache, plan, ("dice", "hd95", "nsd"), native=True)
    own = {p.patient: p for p in result.patients}
    for each in scores:
        assert own[each.patient].dice == pytest.approx(each.mean_dice)
        for label, value in each.hd95_mm.items():
            assert own[each.patient].labels[label].hd95_mm == value
    with pytest.raises(DataError, match="name another folder"):
        ran(*command, "--out", out, "--site", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_validation_goes_on_and_ends_the_same(member: Hospital) -> None:
    folder = member.folder
    command = ("validate", "tiny", "local", "--site", str(folder.path))
    process = subprocess.Popen(
        [sys.executable, "-c", "from sites.cli import main; main()", *command],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    measured, until = folder.validations / "measured", time.monotonic() + 120
    while len(list(measured.glob("*.json"))) < 3 and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in measured.glob("*.json")}
    assert len(kept) >= 3 and not results(folder.validations)
    victim = sorted(kept)[0]
    victim.write_text("{")
    os.utime(victim, ns=(0, 0))
    assert fedseg(*command, module="sites").returncode == 0
    first = read(results(folder.validations)[0])
    after = {path: path.stat().st_mtime_ns for path in measured.glob("*.json")}
    assert len(after) == 14
    assert {p: t for p, t in after.items() if p in kept and p != victim} == {
        p: t for p, t in kept.items() if p != victim
    }
    for path in after:
        path.unlink()
    time.sleep(1)
    assert fedseg(*command, module="sites").returncode == 0
    assert without_times(read(results(folder.validations)[-1])) == without_times(first)


@pytest.mark.slow
def test_thresholds_that_moved_after_a_look_are_told(member: Hospital) -> None:
    folder = member.folder
    ran("validate", "tiny", "--site", folder.path)
    folder.policy.write_text(folder.policy.read_text().replace("0.05", "0.01"))
    assert "was not set beforehand" in ran("validate", "tiny", "--site", folder.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "--lesions", "liver"), "the labels are: head, body"),
        (("tiny", "tiny"), "the same model"),
        ((), "name at least one model"),
        (("tiny", "--out", "x"), "without a site"),
        (("nothing",), "nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(
    member: Hospital, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(FedsegError, match=message):
        ran("validate", *arguments, "--site", member.folder.path)
    assert not results(member.folder.validations)


def test_a_device_that_is_not_there_is_refused_before_the_data_are_read(
    member: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sites.heldback.recorded_cohort", pytest.fail)
    with pytest.raises(FedsegError, match="cuda"):
        ran("validate", "tiny", "--device", "cuda:77", "--site", member.folder.path)


def test_a_refusal_leaves_no_folder(
    data: Path, study: tuple[Consortium, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, models = study
    out, cases = tmp_path / "out", ("--data", data, "--row", "hospital_a", "--site", tmp_path)
    command = ("validate", models / "tiny.safetensors", *cases, "--out", out)
    for more in (("--lesions", "liver"), ("--device", "cuda:77")):
        with pytest.raises(FedsegError):
            ran(*command, *more)
        assert not out.exists()

    def unreadable(*_: Any) -> None:
        raise DataError("the image cannot be read")

    monkeypatch.setattr("sites.validating.measure_case", unreadable)
    with pytest.raises(DataError, match="cannot be read"):
        ran(*command)
    assert not out.exists()
