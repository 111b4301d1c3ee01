"""`fedseg-site run`: one trainer, and one relay for each study that is joined and approved.

The daemon starts them, starts them again when they end, and notices what changes in the folder: a
study that was joined, approved or left, a pause. It works on no task and opens no key. While the
site is paused, or outside the policy's hours, the relays are off line, so that the coordinator sees
it; what the trainer works on is finished and stored. Everything that it knows is in status.json.
"""

from __future__ import annotations

import logging
import os
import signal
import sysconfig
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedseg.errors import DataError, FedsegError, RoundError, StorageError
from fedseg.security.documents import stamp
from fedseg.security.keys import is_encrypted
from fedseg.shell import PASSPHRASE_FILE
from fedseg.sole import sole
from fedseg.supervision import Happening, Program, State, Supervisor
from sites.approval import approved
from sites.client import Door, status
from sites.folder import SiteFolder
from sites.listening import Place, closed_because
from sites.notes import PUBLIC_FILE, write_note
from sites.relay import BEGINS, Word, relay_of, what_it_says
from sites.rights import SHARED_FOLDER, make_folder
from sites.status import Part, SiteStatus

logger = logging.getLogger(__name__)

TRAINER = "trainer"
TURN_S, LOOK_S, STATUS_S = 0.1, 1.0, 5.0
GRACE_S = 10.0
TAIL_BYTES = 16 * 1024
LONGEST_WORDS = 300
HELD_S = 90.0
NOT_FOR_A_TRAINER = ("proxy", "FLWR_")
SENTENCES: Mapping[Word, str] = {
    "starting": "starting",
    "on line": "on line",
    "unreachable": "the coordinator cannot be reached: trying again; see `doctor`",
    "refused": "waiting: Flower holds the session before this one, for 60 s at most",
    "certificate": "the coordinator's certificate is not of the study's CA: see `doctor`",
}
REFUSED_LONG = (
    "the coordinator refuses this site's node key: ask whether the site was revoked, or is not yet "
    "enrolled with the key that it has"
)


@dataclass
class _Refused:
    """Since when a relay has been refused, without having been on line in between."""

    since: float | None = None


