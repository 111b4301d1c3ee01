"""A model accepted for use here, or rejected: what has to speak for it, and what is recorded.

A model is accepted on a validation of its very tensors (`fedseg-site validate`). Where there is
none, or it says no-go, somebody has to override it in so many words, and the audit has an event of
its own for that. A validation that came to no decision leaves it to whoever decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from fedseg.chain import verify_chain
from fedseg.errors import DataError, TrustError
from fedseg.modelfile import ModelHeader, load_model
from fedseg.security.keys import SigningKey
from sites.audit import record, require_words, utc_now
from sites.folder import SiteFolder
from sites.inventory import (
    ACCEPTED,
    AGAINST,
    REJECTED,
    Decision,
    Judged,
    read_register,
    register_path,
)
from sites.notes import write_note

VALIDATED = "validated"

if TYPE_CHECKING:
    from fedseg.evaluation.validation import ValidationResult


@dataclass(frozen=True)
class Opinion:
    """What a validation says of one model.

    Attributes:
        name: of the validation.
        created: ISO 8601, UTC.
        digest: SHA-256 of validation.json.
        verdict: for this model.
        recommended: the name of the candidate that the validation recommends.
        candidate: this model's name in it.
    """

    name: str
    created: str
    digest: str
    verdict: Judged
    recommended: str | None
    candidate: str


def opinion_of(folder: SiteFolder, model: str) -> Opinion | None:
    """The newest validation here that measured a model, by its digest; None where none did.

    Raises:
        DataError: a validation.json cannot be read.
    """
    found = [
        opinion
        for path in sorted((folder.path / "validations").glob("*/validation.json"))
        if (opinion := _opinion(path, model))
    ]
    return max(found, key=lambda each: (each.created, each.name), default=None)


def accept(
    folder: SiteFolder,
    path: Path,
    key: SigningKey,
    *,
    reason: str,
    override: bool = False,
    now: Callable[[], str] = utc_now,
) -> tuple[Decision, Decision | None]:
    """Take a model of models/ into use for its study.

    Args:
        override: accept it although no validation speaks for it.

    Returns:
        The decision, and the one that it supersedes.

    Raises:
        DataError: no validation of this model, or a no-go, without `override`; an override that is
            not needed; the reason is no words.
        TrustError: the file, the register, the audit or the validation was changed.
    """
    require_words(reason, "--reason")
    header, _ = load_model(path)
    opinion = opinion_of(folder, header.model_digest)
    if opinion is not None:
        _require_audited(folder, key, opinion, header.model_digest)
    against = opinion is None or opinion.verdict == "no-go"
    if against and not override:
        raise DataError(_unfounded(path, opinion))
    if override and not against:
        raise DataError(
            f"a validation of {path.name} says {opinion.verdict if opinion else ''!s}: --override "
            "is not needed, and would be audited as if it were; leave it out"
        )
    decided = _decision(path, header, opinion, reason, now)
    decision = decided.model_copy(update={"accepted": True, "override": override})
    before = read_register(folder).in_use(decision.study)
    _write(folder, decision, key, AGAINST if override else ACCEPTED, now)
    return decision, before


def reject(
    folder: SiteFolder,
    path: Path,
    key: SigningKey,
    *,
    reason: str,
    now: Callable[[], str] = utc_now,
) -> tuple[Decision, bool]:
    """Reject a model of models/; where it is in use, none is afterwards.

    Returns:
        The decision, and whether the model was in use.

    Raises:
        DataError: the reason is no words.
        TrustError: the file or the register was changed.
    """
    require_words(reason, "--reason")
    header, _ = load_model(path)
    opinion = opinion_of(folder, header.model_digest)
    decision = _decision(path, header, opinion, reason, now)
    before = read_register(folder).in_use(decision.study)
    after = _write(folder, decision, key, REJECTED, now)
    return decision, before is not None and after is None


def _decision(
    path: Path, header: ModelHeader, opinion: Opinion | None, reason: str, now: Callable[[], str]
) -> Decision:
    """A decision on a model, which is not to accept it."""
    return Decision(
        study=header.plan.study,
        file=path.name,
        model=header.model_digest,
        plan=header.plan_digest,
        arm=header.arm,
        accepted=False,
        at=now(),
        reason=reason,
        validation=opinion.digest if opinion else None,
        verdict=opinion.verdict if opinion else None,
    )


def _require_audited(folder: SiteFolder, key: SigningKey, opinion: Opinion, model: str) -> None:
    """Refuse a validation.json that the audit does not know as it is, or knows as overtaken."""
    entries = [e for e in verify_chain(folder.audit, key.public) if e.event == VALIDATED]
    if opinion.digest not in {e.facts["validation"] for e in entries}:
        raise TrustError(
            f"validations/{opinion.name}/validation.json was not written by `fedseg-site validate` "
            "at this site, or was edited since: move it away, and validate again"
        )
    newest = [e for e in entries if model in _names(e.facts["models"])][-1]
    if newest.facts["validation"] != opinion.digest:
        raise TrustError(
            f"{opinion.name} is not the newest validation of this model in the audit, which is "
            f"{newest.facts['name']}: bring that one back into validations/, or validate again"
        )


def _names(fact: object) -> list[str]:
    """A fact of the audit that is a list."""
    return fact if isinstance(fact, list) else []


def _write(
    folder: SiteFolder, decision: Decision, key: SigningKey, event: str, now: Callable[[], str]
) -> Decision | None:
    """Audit a decision, then enter it; gives what is in use for the study afterwards."""
    register = read_register(folder)
    facts = decision.model_dump(mode="json", exclude={"accepted", "at"})
    record(folder, key, event, now, **facts)
    register = register.model_copy(update={"decisions": (*register.decisions, decision)})
    write_note(register_path(folder), register.signed(key))
    return register.in_use(decision.study)


def _unfounded(path: Path, opinion: Opinion | None) -> str:
    """Why a model is not accepted just so."""
    if opinion is None:
        return (
            f"no validation here measured {path.name} as it is now: run `fedseg-site validate` "
            "with it first; to use it all the same, say --override, which is audited"
        )
    return (
        f"the validation {opinion.name} says no-go for {path.name}"
        + (f" and recommends {opinion.recommended}" if opinion.recommended else "")
        + ": read its report; to use the model all the same, say --override, which is audited"
    )


def _opinion(path: Path, model: str) -> Opinion | None:
    """What one validation.json says of a model, or None where it did not measure it."""
    from fedseg.evaluation.validation import ValidationResult

    data = path.read_bytes()
    try:
        result = ValidationResult.model_validate_json(data)
    except ValidationError:
        raise DataError(
            f"validations/{path.parent.name}/{path.name} is damaged or of another version of "
            "fedseg: move it away, and validate again"
        ) from None
    name = next((c.name for c in result.candidates if c.model_digest == model), None)
    if name is None:
        return None
    return Opinion(
        name=path.parent.name,
        created=result.created,
        digest=hashlib.sha256(data).hexdigest(),
        verdict=_verdict(result, name),
        recommended=result.verdict.recommended,
        candidate=name,
    )


def _verdict(result: ValidationResult, name: str) -> Judged:
    """By its own thresholds first: whoever breaks one is no-go, whatever the others came to."""
    said = result.verdict
    own = [check.met for check in said.checks if check.candidate == name]
    if "broken" in own:
        return "no-go"
    if said.decision != "go" or said.recommended == name:
        return said.decision
    return "go" if own and all(met == "met" for met in own) else "undecided"
