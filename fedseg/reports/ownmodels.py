"""Each hospital's own model at every hospital: the worst and the spread first, the mean second.

Its own model is the last shared one with its last update, where its policy let that go to the
others. What is known is what each hospital let leave of its own measuring. Whose model stayed at
home, and who gave no last update, is named, for the worst may be among those. Nothing here needs
numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedseg.plan import StudyPlan
from fedseg.reports.crosssite import (
    CrossSite,
    SiteScore,
    Spread,
    compared,
    everyone_in,
    listed,
    number,
    own_elsewhere,
    told,
)
from fedseg.result import OwnModelScores, StageRecord, last_training

WHAT = (
    "A hospital’s own model is the last shared one with that hospital’s last update in it. Where "
    "its policy let it go, every hospital got it and measured it on its own held-back patients."
)
NOT_YET = (
    "After the last round each hospital’s own model is measured at every hospital, where its "
    "policy lets it go there."
)


@dataclass(frozen=True)
class OwnModels:
    """All own models that were let go, worst first; whose was not, and who has none.

    Attributes:
        measured: site -> its model over the hospitals.
        at_home: sites that trained in the last round and let no model go.
        without: sites whose update the last round has not.
    """

    measured: Mapping[str, CrossSite]
    at_home: tuple[str, ...]
    without: tuple[str, ...] = ()


def own_models(
    plan: StudyPlan, stages: Sequence[StageRecord], sites: Sequence[str] = ()
) -> OwnModels | None:
    """What the coordinator knows; None where the plan measures none, or no round is left yet.

    Args:
        stages: the study's history.
        sites: who is enrolled besides those who ever answered.
    """
    last = last_training(plan, stages)
    if not plan.evaluation.own_models or last is None:
        return None
    everyone = everyone_in(stages, sites)
    found: dict[str, list[SiteScore]] = {}
    for record in stages:
        if record.owner is not None:
            answers = {a.site: a for a in record.answers}
            found[record.owner] = [told(site, answers.get(site), plan) for site in everyone]
    let_go = {a.site: a.own is not None for a in last.answers}
    return gathered(found, let_go, everyone, plan.aggregation.rounds)


def gathered(
    found: Mapping[str, Iterable[SiteScore]],
    let_go: Mapping[str, bool],
    sites: Iterable[str],
    round_: int,
) -> OwnModels:
    """Own models in the order worst Dice first; those that nobody told of come last.

    Args:
        found: owner -> what each hospital told of its model.
        let_go: of each site whose update the last round has, whether it let its model go.
        sites: all.
    """
    measured = {owner: compared(scores, round_=round_) for owner, scores in found.items()}
    order = sorted(measured, key=lambda owner: (_worst(measured[owner]), owner))
    at_home = tuple(sorted(site for site, gone in let_go.items() if not gone))
    without = tuple(sorted({*sites} - {*let_go}))
    return OwnModels({owner: measured[owner] for owner in order}, at_home, without)


def recorded(found: OwnModels | None, stages: Sequence[StageRecord]) -> tuple[OwnModelScores, ...]:
    """The same for result.json, by name."""
    digests = {a.site: a.own for record in stages for a in record.answers if a.own is not None}
    return tuple(
        OwnModelScores(
            site=owner,
            model=digests[owner],
            scores={score.site: dict(score.values) for score in sorted(across.scores, key=_name)},
        )
        for owner, across in sorted((found.measured if found else {}).items())
    )


def sentences(plan: StudyPlan, found: OwnModels | None) -> tuple[str, ...]:
    """The worst first, or why there is no hospital's own model in the comparison."""
    if found is None:
        return (NOT_YET if plan.evaluation.own_models else own_elsewhere(plan),)
    each = (_sentence(owner, across) for owner, across in found.measured.items())
    return (WHAT, *each, *_left_out(found))


def beside_table(plan: StudyPlan, found: OwnModels | None) -> tuple[str, ...]:
    """The same where a table has the numbers: what they are, and whose model they leave out."""
    return sentences(plan, None) if found is None else (WHAT, *_left_out(found))


def _left_out(found: OwnModels) -> Iterator[str]:
    """Whose own model was not let go, and who has none, if any."""
    if found.at_home:
        who = listed(found.at_home)
        yield f"Not passed on, since the hospital did not consent: the own model of {who}."
    if found.without:
        yield f"No update of the last round, so no own model: {listed(found.without)}."


def dice_of(across: CrossSite) -> Spread | None:
    """The spread of the Dice, where at least two hospitals told it."""
    return next((spread for spread in across.spread if spread.metric == "dice"), None)


def _sentence(owner: str, across: CrossSite) -> str:
    """One own model over the hospitals."""
    dice, known = dice_of(across), across.named("measured")
    if dice is None:
        who = f"{listed(known)} alone told of it" if known else "no hospital measured it and told"
        return f"{owner}’s own model: {who}, so there is nothing to compare."
    home = next((s.values.get("dice") for s in across.scores if s.site == owner), None)
    at_home = "" if home is None else f" At home its Dice is {number(home)}."
    held = across.named("withheld")
    missing = f" Withheld: {listed(held)}." if held else ""
    return (
        f"{owner}’s own model fares worst at {dice.worst_site}: Dice {number(dice.worst)}; the "
        f"standard deviation over the {len(known)} hospitals that told is "
        f"{number(dice.deviation)}, the mean {number(dice.mean)}.{at_home}{missing}"
    )


def _worst(across: CrossSite) -> float:
    """The lowest Dice; above every Dice where none is known."""
    return min((s.values["dice"] for s in across.scores if "dice" in s.values), default=2.0)


def _name(score: SiteScore) -> str:
    """Whose score it is."""
    return score.site
