"""`fedseg-site ledger`: what was done to patients' data, what is left, and acts on the ledger.

Whoever may run these sees what single patients have spent, so they are for the hospital. Patients
are named by the id that the hospital's data give them; the name is hashed at once and goes into no
file, no log and no message. `-` in place of an id has it read from a line of standard input, so
that it stands in no shell history either.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedseg.errors import DataError
from fedseg.sole import sole
from sites.audit import require_words, utc_now
from sites.commands.options import HERE, SiteOption, StudyArgument, open_site
from sites.folder import SiteFolder
from sites.keyring import open_signing_key
from sites.notes import write_note
from sites.policy import limits_of, load_policy
from sites.rights import as_owner_of

if TYPE_CHECKING:
    from fedseg.privacy.ledger import Ledger

app = typer.Typer(
    no_args_is_help=True,
    help="What was done to patients' data under guarantees, and what is left.",
)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReasonOption = Annotated[
    str, typer.Option(help="Why; no patient's name. It stays in ledger and audit.")
]
RESTORE_EPILOG = """
Examples:

  fedseg-site ledger restore /backup/ledger.sqlite --reason "disk replaced, copy of Sunday"

  fedseg-site ledger restore --reason "file was lost"     (from what is left, and the audit)

  fedseg-site ledger restore --whole-folder --reason "SITEDIR put back from the backup of Sunday"
"""
WITHDRAW_EPILOG = """
Examples:

  fedseg-site ledger withdraw 4711 --reason "consent withdrawn on 3 May" --site SITEDIR

  fedseg-site ledger withdraw - --reason "consent withdrawn" < file-with-the-id
"""
LINK_EPILOG = """
Examples:

  fedseg-site ledger link --old 4711 --new 4711-2 --reason "new number after the move"

  fedseg-site ledger link --old 4711 --old 815 --new 815 --reason "one person, two records"
