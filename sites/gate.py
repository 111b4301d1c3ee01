"""The gate between relay and trainer: what is let in, what is worked on, what goes out.

In this order, and nothing is skipped. The envelope is opened, and held against what the hospital
approved (`sites.admission`): a stranger's gets no answer. Whoever is charged for a plan with a
guarantee must stand in the hospital's ledger (`sites.worker`). A task that was answered gets its
stored answer and trains nothing; another one for a stage that was served is refused beyond the
plan's attempts. Then the trainer works; what the hospital took back meanwhile is thrown away. What
it says is looked at again (`sites.egress`), stored ones and refusals too; the answer is kept,
sealed, signed and on disk before its first byte leaves (`sites.outbox`). Under a plan that says so
it waits until a fixed time after its task came, and whatever leaves is an entry of the audit first
(`sites.departures`). Of a refusal one coarse code leaves, its reason stays.
"""

from __future__ import annotations

import logging
import mmap
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedseg.errors import FedsegError, PlanError, PrivacyError, StorageError, TrustError
from fedseg.logs import without_its_text
from fedseg.security.envelope import EnvelopeHeader, envelope_limit
from fedseg.security.identity import SiteIdentity
from fedseg.security.keys import ReceivingKey, SigningKey, VerifyKey
from fedseg.updates import (
    AnswerHeader,
    RefusalCode,
    TaskHeader,
    require_consent,
    require_place,
    task_limit,
)
from sites.admission import Admission, Admitted
from sites.answers import Answers, slot_of
from sites.chronicle import Chronicle
from sites.client import Clock
from sites.departures import EVENT, asked_by
from sites.egress import HouseRule, Outgoing, outgoing, require_permitted
from sites.enrolment import pinned_bundle
from sites.folder import SiteFolder
from sites.outbox import Answer, Outbox, Ready, attempt_of, name_of
from sites.policy import lets_own_model_go, load_policy
from sites.rolls import RosterError
from sites.worker import MakeTrainer, TrainerRefusedError, Worker

logger = logging.getLogger(__name__)

FREE_STAGES = frozenset({"enlist", "release"})
HELD_STAGES = frozenset({"train", "evaluate", "own"})  # the others' work touches no images
MOST_DUE = 64


@dataclass(frozen=True)
class Keys:
    """The site's identity: one key signs answers, the other opens tasks."""

    signing: SigningKey
    receiving: ReceivingKey


@dataclass(frozen=True)
class Doing:
    """What is being worked on."""

    study: str
    round: int
    stage: str
    since: str


class FloodError(FedsegError):
    """The same is asked for so often that it is only counted: what has no entry does not leave."""


