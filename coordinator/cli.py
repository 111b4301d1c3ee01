"""`fedseg-coordinator`: what the consortium runs. This module only mounts the commands of others.

Those import what is heavy inside the commands, so that `--help` comes at once.
"""

from __future__ import annotations

import typer

from coordinator.commands import audit, enrolment, founding, running
from coordinator.dashboard import command as dashboard
from fedseg.shell import run

app = typer.Typer(
    name="fedseg-coordinator",
    help="Found a study, enrol its sites, and run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("init", epilog=founding.INIT_EPILOG)(founding.init)
app.command("enrol", epilog=enrolment.ENROL_EPILOG)(enrolment.enrol)
app.command("sites", epilog=enrolment.SITES_EPILOG)(enrolment.sites)
app.command("run", epilog=running.RUN_EPILOG)(running.run)
app.command("status", epilog=running.STATUS_EPILOG)(running.status)
app.command("dashboard", epilog=dashboard.EPILOG)(dashboard.dashboard)
app.command("pause", epilog=running.PAUSE_EPILOG)(running.pause)
app.command("resume", epilog=running.RESUME_EPILOG)(running.resume)
app.command("stop", epilog=running.STOP_EPILOG)(running.stop)
app.command("logs", epilog=running.LOGS_EPILOG)(running.logs)
app.command("revoke", epilog=enrolment.REVOKE_EPILOG)(enrolment.revoke)
app.command("renew", epilog=enrolment.RENEW_EPILOG)(enrolment.renew)
app.command("proxy", epilog=running.PROXY_EPILOG)(running.proxy)
app.add_typer(audit.audit, name="audit")
app.add_typer(audit.backup, name="backup")


@app.callback()
def coordinator() -> None:
    """Found a study, enrol its sites, and run it."""


def main() -> None:
    """Run the command line; what the user can mend is said in red, with exit status 1."""
    run(app, extra="coordinator")
