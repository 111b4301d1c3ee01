"""policy.yaml: what this hospital allows, whatever a plan asks for.

A policy only restricts. What it does not name is as the plan says; what it forbids is refused, and
the refusal names the rule, so that whoever is asked why can point at a line of the file. It is read
again for every approval and every task: a rule that is tightened holds from the next task on. A
budget is the exception to what is not named: a study with a privacy guarantee needs one, and a file
that is silent has the template's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from fedseg.errors import DataError, PlanError, PrivacyError
from fedseg.evaluation.thresholds import Thresholds
from fedseg.frozen import Count, Frozen, Positive
from fedseg.plan import StudyPlan
from fedseg.promise import OPENNESS, Openness
from fedseg.strictyaml import read_mapping

if TYPE_CHECKING:
    from fedseg.privacy.ledger import Limits

MAX_POLICY_BYTES = 64 * 1024
Delta = Annotated[float, Field(gt=0, lt=1)]
_SCIENTIFIC = re.compile(r"\d+e[+-]?\d{1,3}", re.IGNORECASE)
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")

_MOST: dict[Openness, str] = {
    "none": "not at all",
    "noised": "only with noise that the guarantee counts",
    "suppressed": "only where they are about enough patients",
    "plain": "as the plan says",
}

TEMPLATE = """\
# What this hospital allows, whatever a study's plan asks for. fedseg-site reads this file again for
# every approval and for every task; a rule that forbids something is named in the refusal, here and
# in the audit. A rule can only restrict a plan. `null` means: no limit of our own.

# May a study train without a privacy guarantee? Its updates may then let the coordinator
# reconstruct training images. Only the hospital itself should change this to true.
privacy_none: false

# A study with a guarantee (differential privacy) promises that what leaves is nearly the same with
# or without any one patient. Epsilon bounds how much it may differ, delta is the chance that the
# bound does not hold. The smaller, the better for patients and the worse for the model.
#
# The most that one study may promise. 8 is the weakest that the field still takes for a guarantee
# (published segmentation and image models use 1 to 8); below 1 little is learnt from few patients.
# delta must stay far below one over the number of patients in a study: 0.0001 is right up to about
# a thousand patients. `null`: up to the budget in all, below.
largest_epsilon: 8
largest_delta: 0.0001

# What any patient may be charged over all studies together, as this hospital's ledger counts it
# (fedseg-site ledger budget). Room for one study at the largest epsilon, or for eight of epsilon 3.
# A study that does not fit into what is left for each of its patients is refused when it is to be
# approved. There must be a number here: without one no study with a guarantee is allowed.
total_epsilon: 10
total_delta: 0.0001

# May this hospital's own model be measured at the other hospitals of a study, where its plan asks
# for that? It is the study's last common model with our last update in it: the coordinator has it
# anyway, but here each of the other hospitals gets it as well, and what has left cannot be called
# back. Where we do not consent our model is left out, and the study goes on. The first line is for
# studies whose guarantee covers that update, the second for those without one: then the other
# hospitals might reconstruct training images from it, as the coordinator might.
own_model_guaranteed: false
own_model_unprotected: false

# What may leave besides updates, at most: none, suppressed (only where it is about at least
# suppress_below patients) or plain; metrics also noised (with noise that the guarantee counts).
# counts: how many patients and images; losses: the training error; metrics: the quality on patients
# who are held back. `null`: in a study with a guarantee only what the guarantee covers (noised
# metrics), in one without whatever the plan says, since its updates tell more anyway.
counts: null
losses: null
metrics: null

# Where a plan suppresses numbers about few patients, it must do so below at least this many. 5 is a
# usual threshold of official statistics.
suppress_below: 5

# At most so many rounds of training in a study.
largest_rounds: null

# At most so many attempts at one round: each asks for an update of another model.
largest_attempts: null

# At least so many of our patients in a study's training data: the fewer, the more an update shows
# of each.
smallest_cohort: null

# When tasks may be worked on, in this machine's local time, such as "20:00-06:00". Outside these
# hours the coordinator is told to try again.
hours: null

