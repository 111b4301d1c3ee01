"""A promise in the words of people who must answer for it; nothing is counted here, without torch.

What leaves a hospital besides its updates is said for every plan in the same words: to the hospital
before it approves, on the coordinator's page, and in the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp

from fedseg.plan import StudyPlan
from fedseg.promise import LocalPrivacy, Openness

NONE = (
    "None: images stay in their hospitals, but updates may reveal training images to the "
    "coordinator."
)
_OUTPUTS = {
    "counts": "Numbers of patients and images",
    "losses": "The mean training error of a round",
    "metrics": "The quality on held-back patients",
}


@dataclass(frozen=True)
class Output:
    """One kind of number that may leave besides updates.

    Attributes:
        name: the field of `privacy.outputs`.
        what: in words.
        openness: as the plan has it.
        covered: whether it leaves with accounted noise, or not at all.
    """

    name: str
    what: str
    openness: Openness
    suppress_below: int

    @property
    def covered(self) -> bool:
        """Whether a guarantee holds for it too."""
        return self.openness in ("none", "noised")

    @property
    def how(self) -> str:
        """How it leaves."""
        return {
            "none": "withheld: not sent at all",
            "noised": "as a mean with accounted noise",
            "suppressed": f"sent where it is about at least {self.suppress_below} patients",
            "plain": "sent plainly",
        }[self.openness]


def outputs_of(plan: StudyPlan) -> tuple[Output, ...]:
    """Counts, losses and metrics, and how a plan lets each leave."""
    asked = plan.privacy.outputs
    return tuple(
        Output(name, what, getattr(asked, name), asked.suppress_below)
        for name, what in _OUTPUTS.items()
    )


def withheld(plan: StudyPlan, name: str) -> bool:
    """Whether `counts`, `losses` or `metrics` never leave a hospital under a plan."""
    return bool(getattr(plan.privacy.outputs, name) == "none")


def in_one_line(plan: StudyPlan) -> str:
    """What a plan guarantees: epsilon never without delta and unit."""
    privacy = plan.private
    if privacy is None:
        return NONE
    return (
        f"({privacy.epsilon:g}, {privacy.delta:g})-differential privacy for each patient of a "
        "hospital, over the whole study, by the hospital's own noise."
    )


def not_covered(plan: StudyPlan) -> str:
    """What leaves under a private plan outside of its guarantee, in one sentence."""
    bare = [output for output in outputs_of(plan) if not output.covered]
    if not bare:
        return "No number about patients leaves outside of the guarantee."
    said = "; ".join(f"{output.what[0].lower()}{output.what[1:]}, {output.how}" for output in bare)
    return f"The guarantee does not cover: {said}."


def guessed_right(privacy: LocalPrivacy) -> float:
    """How often anyone can at most tell rightly whether a patient took part; blind guessing: 0.5.

    (e^epsilon + delta) / (e^epsilon + 1): the least that both kinds of error add up to (Kairouz, Oh
    and Viswanath 2015). Rounded up to a thousandth.
    """
    odds = exp(-privacy.epsilon)
    right = (1 + privacy.delta * odds) / (1 + odds)
    return ceil(right * 1000 - 1e-9) / 1000
