"""The privacy ledger: whole, in step with the audit, and with a register for each private plan.

A private study is never told whose images could not be read, so the hospital is, here.
Nothing is written. A copy of the ledger elsewhere cannot be seen from here, and neither can a
folder that was put back as a whole: both are said, so that nobody takes silence for a yes.
"""

from __future__ import annotations

from fedseg.plan import load_plan
from fedseg.security.keys import SigningKey, is_encrypted, load_signing_key
from fedseg.shell import passphrase
from sites.approval import approved
from sites.audit import utc_now
from sites.checkup.verdict import Verdict, fail, warn, well
from sites.folder import SiteFolder
from sites.journal import Journal

JOURNAL = "journal.jsonl"


def ledger(folder: SiteFolder) -> Verdict:
    """The ledger and its secret: there, for their owner alone, unchanged, not rolled back."""
    subject, key = "Privacy ledger", _key(folder)
    if key is None:
        return _unopened(subject)
    from sites.ledger import begun, look_at

    if not begun(folder, key, utc_now):
        return well(subject, "none yet: no study with a privacy guarantee was approved")
    found, unseen = look_at(folder, key, utc_now)
    behind = f"; {unseen} rows of a crash are not in the audit yet" if unseen else ""
    return well(
        subject,
        f"{len(found.rows)} rows, as the audit has seen them{behind}. Whether a copy of it and of "
        "ledger.secret lies elsewhere, and how old it is, cannot be seen from here",
    )


def register(folder: SiteFolder, study: str) -> Verdict | list[Verdict]:
    """For a plan with a guarantee: whose patients are charged for it, and whether there is room."""
    subject, plan = f"Ledger ({study})", load_plan(folder.plan(study))
    approval = approved(folder, study)
    if plan.private is None or approval is None or approval.plan != plan.digest:
        return []
    key = _key(folder)
    if key is None:
        return _unopened(subject)
    from sites.ledger import look_at
    from sites.policy import limits_of, load_policy

    book = look_at(folder, key, utc_now)[0].book
    limits_of(load_policy(folder.policy))
    found = book.studies.get(study)
    if found is None or found.registered.plan != plan.digest or found.closed is not None:
        return fail(
            subject,
            "no open register of this plan is in the ledger: nothing is trained",
            f"`fedseg-site plan approve {study}`",
        )
    steps = sum(each.mechanism.steps for each in book.left(study) if each.use == "train")
    charged = f"{len(found.train)} training patients and {len(found.val)} held back are charged"
    lost = _lost(folder, study)
    if lost:
        return warn(
            subject,
            f"{charged}; in the last round {lost} times a patient who was drawn gave nothing: "
            "no image could be read or the gradient was not finite. The study is not told",
            "make room on the disk of the prepared cases; `fedseg-site check` on the data folder",
        )
    if not steps:
        return warn(
            subject,
            f"{charged}; all steps of its schedule are spent",
            "nothing, where the study is over; another round of training will be refused",
        )
    return well(subject, f"{charged}; {steps} steps of its schedule are left")


def _lost(folder: SiteFolder, study: str) -> int:
    """How often a drawn patient gave nothing in the last round, by the trainer's own journal."""
    rounds = Journal(folder.work(study) / JOURNAL).read("trained")
    return int(rounds[-1].get("lost", 0)) if rounds else 0


def _key(folder: SiteFolder) -> SigningKey | None:
    """The key that the audit is signed with; None behind a passphrase that was not given."""
    secret = passphrase()
    if is_encrypted(folder.signing_key) and secret is None:
        return None
    return load_signing_key(folder.signing_key, secret)


def _unopened(subject: str) -> Verdict:
    """It takes the key."""
    return warn(
        subject,
        "not looked at: the keys are behind a passphrase that was not given",
        "name a file that holds the passphrase in FEDSEG_PASSPHRASE_FILE",
    )
