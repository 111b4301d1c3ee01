"""The same figures for patients of one scanner, sex or age: where a mean may hide someone.

Groups are looked at, not tested: with few patients some group is always the worst by chance. A
group smaller than the hospital's threshold is named and nothing is said of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fedseg.evaluation.estimates import estimate
from fedseg.evaluation.evidence import Subgroup
from fedseg.evaluation.observations import PatientValidation

UNKNOWN, SEVERAL = "unknown", "several"
AGES = ((18, "under 18"), (40, "18 to 39"), (60, "40 to 59"), (75, "60 to 74"))
OLDEST = "75 and over"
_SEXES = {"f": "female", "w": "female", "m": "male"}
_AGE = re.compile(r"0*(\d{1,3})(\.\d+)?\s*[yY]?")


def subgroups(
    traits: Mapping[str, Mapping[str, Sequence[str]]],
    patients: Mapping[str, Sequence[PatientValidation]],
    suppress_below: int,
) -> tuple[Subgroup, ...]:
    """Each group of each column.

    Args:
        traits: column -> patient -> what the manifest says in the patient's rows.
        patients: candidate -> its patients; every candidate has the same ones.
        suppress_below: smaller groups are suppressed.
    """
    found = []
    for column, said in traits.items():
        names = {p.patient for own in patients.values() for p in own}
        values = {name: value_of(column, said.get(name, ())) for name in names}
        for value in sorted(set(values.values()), key=_place):
            members = {name for name in names if values[name] == value}
            found.append(_group(column, value, members, patients, suppress_below))
    return tuple(found)


def value_of(column: str, said: Sequence[str]) -> str:
    """The group of a patient of whom the manifest says this."""
    groups = {_group_of(column, text.strip()) for text in said} - {UNKNOWN}
    return SEVERAL if len(groups) > 1 else next(iter(groups), UNKNOWN)


def _group_of(column: str, text: str) -> str:
    """The group that one cell means."""
    if not text:
        return UNKNOWN
    if column == "sex":
        return _SEXES.get(text[0].casefold(), text)
    if column == "age":
        match = _AGE.fullmatch(text)
        if match is None:
            return UNKNOWN
        return next((name for below, name in AGES if int(match[1]) < below), OLDEST)
    return text


def _place(value: str) -> tuple[int, str]:
    """Ages by age, other values by name, who is unknown last."""
    ages = [name for _, name in AGES] + [OLDEST]
    last = (SEVERAL, UNKNOWN)
    if value in last:
        return len(ages) + 1 + last.index(value), value
    return ages.index(value) if value in ages else len(ages), value


def _group(
    column: str,
    value: str,
    members: set[str],
    patients: Mapping[str, Sequence[PatientValidation]],
    suppress_below: int,
) -> Subgroup:
    """One group, suppressed where it is small."""
    if len(members) < suppress_below:
        return Subgroup(by=column, value=value, suppressed=True, patients=None)
    own = {name: [p for p in all_ if p.patient in members] for name, all_ in patients.items()}
    return Subgroup(
        by=column,
        value=value,
        suppressed=False,
        patients=len(members),
        dice={name: estimate(p.dice for p in some) for name, some in own.items()},
        failed={name: sum(p.failed for p in some) for name, some in own.items()},
    )
