"""The way out: a list of what may leave, and what of it a plan withholds."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from small_plans import built_plan

from fedseg.errors import PrivacyError
from fedseg.frozen import Frozen
from fedseg.plan import StudyPlan
from fedseg.promise import Calibration
from fedseg.result import PatientScores
from fedseg.updates import (
    AnswerHeader,
    Body,
    Enlisted,
    Evaluated,
    Received,
    Refused,
    Trained,
)
from sites.egress import BODIES, HEADER, means, permitted, require_permitted

DIGEST = "a" * 64
SCORES: dict[str, dict[str, float | None]] = {"dice": {"anterior": 0.75, "posterior": 0.25}}
NOTHING: dict[str, dict[str, float | None]] = {"dice": {"anterior": None, "posterior": None}}


def plan_of(**outputs: Any) -> StudyPlan:
    return built_plan(
        privacy={"guarantee": "none", "outputs": outputs}, aggregation__weighting="uniform"
    )


def private_plan(**outputs: Any) -> StudyPlan:
    promise = {
        "guarantee": "local",
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "expected_patients": 10,
        "expected_validation": 4,
    }
    plan = built_plan(
        privacy=promise | ({"outputs": outputs} if outputs else {}),
        aggregation__weighting="uniform",
        training={"gradient_clip_norm": None},
    )
    noise = Calibration(training=4.0, metrics=9.0 if outputs.get("metrics") == "noised" else None)
    return plan.model_copy(update={"calibrated": noise})


def enlisted(train: int = 10, val: int = 3) -> Enlisted:
    return Enlisted(
        patients={"train": train, "val": val},
        cases={"train": 2 * train, "val": 2 * val},
        left_out=7,
    )


def answered(body: Body) -> AnswerHeader:
    header = AnswerHeader(task=DIGEST, site="hospital_a", body=Received(model=DIGEST))
    return header.model_copy(update={"body": body})  # whatever type it is of


def test_every_type_of_message_and_every_field_is_on_the_list() -> None:
    """A field that somebody adds to a message stays in until it is listed with what it is about."""
    types = set(get_args(get_args(Body)[0]))
    assert set(BODIES) == types
    for kind, fields in BODIES.items():
        assert set(kind.model_fields) == set(fields)
    assert set(AnswerHeader.model_fields) == set(HEADER)


def test_a_field_that_nobody_listed_does_not_leave() -> None:
    class Chatty(Trained):
        oldest_patient: int = 93

    body = Chatty(patients=4, steps=20, loss=0.5)
    with pytest.raises(PrivacyError, match="Chatty"):
        permitted(body, plan_of())
    with pytest.raises(PrivacyError, match="Chatty"):
        require_permitted(answered(body), plan_of())


def test_a_field_added_to_a_type_that_is_listed_does_not_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = {name: about for name, about in BODIES[Trained].items() if name != "loss"}
    monkeypatch.setitem(BODIES, Trained, listed)  # type: ignore[misc]
    with pytest.raises(PrivacyError, match="does not name: loss"):
        permitted(Trained(patients=4, steps=20, loss=0.5), plan_of())


def test_a_field_added_to_the_header_does_not_leave() -> None:
    class Header(AnswerHeader):
        host: str = "ward-7"

    header = Header(task=DIGEST, site="hospital_a", body=Received(model=DIGEST))
    with pytest.raises(PrivacyError, match="host"):
        require_permitted(header, plan_of())


def test_a_type_that_nobody_listed_does_not_leave() -> None:
    class Diary(Frozen):
        kind: str = "diary"

    with pytest.raises(PrivacyError, match="Diary"):
        permitted(Diary(), plan_of())  # type: ignore[arg-type]


def test_plain_outputs_leave_as_they_are() -> None:
    plan = plan_of()
    bodies: tuple[Body, ...] = (
        enlisted(),
        Trained(patients=1, steps=20, loss=0.5),
        Evaluated(patients=1, scores=SCORES),
        Received(model=DIGEST),
        Refused(code="not_finite"),
    )
    for body in bodies:
        assert permitted(body, plan) == body
        require_permitted(answered(body), plan)


def test_what_the_plan_withholds_is_none() -> None:
    plan = private_plan(counts="none", losses="none", metrics="none")
    said = permitted(enlisted(), plan)
    assert said == Enlisted(
        patients={"train": None, "val": None}, cases={"train": None, "val": None}, left_out=None
    )
    trained = permitted(Trained(patients=9, steps=20, loss=0.5), plan)
    assert trained == Trained(patients=None, steps=20, loss=None)
    evaluated = permitted(Evaluated(patients=9, scores=SCORES), plan)
    assert evaluated == Evaluated(patients=None, scores=NOTHING)
    for body in (said, trained, evaluated):
        require_permitted(answered(body), plan)


def test_numbers_about_few_patients_are_suppressed() -> None:
    plan = plan_of(counts="suppressed", losses="suppressed", metrics="suppressed")
    said = permitted(enlisted(train=5, val=4), plan)
    assert said == Enlisted(
        patients={"train": 5, "val": None}, cases={"train": 10, "val": None}, left_out=None
    )
    for patients, leaves in ((4, False), (5, True)):
        trained = permitted(Trained(patients=patients, steps=20, loss=0.5), plan)
        assert trained == Trained(
            patients=5 if leaves else None, steps=20, loss=0.5 if leaves else None
        )
        evaluated = permitted(Evaluated(patients=patients, scores=SCORES), plan)
        assert evaluated == Evaluated(
            patients=5 if leaves else None, scores=SCORES if leaves else NOTHING
        )
        for body in (trained, evaluated):
            require_permitted(answered(body), plan)


def test_a_rare_label_is_about_few_patients_of_a_large_cohort() -> None:
    patients = [
        PatientScores(
            site="hospital_a",
            patient=f"p{n}",
            cases=1,
            dice={"anterior": 0.5, "posterior": 1.0 if n < 4 else None},
        )
        for n in range(9)
    ]
    whole = {"dice": {"anterior": 0.5, "posterior": 1.0}}
    assert means(patients, plan_of()) == whole
    suppressing = plan_of(metrics="suppressed")
    assert means(patients, suppressing) == {"dice": {"anterior": 0.5, "posterior": None}}
    assert means([*patients, patients[0]], suppressing) == whole
    assert means(patients, suppressing, 10) == NOTHING


def test_the_hospitals_own_limit_counts_where_it_is_above_the_plans() -> None:
    plan = plan_of(losses="suppressed")
    body = Trained(patients=7, steps=20, loss=0.5)
    assert permitted(body, plan, 3) == body
    assert permitted(body, plan, 8) == Trained(patients=7, steps=20, loss=None)


def test_a_number_about_nobody_knows_how_many_is_suppressed() -> None:
    plan = plan_of(losses="suppressed")
    body = Trained(patients=None, steps=20, loss=0.5)
    assert permitted(body, plan) == Trained(patients=None, steps=20, loss=None)


@pytest.mark.parametrize(
    "body",
    [
        enlisted(),
        Enlisted(patients={"train": None}, cases={"train": 3}, left_out=None),
        Enlisted(patients={"train": None}, cases={"train": None}, left_out=1),
        Trained(patients=9, steps=20, loss=None),
        Trained(patients=None, steps=20, loss=0.5),
        Evaluated(patients=9, scores=NOTHING),
        Evaluated(patients=None, scores=SCORES),
        Refused(code="data"),
        Refused(code="not_finite"),
    ],
)
def test_the_gate_lets_nothing_through_that_the_plan_withholds(body: Body) -> None:
    plan = private_plan(counts="none", losses="none", metrics="none")
    with pytest.raises(PrivacyError):
        require_permitted(answered(body), plan)
    require_permitted(answered(permitted(body, plan)), plan)


def test_the_gate_finds_numbers_about_too_few() -> None:
    plan = plan_of(counts="suppressed", losses="suppressed", metrics="suppressed")
    for body in (
        enlisted(val=3),
        Trained(patients=4, steps=20, loss=None),
        Evaluated(patients=4, scores=NOTHING),
    ):
        with pytest.raises(PrivacyError, match=r"with(holds|held)"):
            require_permitted(answered(body), plan)


def test_noised_metrics_are_complete_and_need_noise() -> None:
    plan = private_plan(metrics="noised")
    whole = Evaluated(patients=None, scores=SCORES)
    assert permitted(whole, plan) == whole
    require_permitted(answered(whole), plan)
    for scores in ({"dice": {"anterior": 0.75}}, {"dice": {"anterior": 0.75, "posterior": None}}):
        with pytest.raises(PrivacyError, match="every label"):
            permitted(Evaluated(patients=None, scores=scores), plan)
    part = Evaluated(patients=None, scores={"dice": {"anterior": 0.75, "posterior": None}})
    assert permitted(part, plan, annotated=("anterior",)) == part
    require_permitted(answered(part), plan, annotated=("anterior",))
    for other in (("posterior",), ("anterior", "posterior")):
        with pytest.raises(PrivacyError, match="every label"):
            permitted(part, plan, annotated=other)
    silent = plan.model_copy(update={"calibrated": Calibration(training=4.0)})
    with pytest.raises(PrivacyError, match="no noise"):
        permitted(whole, silent)


@pytest.mark.parametrize("scores", [{}, {"hd95": {}}, {"dice": {"tumour": 0.5}}])
def test_scores_of_something_else_do_not_leave(scores: dict[str, dict[str, float | None]]) -> None:
    with pytest.raises(PrivacyError, match="other metrics or labels"):
        permitted(Evaluated(patients=9, scores=scores), plan_of())


def test_a_private_plans_refusal_does_not_tell_that_data_were_its_cause() -> None:
    plan = private_plan()
    for body in (Refused(code="data"), Refused(code="not_finite"), Refused(code="failed")):
        assert permitted(body, plan) == Refused(code="failed")
    assert permitted(Refused(code="roster"), plan) == Refused(code="roster")