class Daemon:
    """The daemon of one site; `turn` never blocks for long."""

    def __init__(
        self,
        folder: SiteFolder,
        place: Place,
        *,
        device: str = "cpu",
        outside: Mapping[str, str] = os.environ,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Make a daemon; nothing is started before its first turn.

        Args:
            place: where the trainer is to listen.
            outside: the environment that is passed on as far as it is needed.
        """
        self._folder, self._place, self._device = folder, place, device
        self._outside, self._now = outside, now
        self._site, self._started = folder.record.name, now()
        self._supervisor = Supervisor((), observe=self._tell, keeper=str(folder.path))
        self._refused: dict[str, _Refused] = {}
        self._idle: dict[str, str] = {}
        self._closed: str | None = None
        self._looked = self._wrote = float("-inf")
        self._last: SiteStatus | None = None

    def turn(self) -> None:
        """Look at the folder, look after the processes, say how they do."""
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            self._closed = closed_because(self._folder)
            self._supervisor.replace(self._wanted())
        self._supervisor.step()
        self._write_status()

    def stop(self) -> None:
        """End the relays first, then the trainer."""
        self._supervisor.stop_all(GRACE_S)
        self._folder.status.unlink(missing_ok=True)

    def _wanted(self) -> list[Program]:
        """The trainer, and the relays of the studies that may be worked on."""
        self._idle = {}
        programs = [self._trainer()]
        for study in self._folder.linked:
            try:
                if self._closed is not None:
                    self._idle[study] = self._closed
                elif approved(self._folder, study) is None:
                    self._idle[study] = f"waits for `fedseg-site plan approve {study}`"
                else:
                    programs.append(self._relay(study))
            except FedsegError as error:
                self._idle[study] = str(error)
        return programs

    def _trainer(self) -> Program:
        """The trainer's program: our own command, without proxies."""
        place = self._place
        command = [
            str(Path(sysconfig.get_path("scripts")) / "fedseg-site"),
            *("trainer", "--site", str(self._folder.path)),
            *("--listen", place.address, "--device", self._device),
            *(("--socket-group", place.group) if place.group else ()),
        ]
        environment = {
            name: value
            for name, value in self._outside.items()
            if not name.lower().endswith(NOT_FOR_A_TRAINER[0])
            and not name.startswith(NOT_FOR_A_TRAINER[1])
        }
        log = self._folder.trainer_log
        return Program(TRAINER, tuple(command), environment, log, ready=self._trainer_ready)

    def _trainer_ready(self) -> bool:
        """Whether the trainer answers."""
        token = None if self._place.address.startswith("unix:") else self._folder.token
        try:
            status(Door(self._place.address, token), timeout_s=1.0)
        except RoundError:
            return False
        return True

    def _relay(self, study: str) -> Program:
        """The relay's program."""
        relay = relay_of(self._folder, study, self._outside)
        return Program(
            study_program(study),
            relay.command,
            relay.environment,
            self._folder.relay_log(study),
            ready=lambda: self._word(study) == "on line",
            backoff_s=3.0,
            max_backoff_s=10.0,
        )

    def _word(self, study: str) -> Word:
        """What a relay's log says of it, and since when it has been refused."""
        word = what_it_says(_tail(self._folder.relay_log(study)))
        refused = self._refused.setdefault(study, _Refused())
        if word == "on line":
            refused.since = None
        elif word == "refused" and refused.since is None:
            refused.since = time.monotonic()
        return word

    def _sentence(self, study: str) -> str:
        """How a relay does, in words."""
        if study in self._idle:
            ending = self._supervisor.states().get(study_program(study), State()).pid is not None
            return f"ending: {self._idle[study]}" if ending else self._idle[study]
        word = self._word(study)
        since = self._refused[study].since
        if word != "on line" and since is not None:
            long = time.monotonic() - since > HELD_S
            return REFUSED_LONG if long else SENTENCES["refused"]
        return SENTENCES[word]

    def _why_it_ended(self) -> str:
        """The trainer's last words; those of a traceback may name a patient's file."""
        tail = _tail(self._folder.trainer_log)
        words = tail.strip().rpartition("\n")[2]
        if not words or "Traceback" in tail:
            words = f"{self._folder.trainer_log.name} says why"
        return f"ended, is started again: {words[:LONGEST_WORDS]}"

    def _write_status(self) -> None:
        """Write status.json when something changed, and now and then."""
        if time.monotonic() - self._wrote < LOOK_S:
            return
        states = self._supervisor.states()
        trainer = states.get(TRAINER, State())
        said = "ready" if trainer.ready else "starting" if trainer.pid else self._why_it_ended()
        found = SiteStatus(
            site=self._site,
            pid=os.getpid(),
            started=stamp(self._started),
            written=stamp(self._now()),
            closed=self._closed,
            trainer=self._part(said, trainer),
            studies={
                study: self._part(self._sentence(study), states.get(study_program(study), State()))
                for study in self._folder.linked
            },
        )
        same = self._last is not None and _lasting(found) == _lasting(self._last)
        if same and time.monotonic() - self._wrote < STATUS_S:
            return
        self._last, self._wrote = found, time.monotonic()
        try:
            write_note(self._folder.status, found, PUBLIC_FILE)
        except StorageError as error:  # both halves need the daemon more than people need its words
            logger.warning("%s", error)

    def _part(self, said: str, state: State) -> Part:
        """One process in status.json."""
        since = None
        if state.pid is not None:
            since = stamp(self._now() - timedelta(seconds=time.monotonic() - state.since))
        return Part(state=said, since=since, restarts=state.restarts, pid=state.pid)

    def _tell(self, happening: Happening) -> None:
        """Log what happened; a relay's log gets a line too, so that lives can be told apart."""
        study = happening.program.removeprefix("relay-")
        level, detail = logging.INFO, happening.detail
        if happening.kind == "started" and study != happening.program:
            with suppress(OSError), self._folder.relay_log(study).open("a") as log:
                log.write(f"fedseg: {BEGINS}\n")
        if happening.kind == "ended" and not happening.expected:
            level = logging.WARNING
            if happening.program == TRAINER and happening.status == 1:
                detail = f"the trainer {self._why_it_ended()}"
            if study != happening.program and self._word(study) in {"refused", "certificate"}:
                detail = f"the relay of {study} ended: {self._sentence(study)}"
        fields = {"program": happening.program, "pid": happening.pid, "status": happening.status}
        logger.log(level, "%s", detail, extra={"fields": fields})


def run_daemon(folder: SiteFolder, place: Place, device: str) -> None:
    """Run until SIGTERM, SIGINT or the flag `stop`.

    Raises:
        BusyError: a daemon runs in this folder already.
        DataError: the keys have a passphrase and no file names it: a trainer that is started again
            has nobody to ask.
        StorageError: no right to write to `run/`.
    """
    keys = (folder.signing_key, folder.receiving_key)
    if not os.environ.get(PASSPHRASE_FILE) and any(is_encrypted(key) for key in keys):
        raise DataError(
            f"the site's keys have a passphrase: name the file that holds it in {PASSPHRASE_FILE}"
        )
    make_folder(folder.run, SHARED_FOLDER)
    with sole(folder.pid, "a daemon runs in this folder"):
        for old in (folder.stop, folder.status):
            old.unlink(missing_ok=True)
        asked: list[int] = []
        for wanted in (signal.SIGTERM, signal.SIGINT):
            signal.signal(wanted, lambda number, _frame: asked.append(number))
        daemon = Daemon(folder, place, device=device)
        logger.info("the daemon of %s runs", folder.record.name)
        try:
            while not asked and not folder.stop.exists():
                daemon.turn()
                time.sleep(TURN_S)
        finally:
            daemon.stop()
            folder.stop.unlink(missing_ok=True)
        logger.info("the daemon has stopped")


def study_program(study: str) -> str:
    """What the supervisor calls the relay of a study."""
    return f"relay-{study}"


def _tail(log: Path) -> str:
    """The end of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _lasting(found: SiteStatus) -> SiteStatus:
    """A status without the times that change by themselves."""
    parts = {name: part.model_copy(update={"since": None}) for name, part in found.studies.items()}
    trainer = found.trainer.model_copy(update={"since": None})
    return found.model_copy(update={"written": "", "trainer": trainer, "studies": parts})
