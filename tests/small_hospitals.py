"""A real site folder on phantoms, and a consortium with the study's key, for tests of the gate."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from small_plans import values

from fedseg.arrays import Arrays, digest_of
from fedseg.chain import Chain, Entry, verify_chain
from fedseg.container import peek
from fedseg.imaging.phantoms import write_phantoms
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.security.certificates import make_ca
from fedseg.security.envelope import open_bytes, seal_bytes
from fedseg.security.identity import Roll, SignedRoll, SiteIdentity, make_bundle, sign_roll
from fedseg.security.keys import (
    ReceivingKey,
    SealingKey,
    SigningKey,
    VerifyKey,
    load_receiving_key,
    load_signing_key,
)
from fedseg.updates import AnswerHeader, TaskHeader, seal_task, task_digest
from sites.chronicle import Chronicle
from sites.client import Clock
from sites.cohort import choose_cohort
from sites.decision import approve
from sites.enrolment import join, open_offer
from sites.folder import SiteFolder
from sites.founding import found
from sites.gate import Gate, Keys
from sites.journal import Journal
from sites.keyring import own_identity
from sites.outbox import Answer
from sites.worker import make_trainer

NOW = datetime(2026, 5, 3, 12, 0, tzinfo=UTC)
NAME = "hospital_a"
STUDY = "tiny"
PLAN_VALUES = values(
    task__channels=[{"name": "phantom", "modality": "MR"}],
    task__labels={"head": 1, "body": 2},
    task__spacing_mm=[1.0, 1.0, 1.0],
    training__steps_per_round=1,
    evaluation__overlap=0.0,
)


def text(moment: datetime) -> str:
    """A time as documents carry it."""
    return moment.isoformat(timespec="seconds")


def tiny_built() -> tuple[StudyPlan, dict[str, Any]]:
    """A plan on phantoms, built, and its initial model."""
    plan = StudyPlan.model_validate(PLAN_VALUES)
    record, model = initial_model(plan)
    return plan.model_copy(update={"initial": record}), dict(model)


@dataclass(frozen=True)
class Consortium:
    """Who holds the study key: it makes bundles and tasks, and reads answers."""

    plan: StudyPlan
    model: Arrays
    key: SigningKey = field(default_factory=SigningKey.generate)
    receiving: ReceivingKey = field(default_factory=ReceivingKey.generate)

    def roll(self, *sites: SiteIdentity, version: int = 1, **changes: Any) -> SignedRoll:
        """A list of sites."""
        fields = {
            "study": self.plan.study,
            "version": version,
            "issued": text(NOW),
            "valid_until": text(NOW + timedelta(days=365)),
            "sites": tuple(sorted(sites, key=lambda site: site.name)),
        }
        return sign_roll(Roll.model_validate({**fields, **changes}), self.key)

    def bundle(self, site: SiteIdentity, roll: SignedRoll, address: str = "fl.test:443") -> bytes:
        """What a site joins with."""
        return make_bundle(
            self.key,
            site=site.name,
            address=address,
            ca=make_ca("test", NOW)[1],
            plan=self.plan,
            roll=roll,
            flower="1.41.0",
            issued=text(NOW),
        )

    def plain(self, stage: str, round_: int, model: Arrays | None = None, **changes: Any) -> bytes:
        """A task before it is sealed."""
        carried = None if stage == "enlist" else (model or self.model)
        header = TaskHeader(
            study=self.plan.study,
            plan=self.plan.digest,
            round=round_,
            stage=stage,  # type: ignore[arg-type]
            attempt=1,
            model=None if carried is None else digest_of(carried),
        )
        return seal_task(header.model_copy(update=changes), carried)

    def seal(self, plain: bytes, site: SiteIdentity, roll: SignedRoll, **changes: Any) -> bytes:
        """A task's envelope."""
        fields = {
            "kind": "task",
            "study": self.plan.study,
            "plan": self.plan.digest,
            "roll": roll.roll.digest,
            "about": task_digest(plain),
            "sender": "coordinator",
            "recipients": {site.name: SealingKey.from_text(site.sealing)},
            "signer": self.key,
            "reply_to": self.receiving.public,
        }
        return seal_bytes(plain, **{**fields, **changes})

    def read(self, answer: Answer, site: SiteIdentity, key: ReceivingKey | None = None) -> bytes:
        """What a site answered, verified."""
        data = answer if isinstance(answer, bytes) else answer.read_bytes()
        header, plain = open_bytes(
            data,
            kind="answer",
            study=self.plan.study,
            signer=VerifyKey.from_text(site.signing),
            recipient="coordinator",
            key=key or self.receiving,
            max_bytes=10**8,
        )
        assert header.sender == site.name
        return plain


