"""The study's folder: where everything that the consortium keeps of one study lies.

One property a path, and nothing is written here. `open_study` is the door: it gives a folder only
where `fedseg-coordinator init` has finished, for it writes `study.json` last.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from fedseg.errors import DataError
from fedseg.frozen import Frozen, Name
from fedseg.plan import StudyPlan, load_plan

MAX_SETTINGS_BYTES = 64 * 1024
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")

Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(Frozen):
    """What was said at `init`.

    Attributes:
        host: name or address under which the sites reach the coordinator; it is in the certificate.
        port: the port that they dial, and that the proxy binds.
        listen: the local address that the proxy binds.
        superlink_port: where Flower's SuperLink listens, on 127.0.0.1 only.
        created: ISO 8601, UTC.
    """

    format: Literal["fedseg-study/1"] = "fedseg-study/1"
    study: Name
    host: str = Field(min_length=1, max_length=253)
    port: Port = 443
    listen: str = Field("0.0.0.0", max_length=45)
    superlink_port: Port = 8000
    created: str

    @field_validator("host")
    @classmethod
    def _host(cls, host: str) -> str:
        if _is_address(host):
            return str(ip_address(host))
        if not all(_LABEL.fullmatch(part) for part in host.split(".")):
            raise ValueError(f"{host!r} is neither a host name nor an IP address")
        return host

    @field_validator("listen")
    @classmethod
    def _listen(cls, listen: str) -> str:
        if not _is_address(listen):
            raise ValueError(f"{listen!r} is no IP address; 0.0.0.0 stands for all of IPv4")
        return listen

    @property
    def address(self) -> str:
        """What a site dials: host:port, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class StudyFolder:
    """The paths of one STUDYDIR, absolute."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()

    # What was agreed, and who takes part.
    @property
    def settings_file(self) -> Path:
        """The settings; the last file that `init` writes."""
        return self.path / "study.json"

    @property
    def plan_file(self) -> Path:
        """Canonical bytes of the built plan."""
        return self.path / "plan.json"

    @property
    def initial(self) -> Path:
        """Model file that the study starts from."""
        return self.path / "initial.safetensors"

    @property
    def registry(self) -> Path:
        """The signed roll: the truth about which sites there are."""
        return self.path / "registry.json"

    @property
    def bundles(self) -> Path:
        """What is sent to the sites."""
        return self.path / "bundles"

    def bundle(self, site: str) -> Path:
        """What is sent to one site."""
        return self.bundles / f"{site}.json"

    @property
    def audit(self) -> Path:
        """The audit chain; its signed head lies beside it."""
        return self.path / "audit.jsonl"

    # Keys and certificates.
    @property
    def keys(self) -> Path:
        """Folder of the study key, 0700."""
        return self.path / "keys"

    @property
    def study_key(self) -> Path:
        """Ed25519 key that signs plan, roll, tasks and audit."""
        return self.keys / "study.key"

    @property
    def study_public(self) -> Path:
        """Its public half, as text."""
        return self.keys / "study.pub"

    @property
    def ca(self) -> Path:
        """Folder of the consortium's certificate authority, 0700."""
        return self.path / "ca"

    @property
    def ca_key(self) -> Path:
        """Private key of the authority, PEM."""
        return self.ca / "ca.key"

    @property
    def ca_certificate(self) -> Path:
        """The certificate that sites pin, PEM."""
        return self.ca / "ca.crt"

    @property
    def tls(self) -> Path:
        """Folder of the server's key and certificate, 0700."""
        return self.path / "tls"

    @property
    def server_key(self) -> Path:
        """Private key of proxy and SuperLink, PEM, without a passphrase."""
        return self.tls / "server.key"

    @property
    def server_certificate(self) -> Path:
        """Its certificate, PEM."""
        return self.tls / "server.crt"

    # Flower and the proxy.
    @property
    def flower(self) -> Path:
        """FLWR_HOME of SuperLink and of Flower's command line."""
        return self.path / "flower"

    @property
    def flower_database(self) -> Path:
        """SQLite database of the SuperLink."""
        return self.flower / "state.db"

    @property
    def flower_app(self) -> Path:
        """The thin app that carries settings only."""
        return self.flower / "app"

    @property
    def proxy(self) -> Path:
        """The proxy's generated configuration, pid and temporary files."""
        return self.path / "proxy"

    @property
    def proxy_config(self) -> Path:
        """Generated configuration of nginx."""
        return self.proxy / "nginx.conf"

    # The study's state.
    @property
    def rounds(self) -> Path:
        """What rounds leave behind."""
        return self.path / "rounds"

    @property
    def checkpoint(self) -> Path:
        """State after the last closed stage."""
        return self.rounds / "checkpoint.safetensors"

    @property
    def outbox(self) -> Path:
        """Sealed task and receiving key of the open stage, 0700."""
        return self.rounds / "outbox"

    @property
    def scratch(self) -> Path:
        """Updates of the open round, 0700; there while a robust rule combines them."""
        return self.rounds / "scratch"

    @property
    def own_models(self) -> Path:
        """Hospitals' own models, 0700; there from the last round until they were measured."""
        return self.rounds / "own"

    @property
    def model(self) -> Path:
        """The released model, at the end."""
        return self.rounds / "model.safetensors"

    @property
    def card(self) -> Path:
        """What is known of it, for those who use it; the same as .json beside it."""
        return self.rounds / "model-card.md"

    # The running daemon.
    @property
    def run(self) -> Path:
        """Files of the running daemon."""
        return self.path / "run"

    @property
    def daemon_pid(self) -> Path:
        """Process id of the daemon."""
        return self.run / "daemon.pid"

    @property
    def daemon_report(self) -> Path:
        """How the daemon's programs and the sites' nodes do, for `status`."""
        return self.run / "daemon.json"

    @property
    def study_lock(self) -> Path:
        """Held by the one ServerApp that works on the study; holds its process id."""
        return self.run / "study.lock"

    @property
    def registry_lock(self) -> Path:
        """Held by the one command that changes the registry."""
        return self.run / "registry.lock"

    @property
    def progress(self) -> Path:
        """Where the study stands, for status and dashboard."""
        return self.run / "progress.json"

    @property
    def paused(self) -> Path:
        """Flag: no new stage is begun."""
        return self.run / "paused"

    @property
    def stop(self) -> Path:
        """Flag: the daemon is to end."""
        return self.run / "stop"

    @property
    def logs(self) -> Path:
        """One log a program."""
        return self.path / "logs"

    def log(self, program: str) -> Path:
        """Log of one program: superlink, proxy, study or daemon."""
        return self.logs / f"{program}.log"

    def settings(self) -> Settings:
        """Read the settings.

        Raises:
            DataError: there are none, or they do not hold.
        """
        return load_settings(self.settings_file)

    def plan(self) -> StudyPlan:
        """Read the built plan.

        Raises:
            PlanError: it cannot be read or does not hold.
        """
        return load_plan(self.plan_file)


