"""`fedseg-coordinator run`: the SuperLink, the proxy and the study's run, kept alive together.

The daemon trains nothing and decides nothing about rounds. It makes the SuperLink's nodes the ones
on the signed roll whenever that changes, submits a run where none is alive, and can be killed at
any moment: the next one finds the same folder and goes on. One daemon a folder.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from coordinator.folder import Settings, StudyFolder
from coordinator.office.audit import audit_of
from coordinator.office.expiry import warnings
from coordinator.office.key import unattended_key
from coordinator.office.registry import current_roll
from coordinator.running.control import DaemonReport, NodeReport, ProgramReport
from coordinator.running.proxy import find_nginx, proxy_command, proxy_environment, write_proxy
from coordinator.running.runs import Runs
from coordinator.running.superlink import (
    SuperLink,
    listens,
    superlink_command,
    superlink_environment,
    write_flower,
)
from fedseg.durable import write_atomically
from fedseg.errors import FedsegError, StorageError
from fedseg.logs import FIELDS
from fedseg.security.keys import SigningKey
from fedseg.sole import sole
from fedseg.supervision import Happening, Program, Supervisor, keep_short

logger = logging.getLogger(__name__)

SUPERLINK, PROXY = "superlink", "proxy"
_TURN_S = 0.05
_LOOK_S = 0.25
_NODES_S = 10.0
_DAY_S = 86_400.0
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def run_daemon(folder: StudyFolder, *, with_proxy: bool = True) -> None:
    """Run a study until it is stopped.

    Args:
        with_proxy: start nginx; without it a proxy of the same rules must run elsewhere.

    Raises:
        BusyError: a daemon runs on the folder already.
        TrustError: the study key cannot be opened without somebody at the keyboard.
        ProxyError: nginx is missing or does not take its configuration.
    """
    for name in _PROXIES:  # the daemon speaks to loopback alone
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)
    key = unattended_key(folder)
    with sole(folder.daemon_pid, "a coordinator runs on this study"), _asked_to_end() as asked:
        Daemon(folder, folder.settings(), key, with_proxy=with_proxy).run(asked)


class Daemon:
    """One daemon of one study."""

    def __init__(
        self,
        folder: StudyFolder,
        settings: Settings,
        key: SigningKey,
        *,
        with_proxy: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._settings, self._clock = folder, settings, clock
        self._chain = audit_of(folder, key)
        self._superlink = SuperLink(folder, settings)
        self._runs = Runs(folder, self._superlink, self._say)
        write_flower(folder, settings)
        self._with_proxy = with_proxy
        self._supervisor = Supervisor(
            self._programs(), observe=self._happened, clock=clock, keeper=str(folder.path)
        )
        self._life: int | None = None
        self._roll: bytes | None = None
        self._tls = self._certificate()
        self._paused = folder.paused.exists()
        self._enrolled, self._needed = 0, folder.plan().aggregation.minimum_sites
        self._nodes: tuple[NodeReport, ...] = ()
        self._look_at = self._nodes_at = self._warn_at = 0.0
        self._trouble = ""
        self._written: DaemonReport | None = None
        self._untold = ""

    def run(self, asked: Callable[[], bool]) -> None:
        """Turn until asked to end, by a signal or by `fedseg-coordinator stop`."""
        self._folder.stop.unlink(missing_ok=True)
        self._folder.daemon_report.unlink(missing_ok=True)  # of a daemon that was killed
        self._chain.append("started", study=self._settings.study)
        logger.info("the coordinator of %s starts", self._settings.study)
        try:
            while not asked() and not self._folder.stop.exists():
                self.turn()
                time.sleep(_TURN_S)
        finally:
            self._supervisor.stop_all()
            self._chain.append("stopped", study=self._settings.study)
            self._folder.stop.unlink(missing_ok=True)
            self._folder.daemon_report.unlink(missing_ok=True)
            logger.info("the coordinator of %s has stopped", self._settings.study)

    def turn(self) -> None:
        """One turn; a SuperLink that does not answer is asked again in the next."""
        self._supervisor.step()
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        try:
            self._watch_flags()
            self._watch_certificate()
            self._warn(now)
            keep_short(self._folder.log(PROXY))  # a proxy that runs as its own service writes it
            if self._supervisor.states()[SUPERLINK].ready:
                self._watch_superlink(now)
            self._trouble = self._lack()
        except FedsegError as error:
            if str(error) != self._trouble:
                logger.warning("%s", error)
            self._trouble = str(error)
        self._report()

    def _watch_superlink(self, now: float) -> None:
        """Nodes as on the roll, and a run where none is alive."""
        life = self._supervisor.states()[SUPERLINK].pid
        if life != self._life:
            self._runs.lost()
            self._roll, self._life = None, life
        self._watch_roll()
        if self._enrolled >= self._needed:
            self._runs.turn(now)
        if now >= self._nodes_at:
            self._nodes_at = now + _NODES_S
            self._nodes = tuple(
                NodeReport(site=node.name, online=node.online, last_seen=node.last_seen)
                for node in sorted(self._superlink.nodes(), key=lambda node: node.name)
            )

    def _watch_roll(self) -> None:
        """Have the SuperLink know the sites of the roll, at its start and after every change."""
        data = self._folder.registry.read_bytes()
        if data == self._roll:
            return
        roll = current_roll(self._folder).roll
        changed = self._superlink.reconcile(roll)
        self._roll, self._nodes_at, self._enrolled = data, 0.0, len(roll.sites)
        for site in changed.registered:
            self._say("a node was registered", site=site)
        for site in changed.removed:
            self._say("a node was removed", site=site)
        if changed.registered:
            self._runs.again()

    def _lack(self) -> str:
        """What the study cannot begin without."""
        if self._roll is None or self._enrolled >= self._needed:
            return ""
        return f"the plan needs {self._needed} sites, {self._enrolled} are enrolled: enrol more"

    def _watch_flags(self) -> None:
        """Record that the study was paused or resumed; the ServerApp looks at the flag itself."""
        paused = self._folder.paused.exists()
        if paused != self._paused:
            self._paused = paused
            self._chain.append("paused" if paused else "resumed", study=self._settings.study)
            self._say("the study pauses after the open stage" if paused else "the study goes on")

    def _watch_certificate(self) -> None:
        """Servers read their certificate once: after a renewal they start again."""
        found = self._certificate()
        if found != self._tls:
            self._tls = found
            self._say("the server's certificate is new: its users start again")
            for name in self._supervisor.states():
                self._supervisor.restart(name)

    def _warn(self, now: float) -> None:
        """Say once a day what ends soon."""
        if now >= self._warn_at:
            self._warn_at = now + _DAY_S
            for warning in warnings(self._folder, datetime.now(UTC)):
                logger.warning("%s", warning)

    def _programs(self) -> list[Program]:
        """What is supervised."""
        folder, settings = self._folder, self._settings
        superlink = Program(
            SUPERLINK,
            superlink_command(folder, settings),
            superlink_environment(folder),
            folder.log(SUPERLINK),
            ready=lambda: listens(settings.superlink_port),
            backoff_s=0.2,
            max_backoff_s=15.0,
            folder=folder.flower,
        )
        if not self._with_proxy:
            return [superlink]
        nginx = find_nginx()
        write_proxy(folder, settings, nginx)
        proxy = Program(
            PROXY,
            proxy_command(folder, nginx),
            proxy_environment(),
            folder.log(PROXY),
            backoff_s=0.2,
            max_backoff_s=15.0,
            folder=folder.proxy,
        )
        return [superlink, proxy]

    def _certificate(self) -> float:
        """Something that changes with the server's certificate."""
        try:
            return self._folder.server_certificate.stat().st_mtime
        except OSError:
            return 0.0

    def _report(self) -> None:
        """Write what `status` shows, where it has changed; a full disk is only logged."""
        states, run = self._supervisor.states(), self._runs.state
        report = DaemonReport(
            pid=os.getpid(),
            programs=tuple(
                ProgramReport(name=name, pid=state.pid, ready=state.ready, restarts=state.restarts)
                for name, state in states.items()
            ),
            run=run.number,
            run_pid=run.pid,
            finished=run.finished,
            last_end=run.last_end,
            nodes=self._nodes,
            paused=self._paused,
            trouble=self._trouble,
        )
        if report == self._written:
            return
        try:
            write_atomically(self._folder.daemon_report, report.model_dump_json().encode())
            self._written = report
            self._untold = ""
        except StorageError as error:  # no study ends because nobody can be told of it
            if str(error) != self._untold:
                logger.warning("the daemon's report is out of date: %s", error)
            self._untold = str(error)

    def _happened(self, happening: Happening) -> None:
        """What a program did goes to the log."""
        level = logging.INFO if happening.expected else logging.WARNING
        fields = {
            "program": happening.program,
            "pid": happening.pid,
            "status": happening.status,
            "again_in_s": happening.wait_s,
        }
        logger.log(level, "%s", happening.detail, extra={FIELDS: fields})

    def _say(self, message: str, **fields: object) -> None:
        """One line of the log."""
        logger.info("%s", message, extra={FIELDS: fields})


@contextmanager
def _asked_to_end() -> Iterator[Callable[[], bool]]:
    """Says whether a signal has asked this process to end."""
    seen: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {kind: signal.signal(kind, lambda number, _: seen.append(number)) for kind in kinds}
    try:
        yield lambda: bool(seen)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
