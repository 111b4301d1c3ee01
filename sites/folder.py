"""SITEDIR: where everything of one hospital's fedseg lies, and who may look at it.

One property a path; nothing here decides anything. `trainer/`, `studies/`, `cache/`, `models/`
and `validations/` belong to the user that sees patients, `relay/` to the user that sees the
network, and the relay finds all it needs in `relay/` and `run/`: neither has to look into the
other's folders. What an administrator does as root is done as the owner of the folder it is done
in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, ValidationError

from fedseg.durable import write_atomically
from fedseg.errors import DataError, StorageError
from fedseg.frozen import Frozen, Name, SiteName

MAX_NOTE_BYTES = 16 * 1024 * 1024
OPEN_FOLDER, SHARED_FOLDER, PRIVATE_FOLDER = 0o755, 0o750, 0o700
PUBLIC_FILE, PRIVATE_FILE = 0o644, 0o600
UNIX_TRAINER = "unix:run/trainer.sock"

_STUDY = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
Note = TypeVar("Note", bound=BaseModel)


class SiteRecord(Frozen):
    """site.json: who this is."""

    name: SiteName
    created: str


class Link(Frozen):
    """relay/NAME/link.json: all that the relay of one study knows.

    Attributes:
        study: its name.
        address: the coordinator's `host:port`.
        trainer: `unix:PATH` (relative to SITEDIR, or absolute) or `127.0.0.1:PORT`.
        port: on loopback, where this relay's Flower processes meet.
    """

    study: Name
    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.\[\]:_-]{1,300}:\d{1,5}$")]
    trainer: Annotated[str, Field(pattern=r"^(unix:.+|(127\.0\.0\.1|\[::1\]|localhost):\d{1,5})$")]
    port: Annotated[int, Field(ge=1, le=65535)]


@dataclass(frozen=True)
class SiteFolder:
    """The paths of one SITEDIR."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(os.path.abspath(self.path)))  # noqa: PTH100

    @property
    def site(self) -> Path:
        """site.json, readable by all: name and date."""
        return self.path / "site.json"

    @property
    def request(self) -> Path:
        """What is sent to the consortium; no secret in it."""
        return self.path / "request.json"

    @property
    def policy(self) -> Path:
        """The hospital's rules."""
        return self.path / "policy.yaml"

    @property
    def trainer(self) -> Path:
        """Identity keys, audit and ledger."""
        return self.path / "trainer"

    @property
    def signing_key(self) -> Path:
        """Signs requests, answers and the audit."""
        return self.trainer / "signing.key"

    @property
    def receiving_key(self) -> Path:
        """Opens tasks."""
        return self.trainer / "receiving.key"

    @property
    def audit(self) -> Path:
        """The audit log; its signed head lies beside it, as audit.head."""
        return self.trainer / "audit.jsonl"

    @property
    def ledger(self) -> Path:
        """What was done to patients' data; there once a plan with a guarantee was approved."""
        return self.trainer / "ledger.sqlite"

    @property
    def ledger_secret(self) -> Path:
        """By which the ledger knows patients again without naming them; it is of no other use."""
        return self.trainer / "ledger.secret"

    @property
    def relay(self) -> Path:
        """What the relays know: Flower's node key and a folder a study."""
        return self.path / "relay"

    @property
    def node_key(self) -> Path:
        """Flower's node key (OpenSSH, private)."""
        return self.relay / "node.key"

    @property
    def node_public(self) -> Path:
        """Flower's node key, the public line."""
        return self.relay / "node.pub"

    @property
    def studies(self) -> Path:
        """A folder a study, for the trainer."""
        return self.path / "studies"

    @property
    def cache(self) -> Path:
        """Prepared cases: patient data."""
        return self.path / "cache"

    @property
    def models(self) -> Path:
        """Final models, one file a study."""
        return self.path / "models"

    @property
    def validations(self) -> Path:
        """What models are worth on this hospital's patients: a folder a validation."""
        return self.path / "validations"

    @property
    def run(self) -> Path:
        """What exists while the daemon runs, and the flags that steer it."""
        return self.path / "run"

    @property
    def socket(self) -> Path:
        """Where the trainer listens."""
        return self.run / "trainer.sock"

    @property
    def token(self) -> Path:
        """The bearer token of a trainer that listens on a loopback port."""
        return self.run / "trainer.token"

    @property
    def pid(self) -> Path:
        """The daemon's process id."""
        return self.run / "daemon.pid"

    @property
    def status(self) -> Path:
        """What the daemon is doing."""
        return self.run / "status.json"

    @property
    def paused(self) -> Path:
        """While this flag is there, no task is worked on."""
        return self.run / "paused"

    @property
    def stop(self) -> Path:
        """This flag asks the daemon to end."""
        return self.run / "stop"

    @property
    def logs(self) -> Path:
        """Diagnostics; they name no patient."""
        return self.path / "logs"

    @property
    def trainer_log(self) -> Path:
        """The trainer's log."""
        return self.logs / "trainer.log"

    @property
    def daemon_log(self) -> Path:
        """The daemon's log."""
        return self.logs / "daemon.log"

    def study(self, name: str) -> Path:
        """studies/NAME, the trainer's folder of one study.

        Raises:
            DataError: that cannot be the name of a study.
        """
        return self.studies / _checked(name)

    def bundle(self, name: str) -> Path:
        """The bundle as it was pinned by `join`."""
        return self.study(name) / "bundle.json"

    def plan(self, name: str) -> Path:
        """The plan's canonical bytes."""
        return self.study(name) / "plan.json"

    def approval(self, name: str) -> Path:
        """What the hospital approved; absent while it has not."""
        return self.study(name) / "approval.json"

    def roll(self, name: str) -> Path:
        """The signed roll that is accepted."""
        return self.study(name) / "roll.json"

    def offered_roll(self, name: str) -> Path:
        """A newer signed roll that waits for approval."""
        return self.study(name) / "offered-roll.json"

    def cohort(self, name: str) -> Path:
        """Which data the study may train on, as frozen at approval."""
        return self.study(name) / "cohort.json"

    def answers(self, name: str) -> Path:
        """Stored answers: as they leave, and as they were before they were sealed."""
        return self.study(name) / "answers"

    def work(self, name: str) -> Path:
        """The trainer's optimiser states and journal."""
        return self.study(name) / "work"

    def spool(self, name: str) -> Path:
        """Messages while they are worked on."""
        return self.study(name) / "spool"

    def model(self, name: str) -> Path:
        """The study's final model."""
        return self.models / f"{_checked(name)}.safetensors"

    def relay_of(self, name: str) -> Path:
        """relay/NAME, the relay's folder of one study."""
        return self.relay / _checked(name)

    def link(self, name: str) -> Path:
        """Where the relay connects to."""
        return self.relay_of(name) / "link.json"

    def ca(self, name: str) -> Path:
        """The certificate authority that the coordinator's certificate must come from."""
        return self.relay_of(name) / "ca.crt"

    def flower(self, name: str) -> Path:
        """FLWR_HOME of one relay."""
        return self.relay_of(name) / "flower"

    def relay_log(self, name: str) -> Path:
        """One relay's log."""
        return self.logs / f"relay-{_checked(name)}.log"

    @property
    def joined(self) -> tuple[str, ...]:
        """The studies that were joined and not left, as the trainer sees them."""
        return _named(self.studies.glob("*/bundle.json"))

    @property
    def linked(self) -> tuple[str, ...]:
        """The studies that have a relay, as the relay's user sees them."""
        return _named(self.relay.glob("*/link.json"))

    @property
    def record(self) -> SiteRecord:
        """Who this is.

        Raises:
            DataError: this is no SITEDIR.
        """
        if not self.site.exists():
            raise DataError(
                f"{self.path.name} is no site folder: name it with --site or FEDSEG_SITE, or make "
                "one with `fedseg-site init`"
            )
        return read_note(self.site, SiteRecord)

    def link_of(self, name: str) -> Link:
        """The link of one study, with the trainer's socket as an absolute path.

        Raises:
            DataError: the study has no link, or it is damaged.
        """
        link = read_note(self.link(name), Link)
        kind, _, where = link.trainer.partition(":")
        if kind != "unix":
            return link
        return link.model_copy(update={"trainer": f"unix:{self.path / where}"})

    def require_study(self, name: str) -> Path:
        """studies/NAME of a study that was joined.

        Raises:
            DataError: it was not; the message says which were.
        """
        if not self.bundle(name).exists():
            known = ", ".join(self.joined) or "none yet: `fedseg-site join BUNDLE`"
            raise DataError(f"this site has not joined {name!r}; joined: {known}")
        return self.study(name)