def open_study(path: Path | str) -> StudyFolder:
    """The folder of a study that was initialised.

    Raises:
        DataError: it is none, or its settings do not hold.
    """
    folder = StudyFolder(path)
    folder.settings()
    return folder


def load_settings(path: Path) -> Settings:
    """Read a settings file.

    Raises:
        DataError: it cannot be read or does not hold.
    """
    if not path.exists():
        raise DataError(
            f"{path.parent.name} is no study folder: it has no {path.name}; name one with "
            "--study, or make one with `fedseg-coordinator init STUDYDIR`"
        )
    data = read_part(path, MAX_SETTINGS_BYTES)
    if len(data) > MAX_SETTINGS_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_SETTINGS_BYTES} bytes")
    try:
        return Settings.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{path.name} does not hold: {_first(error)}") from None


def read_part(path: Path, limit: int) -> bytes:
    """A small file of a study; one byte more than the limit where it is larger.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise DataError(f"cannot read the study's {path.name}: {error.strerror}") from None


def new_settings(**values: str | int) -> Settings:
    """Settings as somebody gave them on the command line.

    Raises:
        DataError: one of them cannot be.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise DataError(f"the study cannot be set up like this: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first field that is wrong, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "file"
    return f"{ascii(field)[1:-1]}: {first['msg'].removeprefix('Value error, ')}"


def _is_address(text: str) -> bool:
    """True for an IPv4 or IPv6 address; one with a zone (fe80::1%eth0) means nothing elsewhere."""
    if "%" in text:
        return False
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
