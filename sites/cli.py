"""`fedseg-site`: what a hospital runs. This module only mounts the commands of others."""

from __future__ import annotations

import typer

from fedseg.shell import run
from sites import check, doctor
from sites.commands import (
    alone,
    audit,
    control,
    egress,
    enrolment,
    finetuning,
    ledger,
    models,
    plans,
    validation,
)

HELP = "Check a hospital's data, take part in studies on its own terms, and use their models."

app = typer.Typer(
    name="fedseg-site",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("init", epilog=enrolment.INIT_EPILOG)(enrolment.init)
app.command("join", epilog=enrolment.JOIN_EPILOG)(enrolment.join)
app.command("studies", epilog=enrolment.STUDIES_EPILOG)(enrolment.studies)
app.add_typer(plans.app, name="plan")
app.command("check", epilog=check.CHECK_EPILOG)(check.check)
app.command("doctor", epilog=doctor.DOCTOR_EPILOG)(doctor.doctor)
app.command("run", epilog=control.RUN_EPILOG)(control.run)
app.command("status", epilog="Example:  fedseg-site status --watch")(control.status)
app.command("pause", epilog="Example:  fedseg-site pause")(control.pause)
app.command("resume", epilog="Example:  fedseg-site resume")(control.resume)
app.command("stop", epilog="Example:  fedseg-site stop")(control.stop)
app.command("trainer", epilog="Example:  fedseg-site trainer --site SITEDIR")(control.trainer)
app.command("relay", epilog="Example:  fedseg-site relay lung --site SITEDIR")(control.relay)
app.command("train-local", epilog=alone.TRAIN_EPILOG)(alone.train_local)
app.command("finetune", epilog=finetuning.FINETUNE_EPILOG)(finetuning.finetune)
app.command("models", epilog=models.MODELS_EPILOG)(models.models)
app.command("accept", epilog=models.ACCEPT_EPILOG)(models.accept)
app.command("reject", epilog=models.REJECT_EPILOG)(models.reject)
app.command("validate", epilog=validation.VALIDATE_EPILOG)(validation.validate)
app.command("predict", epilog=models.PREDICT_EPILOG)(models.predict)
app.add_typer(audit.audit, name="audit")
app.add_typer(audit.backup, name="backup")
app.add_typer(ledger.app, name="ledger")
app.add_typer(egress.app, name="egress")
app.add_typer(check.cache, name="cache")
app.command("leave", epilog=enrolment.LEAVE_EPILOG)(enrolment.leave)


@app.callback(help=HELP)
def fedseg_site() -> None:
    """Nothing but a place for the commands."""


def main() -> None:
    """Run the command line; what the user can mend is said in red, with exit status 1."""
    run(app, extra="site")