class Gate:
    """One study's gate. It handles one task at a time; its callers see to that."""

    def __init__(
        self,
        folder: SiteFolder,
        study: str,
        own: SiteIdentity,
        keys: Keys,
        *,
        chronicle: Chronicle,
        now: Callable[[], datetime],
        make_trainer: MakeTrainer,
        clock: Clock | None = None,
    ) -> None:
        """Open the gate of a study that was joined.

        Args:
            own: this site.
            now: the time, with its zone.
            make_trainer: called at the first task after each approval and each withdrawal of a
                patient, with the hospital's ledger, or None where none was begun.
            clock: by which answers are held; the machine's monotonic one by default.

        Raises:
            TrustError: the pinned bundle was edited, or is not this site's.
        """
        self._folder, self._study, self._chronicle, self._now = folder, study, chronicle, now
        bundle = pinned_bundle(folder, study)
        key, plan = VerifyKey.from_text(bundle.study_key), bundle.plan
        self._plan, self.clock, self._limit = plan, clock or Clock(), task_limit(plan)
        self._due: dict[str, float] = {}
        self._answers = Answers(folder.answers(study))
        self._admission = Admission(
            folder, own, plan, key, keys.receiving, chronicle=chronicle, now=now, limit=self._limit
        )
        self._worker = Worker(
            folder, plan, keys.signing, now=now, make_trainer=make_trainer, limit=self._limit
        )
        self._outbox = Outbox(
            own,
            plan,
            keys.signing,
            self._answers,
            address=bundle.address,
            chronicle=chronicle,
            limit=self._limit,
        )
        self.doing: Doing | None = None
        self._held: tuple[Doing, float] | None = None

    @property
    def max_bytes(self) -> int:
        """The largest envelope that a task of this study can have."""
        return envelope_limit(self._limit)

    @property
    def holds(self) -> bool:
        """Whether the plan says when answers leave."""
        return self._held_s > 0

    @property
    def silent_until(self) -> float:
        """Before this nothing may leave that could tell when work on a held answer ended."""
        return max(self._due.values(), default=float("-inf"))

    @property
    def busy(self) -> Doing | None:
        """What is being worked on, as far as it may be seen: till its time comes, on a held one."""
        if self._held is not None and self.clock.now() < self._held[1]:
            return self._held[0]
        return self.doing

    def handle(self, envelope: Path) -> Answer:
        """Answer one sealed task, in this thread: prepared, held, let out.

        Args:
            envelope: the file that it was spooled to.

        Returns:
            The sealed answer: a stored file, or the bytes of a refusal, which is not stored.

        Raises:
            StrangerError: it is not the study's.
            FloodError: it is not answered for now.
            StorageError: the audit cannot be written: nothing leaves unrecorded.
        """
        ready = self.prepare(envelope, self.clock.now())
        wait = ready.due - self.clock.now()
        if wait > 0:
            self.clock.sleep(wait)
        return self.release(ready)

    def prepare(self, envelope: Path, came: float) -> Ready:
        """Work on a sealed task; the answer is stored, and may not leave before it is due.

        Args:
            came: when the task did, on the gate's clock.

        Raises:
            As `handle`.
        """
        with self._admission.opened(envelope) as (header, task):
            said = self._admission.said(task)
            try:
                return self._answer(header, said, task, came)
            except FloodError:
                raise
            except FedsegError as error:
                return self._refuse(header, _code_of(error), str(error), said, came)
            except Exception as error:
                words = "a task failed for a reason that fedseg does not know"
                logger.error(words, extra=without_its_text(error))
                return self._refuse(header, "failed", type(error).__name__, said, came)
            finally:
                self.doing = None
                self._forget_if_left()

    def release(self, ready: Ready) -> Answer:
        """Record that an answer leaves, and let it; to be called once it is due.

        What the hospital took back while the answer was held is not let out: a refusal is.

        Raises:
            FloodError: it is not answered for now.
            StorageError: the audit cannot be written: nothing leaves unrecorded.
        """
        if ready.approval is not None and ready.out is not None:
            try:
                self._admission.require_still(ready.approval)
                self._require_permitted_still(ready.header, ready.out)
            except FedsegError as error:
                code, late = _code_of(error), ready.due
                ready = self._refuse(ready.header, code, str(error), ready.said, late)
        self._chronicle.write(EVENT, **ready.about)
        return ready.answer

    def _answer(
        self, header: EnvelopeHeader, said: TaskHeader | None, task: mmap.mmap, came: float
    ) -> Ready:
        """Check an authentic task against what was approved, and answer it."""
        admitted = self._admission.admitted(header)
        approval = admitted.approval
        self._worker.read_ledger(said.stage if said else None)
        if said is None:
            raise TrustError("what the study's key signed is no task")
        require_place(said, self._plan)
        require_consent(said, self._plan)
        self._admission.check_roll(header, said, approval)
        self._admission.check_consent(said)
        slot, name = slot_of(said), name_of(said, header, approval)
        facts: dict[str, Any] = asked_by(said)
        due = self._due_at(name, said, came)
        plain = self._answers.plain(slot, name)
        if plain is not None:
            if not self._provoked("repeated", **facts, digest=header.about):
                raise FloodError("a task is repeated without end")
            out = self._outgoing(plain, admitted)
            return self._outbox.ready(header, said, plain, out, approval, due, repeated=True)
        attempts = None if said.stage in FREE_STAGES else self._plan.aggregation.attempts
        self._answers.begin(slot, name, attempts, attempt=attempt_of(said, approval))
        received = facts | {"bytes": header.size, "digest": header.about}
        self._chronicle.write("task_received", study=self._study, **received)
        self.doing = Doing(self._study, said.round, said.stage, self._now().isoformat())
        if due > came:
            self._held = (self.doing, due)
        plain = self._worker.work(task, said.stage, approval)
        self._admission.require_still(approval)
        out = self._outgoing(plain, admitted)
        self._answers.keep(slot, name, plain)
        ready = self._outbox.ready(header, said, plain, out, approval, due)
        late_s = self.clock.now() - due if due > came else 0.0
        if late_s > 0:
            ready.about["late_s"] = round(late_s, 3)
        return ready

    def _due_at(self, name: str, said: TaskHeader, came: float) -> float:
        """When the answer to a task may leave: counted from when the task first came.

        A trainer that was started again does not know when that was, and counts anew.
        """
        if said.stage not in HELD_STAGES or self._held_s == 0:
            return came
        while len(self._due) >= MOST_DUE:
            del self._due[next(iter(self._due))]
        return self._due.setdefault(name, came + self._held_s)

    @property
    def _held_s(self) -> float:
        """How long after its task an answer leaves."""
        return self._plan.private.release_after_s if self._plan.private else 0.0

    def _outgoing(self, plain: bytes, admitted: Admitted) -> Outgoing:
        """Look at an answer by the hospital's own rule, which may be stricter than it was."""
        return outgoing(plain, self._plan, **self._house_rule(admitted))

    def _require_permitted_still(self, task: EnvelopeHeader, out: AnswerHeader) -> None:
        """Look at an answer that was held by the hospital's rule as it stands now."""
        require_permitted(out, self._plan, **self._house_rule(self._admission.admitted(task)))

    def _house_rule(self, admitted: Admitted) -> HouseRule:
        """What the hospital adds to the plan as of now."""
        policy = load_policy(self._folder.policy)
        return HouseRule(
            suppress_below=policy.suppress_below,
            annotated=admitted.annotated,
            consents=lets_own_model_go(policy, self._plan),
        )

    def _forget_if_left(self) -> None:
        """Remove what working on a task has written into a study that was left meanwhile."""
        if self._folder.bundle(self._study).exists():
            return
        for part in (self._folder.work, self._folder.answers, self._folder.spool):
            shutil.rmtree(part(self._study), ignore_errors=True)
        with suppress(OSError):
            self._folder.study(self._study).rmdir()

    def _refuse(
        self,
        header: EnvelopeHeader,
        code: RefusalCode,
        reason: str,
        said: TaskHeader | None,
        came: float,
    ) -> Ready:
        """Audit the reason, and seal an answer that has the code alone."""
        if not self._provoked("refused", code=code, reason=reason, digest=header.about):
            raise FloodError("tasks are refused without end")
        held = said is not None and said.stage in HELD_STAGES
        due = came + self._held_s if held else came
        return self._outbox.refusal(header, code, said, due)

    def _provoked(self, event: str, **facts: Any) -> bool:
        """Audit what somebody outside caused; False where it was only counted."""
        return self._chronicle.provoked(event, study=self._study, **facts)


def _code_of(error: FedsegError) -> RefusalCode:
    """The coarse code that leaves."""
    if isinstance(error, TrainerRefusedError):
        return error.code
    codes: tuple[tuple[type[FedsegError], RefusalCode], ...] = (
        (RosterError, "roster"),
        (PlanError, "plan"),
        (PrivacyError, "plan"),
        (TrustError, "task"),
        (StorageError, "failed"),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), "data")
