"""`fedseg-site finetune` at a hospital and with a data folder: whom it uses, and what it leaves."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_hospitals import NAME, STUDY, Hospital, copied, hospital, phantoms
from small_private_sites import private_hospital
from typer.testing import CliRunner, Result

from fedseg.arrays import digest_of
from fedseg.errors import DataError, FedsegError
from fedseg.learning.stopping import TooFewError
from fedseg.modelfile import load_model, save_model
from fedseg.models.zoo import initial_model
from sites import cli
from sites import finetuning as core
from sites.cohort import load_cohort

QUICK = ("--steps", 8, "--check-every", 4, "--learning-rate", 0.02)
FILE = f"{STUDY}-finetuned.safetensors"


def run(*words: object) -> Result:
    """A command; what it raises is raised."""
    result = CliRunner(mix_stderr=False).invoke(cli.app, list(map(str, words)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def at(site: Hospital, *words: object) -> Result:
    """`finetune` at a site."""
    return run("finetune", *words, *QUICK, "--site", site.folder.path)


def raising(error: Exception) -> Callable[..., None]:
    """A function that raises."""

    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms"), patients=6)


@pytest.fixture(scope="module")
def founded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return received(hospital(tmp_path_factory.mktemp("founded") / "site", data))


@pytest.fixture
def site(founded: Hospital, tmp_path: Path) -> Hospital:
    return copied(founded, tmp_path / "site")


def received(site: Hospital) -> Hospital:
    """A site whose study's model has arrived."""
    plan, model = site.consortium.plan, site.consortium.model
    save_model(site.folder.model(STUDY), plan, model, arm="federated", rounds=3)
    return site


def test_a_hospital_fine_tunes_on_what_it_approved(site: Hospital) -> None:
    said = at(site, STUDY).stdout
    path = site.folder.models / FILE
    header, model = load_model(path)
    shared = digest_of(site.consortium.model)
    assert (header.arm, header.released, header.rounds) == ("finetuned", shared, 3)
    assert header.stays and header.model_digest == digest_of(model) != shared
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "does not leave this hospital" in said and "3 patients; 1 others" in said
    (entry,) = site.audited("finetuned")
    facts = entry.facts
    assert (facts["start"], facts["model"]) == (shared, header.model_digest)
    assert (facts["training_patients"], facts["stopping_patients"]) == (3, 1)
    assert not list(site.folder.models.glob("*.unfinished"))
    value = json.loads(run("models", "--json", "--site", site.folder.path).stdout)
    (listed,) = [each for each in value["models"] if each["file"] == FILE]
    assert (listed["arm"], listed["stays"], listed["state"]) == ("finetuned", True, "not decided")


