"""`fedseg-site train-local`: the simulation's local arm at a hospital, and what it leaves there."""

from __future__ import annotations

import contextlib
import csv
import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_hospitals import (
    NAME,
    STUDY,
    Consortium,
    Hospital,
    approved,
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    hospital,
    phantoms,
    tiny_built,
)
from small_private_sites import private_hospital
from tiny_studies import environment
from typer.testing import CliRunner, Result

from fedseg.alone import plan_alone
from fedseg.arrays import digest_of
from fedseg.errors import DataError, FedsegError, PlanError, StorageError
from fedseg.evaluation.validation import ValidationResult
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.phantoms import write_phantoms
from fedseg.learning import alone as rounds
from fedseg.learning.stopping import TooFewError
from fedseg.modelfile import load_model, save_model
from fedseg.plan import StudyPlan, parse_plan
from fedseg.planfile import build
from fedseg.promise import NoPrivacy
from fedseg.simulation.study import Options, simulate
from sites import cli
from sites.cohort import load_cohort
from sites.heldback import SEEN

FILE = f"{STUDY}-local.safetensors"


def run(*words: object, answer: str = "") -> Result:
    """A command; what it raises is raised."""
    result = CliRunner(mix_stderr=False).invoke(cli.app, list(map(str, words)), input=answer)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def at(site: Hospital, *words: object) -> Result:
    """`train-local` at a site."""
    return run("train-local", STUDY, *words, "--site", site.folder.path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms"), patients=6)


def changed(plan: StudyPlan, **sections: dict[str, Any]) -> StudyPlan:
    """A plan with some fields of some sections changed."""
    parts = {name: getattr(plan, name).model_copy(update=to) for name, to in sections.items()}
    return plan.model_copy(update=parts)


@pytest.mark.slow
def test_the_file_is_that_of_a_simulations_local_arm(tmp_path: Path) -> None:
    """Byte for byte: three hospitals in the simulation, one of them by itself at its site."""
    three = write_phantoms(
        tmp_path / "data", sites=3, patients_per_site=(5, 5, 5), shape=(20, 20, 20)
    )
    plan, model = tiny_built()
    plan = changed(plan, aggregation={"weight_averaging": 0.5, "minimum_sites": 2})
    plan = parse_plan(plan.canonical_bytes)  # as a bundle brings it
    own = hospital(tmp_path / "site", three, Consortium(plan, model))
    options = Options(baselines=("local",), finetune=None, initial=model)
    simulate(plan, three, tmp_path / "out", options)
    at(own)
    simulated = tmp_path / "out" / f"model-local-{NAME}.safetensors"
    assert (own.folder.models / FILE).read_bytes() == simulated.read_bytes()


def test_the_model_stays_and_the_audit_has_it(site: Hospital) -> None:
    said = at(site).stdout
    plan, path = site.consortium.plan, site.folder.models / FILE
    header, model = load_model(path)
    assert (header.arm, header.rounds, header.released) == ("local", plan.aggregation.rounds, None)
    assert header.stays and header.plan == plan_alone(plan)
    assert header.model_digest == digest_of(model) != plan.built.digest
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "does not leave this hospital" in said and "steps on 4 patients" in said
    (entry,) = site.audited("trained_locally")
    facts = entry.facts
    assert (facts["plan"], facts["model"]) == (plan.digest, header.model_digest)
    assert (facts["file"], facts["training_patients"]) == (FILE, 4)
    assert facts["steps"] == plan.aggregation.rounds * plan.training.steps_per_round
    assert [each.name for each in site.folder.models.iterdir()] == [FILE]
    (listed,) = json.loads(run("models", "--json", "--site", site.folder.path).stdout)["models"]
    assert (listed["study"], listed["arm"], listed["stays"]) == (STUDY, "local", True)


def test_no_study_starts_from_it(site: Hospital, tmp_path: Path) -> None:
    at(site)
    file = tmp_path / "study.yaml"
    plan = site.consortium.plan.model_dump(mode="json", exclude={"initial"})
    file.write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="does not leave that hospital"):
        build(file, site.folder.models / FILE)


