"""SITEDIR/models: which models are here, which is in use for what, and who decided so.

Every decision is an entry of the audit first and a line of models/accepted.json then, which is
signed with the site's key and written whole or not at all. One model is in use for each study:
accepting another supersedes it, rejecting it leaves none. A model is known by the digest of its
tensors: a file that changed since it was accepted is refused, whatever it is called. An older list
with its good signature, put back, shows against the audit and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedseg.chain import Entry
from fedseg.errors import DataError, FedsegError, TrustError
from fedseg.frozen import Digest, Frozen, Name, SiteName
from fedseg.modelfile import ModelHeader, load_model
from fedseg.security.documents import (
    UNSIGNED,
    Moment,
    Signature,
    from_text,
    signable,
    to_text,
)
from fedseg.security.keys import SIGNATURE_BYTES, SigningKey, VerifyKey
from sites.folder import SiteFolder
from sites.keyring import own_identity
from sites.notes import read_note

CONTEXT = "accepted models"
ACCEPTED, AGAINST, REJECTED = "model_accepted", "model_accepted_by_override", "model_rejected"
SUFFIX = ".safetensors"
Judged = Literal["go", "no-go", "undecided"]


class Decision(Frozen):
    """One model accepted or rejected for use.

    Attributes:
        study: what it is used for.
        file: its name in models/.
        model: digest of its tensors.
        plan: digest of the plan that it was trained by.
        arm: how it was trained.
        reason: in the words of whoever decided.
        validation: SHA-256 of the validation.json that judged this model; None without any.
        verdict: of that validation, for this model.
        override: it was accepted although no validation spoke for it.
    """

    study: Name
    file: Annotated[str, Field(pattern=r"^[^/\x00]{1,255}$")]
    model: Digest
    plan: Digest
    arm: str
    accepted: bool
    at: Moment
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    validation: Digest | None = None
    verdict: Judged | None = None
    override: bool = False


class Register(Frozen):
    """models/accepted.json: every decision, oldest first."""

    format: Literal["fedseg-models/1"] = "fedseg-models/1"
    site: SiteName
    decisions: tuple[Decision, ...] = ()
    signature: Signature = UNSIGNED

    def in_use(self, study: str) -> Decision | None:
        """The decision by which a study's model is in use, or None where none is."""
        found: Decision | None = None
        for each in self.decisions:
            if each.study != study:
                continue
            if each.accepted:
                found = each
            elif found and (found.model == each.model or found.file == each.file):
                found = None
        return found

    @property
    def all_in_use(self) -> tuple[Decision, ...]:
        """What is in use, by study."""
        studies = sorted({each.study for each in self.decisions})
        return tuple(found for study in studies if (found := self.in_use(study)))

    def last(self, model: str) -> Decision | None:
        """The newest decision on a model, by its digest."""
        return next((each for each in reversed(self.decisions) if each.model == model), None)

    def signed(self, key: SigningKey) -> Register:
        """The same register with this site's signature."""
        signature = to_text(key.sign(CONTEXT, signable(self)))
        return self.model_copy(update={"signature": signature})


@dataclass(frozen=True)
class Held:
    """A model file of models/.

    Attributes:
        path: the file.
        header: None where the file cannot be trusted; then `fault` says why.
    """

    path: Path
    header: ModelHeader | None
    fault: str = ""


def register_path(folder: SiteFolder) -> Path:
    """Where the register lies."""
    return folder.models / "accepted.json"


def read_register(folder: SiteFolder) -> Register:
    """What was decided at this site; an empty register where nothing was.

    Raises:
        DataError: it cannot be read.
        TrustError: it was edited, or is another site's.
    """
    own, path = own_identity(folder), register_path(folder)
    if not path.exists():
        return Register(site=own.name)
    register = read_note(path, Register)
    try:
        signature = from_text(register.signature, SIGNATURE_BYTES, "the signature")
        VerifyKey.from_text(own.signing).verify(CONTEXT, signable(register), signature)
    except TrustError:
        raise TrustError(
            f"{path.name} was not written by `fedseg-site accept` or `reject` at this site, or was "
            "edited since: no model is used by it; look at `fedseg-site audit show`, move the file "
            "away and decide again"
        ) from None
    return register


