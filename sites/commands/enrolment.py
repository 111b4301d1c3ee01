"""`fedseg-site init`, `join`, `leave` and `studies`: keys, and in which studies they are known."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedseg.errors import DataError, FedsegError, TrustError
from fedseg.security.certificates import EXPIRY_NOTICE
from fedseg.shell import passphrase as ask_passphrase
from sites.audit import utc_now
from sites.commands.options import HERE, SiteOption, StudyArgument, open_site
from sites.folder import UNIX_TRAINER, SiteFolder

INIT_EPILOG = """
Examples:

  fedseg-site init /var/lib/fedseg --name hospital_a

  FEDSEG_PASSPHRASE_FILE=/run/secrets/fedseg fedseg-site init SITEDIR --name hospital_a --passphrase
"""
JOIN_EPILOG = "Example:  fedseg-site join hospital_a.bundle.json --site /var/lib/fedseg"
LEAVE_EPILOG = "Example:  fedseg-site leave lung --site /var/lib/fedseg"
STUDIES_EPILOG = "Example:  fedseg-site studies --site /var/lib/fedseg"


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="SITEDIR", help="A new folder, for everything of this site.")
    ],
    name: Annotated[str, typer.Option(help="This hospital's name in studies, as hospital_a.")],
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help="Encrypt the trainer's keys; the daemon then needs FEDSEG_PASSPHRASE_FILE.",
        ),
    ] = False,
) -> None:
    """Make this site's folder and keys, and a request to send to the consortium."""
    secret = ask_passphrase("New passphrase of this site's keys", new=True) if passphrase else None
    if passphrase and secret is None:
        raise DataError(
            "--passphrase needs somebody at a terminal, or a file that FEDSEG_PASSPHRASE_FILE names"
        )
    from sites.founding import found

    site = SiteFolder(folder)
    identity = found(site, name, utc_now(), secret)
    typer.echo(f"{identity.name} has its keys. Send the consortium {site.request}; no secret in it")
    typer.echo("When they call to compare, read them this fingerprint:")
    typer.echo(f"  {identity.fingerprint}")
    typer.echo(f"Then look through the rules of this hospital: {site.policy}")


def join(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="The file that the consortium sent.")
    ],
    site: SiteOption = HERE,
    yes: Annotated[
        bool, typer.Option("--yes", help="The fingerprint was compared already: do not ask.")
    ] = False,
    trainer: Annotated[
        str,
        typer.Option(help="Where the relay finds the trainer: unix:PATH or 127.0.0.1:PORT."),
    ] = UNIX_TRAINER,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Loopback port of the relay; else one is chosen."),
    ] = None,
) -> None:
    """Join a study once its fingerprint was compared by telephone; nothing is trained yet."""
    from sites import enrolment
    from sites.keyring import open_signing_key

    folder = open_site(site)
    offer = enrolment.open_offer(folder, bundle)
    new, study = offer.bundle, offer.bundle.study
    typer.echo(f"study {study}, coordinator {new.address}, {len(new.roll.roll.sites)} sites")
    typer.echo(f"Fingerprint of the study:  {new.fingerprint}")
    typer.echo(f"Fingerprint of this site:  {offer.own.fingerprint}")
    for change in offer.changes:
        typer.echo(f"  changed: {change}")
    if offer.to_compare and not yes:
        typer.echo(
            "Call the consortium, at a number that did not come with the bundle, and compare both."
        )
        if not typer.confirm("Are they the same?"):
            raise TrustError(
                f"{study} was not joined: somebody else may have made this bundle; ask the "
                "consortium to send it again by another way"
            )
    key = open_signing_key(folder)
    added = enrolment.join(folder, offer, key, trainer=trainer, port=port)
    if added:
        typer.echo(f"Sites that wait for your approval: {', '.join(added)}")
    typer.echo(f"joined {study}; look at what it asks for: fedseg-site plan show {study}")


def leave(
    study: StudyArgument,
    site: SiteOption = HERE,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """End taking part in a study: nothing more is served; the audit and its model are kept."""
    from sites import enrolment
    from sites.keyring import open_signing_key

    folder = open_site(site)
    if not yes:
        typer.confirm(f"Leave {study}, and delete its approval and stored answers?", abort=True)
    deleted = enrolment.leave(folder, study, open_signing_key(folder))
    typer.echo(f"left {study}; deleted: {', '.join(deleted)}")
    kept = [f"{folder.audit.relative_to(folder.path)} (the audit)"]
    if folder.trained.exists():
        place = folder.trained.relative_to(folder.path)
        kept.append(f"{place} (whom models were trained on, as keyed hashes)")
    if folder.model(study).exists():
        kept.append(f"{folder.model(study).relative_to(folder.path)} (the model)")
    typer.echo(f"kept: {', '.join(kept)}")
    typer.echo(
        "Prepared copies of images are kept for other studies; to delete them: "
        f"fedseg-site cache purge {folder.cache}"
    )
    typer.echo("Tell the consortium, so that it takes this site off its list.")


def studies(
    site: SiteOption = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the studies that this site has joined, and what expires soon."""
    folder = open_site(site)
    found = [_summary(folder, study) for study in folder.joined]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("study", "approved", "coordinator", "sites", "valid until", "model")
    for row in found:
        names = ("study", "approved", "coordinator", "sites", "valid_until", "model")
        table.add_row(*(str(row[name]).partition("T")[0] for name in names))
    console = Console()
    console.print(table if found else "no study joined yet: fedseg-site join BUNDLE")
    for row in found:
        for warning in row["warnings"]:
            console.print(f"{row['study']}: {warning}", style="yellow", soft_wrap=True)


def _summary(folder: SiteFolder, study: str) -> dict[str, Any]:
    """What `studies` says of one."""
    from fedseg.security.certificates import expiry
    from sites.decision import situation_of

    try:
        situation = situation_of(folder, study)
    except FedsegError as error:
        unknown = dict.fromkeys(("coordinator", "sites", "valid_until"), "?")
        return {"study": study, "approved": "?", "model": "?", **unknown, "warnings": [f"{error}"]}
    bundle, roll, approval = situation.bundle, situation.roll, situation.approval
    warnings = [
        f"the {what} expires on {end:%Y-%m-%d}: ask the consortium for a renewed bundle"
        for what, end in (
            ("list of sites", roll.expires),
            ("certificate authority", expiry(bundle.ca.encode())),
        )
        if end - datetime.now(UTC) < EXPIRY_NOTICE
    ]
    if situation.added:
        warnings.append(f"sites wait for your approval: {', '.join(situation.added)}")
    approved = approval is not None and approval.plan == bundle.plan.digest
    return {
        "study": study,
        "approved": "yes" if approved else "no",
        "coordinator": bundle.address,
        "sites": len(roll.sites),
        "valid_until": roll.valid_until,
        "model": "yes" if folder.model(study).exists() else "not yet",
        "warnings": warnings,
    }