def test_nobody_who_is_held_back_is_read(site: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    read = set()
    load = CaseCache.load

    def noting(self: CaseCache, case: Any, label_map: Any = ()) -> Any:
        read.add((case.patient, case.split))
        return load(self, case, label_map)

    monkeypatch.setattr(CaseCache, "load", noting)
    at(site)
    assert read and {split for _, split in read} == {"train"}


def test_a_kill_changes_no_byte_and_repeats_no_round(
    site: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(site, "--out", tmp_path / "whole")
    trained, train = [], rounds.train_by_strategy

    def killed_in(last: int) -> Callable[..., Any]:
        def training(*words: Any, **how: Any) -> Any:
            trained.append(how["round_"])
            if how["round_"] == last:
                raise KeyboardInterrupt
            return train(*words, **how)

        return training

    again = tmp_path / "again"
    for last in (3, 0):
        monkeypatch.setattr(rounds, "train_by_strategy", killed_in(last))
        words = ["train-local", STUDY, "--out", str(again), "--site", str(site.folder.path)]
        CliRunner().invoke(cli.app, words)
        assert again.exists() == (last == 0)
    assert trained == [1, 2, 3, *range(3, site.consortium.plan.aggregation.rounds + 1)]
    assert again.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not again.with_name("again.unfinished").exists()


def size_and_time(path: Path) -> tuple[int, int] | None:
    """What shows that a file was written anew; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return None


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as something is kept, again and again, until the command comes to its end."""
    plan, model = tiny_built()
    plan = changed(plan, aggregation={"rounds": 6}, training={"steps_per_round": 20})
    site = hospital(tmp_path / "site", data, Consortium(plan, model))
    whole, again = tmp_path / "whole", tmp_path / "again"
    at(site, "--out", whole)
    kept, kills = again.with_name("again.unfinished"), 0
    words = ["train-local", STUDY, "--out", str(again), "--site", str(site.folder.path)]
    while not again.exists():
        before = size_and_time(kept)
        process = subprocess.Popen(
            [sys.executable, "-c", "from sites.cli import main; main()", *words],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and size_and_time(kept) == before:
            time.sleep(0.001)
        if process.poll() is None and kills < 3:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 2 and not kept.exists()
    assert again.read_bytes() == whole.read_bytes()


def test_what_was_begun_with_other_patients_is_not_gone_on_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = private_hospital(tmp_path / "site", data)

    def full(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr("sites.alone.save_model", full)
        CliRunner().invoke(cli.app, ["train-local", STUDY, "--site", str(site.folder.path)])
    gone = load_cohort(site.folder, STUDY, site.consortium.plan).split("train").patients[0]
    where = ("--site", site.folder.path)
    run("ledger", "withdraw", "-", "--reason", "asked for it", *where, answer=f"{gone}\n")
    with pytest.raises(DataError, match=r"another training .* remove it to begin anew"):
        at(site)
    (site.folder.models / f"{FILE}.unfinished").unlink()
    said = at(site).stdout
    assert "1 patients who withdrew were left out" in said and "steps on 3 patients" in said
    header, _ = load_model(site.folder.models / FILE)
    assert isinstance(header.plan.privacy, NoPrivacy) and header.private is None and header.stays


def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    site: Hospital, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--site", site.folder.path)
    with pytest.raises(DataError, match="has not joined 'other'"):
        run("train-local", "other", *where)
    with pytest.raises(DataError, match="is not the model that tiny starts from"):
        other = {name: values + 1 for name, values in site.consortium.model.items()}
        save_model(tmp_path / "other", site.consortium.plan, other, arm="initial", rounds=0)
        at(site, "--initial", tmp_path / "other")
    with pytest.raises(DataError, match="is there already"):
        at(site, "--out", site.folder.policy)
    with monkeypatch.context() as unread:
        unread.setattr("sites.own_patients.recorded_cohort", pytest.fail)
        with pytest.raises(FedsegError, match="cuda"):
            at(site, "--device", "cuda:77")
    site.folder.approval(STUDY).unlink()
    with pytest.raises(DataError, match="no data are approved for this plan"):
        at(site)
    assert not list(site.folder.models.iterdir()) and not site.audited("trained_locally")


def test_a_place_that_cannot_be_written_is_refused_before_a_round(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: Any, **__: Any) -> None:
        pytest.fail("a round was trained for nothing")

    monkeypatch.setattr(rounds, "train_by_strategy", trained)
    with pytest.raises(StorageError, match="cannot write"):
        at(site, "--out", site.folder.policy / "model")
    assert not site.audited("trained_locally")


def test_one_labelled_patient_is_too_few(tmp_path: Path) -> None:
    few = phantoms(tmp_path / "phantoms", patients=3)
    own = hospital(tmp_path / "site", few)
    assert len(load_cohort(own.folder, STUDY, own.consortium.plan).split("train").patients) == 1
    with pytest.raises(TooFewError, match=r"at least 2 labelled .* there is 1"):
        at(own)
    assert not list(own.folder.models.iterdir())


def test_a_start_that_no_seed_gives_is_brought_along(data: Path, tmp_path: Path) -> None:
    plan, model = tiny_built()
    trained = {name: values * 0.5 for name, values in model.items()}
    start = plan.built.model_copy(update={"digest": digest_of(trained)})
    plan = plan.model_copy(update={"initial": start})
    site = hospital(tmp_path / "site", data, Consortium(plan, trained))
    with pytest.raises(DataError, match="--initial"):
        at(site)
    save_model(tmp_path / "start", plan, trained, arm="initial", rounds=0)
    at(site, "--initial", tmp_path / "start")
    assert (site.folder.models / FILE).exists()


def read(site: Hospital) -> ValidationResult:
    """The newest validation."""
    paths = site.folder.validations.glob("*/validation.json")
    return ValidationResult.model_validate_json(max(paths).read_bytes())


def test_validation_compares_it_with_the_shared_and_the_fine_tuned_one(site: Hospital) -> None:
    """All three are of one task, though not of one plan, and of patients who were approved."""
    plan, shared = site.consortium.plan, site.consortium.model
    save_model(site.folder.model(STUDY), plan, shared, arm="federated", rounds=3)
    other = plan.model_copy(
        update={"task": plan.task.model_copy(update={"patch_size": (8, 8, 16)})}
    )
    tuned = {name: values * 0.9 for name, values in shared.items()}
    file, digest = site.folder.models / f"{STUDY}-finetuned.safetensors", digest_of(shared)
    save_model(file, other, tuned, arm="finetuned", rounds=3, released=digest)
    at(site)
    where = ("--site", site.folder.path)
    run("validate", f"{STUDY}-local", STUDY, f"{STUDY}-finetuned", *where)
    result = read(site)
    assert [each.name for each in result.candidates] == ["local", "global", "finetuned"]
    assert result.candidates[0].trained_on == "patients of this hospital alone"
    assert not [words for words in result.warnings if "prepared" in words or "plans" in words]


def test_models_whose_images_are_prepared_differently_are_said_to_be(site: Hospital) -> None:
    plan, shared = site.consortium.plan, site.consortium.model
    save_model(site.folder.model(STUDY), plan, shared, arm="federated", rounds=3)
    coarse = changed(plan, task={"spacing_mm": (2.0, 1.0, 1.0)})
    other = {name: values * 0.9 for name, values in shared.items()}
    save_model(site.folder.models / "other.safetensors", coarse, other, arm="local", rounds=3)
    run("validate", STUDY, "other", "--site", site.folder.path)
    (said,) = [words for words in read(site).warnings if "not prepared alike" in words]
    assert "spacing_mm is global: [1.0, 1.0, 1.0]; local: [2.0, 1.0, 1.0]" in said


def test_nobody_is_held_back_for_a_model_that_was_trained_on_him(tmp_path: Path) -> None:
    """A patient of train is held back later: not for models of before, but for one of after."""
    plan, shared = tiny_built()
    data = phantoms(tmp_path / "data", patients=6)
    site = hospital(tmp_path / "site", data, Consortium(plan, shared))
    save_model(site.folder.model(STUDY), plan, shared, arm="federated", rounds=3)
    at(site)
    where = ("--site", site.folder.path)
    run("validate", STUDY, f"{STUDY}-local", *where)
    held = {each.patient for each in read(site).patients}
    assert not read(site).left_out
    table = data / "sites.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    moved = next(row for row in rows if row["split"] == "train")
    own_split = next(row["split"] for row in rows if row["patient"] in held)
    before = ",".join(moved.values())
    after = ",".join((moved | {"split": own_split}).values())
    table.write_text(table.read_text().replace(before, after))
    approved(site.folder, site.consortium, data)
    at(site, "--out", site.folder.models / "again.safetensors")
    for models in ([STUDY], [f"{STUDY}-local"], [f"{STUDY}-local", "again"]):
        run("validate", *models, *where)
        assert {each.patient for each in read(site).patients} == held
        assert read(site).left_out == {SEEN: 1}
    run("validate", "again", *where)
    assert {each.patient for each in read(site).patients} == {*held, moved["patient"]}
    for note in site.folder.trained.iterdir():
        note.write_text("{}")
    run("validate", STUDY, *where)
    (said,) = [words for words in read(site).warnings if "trainer/trained" in words]
    assert said.startswith("global: the note")