def held(folder: SiteFolder) -> tuple[Held, ...]:
    """Every model file here, by name."""
    return tuple(_look_at(path) for path in sorted(folder.models.glob(f"*{SUFFIX}")))


def find(folder: SiteFolder, name: str) -> Path:
    """A model file of this site, by the study's name, the file's, or its path.

    Raises:
        DataError: it is not in models/.
    """
    models = folder.models.resolve()
    candidates = [Path(name)] if Path(name).parent != Path() else []
    candidates += [folder.models / name, folder.models / f"{name}{SUFFIX}"]
    for path in candidates:
        if path.is_file() and path.suffix == SUFFIX:
            if path.resolve().parent != models:
                raise DataError(
                    f"{path.name} is not in this site's models/: copy it there first, so that what "
                    "is in use is kept with the site"
                )
            return path
    there = ", ".join(sorted(path.stem for path in models.glob(f"*{SUFFIX}"))) or "none"
    raise DataError(f"no model {name[:80]!r} is in models/ (there: {there[:400]})")


def model_in_use(folder: SiteFolder, study: str | None) -> tuple[Path, Decision]:
    """The accepted model of a study, its tensors and plan as they were accepted.

    Args:
        study: its name; None takes the only one that has a model in use.

    Raises:
        DataError: none is in use, several are and none was named, or the file is gone.
        TrustError: the file is not what was accepted, or the register was edited.
    """
    register = read_register(folder)
    used = register.all_in_use
    if study is None and len(used) > 1:
        names = ", ".join(each.study for each in used)
        raise DataError(f"models of several studies are in use ({names}): name the study")
    found = register.in_use(study) if study is not None else next(iter(used), None)
    if found is None:
        raise DataError(
            f"no model {f'of {study} ' if study else ''}is in use at this site: validate one with "
            "`fedseg-site validate`, then `fedseg-site accept MODEL --reason TEXT`; a model file "
            "named by its path is used as it is"
        )
    path = folder.models / found.file
    if not path.is_file():
        raise DataError(
            f"models/{found.file}, which was accepted for {found.study}, is gone: bring it back "
            "from a backup, or accept another model"
        )
    header, _ = load_model(path)
    if (header.model_digest, header.plan_digest) != (found.model, found.plan):
        raise TrustError(
            f"models/{found.file} changed since it was accepted for {found.study}: accepted was "
            f"{found.model[:12]}, the file has {header.model_digest[:12]}; bring the accepted file "
            "back, or validate and accept this one"
        )
    return path, found


def compared(register: Register, entries: Sequence[Entry]) -> int:
    """Hold the register against a verified audit.

    Returns:
        How many decisions the audit has that the register lacks: a crash came between, or an older
        register was put back.

    Raises:
        TrustError: the register has a decision that the audit does not know.
    """
    audited = [
        (str(e.facts["model"]), str(e.facts["file"]), e.event != REJECTED, str(e.facts["reason"]))
        for e in entries
        if e.event in (ACCEPTED, AGAINST, REJECTED)
    ]
    for each in register.decisions:
        try:
            audited.remove((each.model, each.file, each.accepted, each.reason))
        except ValueError:
            raise TrustError(
                f"the register says that {each.file} was "
                f"{'accepted' if each.accepted else 'rejected'}, but the audit does not: one of "
                "them was put back; decide again"
            ) from None
    return len(audited)


def _look_at(path: Path) -> Held:
    """One file, or what is wrong with it."""
    try:
        return Held(path, load_model(path)[0])
    except FedsegError as error:
        return Held(path, None, str(error))
