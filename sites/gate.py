"""The gate between relay and trainer: what is let in, what is worked on, what goes out.

In this order, and nothing is skipped. The envelope is opened: signed by the study's pinned key, for
this study and this site; else it is a stranger's and gets no answer. Plan, policy and list of sites
must be those that the hospital approved, and whoever is charged for a plan with a guarantee must
stand in the hospital's ledger. A task that was answered gets its stored answer and trains
nothing; another one for a stage that was served is refused beyond the plan's attempts. Then the
trainer works; what the hospital took back meanwhile is thrown away. What it says is looked at
again (`sites.egress`), stored ones and refusals too; the answer is kept, sealed, signed and on disk
before its first byte leaves. Under a plan that says so it waits until a fixed time after its task
came, and whatever leaves is an entry of the audit first (`sites.departures`). Of a refusal one
coarse code leaves, its reason stays.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedseg.chain import Fact
from fedseg.container import peek
from fedseg.errors import FedsegError, PlanError, PrivacyError, StorageError, TrustError
from fedseg.logs import without_its_text
from fedseg.plan import StudyPlan
from fedseg.security.documents import stamp
from fedseg.security.envelope import (
    EnvelopeHeader,
    envelope_limit,
    open_envelope,
    seal_bytes,
    seal_envelope,
)
from fedseg.security.identity import COORDINATOR, SiteIdentity
from fedseg.security.keys import ReceivingKey, SealingKey, SigningKey, VerifyKey
from fedseg.updates import (
    AnswerHeader,
    RefusalCode,
    Refused,
    TaskHeader,
    message_limit,
    require_place,
    seal_answer,
)
from sites.answers import Answers, Slot
from sites.approval import Approval, approved, frozen_record
from sites.chronicle import Chronicle
from sites.client import Clock
from sites.departures import EVENT, facts_of
from sites.egress import Outgoing, outgoing, permitted
from sites.enrolment import pinned_bundle
from sites.folder import SiteFolder, make_folder
from sites.journal import Journal
from sites.policy import authorise, limits_of, load_policy
from sites.rolls import RosterError, accepted_roll, require_accepted, take_roll

if TYPE_CHECKING:
    from fedseg.privacy.ledger import Ledger
    from sites.trainer import Trainer

logger = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
FREE_STAGES = frozenset({"enlist", "release"})
HELD_STAGES = frozenset({"train", "evaluate"})  # the others' work touches no patient's images
MOST_DUE = 64
Answer = Path | bytes
MakeTrainer = Callable[[SiteFolder, str, StudyPlan, "Ledger | None"], "Trainer"]


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


@dataclass(frozen=True)
class Ready:
    """An answer on its way out.

    Attributes:
        due: when it may leave, on the gate's clock; it may be in the past.
        about: what the audit will say of it.
        header: of the task's envelope.
        said: the task, where it was one.
        approval: under which it was worked for; None for a refusal.
    """

    answer: Answer
    due: float
    about: dict[str, Fact]
    header: EnvelopeHeader
    said: TaskHeader | None = None
    approval: Approval | None = None


class StrangerError(TrustError):
    """An envelope that is not the study's: it gets no answer."""


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
        self._folder, self._study, self._own, self._keys = folder, study, own, keys
        self._chronicle, self._now, self._make_trainer = chronicle, now, make_trainer
        bundle = pinned_bundle(folder, study)
        self._key, self._plan = VerifyKey.from_text(bundle.study_key), bundle.plan
        self._address, self.clock = bundle.address, clock or Clock()
        self._due: dict[str, float] = {}
        self._limit = message_limit(self._plan.built.tensors)
        self._answers = Answers(folder.answers(study))
        self._trainer: tuple[object, Trainer] | None = None
        self._ledger: Ledger | None = None
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
        with self._opened(envelope) as (header, task):
            said = self._said(task)
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
        if ready.approval is not None:
            try:
                self._require_still(ready.approval)
            except FedsegError as error:
                code, late = _code_of(error), ready.due
                ready = self._refuse(ready.header, code, str(error), ready.said, late)
        self._chronicle.write(EVENT, **ready.about)
        return ready.answer

    @contextmanager
    def _opened(self, envelope: Path) -> Iterator[tuple[EnvelopeHeader, mmap.mmap]]:
        """The verified header, and the task in a file of its own that is gone afterwards."""
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
                    key=self._keys.receiving,
                    max_bytes=self._limit,
                )
                if header.reply_to is None or not header.size:
                    raise TrustError("the envelope is empty, or does not say where to answer")
                SealingKey.from_text(header.reply_to)
            except TrustError as error:
                self._provoked("refused", code="stranger", reason=str(error))
                raise StrangerError(str(error)) from None
            plain.flush()
            yield header, mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ)

    def _said(self, task: mmap.mmap) -> TaskHeader | None:
        """The header of an authentic task; None where it is no task at all."""
        try:
            return peek(task, TaskHeader, max_bytes=self._limit)
        except TrustError:
            return None

    def _answer(
        self, header: EnvelopeHeader, said: TaskHeader | None, task: mmap.mmap, came: float
    ) -> Ready:
        """Check an authentic task against what was approved, and answer it."""
        approval = self._approval(header)
        if said is None:
            raise TrustError("what the study's key signed is no task")
        require_place(said, self._plan)
        self._check_roll(header, said, approval)
        slot, name = Slot(said.round, said.stage), _name(said, header, approval)
        facts: dict[str, Any] = {"round": said.round, "stage": said.stage, "attempt": said.attempt}
        due = self._due_at(name, said, came)
        plain = self._answers.plain(slot, name)
        if plain is not None:
            if not self._provoked("repeated", **facts, digest=header.about):
                raise FloodError("a task is repeated without end")
            out = outgoing(plain, self._plan, self._suppress_below())
            return self._ready(header, said, plain, out, approval, due, repeated=True)
        attempts = None if said.stage in FREE_STAGES else self._plan.aggregation.attempts
        self._answers.begin(slot, name, attempts, attempt=_attempt(said, approval))
        received = facts | {"bytes": header.size, "digest": header.about}
        self._chronicle.write("task_received", study=self._study, **received)
        self.doing = Doing(self._study, said.round, said.stage, self._now().isoformat())
        if due > came:
            self._held = (self.doing, due)
        plain = self._work(task, approval)
        self._require_still(approval)
        out = outgoing(plain, self._plan, self._suppress_below())
        self._answers.keep(slot, name, plain)
        ready = self._ready(header, said, plain, out, approval, due)
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

    def _ready(
        self,
        header: EnvelopeHeader,
        said: TaskHeader,
        plain: bytes,
        out: Outgoing,
        approval: Approval,
        due: float,
        *,
        repeated: bool = False,
    ) -> Ready:
        """A stored answer, sealed for whoever asked, and what the audit will say of it."""
        about = facts_of(out, said, self._plan) | self._to(header)
        slot, name = Slot(said.round, said.stage), _name(said, header, approval)
        assert header.reply_to is not None
        sealed = self._answers.sealed(slot, name, header.reply_to)
        if sealed is None:
            facts = {key: about[key] for key in ("round", "stage", "attempt")}
            sealed = self._seal(slot, name, header, plain, facts)
        with sealed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            about |= {"bytes": file.tell(), "digest": digest, "repeated": repeated}
        return Ready(sealed, due, about, header, said, approval)

    def _to(self, header: EnvelopeHeader) -> dict[str, Fact]:
        """To whom an answer goes: the coordinator's address, and the key that can open it."""
        assert header.reply_to is not None
        key = hashlib.sha256(header.reply_to.encode()).hexdigest()
        return {"to": self._address, "key": key, "task": header.about}

    def _suppress_below(self) -> int | None:
        """The hospital's own rule, as it stands now."""
        return load_policy(self._folder.policy).suppress_below

    def _approval(self, header: EnvelopeHeader) -> Approval:
        """What the hospital approved, if it is the task's plan and its rules still allow it."""
        approval = approved(self._folder, self._study)
        if approval is None:
            raise PlanError("the hospital has not approved a plan of this study")
        if not header.plan == approval.plan == self._plan.digest:
            raise PlanError("the task is of another plan than the approved one")
        record = frozen_record(self._folder, self._study, self._plan.digest)
        patients = record.patients.get("train", 0) if record else 0
        authorise(load_policy(self._folder.policy), self._plan, patients)
        self._read_ledger()
        return approval

    def _read_ledger(self) -> None:
        """Look at the ledger as it is now; a private plan that is not in it is refused.

        A ledger that is not what it was is opened anew at the next task: it may have been restored.
        """
        if self._plan.private is None and self._ledger is None and not self._folder.ledger.exists():
            return
        from sites.ledger import open_ledger, require_registered

        try:
            if self._ledger is None:
                now = lambda: stamp(self._now())  # noqa: E731
                self._ledger = open_ledger(self._folder, self._keys.signing, now)
            self._ledger.refresh()
            if self._plan.private is not None:
                require_registered(self._ledger, self._plan)
        except TrustError:
            self._ledger = self._trainer = None
            raise

    def _require_still(self, approval: Approval) -> None:
        """Refuse to answer where the hospital has taken its yes back since the work began."""
        now = approved(self._folder, self._study)
        if now is None or (now.plan, now.cohort) != (approval.plan, approval.cohort):
            raise PlanError(
                "the approval was taken back, or given for other data, while the task was worked "
                "on: its outcome is thrown away"
            )

    def _forget_if_left(self) -> None:
        """Remove what working on a task has written into a study that was left meanwhile."""
        if self._folder.bundle(self._study).exists():
            return
        for part in (self._folder.work, self._folder.answers, self._folder.spool):
            shutil.rmtree(part(self._study), ignore_errors=True)
        with suppress(OSError):
            self._folder.study(self._study).rmdir()

    def _check_roll(self, header: EnvelopeHeader, said: TaskHeader, approval: Approval) -> None:
        """Compare the task's list of sites with the accepted one; enlisting may bring a new one."""
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

    def _work(self, task: mmap.mmap, approval: Approval) -> bytes:
        """Have the trainer answer; what it refuses is raised, and not stored."""
        withdrawn = frozenset(self._ledger.book.withdrawn) if self._ledger else frozenset()
        made_for = (approval.signature, withdrawn)
        if self._trainer is None or self._trainer[0] != made_for:
            self._trainer = None
            trainer = self._make_trainer(self._folder, self._study, self._plan, self._ledger)
            self._trainer = (made_for, trainer)
        answer = self._trainer[1].handle(task)
        body = peek(answer, AnswerHeader, max_bytes=self._limit).body
        if body.kind == "refused":
            raise _TrainerRefusedError(body.code, self._reason(body.code))
        return answer

    def _reason(self, code: RefusalCode) -> str:
        """Why the trainer refused, from its journal; what nobody foresaw may name a path."""
        refusals = Journal(self._folder.work(self._study) / JOURNAL).read("refused")
        if code == "failed" or not refusals:
            return "the trainer failed: its journal has the reason"
        return str(refusals[-1]["reason"])

    def _seal(
        self, slot: Slot, name: str, header: EnvelopeHeader, plain: bytes, facts: dict[str, Any]
    ) -> Path:
        """Seal and store an answer, and audit it: only then may it leave."""
        assert header.reply_to is not None
        with self._answers.sealing(slot, name, header.reply_to) as file:
            seal_envelope(file, [plain], size=len(plain), **self._sealing(header))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # as the coordinator notes it
            left = facts | {"bytes": file.tell(), "digest": digest}
            self._chronicle.write("answered", study=self._study, **left)
        body = peek(plain, AnswerHeader, max_bytes=self._limit).body
        if body.kind == "release":
            self._chronicle.write(
                "released", study=self._study, round=slot.round, digest=body.model
            )
        stored = self._answers.sealed(slot, name, header.reply_to)
        assert stored is not None
        return stored

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
        body = permitted(Refused(code=code), self._plan)
        answer = AnswerHeader(task=header.about, site=self._own.name, body=body)
        plain = seal_answer(answer, plan=self._plan)
        about = facts_of(outgoing(plain, self._plan), said, self._plan)
        sealed = seal_bytes(plain, **self._sealing(header))
        digest = hashlib.sha256(sealed).hexdigest()
        about |= self._to(header) | {"bytes": len(sealed), "digest": digest, "repeated": False}
        held = said is not None and said.stage in HELD_STAGES
        return Ready(sealed, came + self._held_s if held else came, about, header, said)

    def _sealing(self, header: EnvelopeHeader) -> dict[str, Any]:
        """What every answer to this task is sealed with."""
        assert header.reply_to is not None
        return {
            "kind": "answer",
            "study": self._study,
            "plan": header.plan,
            "roll": header.roll,
            "about": header.about,
            "sender": self._own.name,
            "recipients": {COORDINATOR: SealingKey.from_text(header.reply_to)},
            "signer": self._keys.signing,
        }

    def _provoked(self, event: str, **facts: Any) -> bool:
        """Audit what somebody outside caused; False where it was only counted."""
        return self._chronicle.provoked(event, study=self._study, **facts)


