"""Which sites' updates stand out, round after round: a reason to look, never a verdict.

In every closed round of training with at least `FEWEST` answers, three grounds: the update's size
(logarithm of its norm), how far it agrees with the others' (see `likeness`), and whether it is the
same as another site's. Size and agreement are robust z-scores: distance from the round's median in
units of 1.4826 times the median absolute deviation (Iglewicz and Hoaglin, 1993), which is not let
below a floor, so that sites that are all alike do not make a small difference look large. A site is
suspicious on a ground that holds in at least `ROUNDS` rounds and in half of those it answered.

False alarms, measured: see docs/BENCHMARKS.md, "Two of ten poison". A hospital with unlike data can
stand out without lying. A liar that stays within the spread of the honest ones does not stand out.
Under a privacy guarantee all of this is computed from noisy updates, which spends nothing; the
noise hides all but the crudest attack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import log
from statistics import median
from typing import Literal

from fedseg.result import SiteAnswer, StageRecord

FEWEST, ROUNDS, SHARE = 4, 3, 0.5
FAR = 3.5
NORM_FLOOR = 0.2  # of a logarithm: what is flagged is at least twice, or half, the usual size
AGREEMENT_FLOOR = 0.05
NOTHING = 1e-30  # an update of zeros has no logarithm, and is as small as they come
_MAD = 1.4826

NOISY = "All of this is seen through the noise of the guarantee, which hides most attacks."
Ground = Literal["away", "apart", "large", "small", "same"]
_WORDS: dict[Ground, str] = {
    "away": "its updates point away from everybody else's",
    "apart": "its updates agree far less with the others' than those do with each other",
    "large": "its updates are far larger than the others'",
    "small": "its updates are far smaller than the others'",
    "same": "its updates are the same as another site's",
}


def suspicions(history: Iterable[StageRecord]) -> dict[str, tuple[str, ...]]:
    """Site -> why its updates stand out, in plain words; sites that do not are left out.

    Args:
        history: of a study. A round that was tried again counts with its last attempt.
    """
    rounds = {r.round: r.answers for r in history if r.stage == "train" and _compared(r.answers)}
    answered = Counter(a.site for answers in rounds.values() for a in answers)
    held: Counter[tuple[str, Ground]] = Counter()
    for answers in rounds.values():
        held.update((site, ground) for site, found in grounds(answers).items() for ground in found)
    found: dict[str, list[str]] = {}
    for site, ground in sorted(held, key=lambda pair: (pair[0], list(_WORDS).index(pair[1]))):
        times = held[site, ground]
        if times >= ROUNDS and times >= SHARE * answered[site]:
            said = f"{_WORDS[ground]} in {times} of {answered[site]} rounds"
            found.setdefault(site, []).append(said)
    return {site: tuple(reasons) for site, reasons in found.items()}


def sentence(site: str, reasons: Sequence[str]) -> str:
    """What is said of a suspicious site, with what to do."""
    return f"{site}: {'; '.join(reasons)}. Look at its data before you exclude it."


def grounds(answers: Sequence[SiteAnswer]) -> dict[str, tuple[Ground, ...]]:
    """One round: site -> on which grounds its update stands out; sites that do not are left out."""
    norms = {a.site: a.update_norm for a in answers if a.update_norm is not None}
    sizes = {site: log(max(norm, NOTHING)) for site, norm in norms.items()}
    agreed = {a.site: a.update_agreement for a in answers if a.update_agreement is not None}
    size_z, agreed_z = robust_z(sizes, NORM_FLOOR), robust_z(agreed, AGREEMENT_FLOOR)
    together = median(agreed.values()) if agreed else 0.0
    found: dict[str, list[Ground]] = {a.site: [] for a in answers}
    for answer in answers:
        own = found[answer.site]
        z = size_z.get(answer.site, 0.0)
        if abs(z) > FAR:
            own.append("large" if z > 0 else "small")
        if agreed_z.get(answer.site, 0.0) < -FAR:
            own.append("away" if agreed[answer.site] < 0 < together else "apart")
        if answer.update_twin is not None:
            own.append("same")
    return {site: tuple(own) for site, own in found.items() if own}


def robust_z(values: Mapping[str, float], floor: float) -> dict[str, float]:
    """Each value's distance from the median in robust standard deviations, at least `floor`.

    Args:
        floor: least standard deviation, in the units of the values.
    """
    if not values:
        return {}
    middle = median(values.values())
    spread = max(floor, _MAD * median(abs(value - middle) for value in values.values()))
    return {site: (value - middle) / spread for site, value in values.items()}


def _compared(answers: Sequence[SiteAnswer]) -> bool:
    """Whether a stage was closed with enough updates to compare."""
    return len(answers) >= FEWEST and any(a.update_norm is not None for a in answers)
