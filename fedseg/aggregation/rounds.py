"""A study as a state machine: typed stages, one after the other, from the plan.

Where the plan says so, one stage for each hospital's own model that was let go comes before the
release; which those are is in the history.

`open_stage` says what every site is asked (the same bytes for all), `close_stage` takes what came
back and gives the next state. Both are pure; the coordinator moves bytes and stores states. A state
is all that is needed to go on: a killed study continues from its last stored state and ends with
the same bits. A stage that too few sites answered is tried again, as often as the plan allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedseg.aggregation.accumulate import MAX_WEIGHT
from fedseg.aggregation.likeness import Likeness, known
from fedseg.aggregation.server import Model, Presence, ServerState, apply_update
from fedseg.arrays import Arrays, digest_of
from fedseg.errors import PlanError, RoundError, UntaughtLabelError
from fedseg.frozen import Frozen, SiteName
from fedseg.plan import StudyPlan
from fedseg.rates import summed_rate
from fedseg.result import SiteAnswer, SiteFailure, StageRecord, last_training
from fedseg.security.consent import Consent
from fedseg.security.identity import SignedRoll
from fedseg.updates import AnswerError, StageName, TaskHeader, Trained, seal_task

OwnModel = Callable[[str, str], tuple[Consent, Model]]  # of a site, with this digest


class Position(Frozen):
    """Where a study stands: the stage that is to be opened next.

    `owner` is the site whose own model is measured in the stage `own`; None in every other.
    """

    round: int
    stage: StageName
    attempt: int = 1
    owner: SiteName | None = None

    def same_stage(self, other: Position | None) -> bool:
        """The same stage of the same round, whichever attempt; a finished study is at none."""
        return other is not None and self.place == other.place

    @property
    def place(self) -> tuple[int, StageName, str | None]:
        """The stage of the round, whichever attempt."""
        return self.round, self.stage, self.owner


ENLIST = Position(round=0, stage="enlist")


@dataclass(frozen=True)
class StudyState:
    """Everything the coordinator must not lose. `position` is None when the study is finished."""

    position: Position | None
    server: ServerState
    history: tuple[StageRecord, ...] = ()


class Combined(Protocol):
    """The updates of a round as the plan's rule combines them, whatever order they came in."""

    @property
    def weight(self) -> int:
        """Of all the updates together."""

    def mean(self) -> Arrays:
        """The one update that they come to, float64, by name."""

    def likenesses(self) -> Mapping[str, Likeness]:
        """Site -> how its update compares with the others' and with what they come to."""


@dataclass(frozen=True)
class Outcome:
    """What one stage brought, once it is closed to further answers."""

    bytes_down: int
    answers: tuple[SiteAnswer, ...]
    failures: tuple[SiteFailure, ...]
    total: Combined | None = None


def schedule(plan: StudyPlan) -> Iterator[tuple[int, StageName]]:
    """Every stage in order: sites enlist, rounds of training and evaluation, the release.

    Without the stages of hospitals' own models, which nobody knows before they consent.
    """
    yield 0, "enlist"
    for round_ in range(1, plan.aggregation.rounds + 1):
        yield round_, "train"
        last = round_ == plan.aggregation.rounds
        measured = plan.privacy.outputs.metrics != "none"
        if measured and (last or round_ % plan.evaluation.every_rounds == 0):
            yield round_, "evaluate"
    yield plan.aggregation.rounds, "release"


def first_state(plan: StudyPlan, initial: Model) -> StudyState:
    """The state before anything happened.

    Raises:
        PlanError: the model is not the one whose digest the plan holds.
    """
    if digest_of(initial) != plan.built.digest:
        raise PlanError(
            "the initial model is not the one in the plan: build the plan again, or bring the file "
            "that `fedseg plan build` wrote beside it"
        )
    return StudyState(ENLIST, ServerState(initial))


def ahead(
    position: Position | None, plan: StudyPlan, history: Sequence[StageRecord]
) -> list[Position]:
    """This stage and those to come, in order; none when the study is finished.

    Those of own models are among them as far as hospitals have let them go by now.
    """
    if position is None:
        return []
    fixed = [Position(round=round_, stage=stage) for round_, stage in schedule(plan)]
    rounds = plan.aggregation.rounds
    own = [Position(round=rounds, stage="own", owner=site) for site in owned(plan, history)]
    every = [*fixed[:-1], *own, fixed[-1]]
    return every[[stage.place for stage in every].index(position.place) :]


def owned(plan: StudyPlan, history: Sequence[StageRecord]) -> dict[str, str]:
    """Site -> digest of its own model, of those that let it go in the last round that counts."""
    last = last_training(plan, history)
    if last is None or not plan.evaluation.own_models:
        return {}
    return {a.site: a.own for a in last.answers if a.own is not None}