def _checked(name: str) -> str:
    """A study's name, which becomes a folder."""
    if not _STUDY.fullmatch(name):
        raise DataError(
            f"a study is named in small letters, digits, '.', '_' and '-', not {name[:80]!r}"
        )
    return name


def _named(notes: Iterable[Path]) -> tuple[str, ...]:
    """The studies whose folders hold these files."""
    return tuple(sorted(p.parent.name for p in notes if _STUDY.fullmatch(p.parent.name)))


def read_note(path: Path, kind: type[Note]) -> Note:
    """Read one of our JSON files.

    Raises:
        DataError: it is missing, cannot be read, or is not what this version writes.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_NOTE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}") from None
    if len(data) > MAX_NOTE_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_NOTE_BYTES} bytes: it is not fedseg's")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"])) or "whole"
        raise DataError(
            f"{path.name} is damaged or of another version of fedseg ({field}): bring it back from "
            "a backup"
        ) from None


def write_note(path: Path, note: BaseModel | bytes, mode: int = PRIVATE_FILE) -> None:
    """Write a file whole or not at all, for the owner of its folder.

    Raises:
        StorageError: it could not be written; the one before it is untouched.
    """
    data = note if isinstance(note, bytes) else note.model_dump_json(indent=1).encode() + b"\n"
    with as_owner_of(path.parent):
        write_atomically(path, data, mode)


def make_folder(path: Path, mode: int = PRIVATE_FOLDER) -> Path:
    """Make a folder of this mode, for the owner of its parent; one that is there gets no wider.

    Raises:
        StorageError: no right to make it there.
    """
    try:
        with as_owner_of(path.parent):
            if not path.is_dir():
                path.mkdir(parents=True, mode=mode)
                path.chmod(mode)
            wider = path.stat().st_mode & 0o777 & ~mode
            if wider:
                path.chmod(path.stat().st_mode & mode)
    except OSError as error:
        raise StorageError(
            f"cannot make the folder {path.name} ({error.strerror}): run this as the user to whom "
            f"{path.parent.name} belongs, or as root"
        ) from None
    return path


@contextmanager
def as_owner_of(folder: Path) -> Iterator[None]:
    """As root, act with the rights of a folder's owner and no more; else as whoever one is.

    So what root writes belongs to the user that will need it, and a link that such a user lays
    leads nowhere that the user could not go alone: it counts as the user's, whatever it points to.
    For a process with one thread.
    """
    while not folder.exists():
        folder = folder.parent
    owner, groups, group = folder.lstat(), os.getgroups(), os.getegid()
    if owner.st_uid == 0:  # a folder, or a link that root has laid
        owner = folder.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)
