"""Who tries to get more out of a hospital than its patients' budget pays for, or its policy allows.

Each is refused with a typed error, and the audit has the reason; outside one coarse code is seen.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from small_hospitals import Consortium, Hospital, approved, joined, phantoms
from small_private_sites import (
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    ledger_of,
    private_built,
    private_hospital,
    refusals,
)
from typer.testing import CliRunner

from fedseg.errors import FedsegError, PrivacyError, TrustError
from fedseg.imaging.cache import CaseCache
from fedseg.privacy.schedule import mechanism_of
from sites import cli
from sites.approval import Approval, frozen_record
from sites.approval import approved as approval_of
from sites.cohort import choose_cohort, load_cohort
from sites.notes import write_note
from sites.policy import TEMPLATE, limits_of, load_policy
from sites.spending import Account
from sites.trainer import Trainer
from sites.worker import make_trainer

STUDY = "tiny"


def policy(**lines: object) -> str:
    """The template with some lines changed."""
    text = TEMPLATE
    for name, value in lines.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}:")]
        text = text.replace(line, f"{name}: {value}")
    return text


def refused(site: Hospital, code: str, reason: str, **task: Any) -> None:
    """A task is refused with a code and nothing else, and the audit says why."""
    before = site.trained
    assert site.code(site.ask(site.task(**task))) == code
    assert site.trained == before
    assert reason in refusals_of_tasks(site)[-1]


def refusals_of_tasks(site: Hospital) -> list[str]:
    return [str(entry.facts["reason"]) for entry in site.audited("refused")]


class TestApproval:
    @pytest.mark.parametrize(
        ("lines", "changes", "reason"),
        [
            ({"largest_epsilon": 7.9}, {}, "policy: .*largest_epsilon"),
            ({"largest_delta": 1e-6}, {}, "policy: .*largest_delta"),
            ({"total_epsilon": 7.9}, {}, "policy: .*total_epsilon"),
            ({"total_epsilon": "null"}, {}, "policy: .*total_epsilon"),
            ({"total_epsilon": 8.0, "total_delta": 1e-5}, {}, "ledger: .*total_epsilon"),
            ({"smallest_cohort": 5}, {}, "policy: .*smallest_cohort"),
            ({}, {"weaker": 0.98}, "ledger: .*noise is too weak"),
            ({}, {"weaker": 0.1}, "ledger: .*noise is too weak"),
            ({}, {"outputs": {"counts": "plain"}}, "policy: .*counts"),
            ({}, {"outputs": {"losses": "suppressed"}}, "policy: .*losses"),
            ({}, {"outputs": {"metrics": "plain"}}, "policy: .*metrics"),
            ({"counts": "suppressed"}, {"outputs": {"counts": "plain"}}, "policy: .*counts"),
        ],
    )
    def test_what_policy_or_ledger_forbid_is_not_approved(
        self,
        tmp_path: Path,
        data: Path,
        lines: dict[str, object],
        changes: dict[str, Any],
        reason: str,
    ) -> None:
        if "outputs" in changes:
            closed = {"counts": "none", "losses": "none", "metrics": "none"}
            changes = {"outputs": closed | changes["outputs"]}
        site = private_hospital(
            tmp_path / "site", data, approve=False, policy=policy(**lines), **changes
        )
        with pytest.raises(PrivacyError):
            approved(site.folder, site.consortium, data)
        assert approval_of(site.folder, STUDY) is None
        (said,) = refusals(site)
        kind, _, words = reason.partition(": .*")
        assert said.startswith(f"{kind}: ") and words in said
        assert site.code(site.ask(site.task("train", 1))) == "plan"

    def test_a_second_study_may_not_take_what_is_not_left(self, site: Hospital, data: Path) -> None:
        other = Consortium(*private_built(study="other"))
        joined(site.folder, other, other.roll(site.own))
        with pytest.raises(PrivacyError, match=r"too little.*total_epsilon"):
            approved(site.folder, other, data)
        assert approval_of(site.folder, "other") is None
        assert "ledger: 4 of the 6 patients have too little" in refusals(site)[-1]
        small = Consortium(*private_built(study="small", epsilon=1.0))
        joined(site.folder, small, small.roll(site.own))
        approved(site.folder, small, data)

    def test_another_name_of_the_cohort_does_not_reset_what_was_spent(
        self, site: Hospital, data: Path, tmp_path: Path
    ) -> None:
        """The same patients in another folder, in other splits, are the same patients."""
        moved = tmp_path / "moved"
        shutil.copytree(data, moved)
        table = moved / "sites.csv"
        table.write_text(table.read_text().replace(",val,", ",train,"))
        other = Consortium(*private_built(study="other"))
        joined(site.folder, other, other.roll(site.own))
        with pytest.raises(PrivacyError, match="4 of the 6 patients have too little"):
            approved(site.folder, other, moved)


class TestTask:
    @pytest.mark.parametrize(
        ("lines", "reason"),
        [
            ({"largest_epsilon": 7.9}, "largest_epsilon"),
            ({"total_delta": 1e-6}, "total_delta"),
            ({"smallest_cohort": 5}, "smallest_cohort"),
        ],
    )
    def test_a_policy_that_was_tightened_holds_from_the_next_task(
        self, site: Hospital, lines: dict[str, object], reason: str
    ) -> None:
        gate = site.gate()
        assert site.said(site.ask(site.task("train", 1), gate)).body.kind == "train"
        site.folder.policy.write_text(policy(**lines))
        assert site.code(site.ask(site.task("train", 2), gate)) == "plan"
        assert reason in refusals_of_tasks(site)[-1]

    def test_an_output_that_policy_forbids_since_does_not_leave(
        self, tmp_path: Path, data: Path
    ) -> None:
        outputs = {"counts": "plain", "losses": "plain", "metrics": "plain"}
        opened = policy(counts="plain", losses="plain", metrics="plain")
        site = private_hospital(tmp_path / "site", data, policy=opened, outputs=outputs)
        body = site.said(site.ask(site.task("train", 1))).body
        assert body.kind == "train" and body.loss is not None
        for name in outputs:
            site.folder.policy.write_text(opened.replace(f"\n{name}: plain", f"\n{name}: none"))
            refused(site, "plan", name, stage="evaluate", round_=2)
            refused(site, "plan", name, stage="train", round_=2)

    def test_a_budget_that_was_lowered_ends_the_work(self, site: Hospital) -> None:
        gate = site.gate()
        assert site.said(site.ask(site.task("train", 1), gate)).body.kind == "train"
        site.folder.policy.write_text(policy(total_epsilon=8.0, total_delta=1e-5))
        said = [site.said(site.ask(site.task("train", round_), gate)).body for round_ in (2, 3)]
        assert [body.kind for body in said] == ["train", "refused"]
        assert "no budget left" in refusals_of_tasks(site)[-1]

    def test_the_schedule_ends_with_the_last_round(self, site: Hospital) -> None:
        gate = site.gate()
        for round_ in (1, 2, 3):
            assert site.said(site.ask(site.task("train", round_), gate)).body.kind == "train"
        other = {name: array + 1 for name, array in site.consortium.model.items()}
        plain = site.consortium.plain("train", 3, other, attempt=2)
        assert site.code(site.ask(site.task(plain=plain), gate)) == "plan"
        assert "schedule" in refusals_of_tasks(site)[-1]
        assert site.trained == 3

    def test_an_approval_without_a_register_pays_for_nothing(
        self, tmp_path: Path, data: Path
    ) -> None:
        """Whoever writes a well-signed approval past `plan approve` has no register."""
        site = private_hospital(tmp_path / "site", data, approve=False)
        plan = site.consortium.plan
        record = choose_cohort(site.own.name, plan, data).record
        approval = Approval(
            site=site.own.name,
            study=STUDY,
            plan=plan.digest,
            roll=site.roll.roll.digest,
            any_later_sites=False,
            cohort=record.digest,
            when="2026-05-03T12:00:00+00:00",
            by="nobody",
        ).signed(site.signing)
        write_note(site.folder.cohort(STUDY), record)
        write_note(site.folder.approval(STUDY), approval)
        assert frozen_record(site.folder, STUDY, plan.digest) == record
        refused(site, "plan", "no ledger yet", stage="train")


class TestLedgerFile:
    def test_a_rollback_of_the_ledger_alone_is_found_at_the_next_task(
        self, site: Hospital, tmp_path: Path
    ) -> None:
        old = shutil.copy(site.folder.ledger, tmp_path / "old.sqlite")
        running = site.gate()
        assert site.said(site.ask(site.task("train", 1), running)).body.kind == "train"
        shutil.copy(old, site.folder.ledger)
        assert site.code(site.ask(site.task("train", 2), running)) == "task"
        assert "older state while it was in use" in refusals_of_tasks(site)[-1]
        for gate in (running, site.gate()):  # and by whoever opens it anew
            assert site.code(site.ask(site.task("train", 2), gate)) == "task"
            assert "rolled back" in refusals_of_tasks(site)[-1]
        assert site.trained == 1

    def test_a_deleted_ledger_is_found_at_the_next_task(self, site: Hospital) -> None:
        running = site.gate()
        assert site.said(site.ask(site.task("train", 1), running)).body.kind == "train"
        site.folder.ledger.unlink()
        for gate in (running, site.gate()):
            assert site.code(site.ask(site.task("train", 2), gate)) == "task"
            assert "missing" in refusals_of_tasks(site)[-1]
        assert not site.folder.ledger.exists(), "no new one was begun"
        assert site.trained == 1

    @pytest.mark.parametrize(
        "statement",
        [
            "DELETE FROM rows WHERE n = (SELECT max(n) FROM rows)",
            "UPDATE rows SET at = 'never' WHERE n = 2",
            "UPDATE rows SET event = replace(event, '\"steps\":3', '\"steps\":9')",
        ],
    )
    def test_an_edited_ledger_is_found_at_the_next_task(
        self, site: Hospital, statement: str
    ) -> None:
        with closing(sqlite3.connect(site.folder.ledger, isolation_level=None)) as database:
            database.executescript("DROP TRIGGER no_update; DROP TRIGGER no_delete;")
            database.execute(statement)
        assert site.code(site.ask(site.task("train", 1))) == "task"
        assert site.trained == 0

    @pytest.mark.parametrize("harm", ["gone", "another", "short", "readable"])
    def test_a_secret_that_is_not_the_ledgers_stops_all(self, site: Hospital, harm: str) -> None:
        secret = site.folder.ledger_secret
        if harm == "gone":
            secret.unlink()
        elif harm == "readable":
            secret.chmod(0o644)
        else:
            secret.write_bytes(b"x" * (32 if harm == "another" else 31))
        assert site.code(site.ask(site.task("train", 1))) == "task"

    def test_after_a_declared_restore_a_running_gate_goes_on(
        self, site: Hospital, tmp_path: Path
    ) -> None:
        backup = shutil.copy(site.folder.ledger, tmp_path / "backup.sqlite")
        gate = site.gate()
        assert site.said(site.ask(site.task("train", 1), gate)).body.kind == "train"
        shutil.copy(backup, site.folder.ledger)
        assert site.code(site.ask(site.task("train", 2), gate)) == "task"
        args = ["ledger", "restore", "--reason", "tests", "--site", str(site.folder.path)]
        assert CliRunner().invoke(cli.app, args).exit_code == 0
        assert site.said(site.ask(site.task("train", 2), gate)).body.kind == "train"
        assert [a.mechanism.steps for a in ledger_of(site).book.left(STUDY)] == [1]

    def test_a_withdrawn_patient_is_not_used_by_a_study_without_a_ledger_either(
        self, site: Hospital, data: Path
    ) -> None:
        """Where a ledger knows of withdrawals, no study trains past them."""
        site.folder.policy.write_text(policy(privacy_none="true"))
        from small_hospitals import tiny_built

        plan, model = tiny_built()
        plan = plan.model_copy(update={"study": "open"})
        open_ = Consortium(plan, model)
        roll = open_.roll(site.own)
        joined(site.folder, open_, roll)
        approved(site.folder, open_, data)
        other = Hospital(site.folder, open_, roll, site.own)
        gate = other.gate()
        body = other.said(other.ask(other.task("train", 1), gate)).body
        assert body.kind == "train" and body.patients == 4
        ledger = ledger_of(site)
        gone, *_ = load_cohort(site.folder, STUDY, site.consortium.plan).split("train").patients
        ledger.withdraw(ledger.key_of(gone), "asked for it")
        body = other.said(other.ask(other.task("train", 2), gate)).body
        assert body.kind == "train" and body.patients == 3


class TestCaller:
    """Code inside the hospital that goes around the gate meets the same walls."""

    def parts(self, site: Hospital) -> tuple[Any, ...]:
        plan = site.consortium.plan
        cohort = load_cohort(site.folder, STUDY, plan)
        return plan, cohort, CaseCache(site.folder.cache, plan.task), site.folder.work(STUDY)

    def account(self, site: Hospital, plan: Any) -> Account:
        limits = lambda: limits_of(load_policy(site.folder.policy))  # noqa: E731
        return Account(ledger_of(site), plan, site.folder.work(STUDY) / "paid", limits)

    def test_no_trainer_without_an_account(self, site: Hospital) -> None:
        with pytest.raises(PrivacyError, match="account"):
            Trainer(*self.parts(site), models=site.folder.models)
        with pytest.raises(PrivacyError, match="ledger"):
            make_trainer(site.folder, STUDY, site.consortium.plan, None)

    @pytest.mark.parametrize("weaker", [0.5, 0.999])
    def test_no_trainer_of_a_plan_with_weaker_noise(self, site: Hospital, weaker: float) -> None:
        plan, cohort, cache, work = self.parts(site)
        noise = plan.noise.model_copy(update={"training": plan.noise.training * weaker})
        other = plan.model_copy(update={"calibrated": noise})
        with pytest.raises(PrivacyError, match="another plan"):
            Trainer(
                other, cohort, cache, work,
                models=site.folder.models, account=self.account(site, other),
            )  # fmt: skip
        with pytest.raises(PrivacyError, match="schedule"):
            ledger_of(site).reserve(
                "0" * 64, STUDY, "train", mechanism_of(other, "train"),
                limits_of(load_policy(site.folder.policy)),
            )  # fmt: skip

    def test_no_trainer_for_patients_whom_nobody_charges(
        self, site: Hospital, tmp_path: Path
    ) -> None:
        more = phantoms(tmp_path / "more", patients=9)
        plan, _, cache, work = self.parts(site)
        cohort = choose_cohort(site.own.name, plan, more).cohort
        with pytest.raises(PrivacyError, match="not in the ledger's register"):
            Trainer(
                plan, cohort, cache, work,
                models=site.folder.models, account=self.account(site, plan),
            )  # fmt: skip

    def test_two_gates_at_once_answer_once(self, site: Hospital) -> None:
        task = site.task("train", 1)
        first = site.consortium.read(site.ask(task), site.own)
        again = site.consortium.read(site.ask(task), site.own)
        assert first == again and site.trained == 1
        assert len(ledger_of(site).book.debits) == 1

    def test_every_refusal_is_typed(self, site: Hospital) -> None:
        tries: list[Callable[[], object]] = [
            lambda: make_trainer(site.folder, STUDY, site.consortium.plan, None),
            lambda: ledger_of(site).commit("0" * 64, "1" * 64),
            lambda: ledger_of(site).acknowledge(STUDY, "0" * 64),
        ]
        for attempt in tries:
            with pytest.raises(FedsegError) as caught:
                attempt()
            assert isinstance(caught.value, PrivacyError | TrustError)


class TestWholeFolder:
    def test_a_rollback_of_the_whole_folder_is_found_by_what_the_coordinator_has_seen(
        self, site: Hospital, tmp_path: Path
    ) -> None:
        backup = tmp_path / "backup"
        shutil.copytree(site.folder.path, backup)
        head = site.said(site.ask(site.task("train", 1))).head
        assert head is not None
        plain = site.consortium.plain("train", 2, heads={site.own.name: head})
        assert site.said(site.ask(site.task(plain=plain))).body.kind == "train"
        shutil.rmtree(site.folder.path)
        shutil.copytree(backup, site.folder.path)
        assert site.code(site.ask(site.task(plain=plain))) == "task"
        assert "put back to an older one" in refusals_of_tasks(site)[-1]
        assert site.trained == 0 and not ledger_of(site).book.debits

    def test_once_declared_its_studies_are_charged_to_their_end(
        self, site: Hospital, data: Path
    ) -> None:
        place = ["--site", str(site.folder.path)]
        said = CliRunner().invoke(cli.app, ["backup", "restored", "--note", "Sunday", *place])
        assert "ledger restore --whole-folder" in said.stdout
        words = ["ledger", "restore", "--whole-folder", "--reason", "Sunday", *place]
        assert CliRunner().invoke(cli.app, words).exit_code == 0
        refused(site, "plan", "no open register", stage="train")
        approved(site.folder, site.consortium, data)
        refused(site, "plan", "schedule", stage="train")
        other = Consortium(*private_built(study="small", epsilon=1.0))
        joined(site.folder, other, other.roll(site.own))
        approved(site.folder, other, data)