def open_stage(
    state: StudyState,
    plan: StudyPlan,
    roll: SignedRoll | None = None,
    own: OwnModel | None = None,
) -> bytes:
    """The task of the stage that comes next, the same for every site of the round.

    Args:
        roll: who takes part; told to the sites when they enlist.
        own: finds a hospital's own model; needed where the plan measures those.
    """
    position, heads = _open_position(state), last_heads(state.history)
    if position.stage == "enlist":
        return _task(plan, position, None, roll, heads)
    if position.stage == "own":
        if own is None or position.owner is None:
            raise ValueError("a hospital's own model is measured, and nobody said where it lies")
        consent, model = own(position.owner, owned(plan, state.history)[position.owner])
        return _task(plan, position, model, None, heads, consent=consent)
    if position.stage == "train":
        return _task(plan, position, state.server.model, None, heads, _control(state, plan))
    return _task(plan, position, state.server.released(plan.aggregation), None, heads)


def enlist_task(
    plan: StudyPlan, roll: SignedRoll | None = None, history: Sequence[StageRecord] = ()
) -> bytes:
    """The task that asks sites to enlist: when a study is resumed, or others take part."""
    return _task(plan, ENLIST, None, roll, last_heads(history))


def release_task(state: StudyState, plan: StudyPlan) -> bytes:
    """The last task of a finished study once more: the same bytes, for a site that lacks them."""
    position, model = release_position(state), state.server.released(plan.aggregation)
    return _task(plan, position, model, None, last_heads(state.history[:-1]))


def last_heads(history: Sequence[StageRecord]) -> dict[str, str]:
    """The last blinded head of each site's ledger, by site: what its next task acknowledges."""
    found = {a.site: a.head for record in history for a in record.answers if a.head is not None}
    return dict(sorted(found.items()))


def release_position(state: StudyState) -> Position:
    """The last stage of a finished study."""
    if state.position is not None:
        raise ValueError("the study is not finished: its model is not released yet")
    last = state.history[-1]
    return Position(round=last.round, stage="release", attempt=last.attempt)


def also_received(state: StudyState, outcome: Outcome) -> StudyState:
    """A finished study whose released model has reached more sites than before."""
    last = state.history[-1]
    now = {answer.site: answer for answer in (*last.answers, *outcome.answers)}
    known = {failure.site: failure for failure in (*last.failures, *outcome.failures)}
    whole = Outcome(
        last.bytes_down + outcome.bytes_down,
        tuple(now.values()),
        tuple(failure for site, failure in known.items() if site not in now),
    )
    record = _record(release_position(state), whole)
    return replace(state, history=(*state.history[:-1], record))


def close_stage(
    state: StudyState, plan: StudyPlan, outcome: Outcome, *, every_label: bool = True
) -> StudyState:
    """The next state. With too few answers it is the same stage again, one attempt later.

    Args:
        every_label: refuse a study in which a label of the plan is annotated by no site; a
            hospital that trains alone, to be compared with, may lack one.

    Raises:
        PlanError: weights that cannot be summed exactly.
        UntaughtLabelError: a label of the plan is annotated by no site that enlisted.
    """
    position = _open_position(state)
    missing = missing_answers(position.stage, plan, outcome)
    if missing <= 0 and outcome.total is not None:
        outcome = _compared(outcome, outcome.total)
    history = (*state.history, _record(position, outcome))
    if missing > 0:
        again = position.model_copy(update={"attempt": position.attempt + 1})
        return replace(state, position=again, history=history)
    if position.stage == "enlist":
        _require_weights_that_fit(plan, outcome)
        if every_label:
            _require_every_label(plan, outcome)
    server = state.server
    if position.stage == "train":
        assert outcome.total is not None
        presence = _presence(position, plan, state.history, outcome.total.weight)
        server = apply_update(server, outcome.total.mean(), plan.aggregation, presence)
    return StudyState(_after(position, plan, history), server, history)


def missing_answers(stage: StageName, plan: StudyPlan, outcome: Outcome) -> int:
    """How many answers are lacking; evaluation and release never hold a study up."""
    if stage in ("evaluate", "own", "release"):
        return 0
    return plan.aggregation.minimum_sites - len(outcome.answers)


def require_attempts_left(state: StudyState, plan: StudyPlan) -> None:
    """Stop a study whose stage has failed as often as the plan allows.

    Raises:
        RoundError: no attempt is left; it names the sites that failed and why.
    """
    position = state.position
    if position is None or position.attempt <= plan.aggregation.attempts:
        return
    last = state.history[-1]
    failed = ", ".join(f"{failure.site} ({failure.code})" for failure in last.failures) or "none"
    raise RoundError(
        f"round {last.round}, stage {last.stage}: {plan.aggregation.minimum_sites} sites must "
        f"answer, {len(last.answers)} did, in {last.attempt} attempts; failed: {failed}. "
        "Mend the sites and start again (a simulation with --resume); nothing of the rounds before "
        "is lost"
    )


