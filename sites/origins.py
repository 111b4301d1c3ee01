"""Whom a hospital's models were trained on, so that nobody of them is held back for them later.

A plan says how patients are divided, not who they are: after the data were divided anew, or mended,
somebody may be held back on whom a model was trained before. So approving a plan, training alone
and fine-tuning note whose images the model may see, in trainer/trained/DIGEST.json, and enter the
digest in the audit. The notes name nobody: a patient is the hash of the site's signature over the
name, so that only who holds the site's key can say whether somebody is among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedseg.chain import Entry, Fact, verify_chain
from fedseg.errors import DataError
from fedseg.frozen import Digest, Frozen
from fedseg.modelfile import ModelHeader
from sites.folder import SiteFolder
from sites.notes import read_note, write_note
from sites.rights import as_owner_of, make_folder

if TYPE_CHECKING:
    from fedseg.security.keys import SigningKey
    from sites.heldback import House

FACT = "trained_on"
_CONTEXT = "patient of a training"
# What an entry of the audit says it was made for: a plan, or one model.
_MADE = {"plan_approved": "plan", "finetuned": "model", "trained_locally": "model"}


class TrainedOn(Frozen):
    """trainer/trained/DIGEST.json: patients as keyed hashes, sorted, each once."""

    format: Literal["fedseg-trained/1"] = "fedseg-trained/1"
    patients: tuple[Digest, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the note, which is its name and stands in the audit."""
        return hashlib.sha256(self.canonical_bytes).hexdigest()


@dataclass(frozen=True)
class Origins:
    """Which of some patients models may have been trained on here.

    Attributes:
        seen: those who were.
        unknown: the models of which a note is missing, never was written, or was edited.
    """

    seen: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()


def keep_note(folder: SiteFolder, key: SigningKey, patients: Iterable[str]) -> str:
    """Note some patients, for the trainer's user alone, and give the digest for the audit.

    Raises:
        StorageError: it cannot be written.
    """
    note = TrainedOn(patients=tuple(sorted({_hidden(key, patient) for patient in patients})))
    write_note(make_folder(folder.trained) / f"{note.digest}.json", note.canonical_bytes)
    return note.digest


def noted_before(folder: SiteFolder, key: SigningKey, cohort: str) -> str | None:
    """The note of an earlier approval of the same cohort record (its digest), where it is whole.

    Raises:
        TrustError: the audit was changed.
    """
    for entry in reversed(verify_chain(folder.audit, key.public)):
        if entry.event == "plan_approved" and entry.facts.get("cohort") == cohort:
            note = known_note(folder, entry.facts.get(FACT))
            return None if note is None else note.digest
    return None


def known_note(folder: SiteFolder, digest: Fact) -> TrainedOn | None:
    """A note as it was written, or None where it is missing or was edited."""
    try:
        with as_owner_of(folder.trainer):
            note = read_note(folder.trained / f"{digest}.json", TrainedOn)
    except DataError:
        return None
    return note if note.digest == digest else None


def trained_on(house: House, models: Mapping[str, ModelHeader], patients: Iterable[str]) -> Origins:
    """Whom models may have been trained on here, by themselves or by what they were made from.

    Args:
        models: name -> header.
        patients: who are asked about, by the data's own names.

    Raises:
        TrustError: the audit was changed.
    """
    entries = verify_chain(house.folder.audit, house.key.public)
    starts = {e.facts["model"]: e.facts["start"] for e in entries if e.event == "finetuned"}
    hidden, unknown = set[str](), []
    for name, header in models.items():
        line = _line(header.model_digest, starts)
        digests = {entry.facts.get(FACT) for entry in entries if _is_of(entry, header, line)}
        notes = [known_note(house.folder, digest) for digest in digests]
        hidden.update(*(note.patients for note in notes if note is not None))
        if None in notes:
            unknown.append(name)
    seen = frozenset(patient for patient in patients if _hidden(house.key, patient) in hidden)
    return Origins(seen, tuple(unknown))


def _hidden(key: SigningKey, patient: str) -> str:
    """A patient as a keyed hash; Ed25519 signs the same in the same way (RFC 8032)."""
    return hashlib.sha256(key.sign(_CONTEXT, patient.encode())).hexdigest()


def _line(model: Fact, starts: Mapping[Fact, Fact]) -> set[Fact]:
    """A model, the one that it was fine-tuned from, the one that this was, and so on."""
    line = set[Fact]()
    while model is not None and model not in line:
        line.add(model)
        model = starts.get(model)
    return line


def _is_of(entry: Entry, header: ModelHeader, line: set[Fact]) -> bool:
    """Whether an entry says what a model was made of; one of no rounds is of nobody by its plan."""
    plans: set[Fact] = {header.plan_digest} if header.rounds else set()
    named: Mapping[str, set[Fact]] = {"plan": plans, "model": line}
    kind = _MADE.get(entry.event)
    return kind is not None and entry.facts.get(kind) in named[kind]
