"""The ledger in words for a data protection officer, and as JSON for a reviewer.

A patient's own spend depends on that patient's data: these views are for the hospital. They count
patients and name keyed hashes at most, never an id.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from pydantic import JsonValue

from fedseg.privacy.accounting import PrivacyFilter, epsilon_spent
from fedseg.privacy.guarantee import rounded_up
from fedseg.privacy.ledger.book import Book, Debit, Limits, Study
from fedseg.privacy.ledger.entries import Row
from fedseg.privacy.mechanisms import Mechanism, Use, merged

_BAR = 24


def show(book: Book, limits: Limits) -> str:
    """What was spent on which study, per patient of it, at the delta that its plan promises.

    What all studies cost somebody together is said at the policy's delta, by its filter.
    """
    lines = [
        "What was done to patients' data, and what it cost each patient at most. Epsilon bounds",
        "how much likelier anything that left can be with a patient's data than without",
        "(exp(epsilon) times), but for a chance of delta. The bar is what is spent. Each study is",
        "reckoned at the delta of its own plan.",
    ]
    for name, study in book.studies.items():
        state = f"closed ({study.closed})" if study.closed else "open"
        lines += ["", f"{name}: {state}, registered {study.at}"]
        lines += [_use(book, name, use, limits) for use in ("train", "val") if study.cohort(use)]
        if several := book.several_records(name):
            charged = {book.charges(person, name) for person in several}
            worst = max(epsilon_spent(work, study.delta(limits)) for work in charged)
            lines.append(
                f"  {len(several)} ids are of people who are in it under another id too, charged "
                f"for each: up to epsilon {rounded_up(worst)} at delta {_delta(study, limits)}"
            )
        unanswered = sum(d.answer is None for d in book.debits.values() if d.study == name)
        if unanswered:
            lines.append(f"  {unanswered} debits without an answer: begun, not finished, paid for")
    lines += _in_all(book, limits)
    lost = sum(d.everyone for d in book.debits.values())
    if lost:
        lines += ["", f"{lost} debits of lost registers are charged to every patient."]
    if book.withdrawn:
        lines += ["", f"{len(book.withdrawn)} patients have withdrawn."]
    lines += [f"A backup was put in place on {at}." for at in book.restored]
    return "\n".join(lines)


def budget(book: Book, limits: Limits) -> str:
    """What is left: a bar for each study, and how many patients have spent how much in all."""
    rule = PrivacyFilter(limits.total_epsilon, limits.total_delta, book.order)
    lines = [
        f"Budget of each patient over all studies: epsilon {limits.total_epsilon:g} at delta "
        f"{limits.total_delta:g}, by a privacy filter at Renyi order {book.order:g}.",
        "",
    ]
    patients = book.patients
    shares = [rule.share(rule.cost(book.charges(patient))) for patient in patients]
    if not shares:
        return "\n".join([*lines, "No patient was ever charged."])
    worst = patients[shares.index(max(shares))]
    cost = rounded_up(rule.epsilon_so_far(rule.cost(book.charges(worst))))
    price = rounded_up(rule.epsilon - rule.budget)
    lines += _histogram(shares)
    lines += [
        "",
        f"The patient with the least left has spent {_percent(max(shares))}: epsilon {cost} at "
        f"delta {limits.total_delta:g}.",
        f"(By the filter's reckoning, which begins at {price}: the price of studies that are "
        "chosen one after another. `ledger show` reckons each study by itself, tightly.)",
    ]
    promised = max(rule.share(rule.cost(book.promised(patient))) for patient in patients)
    if promised > 0:
        lines.append(f"Open studies may still take up to {_percent(promised)} of one patient.")
    stopped = sum(share >= 1 for share in shares)
    if stopped:
        lines.append(f"{stopped} patients have nothing left: no study can use them.")
    lines.append(
        "What one patient has spent depends on that patient's data: it stays in the hospital."
    )
    return "\n".join(lines)


def withdrawal(debits: Sequence[Debit]) -> str:
    """What a withdrawn patient's data went into."""
    if not debits:
        return "This patient's data went into nothing that could leave the hospital."
    lines = [
        "This patient's data went into the work below. What has left cannot be taken back; the "
        "noise in it bounds what it tells of the patient. Nothing more is computed from the data.",
    ]
    for debit in debits:
        fate = f"answer {debit.answer[:12]}" if debit.answer else "no answer left"
        lines.append(
            f"  {debit.at}  {debit.study}  {_WORDS[debit.use]}  {_work([debit.mechanism])}  {fate}"
        )
    return "\n".join(lines)


