"""`fedseg-coordinator init`: a built plan becomes a study's folder."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedseg.errors import DataError
from fedseg.shell import PASSPHRASE_FILE, passphrase

INIT_EPILOG = """
Examples:

  fedseg-coordinator init /srv/liver --host fl.example.org --plan study.yaml

  fedseg-coordinator init liver --host 192.0.2.7 --port 8443 --plan study.yaml --passphrase
"""


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="STUDYDIR", help="The folder to make; new or empty.")
    ],
    host: Annotated[
        str, typer.Option(help="Name or IP address under which the sites reach this machine.")
    ],
    plan: Annotated[Path, typer.Option(help="The built plan; its initial model lies beside it.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that sites dial.")] = 443,
    listen: Annotated[
        str, typer.Option(help="The local address that the proxy binds.")
    ] = "0.0.0.0",
    superlink_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Flower's own port, on loopback alone.")
    ] = 8000,
    protect: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help=f"Protect the private keys; asked for, or in a file that {PASSPHRASE_FILE} names.",
        ),
    ] = False,
) -> None:
    """Found a study: make its signing key, the consortium's CA and the server's certificate."""
    from coordinator.folder import StudyFolder, new_settings
    from coordinator.office.founding import found, study_fingerprint
    from fedseg.plan import load_plan
    from fedseg.security.documents import stamp

    now = datetime.now(UTC)
    settings = new_settings(
        study=load_plan(plan).study,
        host=host,
        port=port,
        listen=listen,
        superlink_port=superlink_port,
        created=stamp(now),
    )
    secret = passphrase("Passphrase for the study's keys" if protect else None, new=True)
    if protect and secret is None:
        raise DataError(
            f"there is no terminal to ask for a passphrase: name its file in {PASSPHRASE_FILE}"
        )
    study = StudyFolder(folder)
    found(study, plan, settings, now=now, passphrase=secret)
    typer.echo(
        f"The study {settings.study} lies in {folder}; sites will dial {settings.address}.\n"
        f"Its fingerprint, which every hospital compares by telephone when it joins:\n"
        f"  {study_fingerprint(study)}\n"
        f"Next, for each hospital: fedseg-coordinator enrol REQUEST --study {folder}"
    )