"""


@app.command(epilog="Example:  fedseg-site ledger show --site /var/lib/fedseg")
def show(site: SiteOption = HERE, as_json: JsonOption = False) -> None:
    """Say what was done in each study, and what it cost each patient of it at most."""
    from fedseg.privacy.ledger import figures, views

    folder, ledger = _looked_at(site)
    limits = limits_of(load_policy(folder.policy))
    if as_json:
        typer.echo(json.dumps(figures.spent(ledger.book, limits), indent=2))
        return
    typer.echo(views.show(ledger.book, limits))


@app.command(epilog="Example:  fedseg-site ledger budget --site /var/lib/fedseg")
def budget(site: SiteOption = HERE, as_json: JsonOption = False) -> None:
    """Say how much of their budget over all studies patients have spent, and what is left."""
    from fedseg.privacy.ledger import figures, views

    folder, ledger = _looked_at(site)
    limits = limits_of(load_policy(folder.policy))
    if as_json:
        typer.echo(json.dumps(figures.left(ledger.book, limits), indent=2))
        return
    typer.echo(views.budget(ledger.book, limits))


@app.command(epilog="Example:  fedseg-site ledger verify --site /var/lib/fedseg")
def verify(site: SiteOption = HERE, as_json: JsonOption = False) -> None:
    """Prove that no row was edited, removed or rolled back; else exit status 1. Writes nothing."""
    from sites.ledger import look_at

    folder = open_site(site)
    key = open_signing_key(folder)
    with as_owner_of(folder.trainer):
        ledger, unseen = look_at(folder, key, utc_now)
    last = ledger.rows[-1]
    if as_json:
        found = {"rows": last.n, "newest": last.at, "hash": last.hash, "not_in_the_audit": unseen}
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"the ledger stands: {last.n} rows, the newest of {last.at}; the audit agrees")
    if unseen:
        typer.echo(
            f"{unseen} rows are not in the audit yet: a crash came between, no work began under "
            "them, and the next use of the ledger enters them"
        )
    typer.echo("Were ledger and audit both put back to an older state, this would not show here:")
    typer.echo(f"to show it later, note elsewhere: row {last.n}, {last.hash}")


@app.command(epilog="Example:  fedseg-site ledger export --out ledger.json --site SITEDIR")
def export(
    site: SiteOption = HERE,
    out: Annotated[Path | None, typer.Option(help="A new file, instead of the terminal.")] = None,
) -> None:
    """Give every row as it is chained, as JSON, for whoever checks the hashes by other means.

    Patients stand in it as keyed hashes. It shows who was in which study together: confidential.
    """
    from fedseg.privacy.ledger.views import export as rows_of

    _, ledger = _looked_at(site)
    text = json.dumps(rows_of(ledger.rows), indent=1) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise DataError(f"{out.name} is there already: name another file")
    write_note(out, text.encode())
    typer.echo(f"{len(ledger.rows)} rows in {out}")


@app.command(epilog=RESTORE_EPILOG)
def restore(
    reason: ReasonOption,
    backups: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BACKUP]...", help="Copies of trainer/ledger.sqlite."),
    ] = None,
    whole_folder: Annotated[
        bool,
        typer.Option(
            "--whole-folder",
            help="The audit was put back too: charge open studies to their end, and close them.",
        ),
    ] = False,
    new_secret: Annotated[
        bool,
        typer.Option(
            "--new-secret",
            help="ledger.secret is lost for good: charge all that was done to everyone.",
        ),
    ] = False,
    site: SiteOption = HERE,
) -> None:
    """Bring the ledger back, from copies and from what the audit knows: the larger spend counts.

    Nothing that any copy or the audit remembers is forgotten. The trainer must not run meanwhile.
    It is entered in ledger and audit; approve each open study again where its register is lost.
    """
    from sites.ledger import put_back

    folder, copies = open_site(site), tuple(backups or ())
    require_words(reason, "--reason")
    if missing := [path.name for path in copies if not path.is_file()]:
        raise DataError(f"there is no file {missing[0]}: name copies of ledger.sqlite")
    key = open_signing_key(folder)
    with (
        as_owner_of(folder.trainer),
        sole(folder.trainer / "lock", "stop the trainer first: it runs"),
    ):
        ledger, recovered = put_back(
            folder, copies, reason, key, utc_now, to_the_end=whole_folder, new_secret=new_secret
        )
    typer.echo(f"restored: {len(ledger.rows)} rows, {recovered} debits were written anew")
    lost = sum(debit.everyone for debit in ledger.book.debits.values())
    if lost:
        typer.echo(f"{lost} debits are charged to every patient, since their register is lost")
    typer.echo("look at what it says now: fedseg-site ledger show")


@app.command(epilog=LINK_EPILOG)
def link(
    old: Annotated[list[str], typer.Option(help="An id that goes, or stays with another.")],
    new: Annotated[list[str], typer.Option(help="The id, or ids, of the person from now on.")],
    reason: ReasonOption,
    site: SiteOption = HERE,
) -> None:
    """Say that ids mean the same people: records were moved, split or merged.

    Every new id carries all that the old ones spent. It cannot be undone.
    """
    require_words(reason, "--reason")
    _require_apart(reason, *old, *new)
    with _opened(site) as ledger:
        names = [ledger.key_of(_id(name)) for name in old]
        if strangers := len(set(names) - set(ledger.book.patients)):
            raise DataError(
                f"{strangers} of the old ids are in no register of this ledger: there is nothing "
                "to carry over; look for a slip in writing"
            )
        ledger.link(tuple(names), tuple(ledger.key_of(_id(name)) for name in new), reason)
    typer.echo(f"{len(new)} ids carry from now on what {len(old)} ids have spent")


@app.command(epilog=WITHDRAW_EPILOG)
def withdraw(
    patient: Annotated[
        str, typer.Argument(metavar="PATIENT", help="The id in the hospital's data, or `-`.")
    ],
    reason: ReasonOption,
    site: SiteOption = HERE,
) -> None:
    """Withdraw a patient: the data are not used from the next task on; says what they went into.

    What was spent stays spent. It holds for every study of this site, and cannot be undone.
    """
    from fedseg.privacy.ledger.views import withdrawal

    require_words(reason, "--reason")
    _require_apart(reason, patient)
    with _opened(site) as ledger:
        name = ledger.key_of(_id(patient))
        if name not in ledger.book.patients:
            raise DataError(
                "this id is in no register of this ledger: look for a slip in writing; where the "
                "patient was in no study with a guarantee, take the patient out of the data and "
                "approve those studies again"
            )
        for each in sorted(ledger.book.known_ids(name) - {name}):
            ledger.withdraw(each, reason)  # older ids, under which data may still lie
        debits = ledger.withdraw(name, reason)
    typer.echo(withdrawal(debits))


@app.command(epilog='Example:  fedseg-site ledger close lung --reason "the study is over"')
def close(study: StudyArgument, reason: ReasonOption, site: SiteOption = HERE) -> None:
    """End a study in the ledger: nothing more is charged, and what it had left is free for others.

    `plan refuse` and `leave` do this; it is for a study that is over.
    """
    require_words(reason, "--reason")
    with _opened(site) as ledger:
        ledger.close(study, reason)
    typer.echo(f"{study} is closed: no task of it is worked on; `plan approve` opens it again")


def _looked_at(site: Path) -> tuple[SiteFolder, Ledger]:
    """The ledger, verified; nothing is written."""
    from sites.ledger import look_at

    folder = open_site(site)
    key = open_signing_key(folder)
    with as_owner_of(folder.trainer):
        return folder, look_at(folder, key, utc_now)[0]


@contextmanager
def _opened(site: Path) -> Iterator[Ledger]:
    """The ledger, verified, to write to."""
    from sites.ledger import open_ledger

    folder = open_site(site)
    key = open_signing_key(folder)
    with as_owner_of(folder.trainer):
        yield open_ledger(folder, key, utc_now)


def _id(given: str) -> str:
    """A patient's id, as given or as a line of standard input."""
    name = (sys.stdin.readline() if given == "-" else given).strip()
    if not name:
        raise DataError("a patient's id is needed")
    return name


def _require_apart(reason: str, *patients: str) -> None:
    """Keep ids out of what is stored in words."""
    if any(name.strip() and name.strip() in reason for name in patients if name != "-"):
        raise DataError("--reason must not name the patient: it is stored in plain words")