# What a model must do on this hospital's own held-back patients before it may be used here. Set it
# before anybody looks at a model: `fedseg-site validate` says go only where each line holds, and
# `null` (nothing was asked) is never go. Means must hold with all of their 95 % interval. Such as:
# acceptance:
#   dice_at_least: 0.8                  # mean over patients
#   worst_case_dice_at_least: 0.5       # the patient with the lowest one
#   failures_share_at_most: 0.05        # patients with an empty or wild prediction
#   volume_bias_percent_at_most: 10     # of each label, on average
#   hd95_mm_at_most: 5                  # mean over patients
#   patients_at_least: 20               # fewer held-back patients decide nothing
acceptance: null
"""


class Policy(Frozen):
    """The rules of one hospital; see `TEMPLATE` for what each means."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    privacy_none: bool = False
    largest_epsilon: Positive | None = 8.0
    largest_delta: Delta | None = 1e-4
    total_epsilon: Positive | None = 10.0
    total_delta: Delta | None = 1e-4
    own_model_guaranteed: bool = False
    own_model_unprotected: bool = False
    counts: Literal["none", "suppressed", "plain"] | None = None
    losses: Literal["none", "suppressed", "plain"] | None = None
    metrics: Openness | None = None
    suppress_below: Count | None = 5
    largest_rounds: Count | None = None
    largest_attempts: Count | None = None
    smallest_cohort: Count | None = None
    hours: Annotated[str, Field(max_length=32)] | None = None
    acceptance: Thresholds | None = None

    @field_validator(
        "largest_epsilon", "largest_delta", "total_epsilon", "total_delta", mode="before"
    )
    @classmethod
    def _power_of_ten(cls, number: object) -> object:
        """YAML takes 1e-5 for a word: it wants a point in it."""
        if isinstance(number, str) and _SCIENTIFIC.fullmatch(number):
            return float(number)
        return number

    @field_validator("hours")
    @classmethod
    def _hours(cls, hours: str | None) -> str | None:
        if hours is not None and (not _HOURS.fullmatch(hours) or hours[:5] == hours[6:]):
            raise ValueError('write two different times, such as "20:00-06:00"')
        return hours


@dataclass(frozen=True)
class Rule:
    """One rule beside what a plan asks for.

    Attributes:
        name: the field of policy.yaml.
        says: the rule in words.
        broken: what the plan asks for that the rule forbids, or None.
    """

    name: str
    says: str
    broken: str | None = None


