"""How a site stands: what its folder, its daemon and its trainer say, put together.

It works as well where trainer and relays are run by systemd or containers and there is no daemon.
What a study's folder says is left out for users who may not look into it.
"""

from __future__ import annotations

from typing import Any

from fedseg.errors import FedsegError
from fedseg.sole import holder
from sites.answers import Answers
from sites.approval import approved
from sites.client import Door
from sites.client import status as ask_status
from sites.folder import SiteFolder
from sites.notes import read_note
from sites.status import SiteStatus


def standing(folder: SiteFolder) -> dict[str, Any]:
    """Everything that is known: of the daemon, of the trainer itself, of every study."""
    daemon: dict[str, Any] | None = None
    if holder(folder.pid) is not None and folder.status.exists():
        daemon = read_note(folder.status, SiteStatus).model_dump(mode="json")
    said = _asked(folder)
    studies = {name: _study(folder, name, daemon) for name in folder.linked}
    return {
        "site": folder.record.name,
        "daemon": None if daemon is None else {k: daemon[k] for k in ("pid", "started", "written")},
        "paused": folder.paused.exists(),
        "closed": None if daemon is None else daemon["closed"],
        "trainer": {
            "answers": said is not None,
            "state": "not running" if daemon is None else daemon["trainer"]["state"],
            "restarts": 0 if daemon is None else daemon["trainer"]["restarts"],
            "doing": None if said is None else said["doing"],
            "waiting": 0 if said is None else said["waiting"],
        },
        "studies": studies,
    }


def _asked(folder: SiteFolder) -> dict[str, Any] | None:
    """What the trainer says itself, or None where it does not answer."""
    doors = [Door(f"unix:{folder.socket}")]
    for link in (folder.link_of(name) for name in folder.linked):
        token = None if link.trainer.startswith("unix:") else folder.token
        doors.append(Door(link.trainer, token))
    for door in dict.fromkeys(doors):
        try:
            return ask_status(door)
        except FedsegError:
            continue
    return None


def _study(folder: SiteFolder, name: str, daemon: dict[str, Any] | None) -> dict[str, Any]:
    """One study: approved or not, how its relay does, which round was served last."""
    part = None if daemon is None else daemon["studies"].get(name)
    last, here = None, False
    try:
        state = _approval(folder, name)
        last, here = Answers(folder.answers(name)).last, folder.model(name).exists()
    except FedsegError as error:
        state = str(error)
    except OSError:
        state = "not for this user to see"
    return {
        "plan": state,
        "relay": "not running" if part is None else part["state"],
        "since": None if part is None else part["since"],
        "restarts": 0 if part is None else part["restarts"],
        "last": None if last is None else {"round": last.round, "stage": last.stage},
        "model": here,
    }


def _approval(folder: SiteFolder, name: str) -> str:
    """Whether the hospital has said yes, and whether somebody waits for another yes."""
    approval = approved(folder, name)
    if approval is None:
        return "not approved"
    waits = folder.offered_roll(name).exists() and not approval.any_later_sites
    return "new sites wait for approval" if waits else "approved"
