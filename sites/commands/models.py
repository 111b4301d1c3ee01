"""`fedseg-site models | accept | reject | predict`: which models are here, and using one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedseg.commands.models import Device, segment
from fedseg.errors import DataError
from sites.commands.options import HERE, SiteOption, open_site
from sites.folder import SiteFolder
from sites.keyring import open_signing_key, own_identity

if TYPE_CHECKING:
    from sites.inventory import Decision, Held, Register

PREDICT_EPILOG = """
Examples:

  fedseg-site predict lung scan.nii.gz --out masks --site /var/lib/fedseg

  fedseg-site predict scan.nii.gz --out masks --site /var/lib/fedseg

  fedseg-site predict models/lung.safetensors dicom-folder --out masks
"""
MODELS_EPILOG = """
Examples:

  fedseg-site models --site /var/lib/fedseg

  fedseg-site models --json
"""
ACCEPT_EPILOG = """
Examples:

  fedseg-site accept lung-finetuned --reason "better at the worst cases" --site /var/lib/fedseg

  fedseg-site accept lung --override --reason "pilot on phantoms only"
"""
REJECT_EPILOG = """
Examples:

  fedseg-site reject lung --reason "misses small lesions" --site /var/lib/fedseg
"""
NameArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A file in models/, by its name or its study's.")
]
ReasonOption = Annotated[str, typer.Option(help="Why, in a few words; it is audited.")]


def predict(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] IMAGE...",
            help="A study (its accepted model) or a model file; then NIfTI files or folders of a "
            "DICOM series, one an image. Without MODEL, the only accepted model.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME_mask.nii.gz.")],
    device: Device = "cpu",
    site: SiteOption = HERE,
) -> None:
    """Segment images with the model that is in use here; each mask names it in its header.

    A study's name takes the model that was accepted for it. A file that is named by its path is
    used as it is, accepted or not.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    named, images = _divided(words, site)
    if named is not None and _is_file(named):
        _say_standing(Path(named), site, console)
        segment(Path(named), images, out, device)
        return
    from sites.inventory import model_in_use

    path, decision = model_in_use(open_site(site), named)
    console.print(
        f"model of {decision.study}: {path.name} ({decision.model[:12]}), accepted "
        f"{decision.at[:10]}: {escape(decision.reason)}"
    )
    segment(path, images, out, device)


