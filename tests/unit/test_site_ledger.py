"""A hospital's ledger in its folder: begun at the first private approval, and kept."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_hospitals import NAME, Hospital, approved
from small_private_sites import (
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    ledger_of,
    private_hospital,
)
from typer.testing import CliRunner, Result

from fedseg.chain import verify_chain
from fedseg.errors import DataError, PrivacyError, TrustError
from fedseg.privacy.ledger import patient_key
from fedseg.sole import BusyError, sole
from sites import cli
from sites.approval import approved as approval_of
from sites.cohort import load_cohort
from sites.decision import refuse
from sites.doctor import Half, examine
from sites.enrolment import leave

STUDY = "tiny"


def run(site: Hospital, *args: object, **more: str) -> Result:
    words = [str(arg) for arg in args]
    result = CliRunner().invoke(
        cli.app, ["ledger", *words, "--site", str(site.folder.path)], **more
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def patients_of(site: Hospital, split: str = "train") -> tuple[str, ...]:
    cohort = load_cohort(site.folder, STUDY, site.consortium.plan)
    return cohort.split(split).patients  # type: ignore[arg-type]


def everything_in(folder: Path) -> bytes:
    """All bytes of a folder but the data's names that the cohort record needs."""
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name != "cohort.json")
    return b"".join(p.read_bytes() for p in kept)


def train(site: Hospital) -> None:
    assert site.said(site.ask(site.task("train", 1))).body.kind == "train"


class TestApproval:
    def test_the_first_private_approval_begins_the_ledger(self, site: Hospital) -> None:
        secret = site.folder.ledger_secret.read_bytes()
        book = ledger_of(site).book
        registered = book.studies[STUDY].registered
        assert registered.plan == site.consortium.plan.digest
        for split, named in (("train", registered.train), ("val", registered.val)):
            keys = {patient_key(secret, patient) for patient in patients_of(site, split)}
            assert keys == set(named) and len(named) > 0
        assert [a.mechanism.steps for a in registered.schedule] == [3]
        for path in (site.folder.ledger, site.folder.ledger_secret):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_no_patient_is_named_in_ledger_or_audit(self, site: Hospital) -> None:
        written = site.folder.ledger.read_bytes() + site.folder.audit.read_bytes()
        for patient in patients_of(site):
            assert patient.encode() not in written

    def test_a_study_without_a_guarantee_begins_none(self, tmp_path: Path, data: Path) -> None:
        from small_hospitals import hospital

        site = hospital(tmp_path / "open", data)
        assert not site.folder.ledger.exists() and not site.folder.ledger_secret.exists()
        with pytest.raises(PrivacyError, match="no ledger yet"):
            run(site, "show")

    def test_the_command_approves_or_ends_with_1_and_says_the_rule(
        self, tmp_path: Path, data: Path
    ) -> None:
        site = private_hospital(tmp_path / "site", data, approve=False)
        place = {**os.environ, "FEDSEG_SITE": str(site.folder.path)}
        start = "from sites.cli import main; main()"
        words = ["plan", "approve", STUDY, "--data", str(data), "--by", "me"]
        command = [sys.executable, "-c", start, *words]
        template = site.folder.policy.read_text()
        site.folder.policy.write_text(template.replace("total_epsilon: 10", "total_epsilon: 8"))
        site.folder.policy.write_text(
            site.folder.policy.read_text().replace("total_delta: 0.0001", "total_delta: 0.00001")
        )
        done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "total_epsilon" in done.stderr + done.stdout
        assert approval_of(site.folder, STUDY) is None
        site.folder.policy.write_text(template)
        done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "ledger budget" in done.stdout
        assert STUDY in ledger_of(site).book.studies

    def test_approving_again_changes_nothing(self, site: Hospital, data: Path) -> None:
        rows = len(ledger_of(site).rows)
        approved(site.folder, site.consortium, data)
        assert len(ledger_of(site).rows) == rows

    def test_a_no_closes_the_register_and_a_yes_opens_it(self, site: Hospital, data: Path) -> None:
        train(site)
        refuse(site.folder, STUDY, "second thoughts", site.signing)
        assert ledger_of(site).book.studies[STUDY].closed == "the plan was refused"
        approved(site.folder, site.consortium, data)
        study = ledger_of(site).book
        assert study.studies[STUDY].closed is None
        assert [a.mechanism.steps for a in study.left(STUDY)] == [2]

    def test_leaving_closes_the_register(self, site: Hospital) -> None:
        leave(site.folder, STUDY, site.signing)
        assert ledger_of(site).book.studies[STUDY].closed == "the site left the study"

    def test_leaving_works_where_the_ledger_does_not(self, site: Hospital) -> None:
        site.folder.ledger.write_bytes(b"no ledger")
        with pytest.raises(TrustError, match="nothing of tiny is served any more"):
            leave(site.folder, STUDY, site.signing)
        assert not site.folder.study(STUDY).exists()

    def test_a_lost_ledger_is_not_begun_anew(self, site: Hospital, data: Path) -> None:
        site.folder.ledger.unlink()
        with pytest.raises(TrustError, match="missing"):
            approved(site.folder, site.consortium, data)
        site.folder.ledger_secret.unlink()
        with pytest.raises(TrustError, match=r"ledger\.secret is missing"):
            approved(site.folder, site.consortium, data)
        assert site.audited("plan_refused")[-1].facts["code"] == "ledger"

    def test_an_interrupted_beginning_is_taken_up(self, tmp_path: Path, data: Path) -> None:
        site = private_hospital(tmp_path / "site", data, approve=False)
        site.folder.ledger.touch(mode=0o600)
        approved(site.folder, site.consortium, data)
        assert STUDY in ledger_of(site).book.studies


