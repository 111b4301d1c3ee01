"""What is let in: an envelope of the study's, for what the hospital approved, from its own list.

Signed by the study's pinned key, for this study and this site; else it is a stranger's. The plan is
the approved one, the hospital's rules still allow it, and the list of sites is the accepted one.
Another hospital's own model comes with that hospital's signed consent. That the hospital has not
taken its yes back is asked again before anything goes out.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedseg.container import peek
from fedseg.errors import PlanError, TrustError
from fedseg.plan import StudyPlan
from fedseg.security.envelope import EnvelopeHeader, open_envelope
from fedseg.security.identity import SiteIdentity
from fedseg.security.keys import ReceivingKey, SealingKey, VerifyKey
from fedseg.updates import TaskHeader
from sites.approval import Approval, approved, frozen_record
from sites.chronicle import Chronicle
from sites.folder import SiteFolder
from sites.policy import authorise, load_policy
from sites.rights import make_folder
from sites.rolls import accepted_roll, require_accepted, take_roll


class StrangerError(TrustError):
    """An envelope that is not the study's: it gets no answer."""


@dataclass(frozen=True)
class Admitted:
    """What a task is worked on by, for as long as `require_still` holds.

    Attributes:
        annotated: the plan's labels that the hospital declares to annotate; None is all of them.
    """

    approval: Approval
    annotated: tuple[str, ...] | None


class Admission:
    """What one study's tasks must be to be worked on."""

    def __init__(
        self,
        folder: SiteFolder,
        own: SiteIdentity,
        plan: StudyPlan,
        key: VerifyKey,
        receiving: ReceivingKey,
        *,
        chronicle: Chronicle,
        now: Callable[[], datetime],
        limit: int,
    ) -> None:
        """Make the check.

        Args:
            own: this site.
            plan: of the pinned bundle.
            key: the study's.
            receiving: opens what is sealed for this site.
            now: the time, with its zone.
            limit: the largest task, in bytes.
        """
        self._folder, self._study, self._own, self._plan = folder, plan.study, own, plan
        self._key, self._receiving, self._limit = key, receiving, limit
        self._chronicle, self._now = chronicle, now

    @contextmanager
    def opened(self, envelope: Path) -> Iterator[tuple[EnvelopeHeader, mmap.mmap]]:
        """The verified header, and the task in a file of its own that is gone afterwards.

        Raises:
            StrangerError: it is not the study's.
        """
        spool = make_folder(self._folder.spool(self._study))
        with tempfile.TemporaryFile(dir=spool) as plain, envelope.open("rb") as source:
            try:
                header = open_envelope(
                    source,
                    plain,
                    kind="task",
                    study=self._study,
                    signer=self._key,
                    recipient=self._own.name,
                    key=self._receiving,
                    max_bytes=self._limit,
                )
                if header.reply_to is None or not header.size:
                    raise TrustError("the envelope is empty, or does not say where to answer")
                SealingKey.from_text(header.reply_to)
            except TrustError as error:
                facts = {"code": "stranger", "reason": str(error)}
                self._chronicle.provoked("refused", study=self._study, **facts)
                raise StrangerError(str(error)) from None
            plain.flush()
            yield header, mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ)

    def said(self, task: mmap.mmap) -> TaskHeader | None:
        """The header of an authentic task; None where it is no task at all."""
        try:
            return peek(task, TaskHeader, max_bytes=self._limit)
        except TrustError:
            return None

    def admitted(self, header: EnvelopeHeader) -> Admitted:
        """What the hospital approved, if it is the task's plan and its rules still allow it.

        Raises:
            PlanError: nothing is approved, or another plan.
            PrivacyError: a rule forbids it by now.
        """
        approval = approved(self._folder, self._study)
        if approval is None:
            raise PlanError("the hospital has not approved a plan of this study")
        if not header.plan == approval.plan == self._plan.digest:
            raise PlanError("the task is of another plan than the approved one")
        record = frozen_record(self._folder, self._study, self._plan.digest)
        patients = record.patients.get("train", 0) if record else 0
        authorise(load_policy(self._folder.policy), self._plan, patients)
        return Admitted(approval, record.annotated if record else None)

    def require_still(self, approval: Approval) -> None:
        """Refuse to answer where the hospital has taken its yes back since the work began.

        Raises:
            PlanError: it has, or has given it for other data.
        """
        now = approved(self._folder, self._study)
        if now is None or (now.plan, now.cohort) != (approval.plan, approval.cohort):
            raise PlanError(
                "the approval was taken back, or given for other data, while the task was worked "
                "on: its outcome is thrown away"
            )

    def check_roll(self, header: EnvelopeHeader, said: TaskHeader, approval: Approval) -> None:
        """Compare the task's list of sites with the accepted one; enlisting may bring a new one.

        Raises:
            RosterError: it is not the accepted one, or has expired.
        """
        offered = said.roll if said.stage == "enlist" else None
        if offered is None:
            roll = accepted_roll(self._folder, self._study, self._key)
        else:
            roll = take_roll(
                self._folder,
                self._study,
                offered,
                key=self._key,
                own=self._own,
                approval=approval,
            )
        require_accepted(roll, header.roll, self._now())

    def check_consent(self, said: TaskHeader) -> None:
        """Accept another hospital's own model only where that hospital itself let this one go.

        Raises:
            TrustError: it is not on the accepted list, or has not signed the consent.
        """
        if said.consent is None:
            return
        roll = accepted_roll(self._folder, self._study, self._key).roll
        owner = roll.site(said.consent.site)
        if owner is None:
            raise TrustError(
                f"the task brings the own model of {said.consent.site}, who is not on the list of "
                "sites that is accepted here"
            )
        said.consent.require_signed(VerifyKey.from_text(owner.signing))
