"""How tasks and answers travel between hospitals: sealed, signed, and read by nobody on the way.

A task is encrypted once for all sites of the signed roll and signed by the study key; it
names the key that answers are sealed for, which is made for the stage and destroyed when the stage
is closed. An answer counts where it answers the open task and is signed by a site that is on the
roll as the sites were told it, and still is: who was revoked a minute ago is refused. Ciphertext is
streamed to and from files, a plaintext is held in memory and never touches a disk here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from coordinator.office.registry import Registry
from coordinator.sealing.outbox import Outbox
from fedseg.aggregation.rounds import Position
from fedseg.durable import Buffer
from fedseg.errors import RoundError, TrustError
from fedseg.plan import StudyPlan
from fedseg.security.consent import Consent
from fedseg.security.envelope import EnvelopeHeader, open_envelope, read_header, seal_envelope
from fedseg.security.identity import COORDINATOR, Roll, SignedRoll, SiteIdentity
from fedseg.security.keys import ReceivingKey, SealingKey, SigningKey, VerifyKey
from fedseg.updates import AnswerError, answer_limit, task_digest


@dataclass(frozen=True)
class _Sealed:
    """The task whose answers count."""

    position: Position
    about: str
    key: ReceivingKey
    max_bytes: int


class SealedExchange:
    """Tasks and answers between a coordinator and hospitals.

    Args:
        plan: the study's.
        key: the study key.
        registry: file with the signed roll; looked at again whenever it matters.
        outbox: folder for the open stage's task and receiving key.
    """

    def __init__(self, plan: StudyPlan, key: SigningKey, *, registry: Path, outbox: Path) -> None:
        self._plan, self._key = plan, key
        self._registry = Registry(registry, key.public, plan.study)
        self._outbox = Outbox(outbox)
        self._roll: SignedRoll | None = None
        self._open: _Sealed | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """Who is enrolled, as of the roll in force."""
        return tuple(site.name for site in self._in_force().roll.sites)

    def adopt(self) -> SignedRoll:
        """Put the roll as it stands in force.

        Raises:
            TrustError: the registry is not the study's, or older than the one before.
        """
        self._roll = self._registry.read()
        return self._roll

    def changed(self) -> bool:
        """Whether the registry holds another roll than the one in force.

        Raises:
            TrustError: as `adopt`.
        """
        return self._registry.read().roll.digest != self._in_force().roll.digest

    def revoked(self, site: str) -> bool:
        """Whether a site of the roll in force was taken out meanwhile, or has other keys now.

        Raises:
            TrustError: as `adopt`.
        """
        told, now = self._in_force().roll.site(site), self._registry.read().roll.site(site)
        return told is not None and (now is None or now.signing != told.signing)

    def seal(self, position: Position, task: bytes) -> bytes:
        """Seal a task for every site of the roll, and store it; or take what is stored of it.

        Where the roll changed since it was stored it is sealed again under the same receiving key:
        to a site that answered it is the same task.

        Raises:
            StorageError: it cannot be stored; then it must not be sent.
            RoundError: no site is enrolled.
            ValueError: no roll is in force.
        """
        roll, about = self._in_force().roll, task_digest(task)
        if not roll.sites:
            raise RoundError("no site is enrolled: run `fedseg-coordinator enrol REQUEST` first")
        if position.stage != "enlist":  # sites may enlist while another stage waits to go on
            self._outbox.destroy_others(position)
        key = self._outbox.key(position)
        stored = self._outbox.header(position, len(task))
        mark = (about, roll.digest, key.public.text)
        if stored is None or (stored.about, stored.roll, stored.reply_to) != mark:
            self._write(position, task, about, roll, key)
        self._open = _Sealed(position, about, key, answer_limit(self._plan, position.stage))
        return self._outbox.task(position).read_bytes()

    def open(self, data: bytes) -> tuple[str, Buffer]:
        """Open an answer to the task that was sealed last.

        Returns:
            The site whose key signed it, and the answer, which is held in memory alone.

        Raises:
            AnswerError: `malformed`: no sealed answer of this study; `stale`: it answers another
                task; `site`: not on the roll, or revoked; `signature`: not signed by that site, or
                not readable with this stage's key.
        """
        if self._open is None:
            raise AnswerError("stale", "an answer came although no stage is open")
        source, plain = io.BytesIO(data), io.BytesIO()
        try:
            claimed = read_header(source, max_bytes=self._open.max_bytes)
        except TrustError as error:
            raise AnswerError("malformed", str(error)) from None
        self._check(claimed, self._open.about)
        site = self._identity(claimed.sender)
        source.seek(0)
        try:
            header = open_envelope(
                source,
                plain,
                kind="answer",
                study=self._plan.study,
                signer=VerifyKey.from_text(site.signing),
                recipient=COORDINATOR,
                key=self._open.key,
                max_bytes=self._open.max_bytes,
            )
        except TrustError as error:
            raise AnswerError("signature", str(error)) from None
        return header.sender, plain.getbuffer().toreadonly()

    def require_given(self, consent: Consent) -> None:
        """Check that the site which a consent names has signed it, and is on the roll as it was.

        Raises:
            AnswerError: `site`: not on the roll, or revoked; `signature`: not signed by that site.
        """
        key = VerifyKey.from_text(self._identity(consent.site).signing)
        try:
            consent.require_signed(key)
        except TrustError as error:
            raise AnswerError("signature", str(error)) from None

    def closed(self, position: Position) -> None:
        """Destroy the stage's receiving key, and its tasks."""
        self._outbox.destroy(position)
        open_ = self._open
        if open_ and open_.position.same_stage(position):
            self._open = None

    def _write(
        self, position: Position, task: bytes, about: str, roll: Roll, key: ReceivingKey
    ) -> None:
        """Seal a task into the outbox."""
        with self._outbox.writing(position) as file:
            seal_envelope(
                file,
                [task],
                kind="task",
                study=self._plan.study,
                plan=self._plan.digest,
                roll=roll.digest,
                about=about,
                sender=COORDINATOR,
                recipients={site.name: SealingKey.from_text(site.sealing) for site in roll.sites},
                signer=self._key,
                size=len(task),
                reply_to=key.public,
            )

    def _check(self, claimed: EnvelopeHeader, about: str) -> None:
        """Refuse what is not an answer to the open task, before any work is spent on it."""
        if (claimed.kind, claimed.study) != ("answer", self._plan.study):
            raise AnswerError("malformed", "what came is no answer of this study")
        if claimed.plan != self._plan.digest or set(claimed.keys) != {COORDINATOR}:
            raise AnswerError("malformed", "the answer is of another plan, or sealed for others")
        if claimed.about != about:
            raise AnswerError("stale", "the answer belongs to another task")

    def _identity(self, name: str) -> SiteIdentity:
        """A site of the roll in force that has not been revoked since."""
        site = self._in_force().roll.site(name)
        if site is None:
            raise AnswerError("site", f"what came claims to be of {name}, who is not on the roll")
        if self.revoked(name):
            raise AnswerError("site", f"{name} was revoked")
        return site

    def _in_force(self) -> SignedRoll:
        """The roll that the sites were told."""
        if self._roll is None:
            raise ValueError("adopt the roll before anything is sealed or opened")
        return self._roll