def test_nobody_who_is_kept_for_the_end_is_read(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedseg.imaging.cache import CaseCache

    read = set()
    load = CaseCache.load

    def noting(self: CaseCache, case: Any, label_map: Any = ()) -> Any:
        read.add((case.patient, case.split))
        return load(self, case, label_map)

    monkeypatch.setattr(CaseCache, "load", noting)
    at(site, STUDY)
    assert len(read) == 4 and {split for _, split in read} == {"train"}


def test_nothing_is_overwritten(site: Hospital) -> None:
    at(site, STUDY)
    before = (site.folder.models / FILE).read_bytes()
    with pytest.raises(DataError, match="is there already"):
        at(site, STUDY)
    assert (site.folder.models / FILE).read_bytes() == before
    with pytest.raises(DataError, match="is there already"):
        at(site, STUDY, "--out", site.folder.model(STUDY))


def test_a_device_that_is_not_there_is_refused_before_the_data_are_read(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sites.own_patients.recorded_cohort", pytest.fail)
    with pytest.raises(FedsegError, match="cuda"):
        at(site, STUDY, "--device", "cuda:77")


def test_no_model_is_there_that_the_audit_does_not_have(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sites.finetuning.record", raising(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        at(site, STUDY)
    assert not (site.folder.models / FILE).exists()
    monkeypatch.undo()
    at(site, STUDY)
    (entry,) = site.audited("finetuned")
    assert entry.facts["model"] == load_model(site.folder.models / FILE)[0].model_digest


def test_a_sites_images_are_prepared_in_its_own_folder(site: Hospital, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--cache is for a data folder without a site"):
        at(site, STUDY, "--cache", tmp_path / "elsewhere")


def test_equal_seeds_give_equal_files_and_a_kill_changes_none(
    site: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(site, STUDY, "--out", tmp_path / "whole")
    save = core.save_finetuned

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(core, "save_finetuned", killed)
    CliRunner().invoke(
        cli.app,
        ["finetune", STUDY, *map(str, QUICK), "--out", str(tmp_path / "again"),
         "--site", str(site.folder.path)],
    )  # fmt: skip
    assert (tmp_path / "again.unfinished").exists() and not (tmp_path / "again").exists()
    monkeypatch.setattr(core, "save_finetuned", save)
    at(site, STUDY, "--out", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    at(site, STUDY, "--out", tmp_path / "other", "--seed", 5)
    assert load_model(tmp_path / "other")[1].keys() == load_model(tmp_path / "whole")[1].keys()
    assert (tmp_path / "other").read_bytes() != (tmp_path / "whole").read_bytes()


def test_where_nothing_is_better_no_file_is_written_and_the_audit_says_so(site: Hospital) -> None:
    """A learning rate by which no mask changes."""
    words = ("finetune", STUDY, "--steps", 2, "--check-every", 2, "--learning-rate", 1e-9)
    with pytest.raises(DataError, match="nothing was better"):
        run(*words, "--site", site.folder.path)
    assert [path.name for path in site.folder.models.iterdir()] == [f"{STUDY}.safetensors"]
    assert site.audited("finetuned_in_vain")[0].facts["model"] is None


def test_withdrawn_patients_are_left_out(data: Path, tmp_path: Path) -> None:
    site = received(private_hospital(tmp_path / "site", data))
    gone = load_cohort(site.folder, STUDY, site.consortium.plan).split("train").patients[0]
    folder = ("--site", site.folder.path)
    done = CliRunner().invoke(
        cli.app,
        ["ledger", "withdraw", "-", "--reason", "asked for it", *map(str, folder)],
        input=f"{gone}\n",
    )
    assert done.exit_code == 0, done.output
    said = at(site, STUDY).stdout
    assert "1 patients who withdrew were left out" in said and "2 patients; 1 others" in said
    header, _ = load_model(site.folder.models / FILE)
    assert header.plan.private is not None and header.private is False and header.stays
    assert gone not in site.folder.audit.read_text()


def test_a_researcher_fine_tunes_on_a_folder_without_a_site(
    data: Path, site: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = shutil.copy(site.folder.model(STUDY), tmp_path / "model.safetensors")
    words = ("finetune", model, "--data", data, *QUICK)
    with pytest.raises(DataError, match="--row"):
        run(*words)
    assert "wrote" in run(*words, "--row", NAME).stdout
    header, _ = load_model(tmp_path / FILE)
    assert header.arm == "finetuned"
    run(*words, "--row", NAME, "--kind", "norms", "--out", "norms.safetensors")
    assert (tmp_path / "norms.safetensors").exists()


def test_data_that_do_not_fit_the_models_task_are_refused(
    data: Path, site: Hospital, tmp_path: Path
) -> None:
    plan = site.consortium.plan
    channels = (*plan.task.channels, plan.task.channels[0].model_copy(update={"name": "T2"}))
    other = plan.model_copy(
        update={"task": plan.task.model_copy(update={"channels": channels}), "initial": None}
    )
    save_model(tmp_path / "other", other, initial_model(other)[1], arm="federated", rounds=1)
    with pytest.raises(DataError):
        run("finetune", tmp_path / "other", "--data", data, "--row", NAME, *QUICK)
    with pytest.raises(DataError, match="no data are approved here"):
        at(site, tmp_path / "other")


def test_too_few_patients_are_refused(tmp_path: Path) -> None:
    few = phantoms(tmp_path / "phantoms", patients=4)
    site = received(hospital(tmp_path / "site", few))
    with pytest.raises(TooFewError, match="at least 3"):
        at(site, STUDY)
    assert not site.audited("finetuned")
