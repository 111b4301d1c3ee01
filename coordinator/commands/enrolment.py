"""`fedseg-coordinator enrol`, `revoke`, `renew`, `sites`: who takes part, and until when."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.study import StudyPath, unlocked
from fedseg.errors import DataError, TrustError

ENROL_EPILOG = "Example:  fedseg-coordinator enrol hospital_a.request.json --study /srv/liver"
REVOKE_EPILOG = (
    'Example:  fedseg-coordinator revoke hospital_a --reason "key lost" --study /srv/liver'
)
RENEW_EPILOG = "Example:  fedseg-coordinator renew --study /srv/liver"
SITES_EPILOG = "Example:  fedseg-coordinator sites --study /srv/liver"


def enrol(
    request: Annotated[
        Path, typer.Argument(metavar="REQUEST", help="The request.json that the site sent.")
    ],
    study: StudyPath = Path(),
    yes: Annotated[
        bool, typer.Option("--yes", help="The fingerprint was compared already: do not ask.")
    ] = False,
) -> None:
    """Enrol a site once its fingerprint was compared by telephone; writes bundles/SITE.json.

    Enrolling the same request again writes the site's bundle anew. Sites that have joined already
    get the new list of sites by themselves, and ask their people to approve the newcomer.
    """
    from coordinator.folder import open_study
    from coordinator.office.enrolment import refuse_clash, register
    from coordinator.office.registry import current_roll
    from fedseg.security.identity import open_request

    folder = open_study(study)
    data = _read(request)
    identity = open_request(data).identity
    roll = current_roll(folder).roll
    refuse_clash(roll, identity)
    known = roll.site(identity.name) == identity
    if not known:
        typer.echo(f"{identity.name} asks to take part. Fingerprint of its keys:")
        typer.echo(f"  {identity.fingerprint}")
    if not (known or yes):
        _confirm(identity.name)
    bundle = register(folder, data, unlocked(folder)[0], datetime.now(UTC))
    done = "was enrolled already: its bundle is new" if known else "is enrolled"
    typer.echo(f"{identity.name} {done}; send it {bundle}, which holds no secret")


def revoke(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Name of the site, as in `sites`.")],
    reason: Annotated[str, typer.Option(help="Why; it stays in the audit.")],
    study: StudyPath = Path(),
) -> None:
    """Take a site out of the study: its keys are refused from now on."""
    from coordinator.folder import open_study
    from coordinator.office.enrolment import revoke as take_out

    folder = open_study(study)
    take_out(folder, site, reason, unlocked(folder)[0], datetime.now(UTC))
    typer.echo(f"{site} is revoked; a running coordinator shuts it out by itself")


def renew(study: StudyPath = Path()) -> None:
    """Make a new server certificate and a roll that is valid anew; write all bundles again.

    Needed once a year, and after study.json was given another host.
    """
    from coordinator.folder import open_study
    from coordinator.office.enrolment import renew as renew_all
    from coordinator.office.expiry import valid_until, warnings

    folder = open_study(study)
    now = datetime.now(UTC)
    key, secret = unlocked(folder)
    renew_all(folder, key, now, secret)
    typer.echo(
        f"The roll is valid until {valid_until(folder):%Y-%m-%d}; sites get it when they enlist "
        "next. A running coordinator takes the new certificate by itself."
    )
    _warn(warnings(folder, now))


def sites(study: StudyPath = Path()) -> None:
    """List the sites with their fingerprints; warn of all that ends within 30 days."""
    from rich.console import Console
    from rich.table import Table

    from coordinator.folder import open_study
    from coordinator.office.audit import enrolled_at
    from coordinator.office.expiry import valid_until, warnings
    from coordinator.office.founding import study_fingerprint
    from coordinator.office.registry import current_roll

    folder = open_study(study)
    roll, since = current_roll(folder).roll, enrolled_at(folder)
    table = Table("site", "fingerprint", "enrolled", "valid until")
    for site in roll.sites:
        end = f"{valid_until(folder):%Y-%m-%d}"
        table.add_row(site.name, site.fingerprint, since.get(site.name, "-")[:10], end)
    for gone in roll.revoked:
        table.add_row(gone.name, "-", "-", "revoked", style="dim")
    Console(width=120, highlight=False).print(table)
    typer.echo(f"{roll.study}, version {roll.version} of the roll; fingerprint of the study:")
    typer.echo(f"  {study_fingerprint(folder)}")
    _warn(warnings(folder, datetime.now(UTC)))


def _confirm(name: str) -> None:
    """Nobody is enrolled unless people spoke to each other."""
    typer.echo(
        "Call the hospital, at a number that did not come with the request, and have these digits "
        "read to you; `fedseg-site init` showed them there."
    )
    if not typer.confirm("Are they the same?"):
        raise TrustError(
            f"{name} was not enrolled: somebody else may have made this request; ask the hospital "
            "to send it again by another way"
        )


def _warn(found: tuple[str, ...]) -> None:
    """Warnings on the error stream."""
    for line in found:
        typer.secho(f"warning: {line}", fg="yellow", err=True)


def _read(request: Path) -> bytes:
    """The request's bytes, no more than one can have."""
    from fedseg.security.identity import MAX_REQUEST_BYTES

    try:
        with request.open("rb") as file:
            return file.read(MAX_REQUEST_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read the request {request.name}: {error.strerror}") from None
