"""Whom a hospital's models were trained on, so that nobody of them is held back for them later.

A plan says how patients are divided, not who they are: after the data were divided anew, or mended,
somebody may be held back on whom a model was trained before. So approving a plan, training alone
and fine-tuning note whose images the model may see, in trainer/trained/DIGEST.json, and enter the
digest in the audit. The notes name patients: they are for the trainer's user alone. They name the
data's fingerprint too: who is shown the audit, and guesses names, cannot try them on the digest.
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
    from sites.heldback import House

FACT = "trained_on"
# What an entry of the audit says it was made for: a plan, or one model.
_MADE = {"plan_approved": "plan", "finetuned": "model", "trained_locally": "model"}


class TrainedOn(Frozen):
    """trainer/trained/DIGEST.json: patients, sorted, each once, and the data's fingerprint."""

    format: Literal["fedseg-trained/1"] = "fedseg-trained/1"
    data: Digest
    patients: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the note, which is its name and stands in the audit."""
        return hashlib.sha256(self.canonical_bytes).hexdigest()


@dataclass(frozen=True)
class Origins:
    """Whom some models may have been trained on here.

    Attributes:
        patients: those that are known.
        unknown: the models of which a note is missing, never was written, or was edited.
    """

    patients: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()


def note_of(patients: Iterable[str], data: str) -> TrainedOn:
    """The note of some patients of data of this fingerprint; it is not written yet."""
    return TrainedOn(data=data, patients=tuple(sorted(set(patients))))


def keep_note(folder: SiteFolder, note: TrainedOn) -> str:
    """Write a note, for the trainer's user alone, and give its digest for the audit.

    Raises:
        StorageError: it cannot be written.
    """
    write_note(make_folder(folder.trained) / f"{note.digest}.json", note.canonical_bytes)
    return note.digest


def known_note(folder: SiteFolder, digest: Fact) -> TrainedOn | None:
    """A note as it was written, or None where it is missing or was edited."""
    try:
        with as_owner_of(folder.trainer):
            note = read_note(folder.trained / f"{digest}.json", TrainedOn)
    except DataError:
        return None
    return note if note.digest == digest else None


def trained_on(house: House, models: Mapping[str, ModelHeader]) -> Origins:
    """Whom models may have been trained on here, by themselves or by what they were made from.

    Args:
        models: name -> header.

    Raises:
        TrustError: the audit was changed.
    """
    entries = verify_chain(house.folder.audit, house.key.public)
    starts = {e.facts["model"]: e.facts["start"] for e in entries if e.event == "finetuned"}
    patients, unknown = set[str](), []
    for name, header in models.items():
        line = _line(header.model_digest, starts)
        digests = {entry.facts.get(FACT) for entry in entries if _is_of(entry, header, line)}
        notes = [known_note(house.folder, digest) for digest in digests]
        patients.update(*(note.patients for note in notes if note is not None))
        if None in notes:
            unknown.append(name)
    return Origins(frozenset(patients), tuple(unknown))


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
