"""The ledger in numbers, for whoever draws or checks them; `views` says the same in words.

Counts, shares, and epsilons: a study's at the delta of its plan, those over all studies at the
policy's; no patient, not even by a keyed hash. What one
patient has spent depends on that patient's data, so these figures are for the hospital.
"""

from __future__ import annotations

from pydantic import JsonValue

from fedseg.privacy.accounting import PrivacyFilter, epsilon_spent
from fedseg.privacy.ledger.book import Book, Limits
from fedseg.privacy.mechanisms import Mechanism, Use, merged

ENDS = (0.0, 0.25, 0.5, 0.75, 1.0)


def spent(book: Book, limits: Limits) -> dict[str, JsonValue]:
    """What was done in each study, and what it cost each patient of it at most."""
    return {
        "studies": [
            {
                "study": name,
                "delta": study.delta(limits),
                "delta_is_of": "policy" if study.registered.delta is None else "plan",
                "plan": study.registered.plan,
                "registered": study.at,
                "closed": study.closed,
                "train": _use(book, name, "train", limits),
                "val": _use(book, name, "val", limits),
                "ids_with_several_records": len(book.several_records(name)),
                "epsilon_of_several_records": max(
                    (
                        epsilon_spent(work, study.delta(limits))
                        for work in {book.charges(p, name) for p in book.several_records(name)}
                    ),
                    default=0.0,
                ),
                "unanswered": sum(
                    debit.answer is None for debit in book.debits.values() if debit.study == name
                ),
            }
            for name, study in book.studies.items()
        ],
        "charged_to_everyone": sum(debit.everyone for debit in book.debits.values()),
        "withdrawn_patients": len(book.withdrawn),
        "restored": list(book.restored),
    }


def left(book: Book, limits: Limits) -> dict[str, JsonValue]:
    """What patients have spent of the budget over all studies, as shares of it.

    `patients_by_share` counts the patients up to each end, the last with all above it.
    """
    rule = PrivacyFilter(limits.total_epsilon, limits.total_delta, book.order)
    costs = [rule.cost(book.charges(patient)) for patient in book.patients]
    shares = [rule.share(cost) for cost in costs]
    open_ = [rule.share(rule.cost(book.promised(patient))) for patient in book.patients]
    ends: list[JsonValue] = []
    low = -1.0
    for end in ENDS:
        last = end == ENDS[-1]
        ends.append({"up_to": end, "patients": sum(low < s and (last or s <= end) for s in shares)})
        low = end
    return {
        "total_epsilon": limits.total_epsilon,
        "total_delta": limits.total_delta,
        "renyi_order": book.order,
        "patients": len(shares),
        "patients_by_share": ends,
        "largest_share_spent": max(shares, default=0.0),
        "largest_epsilon_spent": rule.epsilon_so_far(max(costs, default=0.0)),
        "largest_share_promised": max(open_, default=0.0),
        "patients_with_nothing_left": sum(share >= 1 for share in shares),
    }


def _use(book: Book, name: str, use: Use, limits: Limits) -> dict[str, JsonValue]:
    """One use of one study."""
    study = book.studies[name]
    done = merged(d.mechanism for d in book.debits.values() if (d.study, d.use) == (name, use))
    planned = [a.mechanism for a in study.registered.schedule if a.use == use]
    return {
        "patients": len(study.cohort(use)),
        "steps_done": _steps(done),
        "steps_planned": _steps(planned),
        "epsilon_spent": epsilon_spent(done, study.delta(limits)),
        "epsilon_planned": epsilon_spent(planned, study.delta(limits)),
    }


def _steps(work: list[Mechanism] | tuple[Mechanism, ...]) -> int:
    """How many releases."""
    return sum(each.steps for each in work)
