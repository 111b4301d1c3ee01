"""Which model to use here, and whether to use it: thresholds first, then the paired comparisons.

What is measured as it is (the worst patient, the share of failures) is held against its threshold
as it is. A mean is known only as well as the patients are many: it meets a threshold where all of
its interval does, breaks it where none of it does, and is undecided between. Without thresholds set
beforehand, or with too few patients, the answer is never "go".

Recommended is the simplest model that is shown to be not worse than every other one; a model that
breaks a threshold is passed over for one that does not, and it is said where that one is worse. The
shared model is simplest: nobody has to keep, repeat or explain anything made here. Where nothing is
shown, the highest mean is named, and said to be no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf

from fedseg.evaluation.comparisons import DECISIVE, turned
from fedseg.evaluation.estimates import FEWEST
from fedseg.evaluation.evidence import Agreement, Comparison, Estimate, Summary
from fedseg.evaluation.thresholds import Thresholds
from fedseg.evaluation.validation import Check, Decision, Met, Verdict

SIMPLEST_FIRST = ("global", "local", "own", "finetuned", "pooled", "initial")
SHOWN = ("better", "not worse")
AS_MEASURED = ("worst_case_dice_at_least", "failures_share_at_most")
NO_THRESHOLDS = (
    "no thresholds were set: write them into the section acceptance of policy.yaml before the next "
    "validation; without them no model is accepted"
)


def judge(
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    agreement: Sequence[Agreement],
    thresholds: Thresholds | None,
) -> Verdict:
    """The verdict on all candidates.

    Args:
        summaries: one a candidate, at least one; all over the same patients.
        comparisons: every pair, by Dice at least.
        agreement: every label of every candidate.
        thresholds: as the hospital set them beforehand.
    """
    checks = tuple(
        check
        for summary in summaries
        for check in _checks(summary, agreement, thresholds or Thresholds())
    )
    patients = summaries[0].dice.patients
    if patients < FEWEST:
        return _of_too_few(patients, summaries, checks)
    standing = _standing(summaries, checks)
    name, established, why = _recommended(standing, comparisons)
    decision, reasons = _decided(name, checks, thresholds)
    passed_over = [s.candidate for s in summaries if s not in standing]
    if passed_over:
        why += _without(name, passed_over, comparisons)
        seen = _seen_from(comparisons)
        established &= all(seen[name, other].outcome in SHOWN for other in passed_over)
    return Verdict(
        decision=decision,
        recommended=name,
        established=established,
        reasons=(*reasons, why) if decision == "no-go" else (why, *reasons),
        checks=checks,
    )


def _checks(summary: Summary, agreement: Sequence[Agreement], asked: Thresholds) -> Iterator[Check]:
    """Each threshold that was set, held against one candidate."""
    name, patients = summary.candidate, summary.dice.patients

    def check(threshold: str, limit: float, found: float | None, met: Met, words: str) -> Check:
        return Check(
            candidate=name, threshold=threshold, asked=limit, found=found, met=met, words=words
        )

    if (least := asked.patients_at_least) is not None:
        met: Met = "met" if patients >= least else "undecided"
        words = f"{patients} patients were measured, {least} are asked for"
        yield check("patients_at_least", least, patients, met, words)
    if (limit := asked.dice_at_least) is not None:
        words, met = _range("mean Dice", summary.dice, 3), _between(limit, summary.dice, inf)
        yield check("dice_at_least", limit, summary.dice.mean, met, words)
    if (limit := asked.worst_case_dice_at_least) is not None:
        worst = summary.worst_dice
        met = "undecided" if worst is None else "met" if worst >= limit else "broken"
        words = "no Dice is defined" if worst is None else f"the lowest Dice is {worst:.3f}"
        yield check("worst_case_dice_at_least", limit, worst, met, words)
    if (limit := asked.failures_share_at_most) is not None:
        observed = summary.failed_share.mean or 0.0
        words = f"{summary.failed} of {summary.patients} predictions failed"
        if summary.failed_share.high is not None:
            words += f"; among future patients up to {summary.failed_share.high:.0%} may"
        met = "met" if observed <= limit else "broken"
        yield check("failures_share_at_most", limit, observed, met, words)
    if (limit := asked.volume_bias_percent_at_most) is not None:
        for each in agreement:
            if each.candidate == name:
                bias = each.bias_percent
                words, met = (
                    _range(f"bias of {each.label} in percent", bias, 1),
                    _within(bias, limit),
                )
                found = None if bias.mean is None else abs(bias.mean)
                yield check("volume_bias_percent_at_most", limit, found, met, words)
    if (limit := asked.hd95_mm_at_most) is not None:
        words, met = (
            _range("mean HD95 in mm", summary.hd95_mm, 2),
            _between(0, summary.hd95_mm, limit),
        )
        yield check("hd95_mm_at_most", limit, summary.hd95_mm.mean, met, words)


def _of_too_few(patients: int, summaries: Sequence[Summary], checks: Sequence[Check]) -> Verdict:
    """No candidate is recommended; what each of them breaks as it was measured is broken."""
    few = (
        f"{patients} patients were measured: fewer than {FEWEST} can show nothing about the next "
        "one, so no model is recommended"
    )
    broken = [c for c in checks if c.met == "broken" and c.threshold in AS_MEASURED]
    each = {check.candidate for check in broken} == {s.candidate for s in summaries}
    words = [f"{check.candidate}: {_said(check, 'is broken')}" for check in broken]
    return Verdict(
        decision="no-go" if each else "undecided",
        recommended=None,
        established=False,
        reasons=(*words, few) if each else (few, *words),
        checks=tuple(checks),
    )


def _standing(summaries: Sequence[Summary], checks: Sequence[Check]) -> list[Summary]:
    """The candidates that break nothing, or all of them where each breaks something."""
    broken = {check.candidate for check in checks if check.met == "broken"}
    return [s for s in summaries if s.candidate not in broken] or list(summaries)


def _recommended(
    standing: Sequence[Summary], comparisons: Sequence[Comparison]
) -> tuple[str, bool, str]:
    """Who is recommended, whether that is established, and why."""
    scored = [s for s in standing if s.dice.mean is not None] or list(standing)
    if len(scored) == 1:
        return scored[0].candidate, True, f"{scored[0].candidate} is the only candidate left"
    seen = _seen_from(comparisons)
    names = sorted((s.candidate for s in scored), key=_simplicity)
    for name in names:
        others = [other for other in names if other != name]
        said = [seen[name, other].outcome for other in others]
        if all(outcome in SHOWN for outcome in said):
            return name, True, _why(name, [seen[name, other] for other in others])
    means = {s.candidate: s.dice.mean or 0.0 for s in scored}
    best = max(names, key=lambda name: means[name])  # ties: the simplest
    others = [n for n in names if n != best and seen[best, n].outcome not in SHOWN]
    why = (
        f"{best} has the highest mean Dice ({means[best]:.3f}), but {scored[0].dice.patients} "
        f"patients do not show that it is not worse than {' and '.join(others)}: others might turn "
        "the order"
    )
    return best, False, why


def _without(name: str, passed_over: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    """Who was passed over, and whether the recommended one is worse than they are."""
    was = "was" if len(passed_over) == 1 else "were"
    words = f"; {' and '.join(passed_over)} broke a threshold and {was} passed over"
    seen = [_seen_from(comparisons)[name, other] for other in passed_over]
    worse = [
        f"{each.b} (Dice {each.difference.mean:+.3f})" for each in seen if each.outcome == "worse"
    ]
    return words + (f", although {name} is worse than {' and '.join(worse)}" if worse else "")


def _decided(
    name: str, checks: Sequence[Check], thresholds: Thresholds | None
) -> tuple[Decision, tuple[str, ...]]:
    """The decision for the recommended candidate, with its reasons."""
    if thresholds is None or not thresholds.asked:
        return "undecided", (NO_THRESHOLDS,)
    own = [check for check in checks if check.candidate == name]
    broken = [check for check in own if check.met == "broken"]
    if broken:
        return "no-go", tuple(_said(check, "is broken") for check in broken)
    unknown = [check for check in own if check.met == "undecided"]
    if unknown:
        return "undecided", tuple(_said(check, "cannot be told yet") for check in unknown)
    return "go", tuple(_said(check, "is met") for check in own)


def _why(name: str, comparisons: Sequence[Comparison]) -> str:
    """Why a model is recommended, by what was shown against the others."""
    parts = []
    for each in comparisons:
        assert each.difference.low is not None and each.difference.mean is not None
        parts.append(
            f"{each.outcome} than {each.b} (Dice {each.difference.mean:+.3f}, at worst "
            f"{each.difference.low:+.3f})"
        )
    return f"{name} is the simplest model that is shown to be not worse: {', '.join(parts)}"


def _seen_from(comparisons: Sequence[Comparison]) -> Mapping[tuple[str, str], Comparison]:
    """Each pair from both sides."""
    dice = [each for each in comparisons if each.measure == DECISIVE]
    return {(c.a, c.b): c for c in (*dice, *map(turned, dice))}


def _simplicity(name: str) -> tuple[int, str]:
    """The simplest first; a name may have its file in brackets."""
    kind = name.partition(" (")[0]
    known = kind in SIMPLEST_FIRST
    return (SIMPLEST_FIRST.index(kind) if known else len(SIMPLEST_FIRST)), name


def _said(check: Check, how: str) -> str:
    """A threshold in words."""
    return f"{check.threshold} ({check.asked:g}) {how}: {check.words}"


def _between(least: float, estimate: Estimate, most: float) -> Met:
    """Whether a mean is in a range, all of its interval considered."""
    if estimate.low is None or estimate.high is None:
        return "undecided"
    if least <= estimate.low and estimate.high <= most:
        return "met"
    return "broken" if estimate.high < least or estimate.low > most else "undecided"


def _within(estimate: Estimate, limit: float) -> Met:
    """Whether a bias is within plus and minus a limit."""
    return _between(-limit, estimate, limit)


def _range(what: str, estimate: Estimate, digits: int) -> str:
    """An estimate in words."""
    if estimate.mean is None:
        return f"{what} is undefined"
    shown = f"{what} is {estimate.mean:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return f"{shown}, of too few patients for an interval"
    return f"{shown} (95 % interval {estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