def fresh_attempts(state: StudyState, plan: StudyPlan) -> StudyState:
    """What --resume starts from: a stage that used up its attempts gets them back, others go on."""
    if state.position is None or state.position.attempt <= plan.aggregation.attempts:
        return state
    return replace(state, position=state.position.model_copy(update={"attempt": 1}))


def weight_of(body: Trained, plan: StudyPlan) -> int:
    """The whole-number weight of a site's update."""
    if plan.aggregation.weighting == "uniform":
        return 1
    if body.patients is None:
        raise AnswerError(
            "data", "the plan weighs updates by patients, and the site withholds them"
        )
    return body.patients


def _compared(outcome: Outcome, total: Combined) -> Outcome:
    """The answers with how each site's update compares with the others'."""
    found = total.likenesses()

    def figures(site: str) -> dict[str, float | str | None]:
        like = found[site]
        return {
            "update_norm": known(like.norm),
            "update_agreement": known(like.agreement, 4),
            "update_twin": like.twin,
            "update_cosine": known(like.cosine, 4),
            "update_distance": known(like.distance),
        }

    answers = tuple(a.model_copy(update=figures(a.site)) for a in outcome.answers)
    return replace(outcome, answers=answers)


def _presence(
    position: Position, plan: StudyPlan, history: Sequence[StageRecord], weight: int
) -> Presence | None:
    """How much of the federation answered, where the plan's rule asks for it."""
    if plan.aggregation.strategy != "scaffold":
        return None
    enlisted = [record for record in history if record.stage == "enlist"]
    answers = enlisted[-1].answers if enlisted else ()
    uniform = plan.aggregation.weighting == "uniform"
    everyone = sum(1 if uniform else answer.patients or 0 for answer in answers)
    share = weight / max(weight, everyone)
    return Presence(share, summed_rate(plan, position.round))


def _control(state: StudyState, plan: StudyPlan) -> Model | None:
    """The server's control variate as it travels, in the model's dtypes; zeros at the start."""
    if plan.aggregation.strategy != "scaffold":
        return None
    model, kept = state.server.model, state.server.control
    names = (spec.name for spec in plan.built.updated)
    return {
        name: np.zeros_like(model[name]) if kept is None else kept[name].astype(model[name].dtype)
        for name in names
    }


def _require_weights_that_fit(plan: StudyPlan, outcome: Outcome) -> None:
    """Refuse a study whose weights could not be summed exactly, before the first round."""
    patients = sum(answer.patients or 0 for answer in outcome.answers)
    if plan.aggregation.weighting == "patients" and patients > MAX_WEIGHT:
        raise PlanError(
            f"the sites have {patients} training patients together, weights are summed exactly up "
            f"to {MAX_WEIGHT}: set aggregation.weighting: uniform"
        )


def _require_every_label(plan: StudyPlan, outcome: Outcome) -> None:
    """Refuse a study in which nobody could teach a label, before the first round."""
    every = tuple(plan.task.labels)
    annotated = {a.site: every if a.labels is None else a.labels for a in outcome.answers}
    taught = set().union(*annotated.values())
    untaught = tuple(name for name in every if name not in taught)
    if untaught:
        raise UntaughtLabelError(untaught, annotated)


def _task(
    plan: StudyPlan,
    position: Position,
    model: Model | None,
    roll: SignedRoll | None,
    heads: dict[str, str],
    control: Model | None = None,
    consent: Consent | None = None,
) -> bytes:
    """The task of one position."""
    header = TaskHeader(
        study=plan.study,
        plan=plan.digest,
        round=position.round,
        stage=position.stage,
        attempt=position.attempt,
        model=None if model is None else digest_of(model),
        control=None if control is None else digest_of(control),
        roll=roll,
        heads=heads,
        consent=consent,
    )
    return seal_task(header, model, control)


def _open_position(state: StudyState) -> Position:
    """The stage to open; a finished study has none."""
    if state.position is None:
        raise ValueError("the study is finished: no stage is left to open")
    return state.position


def _after(position: Position, plan: StudyPlan, history: Sequence[StageRecord]) -> Position | None:
    """The stage that follows, or None at the end."""
    return next(iter(ahead(position, plan, history)[1:]), None)


def _record(position: Position, outcome: Outcome) -> StageRecord:
    """The history's entry, sorted by site so that the order of answers leaves no trace."""
    return StageRecord(
        round=position.round,
        stage=position.stage,
        attempt=position.attempt,
        owner=position.owner,
        bytes_down=outcome.bytes_down,
        bytes_up=sum(answer.bytes_up for answer in outcome.answers),
        answers=tuple(sorted(outcome.answers, key=lambda answer: answer.site)),
        failures=tuple(sorted(outcome.failures, key=lambda failure: failure.site)),
    )