def models(
    site: SiteOption = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the models that are here: which is in use, since when, from which study and plan.

    The audit is verified first, and the list of what was accepted is held against it.
    """
    from fedseg.chain import verify_chain
    from fedseg.security.keys import VerifyKey
    from sites.inventory import compared, held, read_register

    folder = open_site(site)
    register = read_register(folder)
    key = VerifyKey.from_text(own_identity(folder).signing)
    missing = compared(register, verify_chain(folder.audit, key))
    found = [_listed(folder, register, each) for each in held(folder)]
    gone = [d.file for d in register.all_in_use if not (folder.models / d.file).is_file()]
    if as_json:
        value = {"models": found, "gone": gone, "decisions_only_in_the_audit": missing}
        typer.echo(json.dumps(value, indent=1, sort_keys=True))
        return
    _show(found, gone, missing)


def accept(
    model: NameArgument,
    reason: ReasonOption,
    override: Annotated[
        bool,
        typer.Option("--override", help="Although no validation speaks for it; audited as such."),
    ] = False,
    site: SiteOption = HERE,
) -> None:
    """Take a model into use for its study; the one before is superseded.

    It needs a validation of this very model by `fedseg-site validate` that does not say no-go.
    """
    from sites.acceptance import accept as take
    from sites.inventory import find

    folder = open_site(site)
    decision, before = take(
        folder, find(folder, model), open_signing_key(folder), reason=reason, override=override
    )
    console = Console(soft_wrap=True, highlight=False)
    said = f"on a validation that said {decision.verdict}"
    if override:
        said = "[bold red]although no validation speaks for it[/], which the audit says"
    console.print(f"{decision.file} ({decision.model[:12]}) is in use for {decision.study}, {said}")
    if before is not None and before.model != decision.model:
        console.print(
            f"it supersedes {before.file} ({before.model[:12]}), in use since {before.at}"
        )


def reject(model: NameArgument, reason: ReasonOption, site: SiteOption = HERE) -> None:
    """Reject a model; where it is in use, no model of its study is afterwards."""
    from sites.acceptance import reject as refuse
    from sites.inventory import find

    folder = open_site(site)
    decision, was_in_use = refuse(
        folder, find(folder, model), open_signing_key(folder), reason=reason
    )
    said = f"{decision.file} ({decision.model[:12]}) is rejected"
    if was_in_use:
        said += f"; no model of {decision.study} is in use any more"
    typer.echo(said)


def model_file(model: str, site: Path) -> Path:
    """The file that is meant: a path to one, or the name of a study or file of this site."""
    if _is_file(model):
        return Path(model)
    from sites.inventory import find

    return find(open_site(site), model)


def _is_file(model: str) -> bool:
    """Whether a word is a model file's path, not a study's name."""
    path = Path(model)
    return path.suffix == ".safetensors" or (path.is_file() and not _is_image(path))


def _is_image(path: Path) -> bool:
    """Whether a file is called as images are."""
    return path.name.endswith((".nii", ".nii.gz", ".dcm"))


def _divided(words: list[str], site: Path) -> tuple[str | None, list[Path]]:
    """The model that was named, if any, and the images.

    Raises:
        DataError: the first word is neither a model nor an image, or there is no image.
    """
    first, rest = words[0], [Path(word) for word in words[1:]]
    named: str | None = None
    if _is_file(first) or _may_be_study(first, site):
        named, images = first, rest
    else:
        images = [Path(first), *rest]
        if not images[0].exists():
            raise DataError(
                f"{first[:80]!r} is neither a study of this site, nor a model file, nor an image"
            )
    if not images:
        raise DataError("name at least one image after the model")
    return named, images


def _may_be_study(word: str, site: Path) -> bool:
    """Whether a word is the name of a study with a model here; a folder is written ./NAME."""
    folder = SiteFolder(site)
    if len(Path(word).parts) != 1 or word.startswith("./") or not folder.site.exists():
        return False
    from sites.inventory import held, read_register

    known = {each.study for each in read_register(folder).decisions}
    known |= {each.header.plan.study for each in held(folder) if each.header}
    return word in known or not Path(word).exists()


def _say_standing(path: Path, site: Path, console: Console) -> None:
    """At a site, say whether the file that was named is the one in use."""
    folder = SiteFolder(site)
    if not folder.site.exists():
        return
    from fedseg.modelfile import load_model
    from sites.inventory import read_register

    header, _ = load_model(path)
    used = read_register(folder).in_use(header.plan.study)
    if used is None or used.model != header.model_digest:
        console.print(
            f"[bold yellow]not in use here[/]: {path.name} ({header.model_digest[:12]}) was not "
            f"accepted for {header.plan.study} at this site"
        )


def _listed(folder: SiteFolder, register: Register, each: Held) -> dict[str, Any]:
    """One model as JSON has it."""
    if each.header is None:
        return {"file": each.path.name, "state": "damaged", "fault": each.fault}
    from sites.acceptance import opinion_of

    header = each.header
    opinion = opinion_of(folder, header.model_digest)
    return {
        "file": each.path.name,
        "study": header.plan.study,
        "arm": header.arm,
        "rounds": header.rounds,
        "model": header.model_digest,
        "plan": header.plan_digest,
        "released": header.released,
        "private": header.private,
        "stays": header.stays,
        "validation": None
        if opinion is None
        else {"name": opinion.name, "created": opinion.created, "verdict": opinion.verdict},
        **_standing(register, each),
    }


def _standing(register: Register, each: Held) -> dict[str, Any]:
    """How a model stands, since when, and why."""
    assert each.header is not None
    used = register.in_use(each.header.plan.study)
    if used is not None and used.file == each.path.name:
        same = (used.model, used.plan) == (each.header.model_digest, each.header.plan_digest)
        return _decided("in use" if same else "changed since it was accepted", used)
    last = register.last(each.header.model_digest)
    if last is None:
        return {"state": "not decided", "since": None, "reason": None, "override": None}
    if not last.accepted:
        return _decided("rejected", last)
    copy = used is not None and used.model == last.model
    return _decided(f"a copy of {used.file}" if copy and used else "superseded", last)


def _decided(state: str, decision: Decision) -> dict[str, Any]:
    """A state with the decision behind it."""
    return {
        "state": state,
        "since": decision.at,
        "reason": decision.reason,
        "override": decision.override,
    }


def _show(found: list[dict[str, Any]], gone: list[str], missing: int) -> None:
    """The list for people."""
    console = Console(highlight=False)
    table = Table()
    for heading in ("study", "model", "made", "digest", "plan", "validated", "state", "since, why"):
        table.add_column(heading, overflow="fold")
    for each in found:
        if each["state"] == "damaged":
            cells = ("-", each["file"], "-", "-", "-", "-", "damaged", each["fault"])
            table.add_row(*map(escape, cells), style="red")
            continue
        judged, since = each["validation"], each["since"]
        why = "-" if since is None else f"{since[:10]}: {each['reason']}"
        if each["override"]:
            why += " (no validation spoke for it)"
        cells = (
            each["study"],
            each["file"],
            f"{each['arm']}, {each['rounds']} rounds" + ("; stays here" if each["stays"] else ""),
            each["model"][:12],
            each["plan"][:12],
            "no" if judged is None else f"{judged['verdict']} ({judged['name']})",
            each["state"],
            why,
        )
        style = {"in use": "bold green", "changed since it was accepted": "bold red"}
        table.add_row(*map(escape, cells), style=style.get(each["state"]))
    console.print(table if found else "no model is here yet: it arrives when a study ends")
    for file in gone:
        console.print(f"[bold red]gone[/]: models/{escape(file)} is in use, but not there")
    if missing:
        console.print(
            f"[bold red]the audit has {missing} decisions that the list lacks[/]: a crash came "
            "between, or an older list was put back; decide again"
        )