class _TrainerRefusedError(FedsegError):
    """The trainer refused."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def make_trainer(
    folder: SiteFolder, study: str, plan: StudyPlan, ledger: Ledger | None, device: str = "cpu"
) -> Trainer:
    """The trainer of an approved plan, on the cohort that was approved with it.

    Patients who have withdrawn since are left out; under a guarantee they contribute zero, and the
    work is paid for from the ledger.

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

        limits = lambda: limits_of(load_policy(folder.policy))  # noqa: E731
        account = Account(ledger, plan, folder.work(study) / "paid", limits)
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
    )


def _name(said: TaskHeader, header: EnvelopeHeader, approval: Approval) -> str:
    """What a task's answer is stored under; one from data that are no longer approved is none.

    Enlisting is asked anew after every approval.
    """
    brings = approval.signature if said.stage == "enlist" else approval.cohort
    return hashlib.sha256(f"{header.about} {brings}".encode()).hexdigest()


def _attempt(said: TaskHeader, approval: Approval) -> str:
    """What a task asks for, whichever heads of ledgers it acknowledges."""
    asked = f"{said.attempt} {said.model} {approval.cohort}"
    return hashlib.sha256(asked.encode()).hexdigest()


def _code_of(error: FedsegError) -> RefusalCode:
    """The coarse code that leaves."""
    if isinstance(error, _TrainerRefusedError):
        return error.code
    codes: tuple[tuple[type[FedsegError], RefusalCode], ...] = (
        (RosterError, "roster"),
        (PlanError, "plan"),
        (PrivacyError, "plan"),
        (TrustError, "task"),
        (StorageError, "failed"),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), "data")
