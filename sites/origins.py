"""Of which of a hospital's data its models were made, as its audit has it.

A plan says how patients are divided, not who they were. Where the data changed between a training
and a validation, somebody may be held back now on whom a model was trained before.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedseg.chain import Entry, Fact, verify_chain
from fedseg.modelfile import ModelHeader
from sites.heldback import House

# What an entry of the audit says it was made for: a plan, or one model.
_MADE = {"plan_approved": "plan", "finetuned": "model", "trained_locally": "model"}


def made_of_other_data(
    house: House, models: Mapping[str, ModelHeader], fingerprint: str
) -> tuple[str, ...]:
    """A warning for every model that this hospital trained, or allowed to train, on other data.

    Args:
        models: name -> header.
        fingerprint: of the data on which they are to be validated, all splits.

    Raises:
        TrustError: the audit was changed.
    """
    entries = verify_chain(house.folder.audit, house.key.public)
    starts = {e.facts["model"]: e.facts["start"] for e in entries if e.event == "finetuned"}
    return tuple(
        f"{name}: this hospital approved other data for it, or trained it on others, than those it "
        "is validated on: somebody who is held back now may have been trained on, and its figures "
        "may flatter it"
        for name, header in models.items()
        if any(
            _is_of(entry, header, _line(header.model_digest, starts))
            and _differs(entry, fingerprint)
            for entry in entries
        )
    )


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


def _differs(entry: Entry, fingerprint: str) -> bool:
    """Whether it names other data; entries of before the data were named do not say."""
    return entry.facts.get("data") not in (None, fingerprint)