def load_policy(path: Path) -> Policy:
    """Read policy.yaml.

    Raises:
        DataError: missing, not YAML, or with a field that fedseg does not know; nothing is allowed
            until it is mended.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"cannot read {path.name} ({error.strerror}): nothing is allowed without it; bring it "
            "back from a backup"
        ) from None
    if len(data) > MAX_POLICY_BYTES:
        raise DataError(f"{path.name} is larger than {MAX_POLICY_BYTES} bytes: that is no policy")
    try:
        return Policy.model_validate(read_mapping(data, path.name))
    except PlanError as error:
        raise DataError(f"{error}".partition("; `fedseg plan")[0]) from None
    except ValidationError as error:
        item = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, item["loc"])) or "the file"
        section = Thresholds if item["loc"][:1] == ("acceptance",) else Policy
        known = ", ".join(section.model_fields)
        what = "is no rule" if item["type"] == "extra_forbidden" else item["msg"]
        raise DataError(
            f"{path.name}: {field[:80]}: {what}; the rules are {known}; nothing is allowed until "
            "this is mended"
        ) from None


def rules(policy: Policy, plan: StudyPlan, training_patients: int | None) -> tuple[Rule, ...]:
    """Every rule that this hospital has set, held against a plan.

    Args:
        training_patients: this site's usable ones, or None while they are not counted yet.
    """
    found = [_privacy(policy, plan), *_budget(policy, plan), *_outputs(policy, plan)]
    if plan.evaluation.own_models:
        found.append(_own_model(policy, plan))
    asked = plan.aggregation
    if policy.largest_rounds is not None:
        found.append(_at_most("largest_rounds", "rounds", policy.largest_rounds, asked.rounds))
    if policy.largest_attempts is not None:
        most = policy.largest_attempts
        found.append(_at_most("largest_attempts", "attempts at a round", most, asked.attempts))
    if policy.smallest_cohort is not None:
        least, broken = policy.smallest_cohort, None
        if training_patients is not None and training_patients < least:
            broken = f"{training_patients} of our patients can be trained on"
        says = f"at least {least} of our patients in the training data"
        found.append(Rule("smallest_cohort", says, broken))
    if policy.hours is not None:
        found.append(Rule("hours", f"tasks are worked on from {policy.hours.replace('-', ' to ')}"))
    return tuple(found)


def authorise(policy: Policy, plan: StudyPlan, training_patients: int | None = None) -> None:
    """Accept a plan as far as the hospital's rules go.

    Raises:
        PrivacyError: a rule forbids it; the message names each rule that does.
    """
    broken = [rule for rule in rules(policy, plan, training_patients) if rule.broken]
    if broken:
        reasons = "; ".join(f"{rule.name} ({rule.says}): {rule.broken}" for rule in broken)
        raise PrivacyError(
            f"this hospital's policy.yaml forbids the study {plan.study}: {reasons}. Refuse the "
            "plan, or let whoever is responsible for the policy change that line"
        )


def own_model_line(plan: StudyPlan) -> Literal["own_model_unprotected", "own_model_guaranteed"]:
    """Which line of policy.yaml speaks of the own model of a study of this kind."""
    return "own_model_unprotected" if plan.private is None else "own_model_guaranteed"


def lets_own_model_go(policy: Policy, plan: StudyPlan) -> bool:
    """Whether this hospital's own model may be measured at the others; a plan that asks is needed.

    The consent is of its kind: one without a guarantee is none for a study with one, nor the other
    way round.
    """
    if not plan.evaluation.own_models:
        return False
    allowed: bool = getattr(policy, own_model_line(plan))
    return allowed


def limits_of(policy: Policy) -> Limits:
    """What the hospital allows any patient to be charged.

    Raises:
        PrivacyError: no budget is set; the message names the rule.
    """
    from fedseg.privacy.ledger import Limits

    epsilon, delta = policy.total_epsilon, policy.total_delta
    if epsilon is None or delta is None:
        name = "total_epsilon" if epsilon is None else "total_delta"
        raise PrivacyError(
            f"this hospital's policy.yaml sets no {name}: without a budget in all no study with a "
            "privacy guarantee is allowed; write a number"
        )
    return Limits(
        study_epsilon=policy.largest_epsilon or epsilon,
        study_delta=policy.largest_delta or delta,
        total_epsilon=epsilon,
        total_delta=delta,
    )


def open_at(policy: Policy, local: datetime) -> bool:
    """Whether tasks may be worked on at this moment of local time."""
    if policy.hours is None:
        return True
    start, end = (time.fromisoformat(part) for part in policy.hours.split("-"))
    now = local.time().replace(tzinfo=None)
    return start <= now < end if start < end else now >= start or now < end


def _privacy(policy: Policy, plan: StudyPlan) -> Rule:
    """Whether the study may train without a guarantee."""
    if policy.privacy_none:
        return Rule("privacy_none", "a study may train without a privacy guarantee")
    broken = None
    if plan.privacy.guarantee == "none":
        broken = "the plan has none; images may be reconstructed from updates"
    return Rule("privacy_none", "no study without a privacy guarantee", broken)


def _own_model(policy: Policy, plan: StudyPlan) -> Rule:
    """Whether the own model goes to the other hospitals: never a reason to refuse a plan."""
    name = own_model_line(plan)
    if lets_own_model_go(policy, plan):
        return Rule(name, "our own model is measured at the other hospitals: they get it")
    return Rule(name, "our own model is not passed on to the other hospitals")


def _budget(policy: Policy, plan: StudyPlan) -> Iterator[Rule]:
    """What a guarantee may cost patients; nothing where there is none."""
    promise = plan.private
    if promise is None:
        return
    for name, most, asked in (
        ("largest_epsilon", policy.largest_epsilon, promise.epsilon),
        ("largest_delta", policy.largest_delta, promise.delta),
    ):
        if most is not None:
            broken = f"the plan asks for {asked:g}" if asked > most else None
            yield Rule(name, f"at most {name[8:]} {most:g} for one study", broken)
    for name, total, asked in (
        ("total_epsilon", policy.total_epsilon, promise.epsilon),
        ("total_delta", policy.total_delta, promise.delta),
    ):
        if total is None:
            says, broken = "a budget of each patient over all studies", "no budget is set"
        else:
            says = f"each patient at most {name[6:]} {total:g} over all studies, by the ledger"
            broken = f"the plan alone asks for {asked:g}" if asked > total else None
        yield Rule(name, says, broken)


def _outputs(policy: Policy, plan: StudyPlan) -> Iterator[Rule]:
    """What may leave besides updates."""
    outputs = plan.privacy.outputs
    asked: dict[str, Openness] = {
        "counts": outputs.counts,
        "losses": outputs.losses,
        "metrics": outputs.metrics,
    }
    for name, wanted in asked.items():
        most: Openness | None = getattr(policy, name)
        if most is None and plan.private is None:
            continue
        most = most or "noised"
        broken = None
        if OPENNESS.index(wanted) > OPENNESS.index(most):
            broken = f"the plan lets them leave {wanted}"
        yield Rule(name, f"{name} leave {_MOST[most]}", broken)
    least = policy.suppress_below
    if least is not None and "suppressed" in asked.values():
        few = outputs.suppress_below
        broken = f"the plan says {few}" if few < least else None
        yield Rule(
            "suppress_below", f"suppressed numbers are about {least} patients or more", broken
        )


def _at_most(name: str, what: str, most: int, asked: int) -> Rule:
    """A rule with an upper limit."""
    broken = f"the plan asks for {asked}" if asked > most else None
    return Rule(name, f"at most {most} {what}", broken)
