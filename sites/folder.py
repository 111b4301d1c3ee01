"""SITEDIR: where everything of one hospital's fedseg lies.

One property a path; nothing here decides anything. `trainer/`, `studies/`, `cache/`, `models/`
and `validations/` belong to the user that sees patients, `relay/` to the user that sees the
network, and the relay finds all it needs in `relay/` and `run/`: neither has to look into the
other's folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedseg.errors import DataError
from fedseg.frozen import Frozen, Name, SiteName
from sites.notes import read_note

UNIX_TRAINER = "unix:run/trainer.sock"

_STUDY = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


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
    def trained(self) -> Path:
        """Notes of whom models were trained on; see `sites.origins`."""
        return self.trainer / "trained"

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
