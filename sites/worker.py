"""Who works behind the gate: the trainer of what is approved, paid for from the hospital's ledger.

A trainer is kept for as long as the same yes holds and nobody withdraws. The ledger is looked at
before every task, and opened anew once it is not what it was.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from fedseg.container import peek
from fedseg.errors import FedsegError, PrivacyError, TrustError
from fedseg.plan import StudyPlan
from fedseg.security.consent import Consent
from fedseg.security.documents import stamp
from fedseg.security.keys import SigningKey
from fedseg.updates import AnswerHeader, RefusalCode
from sites.approval import Approval
from sites.folder import SiteFolder
from sites.journal import Journal
from sites.keyring import own_identity
from sites.policy import authorise, lets_own_model_go, limits_of, load_policy

if TYPE_CHECKING:
    from fedseg.privacy.ledger import Ledger
    from sites.trainer import Trainer

JOURNAL = "journal.jsonl"
RELEASE = "release"
Vouch = Callable[[str], Consent | None]  # digest of the own model -> consent, or None
MakeTrainer = Callable[[SiteFolder, str, StudyPlan, "Ledger | None", Vouch], "Trainer"]


class TrainerRefusedError(FedsegError):
    """The trainer refused."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Worker:
    """One study's trainer and the ledger that it is paid from."""

    def __init__(
        self,
        folder: SiteFolder,
        plan: StudyPlan,
        signing: SigningKey,
        *,
        now: Callable[[], datetime],
        make_trainer: MakeTrainer,
        limit: int,
    ) -> None:
        """Make a worker; its trainer is made at the first task.

        Args:
            signing: this site's.
            now: the time, with its zone.
            make_trainer: as in `Gate`.
            limit: the largest answer, in bytes.
        """
        self._folder, self._study, self._plan, self._signing = folder, plan.study, plan, signing
        self._now, self._make_trainer, self._limit = now, make_trainer, limit
        self.trainer: tuple[object, Trainer] | None = None
        self._ledger: Ledger | None = None

    def read_ledger(self, stage: str | None) -> None:
        """Look at the ledger as it is now; a private plan that is not in it is refused.

        A ledger that is not what it was is opened anew at the next task: it may have been restored.
        The released model costs nobody anything, and comes where the study was closed as well.

        Args:
            stage: the task's; None where it is no task.

        Raises:
            PrivacyError: nobody would be charged for the plan.
            TrustError: ledger or audit were changed, or the ledger is missing.
        """
        if self._plan.private is None and self._ledger is None and not self._folder.ledger.exists():
            return
        from sites.ledger import open_ledger, require_registered

        try:
            if self._ledger is None:
                self._ledger = open_ledger(self._folder, self._signing, lambda: stamp(self._now()))
            self._ledger.refresh()
            if self._plan.private is not None:
                over = stage == RELEASE
                require_registered(self._ledger, self._plan, closed_too=over)
        except TrustError:
            self._ledger = self.trainer = None
            raise

    def work(self, task: mmap.mmap, stage: str, approval: Approval) -> bytes:
        """Have the trainer answer; what it refuses is raised, and not stored.

        Raises:
            PrivacyError: so many patients withdrew that the policy's smallest_cohort is not met.
            TrainerRefusedError: with the code that leaves; the message stays.
        """
        withdrawn = frozenset(self._ledger.book.withdrawn) if self._ledger else frozenset()
        made_for = (approval.signature, withdrawn)
        if self.trainer is None or self.trainer[0] != made_for:
            self.trainer = None
            trainer = self._make_trainer(
                self._folder, self._study, self._plan, self._ledger, self._vouch
            )
            self.trainer = (made_for, trainer)
        trainer = self.trainer[1]
        if stage != RELEASE:  # once more: what was approved may name patients who withdrew since
            authorise(load_policy(self._folder.policy), self._plan, trainer.training_patients)
        answer = trainer.handle(task)
        body = peek(answer, AnswerHeader, max_bytes=self._limit).body
        if body.kind == "refused":
            raise TrainerRefusedError(body.code, self._reason(body.code))
        return answer

    def _vouch(self, model: str) -> Consent | None:
        """This hospital's signed word that its own model may go, where its policy says so now."""
        if not lets_own_model_go(load_policy(self._folder.policy), self._plan):
            return None
        site = own_identity(self._folder).name
        consent = Consent(study=self._study, plan=self._plan.digest, site=site, model=model)
        return consent.signed(self._signing)

    def _reason(self, code: RefusalCode) -> str:
        """Why the trainer refused, from its journal; what nobody foresaw may name a path."""
        refusals = Journal(self._folder.work(self._study) / JOURNAL).read("refused")
        if code == "failed" or not refusals:
            return "the trainer failed: its journal has the reason"
        return str(refusals[-1]["reason"])


def make_trainer(
    folder: SiteFolder,
    study: str,
    plan: StudyPlan,
    ledger: Ledger | None,
    vouch: Vouch = lambda _model: None,
    device: str = "cpu",
) -> Trainer:
    """The trainer of an approved plan, on the cohort that was approved with it.

    Patients who have withdrawn since are left out; under a guarantee they contribute zero, and the
    work is paid for from the ledger.

    Args:
        vouch: signs that the hospital's own model may go, or does not; by default it never does.

    Raises:
        DataError: the data changed since.
        PrivacyError: the plan has a guarantee, and there is no ledger to charge.
    """
    import torch

    from fedseg.imaging.cache import CaseCache
    from sites.cohort import load_cohort, load_record
    from sites.trainer import Trainer

    torch.set_num_threads(plan.training.threads)
    cohort, account = load_cohort(folder, study, plan), None
    if ledger is not None:
        from sites.ledger import without_withdrawn

        cohort = without_withdrawn(ledger, cohort)
    if plan.private is not None:
        if ledger is None:
            raise PrivacyError("a plan with a guarantee needs the hospital's ledger: approve it")
        from sites.spending import Account

        account = Account(
            ledger,
            plan,
            folder.work(study) / "paid",
            lambda: limits_of(load_policy(folder.policy)),
        )
    return Trainer(
        plan,
        cohort,
        CaseCache(folder.cache, plan.task),
        folder.work(study),
        left_out=load_record(folder, study, plan).left_out,
        models=folder.models,
        device=device,
        account=account,
        suppress_below=load_policy(folder.policy).suppress_below,
        vouch=vouch,
    )
