"""The folder itself: keys, owners and modes, policy, the trainer's socket, the running daemon.

Relay and trainer may be one user or two. Where they are two, the relay's user must reach the socket
and nothing else of the trainer's; modes are computed, not tried, so root's answer is theirs too.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from fedseg.errors import FedsegError
from fedseg.security.keys import is_encrypted, load_receiving_key, load_signing_key
from fedseg.security.nodekeys import public_line
from fedseg.shell import passphrase
from fedseg.sole import holder
from sites.checkup.verdict import Verdict, fail, warn, well
from sites.client import Door, status
from sites.folder import SiteFolder
from sites.keyring import own_identity
from sites.policy import load_policy

_RESTORE = "bring trainer/, relay/ and request.json back from one backup, or make a new site folder"


def trainer_keys(folder: SiteFolder) -> Verdict:
    """The identity keys: there, for their owner alone, and those of the request."""
    subject, own = "Identity keys", own_identity(folder)
    secret = passphrase()
    locked = is_encrypted(folder.signing_key) or is_encrypted(folder.receiving_key)
    if locked and secret is None:
        return warn(
            subject,
            "there, behind a passphrase that was not given: not opened",
            "to have them checked, and to run the trainer unattended, name a file that holds the "
            "passphrase in FEDSEG_PASSPHRASE_FILE",
        )
    signing = load_signing_key(folder.signing_key, secret).public.text
    receiving = load_receiving_key(folder.receiving_key, secret).public.text
    if (signing, receiving) != (own.signing, own.sealing):
        return fail(subject, "they are not the keys that request.json names", _RESTORE)
    return well(subject, f"{own.name}'s own{', behind a passphrase' if locked else ''}")


def node_key(folder: SiteFolder) -> Verdict:
    """Flower's key: there, for its owner alone, and that of the request."""
    subject, line = "Node key", public_line(folder.node_key)
    if line != own_identity(folder).node:
        return fail(subject, "it is not the key that request.json names", _RESTORE)
    return well(subject, "the one that request.json names")


def owners_and_modes(folder: SiteFolder) -> Verdict:
    """Who may read and write what."""
    subject, wrong = "Owners and modes", list(_too_wide(folder))
    if wrong:
        commands = "; ".join(f"chmod {mode:o} {name}" for name, _, mode in wrong)
        shown = ", ".join(f"{name} has {found:04o}" for name, found, _ in wrong)
        return fail(subject, f"others than the owner get too much: {shown}", f"run: {commands}")
    if not (folder.trainer.exists() and folder.relay.exists()):
        return well(subject, "this half's files are for their owner alone")
    if folder.trainer.stat().st_uid == folder.relay.stat().st_uid:
        return warn(
            subject,
            "relay and trainer are one user: an app from the coordinator runs in the relay and "
            "could read keys and data",
            "run the two halves as two users or containers: docs/deploy.md",
        )
    return well(subject, "relay and trainer are two users, and each has its own")


def policy(folder: SiteFolder) -> Verdict:
    """The hospital's rules can be read, and nobody but their owner writes them."""
    subject, rules = "Policy", load_policy(folder.policy)
    allowed = "allowed" if rules.privacy_none else "refused"
    says = f"read; studies without a privacy guarantee are {allowed} (privacy_none)"
    if rules.total_epsilon is None or rules.total_delta is None:
        return well(subject, f"{says}; those with one are refused: no total_epsilon or delta")
    return well(
        subject,
        f"{says}; those with one may cost a patient epsilon {rules.total_epsilon:g} at delta "
        f"{rules.total_delta:g} over all",
    )


def door(folder: SiteFolder) -> Verdict:
    """The trainer's door: open to the relay, and to whom else."""
    subject = "Trainer's socket"
    if not folder.socket.exists():
        if folder.token.exists():
            return well(subject, "the trainer listens on a loopback port, with a token")
        return warn(
            subject,
            "not there: the trainer does not run",
            "start it: `fedseg-site run SITEDIR`, or the service; its log says why it ended",
        )
    problem = _problem_with(folder, folder.socket.stat())
    if problem is not None:
        return problem
    try:
        said = status(Door(f"unix:{folder.socket}"))
    except FedsegError as error:
        return fail(subject, str(error), "restart the trainer; its log says why it does not answer")
    closed = said.get("closed")
    return well(subject, "the trainer answers" + (f" (no tasks now: {closed})" if closed else ""))


def daemon(folder: SiteFolder) -> Verdict:
    """Whether the daemon runs that keeps both halves alive."""
    subject, remedy = (
        "Daemon",
        "start it: `fedseg-site run SITEDIR`, or the services of both halves",
    )
    try:
        pid = holder(folder.pid)
    except PermissionError:
        return well(subject, "another user's; `fedseg-site status` as that user says more")
    if pid is None and folder.socket.exists():
        return well(subject, "none: the trainer runs as a service of its own")
    if pid is None:
        return warn(subject, "does not run", remedy)
    if folder.paused.exists():
        return warn(subject, "runs, but the site is paused", "`fedseg-site resume` goes on")
    return well(subject, f"runs as process {pid}")


def _too_wide(folder: SiteFolder) -> Iterator[tuple[str, int, int]]:
    """Name, mode, and the widest mode that it should have, of what others get too much of."""
    private = (
        *(folder.trainer, folder.relay, folder.studies, folder.cache),
        *(folder.models, folder.validations),
    )
    keys = (folder.signing_key, folder.receiving_key, folder.node_key)
    secret = (*keys, folder.ledger, folder.ledger_secret)
    guarded = (folder.policy, folder.site, folder.request, folder.path)
    allowed: list[tuple[Path, int]] = [
        *((path, 0o700) for path in private),
        *((path, 0o600) for path in secret),
        *((path, 0o755) for path in guarded),
        (folder.run, 0o770),
        (folder.logs, 0o770),
    ]
    for path, widest in allowed:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except (FileNotFoundError, PermissionError):
            continue
        if mode & ~widest & 0o777:
            yield str(path.relative_to(folder.path)), mode, mode & widest


def _problem_with(folder: SiteFolder, door: os.stat_result) -> Verdict | None:
    """Who may ask the trainer and should not, or the other way round."""
    subject = "Trainer's socket"
    if not stat.S_ISSOCK(door.st_mode):
        return fail(subject, "run/trainer.sock is not a socket", "remove it, start the trainer")
    if stat.S_IMODE(door.st_mode) & 0o007:
        return fail(
            subject,
            "every user of this machine may ask the trainer",
            "restart the trainer: its socket is for its owner, or for the group of --socket-group",
        )
    if not _relay_may(folder, door):
        return fail(
            subject,
            "the relay's user may not use it",
            "put the relay's user into a group, and name it to the trainer with --socket-group",
        )
    return None


def _relay_may(folder: SiteFolder, door: os.stat_result) -> bool:
    """Whether the owner of the relay's folder may connect to the socket."""
    if not folder.relay.exists():
        return True
    relay = folder.relay.stat()
    if relay.st_uid in {0, door.st_uid}:
        return True
    try:
        if relay.st_uid == os.geteuid():
            return os.access(folder.socket, os.W_OK)
        groups = os.getgrouplist(pwd.getpwuid(relay.st_uid).pw_name, relay.st_gid)
    except KeyError:
        groups = [relay.st_gid]
    return bool(door.st_mode & stat.S_IWGRP) and door.st_gid in groups
