"""What left: each message is an entry of the audit, written before its first byte goes out.

The entry names when, to whom, what was said in which fields, the size and SHA-256 of the sealed
bytes as they travelled, and what they cost patients. A message that was cut short on its way is in
the list as well: what may have been read has left. Answers that go out again are entries of their
own, marked as repeated; they cost nothing more, as does another message under a reservation that is
paid for already.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from fedseg.chain import MAX_LINE_BYTES, Entry, Fact
from fedseg.errors import PrivacyError
from fedseg.plan import StudyPlan
from fedseg.privacy.accounting import epsilon_spent
from fedseg.privacy.mechanisms import Mechanism, merged
from fedseg.privacy.schedule import mechanism_of
from fedseg.updates import Evaluated, TaskHeader, Trained
from sites.egress import Outgoing
from sites.spending import reservation_of

EVENT = "egress"
MOST_FIELDS_BYTES = MAX_LINE_BYTES - 8 * 1024


def asked_by(said: TaskHeader) -> dict[str, Fact]:
    """The stage that a task asks for, as the audit has it."""
    facts: dict[str, Fact] = {"round": said.round, "stage": said.stage, "attempt": said.attempt}
    return facts if said.owner is None else facts | {"owner": said.owner}


def facts_of(out: Outgoing, said: TaskHeader | None, plan: StudyPlan) -> dict[str, Fact]:
    """What an entry says of a message, but for how it was sealed and when it leaves.

    Args:
        said: the task that it answers; None where what came was no task.

    Raises:
        PrivacyError: there is more than an entry holds: what cannot be recorded does not leave.
    """
    fields = list(out.fields)
    if len(json.dumps(fields)) > MOST_FIELDS_BYTES:
        raise PrivacyError("an answer has more fields than the audit can record")
    facts: dict[str, Fact] = {"study": plan.study, "type": out.header.body.kind}
    if said is not None:
        facts |= asked_by(said)
    count, size = out.tensors
    facts |= {"fields": fields, "tensors": count, "tensor_bytes": size, "content": out.content}
    return facts | _cost(out, said, plan)


@dataclass(frozen=True)
class Departure:
    """One message that left.

    Attributes:
        number: its entry in the audit.
        at: when, in UTC.
        facts: all that the entry says.
        mechanism: what it cost patients; None where it cost nothing, because it is covered by no
            guarantee or was paid for before.
    """

    number: int
    at: str
    facts: Mapping[str, Fact]
    mechanism: Mechanism | None

    @property
    def study(self) -> str:
        """The study that it was for."""
        return str(self.facts["study"])

    def listed(self) -> dict[str, Fact]:
        """All of it, for JSON."""
        return {"number": self.number, "at": self.at, **self.facts, "paid": bool(self.mechanism)}


def departures(entries: Iterable[Entry]) -> list[Departure]:
    """Every message that an audit says has left, in order."""
    found, paid = [], set[Fact]()
    for entry in entries:
        if entry.event != EVENT:
            continue
        reservation = entry.facts.get("reservation")
        new = reservation is not None and reservation not in paid
        paid.add(reservation)
        found.append(
            Departure(entry.n, entry.at, entry.facts, _mechanism(entry.facts) if new else None)
        )
    return found


def spent(found: Iterable[Departure]) -> dict[tuple[str, float], float]:
    """The epsilon of all that left, by study and the delta of its plan.

    Of training and of validation the larger one: these are different patients.
    """
    done: dict[tuple[str, float], dict[str, list[Mechanism]]] = {}
    for each in found:
        if each.mechanism is not None:
            uses = done.setdefault((each.study, float(str(each.facts["delta"]))), {})
            uses.setdefault(str(each.facts["stage"]), []).append(each.mechanism)
    return {
        key: max(epsilon_spent(merged(work), key[1]) for work in uses.values())
        for key, uses in done.items()
    }


def _cost(out: Outgoing, said: TaskHeader | None, plan: StudyPlan) -> dict[str, Fact]:
    """What a message costs patients under the plan's guarantee."""
    body, promise = out.header.body, plan.private
    if promise is None or said is None:
        return {}
    if isinstance(body, Trained):
        mechanism = mechanism_of(plan, "train")
    elif isinstance(body, Evaluated) and plan.privacy.outputs.metrics == "noised":
        mechanism = mechanism_of(plan, "val")
    else:
        return {}
    return {
        "reservation": reservation_of(said),
        "noise_multiplier": mechanism.noise_multiplier,
        "rate": mechanism.rate,
        "steps": mechanism.steps,
        "epsilon": _epsilon(mechanism, promise.delta),
        "delta": promise.delta,
    }


@lru_cache(maxsize=64)
def _epsilon(mechanism: Mechanism, delta: float) -> float:
    """The epsilon of one message by itself."""
    return epsilon_spent([mechanism], delta)


def _mechanism(facts: Mapping[str, Fact]) -> Mechanism:
    """What an entry says that a message cost."""
    names = ("noise_multiplier", "rate", "steps")
    return Mechanism.model_validate({name: facts[name] for name in names})