class TestCommands:
    def test_show_and_budget_in_words_and_numbers(self, site: Hospital) -> None:
        train(site)
        shown = run(site, "show").stdout
        count = len(patients_of(site))
        assert f"training   {count:5} patients  ####" in shown and "....  epsilon" in shown
        assert "no release with noise is planned" in shown
        (study,) = json.loads(run(site, "show", "--json").stdout)["studies"]
        assert (study["train"]["steps_done"], study["train"]["steps_planned"]) == (1, 3)
        assert 0 < study["train"]["epsilon_spent"] < study["train"]["epsilon_planned"] <= 8
        left = json.loads(run(site, "budget", "--json").stdout)
        assert 0 < left["largest_share_spent"] < left["largest_share_promised"] < 1
        assert left["patients"] == count + len(patients_of(site, "val"))
        assert f"{count:6} patients  " in run(site, "budget").stdout

    def test_verify_writes_nothing_and_finds_a_rollback(
        self, site: Hospital, tmp_path: Path
    ) -> None:
        old = shutil.copy(site.folder.ledger, tmp_path / "old.sqlite")
        train(site)
        before = site.folder.audit.read_bytes()
        last = ledger_of(site).rows[-1]
        assert f"row {last.n}, {last.hash}" in run(site, "verify").stdout
        assert json.loads(run(site, "verify", "--json").stdout)["hash"] == last.hash
        shutil.copy(old, site.folder.ledger)
        with pytest.raises(TrustError, match="rolled back"):
            run(site, "verify")
        assert site.folder.audit.read_bytes() == before

    def test_export_gives_every_row_and_no_id(self, site: Hospital, tmp_path: Path) -> None:
        out = tmp_path / "ledger.json"
        run(site, "export", "--out", out)
        rows = json.loads(out.read_text())
        assert [row["n"] for row in rows] == list(range(1, len(rows) + 1))
        assert not any(patient in out.read_text() for patient in patients_of(site))
        assert json.loads(run(site, "export").stdout) == rows
        with pytest.raises(DataError, match="there already"):
            run(site, "export", "--out", out)

    def test_a_restored_backup_has_lost_no_debit(self, site: Hospital, tmp_path: Path) -> None:
        backup = shutil.copy(site.folder.ledger, tmp_path / "backup.sqlite")
        train(site)
        site.folder.ledger.unlink()
        said = run(site, "restore", backup, "--reason", "disk replaced").stdout
        assert "1 debits were written anew" in said
        assert [a.mechanism.steps for a in ledger_of(site).book.left(STUDY)] == [2]
        entry = site.audited("ledger_restored")[-1]
        assert entry.facts["what"] == "restored"
        assert site.said(site.ask(site.task("train", 2))).body.kind == "train"

    def test_nothing_is_restored_under_a_running_trainer(self, site: Hospital) -> None:
        with (
            sole(site.folder.trainer / "lock", "a trainer runs"),
            pytest.raises(BusyError, match="stop the trainer first"),
        ):
            run(site, "restore", "--reason", "too early")

    def test_a_folder_that_went_back_is_charged_to_the_studys_end(self, site: Hospital) -> None:
        run(site, "restore", "--whole-folder", "--reason", "backup of Sunday")
        book = ledger_of(site).book
        assert book.left(STUDY) == () and book.studies[STUDY].closed == "backup of Sunday"
        assert site.code(site.ask(site.task("train", 1))) == "plan"

    def test_a_lost_secret_charges_everyone(self, site: Hospital, data: Path) -> None:
        train(site)
        site.folder.ledger_secret.unlink()
        with pytest.raises(TrustError, match=r"ledger\.secret is missing"):
            run(site, "restore", "--reason", "lost")
        said = run(site, "restore", "--new-secret", "--reason", "lost").stdout
        assert "1 debits are charged to every patient" in said
        assert site.folder.ledger.with_name("ledger.sqlite.old-1").exists()
        approved(site.folder, site.consortium, data)
        assert [a.mechanism.steps for a in ledger_of(site).book.left(STUDY)] == [2]

    def test_a_withdrawn_patient_is_not_used_and_not_named(
        self, site: Hospital, data: Path
    ) -> None:
        train(site)
        gone, *_ = patients_of(site)
        said = run(site, "withdraw", "-", "--reason", "asked for it", input=f"{gone}\n").stdout
        assert "1 steps" in said and gone not in said
        assert gone.encode() not in everything_in(site.folder.path / "trainer")
        gate = site.gate()
        assert site.said(site.ask(site.task("train", 2), gate)).body.kind == "train"
        assert gone not in gate._worker.trainer[1]._patients  # type: ignore[index]
        with pytest.raises(DataError, match="must not name"):
            run(site, "withdraw", gone, "--reason", f"{gone} asked for it")
        with pytest.raises(DataError, match="in no register"):
            run(site, "withdraw", "nobody", "--reason", "a slip")

    def test_a_withdrawn_patients_data_may_be_deleted(
        self, site: Hospital, data: Path, tmp_path: Path
    ) -> None:
        train(site)
        gone, *_ = patients_of(site)
        kept = tmp_path / "data"
        shutil.copytree(data, kept)
        table = kept / "sites.csv"
        lines = [line for line in table.read_text().splitlines() if gone not in line.split(",")]
        table.write_text("\n".join(lines) + "\n")
        with pytest.raises(PrivacyError, match="frozen"):
            approved(site.folder, site.consortium, kept)
        run(site, "withdraw", gone, "--reason", "asked for it")
        approved(site.folder, site.consortium, kept)
        assert gone not in patients_of(site)
        assert site.said(site.ask(site.task("train", 2))).body.kind == "train"

    def test_linked_ids_carry_what_was_spent(self, site: Hospital) -> None:
        train(site)
        old, *_ = patients_of(site)
        run(site, "link", "--old", old, "--new", "new-number", "--reason", "moved")
        ledger = ledger_of(site)
        key = ledger.key_of("new-number")
        assert ledger.book.charges(key) == ledger.book.charges(ledger.key_of(old)) != ()
        run(site, "withdraw", "new-number", "--reason", "asked for it")
        assert ledger_of(site).book.has_withdrawn(ledger.key_of(old))
        with pytest.raises(DataError, match="in no register"):
            run(site, "link", "--old", "nobody", "--new", "new", "--reason", "a slip")

    def test_a_study_that_is_over_is_closed(self, site: Hospital) -> None:
        run(site, "close", STUDY, "--reason", "over")
        assert ledger_of(site).book.studies[STUDY].closed == "over"
        assert site.code(site.ask(site.task("train", 1))) == "plan"

    def test_a_closed_study_still_gives_its_model_to_the_hospital(self, site: Hospital) -> None:
        train(site)
        last = site.consortium.plan.aggregation.rounds
        run(site, "close", STUDY, "--reason", "over")
        for stage in ("enlist", "train", "evaluate"):
            assert site.code(site.ask(site.task(stage, 0 if stage == "enlist" else 2))) == "plan"
            assert "no open register" in str(site.audited("refused")[-1].facts["reason"])
        assert site.said(site.ask(site.task("release", last))).body.kind == "release"
        assert list(site.folder.models.glob(f"{STUDY}*.safetensors"))
        assert len(ledger_of(site).book.debits) == 1, "it costs nobody anything"

    def test_patients_who_withdrew_do_not_count_for_the_smallest_cohort(
        self, site: Hospital, data: Path
    ) -> None:
        text = site.folder.policy.read_text()
        site.folder.policy.write_text(text.replace("smallest_cohort: null", "smallest_cohort: 4"))
        train(site)
        gone, *_ = patients_of(site)
        run(site, "withdraw", gone, "--reason", "asked for it")
        assert site.code(site.ask(site.task("train", 2))) == "plan"
        reason = str(site.audited("refused")[-1].facts["reason"])
        assert "smallest_cohort" in reason and "3 of our patients" in reason
        assert len(ledger_of(site).book.debits) == 1, "nothing was charged for what was refused"
        with pytest.raises(PrivacyError, match=r"smallest_cohort.*3 of our patients"):
            approved(site.folder, site.consortium, data)

    def test_every_command_has_an_example(self) -> None:
        for name in ("show", "budget", "verify", "export", "restore", "link", "withdraw", "close"):
            said = CliRunner().invoke(cli.app, ["ledger", name, "--help"]).stdout
            assert f"fedseg-site ledger {name}" in said, name