@dataclass
class Hospital:
    """A site that has joined and approved."""

    folder: SiteFolder
    consortium: Consortium
    roll: SignedRoll
    own: SiteIdentity
    now: datetime = NOW

    @property
    def signing(self) -> SigningKey:
        """Its signing key."""
        return load_signing_key(self.folder.signing_key)

    def gate(self, chronicle: Chronicle | None = None, clock: Clock | None = None) -> Gate:
        """A gate, as a trainer that was just started opens it."""
        keys = Keys(self.signing, load_receiving_key(self.folder.receiving_key))
        chain = Chain(self.folder.audit, keys.signing, lambda: text(self.now))
        return Gate(
            self.folder,
            self.consortium.plan.study,
            self.own,
            keys,
            chronicle=chronicle or Chronicle(chain),
            now=lambda: self.now,
            make_trainer=make_trainer,
            clock=clock,
        )

    def task(self, stage: str = "train", round_: int = 1, **changes: Any) -> bytes:
        """A sealed task; `plain` changes the task, other names change its envelope."""
        plain = changes.pop("plain", None) or self.consortium.plain(stage, round_)
        return self.consortium.seal(plain, self.own, changes.pop("under", self.roll), **changes)

    def ask(self, envelope: bytes, gate: Gate | None = None) -> Answer:
        """Have a gate answer."""
        path = self.folder.path / "envelope"
        path.write_bytes(envelope)
        return (gate or self.gate()).handle(path)

    def said(self, answer: Answer, key: ReceivingKey | None = None) -> AnswerHeader:
        """What an answer says."""
        return peek(self.consortium.read(answer, self.own, key), AnswerHeader, max_bytes=10**8)

    def code(self, answer: Answer) -> str:
        """The code of a refusal, which is sealed and stored nowhere."""
        body = self.said(answer).body
        assert body.kind == "refused"
        assert isinstance(answer, bytes)
        return body.code

    @property
    def trained(self) -> int:
        """How many rounds were trained here, by the trainer's own journal."""
        work = self.folder.work(self.consortium.plan.study)
        return len(Journal(work / "journal.jsonl").read("trained"))

    def audited(self, event: str) -> list[Entry]:
        """The audit's entries of one kind; the whole chain is verified."""
        entries = verify_chain(self.folder.audit, self.signing.public)
        return [entry for entry in entries if entry.event == event]


def hospital(
    path: Path, data: Path, consortium: Consortium | None = None, **where: Any
) -> Hospital:
    """Found a site, have it join a study and approve it on a folder of phantoms."""
    consortium = consortium or Consortium(*tiny_built())
    folder = SiteFolder(path)
    own = found(folder, NAME, text(NOW))
    folder.policy.write_text("privacy_none: true\n")
    roll = consortium.roll(own)
    joined(folder, consortium, roll, **where)
    approved(folder, consortium, data)
    return Hospital(folder, consortium, roll, own)


def copied(founded: Hospital, path: Path) -> Hospital:
    """The same hospital in a folder of its own."""
    shutil.copytree(founded.folder.path, path)
    return Hospital(SiteFolder(path), founded.consortium, founded.roll, founded.own)


@pytest.fixture(scope="module", name="data")
def fixture_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients of one hospital, two of them held back."""
    return phantoms(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="module", name="founded")
def fixture_founded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A hospital that has approved a study; tests have copies of it."""
    return hospital(tmp_path_factory.mktemp("founded") / "site", data)


@pytest.fixture(name="site")
def fixture_site(founded: Hospital, tmp_path: Path) -> Hospital:
    """A hospital that has approved a study and answered nothing yet."""
    return copied(founded, tmp_path / "site")


def joined(folder: SiteFolder, consortium: Consortium, roll: SignedRoll, **where: Any) -> None:
    """Join a study."""
    file = folder.path / "bundle"
    address = where.pop("address", "fl.test:443")
    file.write_bytes(consortium.bundle(own_identity(folder), roll, address))
    join(folder, open_offer(folder, file), load_signing_key(folder.signing_key), **where)


def approved(folder: SiteFolder, consortium: Consortium, data: Path, later: bool = False) -> None:
    """Approve a study."""
    chosen = choose_cohort(NAME, consortium.plan, data)
    key = load_signing_key(folder.signing_key)
    now = lambda: text(NOW)  # noqa: E731
    approve(
        folder, consortium.plan.study, chosen.record, key, any_later_sites=later, by="me", now=now
    )


def phantoms(path: Path, patients: int = 3) -> Path:
    """A few small patients of one hospital, two of them held back."""
    return write_phantoms(path, sites=1, patients_per_site=(patients,), shape=(20, 20, 20))
