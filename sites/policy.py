"""policy.yaml: what this hospital allows, whatever a plan asks for.

A policy only restricts. What it does not name is as the plan says; what it forbids is refused, and
the refusal names the rule, so that whoever is asked why can point at a line of the file. It is read
again for every approval and every task: a rule that is tightened holds from the next task on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError, field_validator

from fedseg.errors import DataError, PlanError, PrivacyError
from fedseg.frozen import Count, Frozen
from fedseg.plan import StudyPlan, read_mapping

MAX_POLICY_BYTES = 64 * 1024
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")

TEMPLATE = """\
# What this hospital allows, whatever a study's plan asks for. fedseg-site reads this file again for
# every approval and for every task; a rule that forbids something is named in the refusal, here and
# in the audit. A rule can only restrict a plan. `null` means: no limit of our own.

# May a study train without a privacy guarantee? Its updates may then let the coordinator
# reconstruct training images. Only the hospital itself should change this to true.
privacy_none: false

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
"""


class Policy(Frozen):
    """The rules of one hospital; see `TEMPLATE` for what each means."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    privacy_none: bool = False
    largest_rounds: Count | None = None
    largest_attempts: Count | None = None
    smallest_cohort: Count | None = None
    hours: Annotated[str, Field(max_length=32)] | None = None

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
        known = ", ".join(Policy.model_fields)
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
    found = [_privacy(policy, plan)]
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


def _at_most(name: str, what: str, most: int, asked: int) -> Rule:
    """A rule with an upper limit."""
    broken = f"the plan asks for {asked}" if asked > most else None
    return Rule(name, f"at most {most} {what}", broken)