class TestDoctor:
    def found(self, site: Hospital, subject: str) -> tuple[str, str]:
        for verdict in examine(site.folder, Half.TRAINER, now=lambda: site.now):
            if verdict.subject == subject:
                return verdict.condition, verdict.says
        raise AssertionError(subject)

    def test_all_is_well(self, site: Hospital) -> None:
        condition, says = self.found(site, "Privacy ledger")
        assert condition == "ok" and "cannot be seen from here" in says
        condition, says = self.found(site, f"Ledger ({STUDY})")
        assert condition == "ok" and "3 steps of its schedule are left" in says

    def test_patients_who_could_not_be_read_are_said_here_alone(
        self, site: Hospital, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        train(site)
        assert self.found(site, f"Ledger ({STUDY})")[0] == "ok"
        monkeypatch.setattr("fedseg.imaging.cache._store", full)
        shutil.rmtree(site.folder.cache)
        assert site.said(site.ask(site.task("train", 2))).body.kind == "train"
        condition, says = self.found(site, f"Ledger ({STUDY})")
        assert condition == "warning" and "4 times a patient who was drawn gave nothing" in says

    def test_what_is_wrong_is_said(self, site: Hospital) -> None:
        site.folder.ledger_secret.chmod(0o640)
        assert self.found(site, "Owners and modes")[0] == "fail"
        assert self.found(site, "Privacy ledger")[0] == "fail"
        site.folder.ledger_secret.chmod(0o600)
        run(site, "close", STUDY, "--reason", "over")
        assert self.found(site, f"Ledger ({STUDY})")[0] == "fail"
        site.folder.ledger.unlink()
        assert self.found(site, "Privacy ledger")[0] == "fail"


def test_the_name_of_the_site_is_that_of_the_phantoms(site: Hospital) -> None:
    assert site.own.name == NAME
    assert approval_of(site.folder, STUDY) is not None
    assert verify_chain(site.folder.audit, site.signing.public)
