"""`fedseg-site egress list | show`: every message that ever left this hospital.

The audit is verified first, with the site's own public key: no passphrase is asked for, and what is
shown is what was written. Numbers are those of the audit's entries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedseg.chain import verify_chain
from fedseg.errors import DataError
from fedseg.security.keys import VerifyKey
from sites.commands.options import HERE, SiteOption, open_site
from sites.folder import SiteFolder
from sites.keyring import own_identity

if TYPE_CHECKING:
    from sites.departures import Departure

app = typer.Typer(no_args_is_help=True, help="Every message that ever left this hospital.")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one message a line.")]
LIST_EPILOG = """
Examples:

  fedseg-site egress list --site /var/lib/fedseg

  fedseg-site egress list --study lung --last 20

  fedseg-site egress list --json > left.jsonl
"""
SHOW_EPILOG = """
Examples:

  fedseg-site egress show 42 --site /var/lib/fedseg

  fedseg-site egress show 42 --json
"""


@app.command("list", epilog=LIST_EPILOG)
def list_(
    site: SiteOption = HERE,
    study: Annotated[str | None, typer.Option(help="Only messages of this study.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="How many, the newest; all.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what left: when, to whom, what, how large, and what it cost patients."""
    found = [each for each in _found(open_site(site)) if study in (None, each.study)]
    shown = found[-last:] if last else found
    if as_json:
        for each in shown:
            typer.echo(json.dumps(each.listed(), sort_keys=True))
        return
    table = Table()
    for name in ("no.", "when (UTC)", "study, to", "what", "bytes", "sha256", "cost"):
        table.add_column(name, overflow="fold", no_wrap=name in {"when (UTC)", "bytes", "sha256"})
    for each in shown:
        facts = each.facts
        table.add_row(
            str(each.number),
            each.at[:19].replace("T", " "),
            escape(f"{each.study}, {facts['to']}"),
            _what(each),
            str(facts["bytes"]),
            str(facts["digest"])[:12],
            _cost(each),
        )
    console = Console()
    console.print(table)
    _sum_up(console, found)
    if len(found) > len(shown):
        console.print(f"{len(found) - len(shown)} older messages: leave --last out")


@app.command(epilog=SHOW_EPILOG)
def show(
    number: Annotated[int, typer.Argument(metavar="N", help="The message's number in the list.")],
    site: SiteOption = HERE,
    as_json: JsonOption = False,
) -> None:
    """Show all that one message said, and under what it can be found elsewhere."""
    found = {each.number: each for each in _found(open_site(site))}
    if number not in found:
        raise DataError(f"no message {number} left: `fedseg-site egress list` has the numbers")
    each = found[number]
    if as_json:
        typer.echo(json.dumps(each.listed(), sort_keys=True))
        return
    facts = each.facts
    lines = [
        f"message {each.number}, {each.at}",
        f"  to      the coordinator of {each.study}, {facts['to']} (receiving key {facts['key']})",
        f"  what    {_what(each)}",
        f"  answers task {facts['task']}",
        f"  sealed  {facts['bytes']} bytes, sha256 {facts['digest']}",
        f"  inside  sha256 {facts['content']}",
        f"  tensors {facts['tensors']}, {facts['tensor_bytes']} bytes",
        f"  cost    {_cost(each)}",
    ]
    if each.mechanism is not None:
        done = each.mechanism
        lines.append(
            f"          {done.steps} steps with noise multiplier {done.noise_multiplier:g} and "
            f"rate {done.rate:g}; reservation {facts['reservation']}"
        )
    lines += ["  fields", *(f"    {field}" for field in _fields(each))]
    typer.echo("\n".join(lines))


def _found(folder: SiteFolder) -> list[Departure]:
    """What left, by an audit that was verified."""
    from sites.departures import departures

    if not folder.audit.exists() and not folder.audit.with_suffix(".head").exists():
        return []
    return departures(verify_chain(folder.audit, VerifyKey.from_text(own_identity(folder).signing)))


def _what(each: Departure) -> str:
    """The type of a message, the round, and what is odd about it."""
    facts = each.facts
    said = str(facts["type"])
    if said == "refused":
        code = next((f for f in _fields(each) if f.startswith("body.code=")), "")
        said = f"refused ({code.partition('=')[2].strip(chr(34))})"
    if "round" in facts:
        attempt = f", attempt {facts['attempt']}" if facts["attempt"] != 1 else ""
        said += f", round {facts['round']} {facts['stage']}{attempt}"
        said += f" (own model of {facts['owner']})" if "owner" in facts else ""
    if any(field.startswith("body.consent.model=") for field in _fields(each)):
        said += ", lets own model go to the other hospitals"
    if facts["repeated"]:
        said += ", repeated"
    if "late_s" in facts:
        said += f", {facts['late_s']} s late"
    return said


def _fields(each: Departure) -> list[str]:
    """The lines `name=value` of a message."""
    fields = each.facts["fields"]
    return fields if isinstance(fields, list) else []


def _cost(each: Departure) -> str:
    """What a message cost patients, in a few words."""
    facts = each.facts
    if each.mechanism is not None:
        return (
            f"epsilon {_up(float(str(facts['epsilon'])))} at delta {float(str(facts['delta'])):g}"
        )
    if "reservation" in facts:
        return "paid before"
    return "not covered" if facts["type"] in {"train", "evaluate"} else "-"


def _sum_up(console: Console, found: Sequence[Departure]) -> None:
    """How much left in all, and what it cost."""
    from sites.departures import spent

    size = sum(int(str(each.facts["bytes"])) for each in found)
    console.print(f"{len(found)} messages left, {size} bytes")
    for (study, delta), epsilon in sorted(spent(found).items()):
        console.print(
            f"{study}: in all epsilon {_up(epsilon)} at delta {delta:g} for each patient; "
            "`fedseg-site ledger show` has what was charged"
        )


def _up(epsilon: float) -> str:
    """An epsilon, rounded up."""
    from fedseg.privacy.guarantee import rounded_up

    return rounded_up(epsilon)