def export(rows: Sequence[Row]) -> list[JsonValue]:
    """Every row as it is chained, for whoever checks the hashes."""
    return [row.model_dump(mode="json") for row in rows]


_WORDS: dict[Use, str] = {"train": "training", "val": "validation"}


def _use(book: Book, name: str, use: Use, limits: Limits) -> str:
    """One line on one use of one study."""
    study = book.studies[name]
    done = merged(d.mechanism for d in book.debits.values() if (d.study, d.use) == (name, use))
    planned = [a.mechanism for a in study.registered.schedule if a.use == use]
    patients = f"  {_WORDS[use]:10} {len(study.cohort(use)):5} patients"
    if not (done or planned):
        return f"{patients}  no release with noise is planned about them"
    spent, whole = (epsilon_spent(work, study.delta(limits)) for work in (done, planned))
    share = spent / whole if whole > 0 else 0.0
    return (
        f"{patients}  {_bar(share)}  epsilon {rounded_up(spent)} of {rounded_up(whole)} at delta "
        f"{_delta(study, limits)}  ({_work(done)})"
    )


def _delta(study: Study, limits: Limits) -> str:
    """A study's delta, and whose it is where it is not the plan's."""
    known = study.registered.delta is not None
    return f"{study.delta(limits):g}{'' if known else ' (the policy, whose largest this is)'}"


def _in_all(book: Book, limits: Limits) -> list[str]:
    """What all studies together cost whoever was charged the most."""
    rule = PrivacyFilter(limits.total_epsilon, limits.total_delta, book.order)
    most = max((rule.cost(book.charges(patient)) for patient in book.patients), default=0.0)
    if most == 0:
        return []
    return [
        "",
        f"All studies together cost no patient more than epsilon "
        f"{rounded_up(rule.epsilon_so_far(most))} at delta {limits.total_delta:g}, which is the "
        "policy's total_delta,",
        "by the filter that `ledger budget` explains.",
    ]


def _work(mechanisms: Sequence[Mechanism]) -> str:
    """Mechanisms in a few words."""
    parts = [
        f"{m.steps} steps, noise {m.noise_multiplier:.3g}, rate {m.rate:.3g}" for m in mechanisms
    ]
    return "; ".join(parts) or "nothing yet"


def _histogram(shares: Sequence[float]) -> list[str]:
    """How many patients have spent which part of their budget."""
    names = ("nothing", "up to a quarter", "up to a half", "up to three quarters", "more")
    ends = (0.0, 0.25, 0.5, 0.75, float("inf"))
    counts, low = [], -1.0
    for end in ends:
        counts.append(sum(low < share <= end for share in shares))
        low = end
    return [
        f"  {name:22} {count:6} patients  {_bar(count / len(shares))}"
        for name, count in zip(names, counts, strict=True)
    ]


def _bar(share: float) -> str:
    """A share as a bar of fixed width."""
    full = round(max(0.0, min(share, 1.0)) * _BAR)
    return "#" * full + "." * (_BAR - full)


def _percent(share: float) -> str:
    """A share of the budget, rounded up."""
    return f"{-int(-share * 100 // 1)} % of the budget" if isfinite(share) else "all of the budget"
