"""Rehearsed attacks: what each sends, what it knows, and that equal studies stay equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from own_models import consent_of
from pure_studies import reply, train
from small_plans import answer, body_of, built_plan, tiny_model

from fedseg.aggregation.ownmodels import own_model
from fedseg.aggregation.rounds import ENLIST, Position, StudyState, first_state, open_stage
from fedseg.aggregation.server import ServerState
from fedseg.arrays import digest_of
from fedseg.imaging.cases import Cohort
from fedseg.imaging.readers import map_labels
from fedseg.plan import StudyPlan
from fedseg.simulation.attacks import (
    ALIE_Z,
    ATTACKS,
    FLIP,
    LOUD,
    Means,
    a_little_is_enough,
    label_swapped,
)
from fedseg.simulation.rehearsal import KINDS, Broken, Fault, parse_fault, with_faults
from fedseg.updates import RefusalCode, Refused, Trained, open_answer, open_task, task_digest

PLAN = built_plan()
TASK = open_stage(StudyState(Position(round=2, stage="train"), ServerState(tiny_model())), PLAN)


def honest(site: str) -> Callable[[bytes], bytes]:
    return lambda task: reply(task, site, PLAN)


def sent(handle: Callable[[bytes], bytes], site: str, plan: StudyPlan = PLAN) -> Any:
    """What the coordinator opens: every attack must get past its checks."""
    data = handle(TASK)
    return open_answer(data, plan, task=task_digest(TASK), stage="train", site=site)[1]


def attacked(kind: Any, means: Means | None = None, site: str = "site_a") -> Any:
    fault = Fault(site=site, kind=kind)
    return sent(with_faults(honest(site), [fault], means), site)


def test_every_attack_can_be_asked_for() -> None:
    assert set(KINDS) == {*get_args(Broken), *ATTACKS}
    for kind in ATTACKS:
        assert parse_fault(f"site_a:{kind}@3") == Fault(site="site_a", kind=kind, round=3)


def test_a_flipped_sign_is_what_two_of_ten_need_to_cancel_the_rest() -> None:
    update = attacked("sign_flip")
    for name, own in train("site_a", 2, tiny_model()).items():
        np.testing.assert_allclose(update[name], -FLIP * own, rtol=1e-6)
    assert 2 * FLIP == 8


def test_noise_is_loud_and_the_same_again() -> None:
    model = {"wide": np.zeros((400, 30), np.float32)}
    plan = built_plan(model)
    state = StudyState(Position(round=2, stage="train"), ServerState(model))
    task = open_stage(state, plan)
    fault = Fault(site="site_a", kind="scaled_noise")
    handle = with_faults(lambda t: reply(t, "site_a", plan), [fault], Means(seed=5))
    data = handle(task)
    assert handle(task) == data
    delta = open_answer(data, plan, task=task_digest(task), stage="train", site="site_a")[1]
    own = train("site_a", 2, model)["wide"]
    rms = [float(np.sqrt(np.mean(np.square(a, dtype=np.float64)))) for a in (delta["wide"], own)]
    assert rms[0] / rms[1] == pytest.approx(LOUD, rel=0.05)
    assert abs(np.corrcoef(delta["wide"].ravel(), own.ravel())[0, 1]) < 0.05
    other = with_faults(lambda t: reply(t, "site_a", plan), [fault], Means(seed=6))
    assert other(task) != data


def test_colluders_send_the_same_update_within_their_spread() -> None:
    sites = ("site_a", "site_b", "site_c")
    updates = []
    for site in sites:
        others = {other: honest(other) for other in sites if other != site}
        updates.append(attacked("alie", Means(colluders=others), site))
    own = [train(site, 2, tiny_model()) for site in sites]
    for name in own[0]:
        values = np.stack([update[name] for update in own]).astype(np.float64)
        expected = values.mean(axis=0) - ALIE_Z * values.std(axis=0)
        for update in updates:
            np.testing.assert_allclose(update[name], expected, rtol=1e-5, atol=1e-7)
            assert update[name].tobytes() == updates[0][name].tobytes()


def test_a_lone_adaptive_attacker_has_nothing_to_hide_in() -> None:
    own = train("site_a", 2, tiny_model())
    found = a_little_is_enough([own])
    assert all(found[name].tobytes() == own[name].tobytes() for name in own)


def test_labels_are_exchanged_in_training_alone() -> None:
    swapped = honest("site_b")
    handle = with_faults(
        honest("site_a"), [Fault(site="site_a", kind="label_swap")], Means(swapped=swapped)
    )
    assert handle(TASK) == swapped(TASK)
    enlist = open_stage(first_state(PLAN, tiny_model()), PLAN)
    assert ENLIST.stage == "enlist"
    assert handle(enlist) == honest("site_a")(enlist)


@pytest.mark.parametrize(
    ("labels", "label_map", "drawn", "taught"),
    [
        ({"a": 1, "b": 2}, (), [0, 1, 2], [0, 2, 1]),
        ({"a": 1, "b": 2, "c": 3}, (), [0, 1, 2, 3], [0, 2, 3, 1]),
        ({"a": 1}, (), [0, 1], [1, 0]),
        ({"a": 1, "b": 2}, ((7, 1), (8, 2), (9, 0)), [0, 7, 8, 9], [0, 2, 1, 0]),
    ],
)
def test_what_a_swapped_hospital_teaches(
    labels: dict[str, int], label_map: Any, drawn: list[int], taught: list[int]
) -> None:
    task = built_plan(task__labels=labels).task
    cohort = label_swapped(Cohort("site_a", (), label_map), task)
    values = np.array(drawn, np.uint8).reshape(-1, 1, 1)
    assert map_labels(values, task, cohort.label_map).ravel().tolist() == taught


def test_a_round_that_is_not_attacked_is_honest() -> None:
    handle = with_faults(honest("site_a"), [Fault(site="site_a", kind="sign_flip", round=3)])
    assert handle(TASK) == honest("site_a")(TASK)


def test_an_attacker_that_must_refuse_refuses() -> None:
    code: RefusalCode = "data"
    refused = answer(task_digest(TASK), "site_a", Refused(code=code), None)
    for kind in ("sign_flip", "scaled_noise", "alie"):
        handle = with_faults(lambda _task: refused, [Fault(site="site_a", kind=kind)])
        assert handle(TASK) == refused


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
@pytest.mark.parametrize("kind", ["sign_flip", "scaled_noise", "alie"])
def test_an_attackers_own_model_is_the_one_that_its_update_makes(strategy: Any, kind: Any) -> None:
    plan = built_plan(
        aggregation__strategy=strategy,
        training__optimiser={"name": "sgd", "momentum": 0.0},
        evaluation__own_models=True,
    )
    rounds, model = plan.aggregation.rounds, tiny_model()
    task = open_stage(StudyState(Position(round=rounds, stage="train"), ServerState(model)), plan)

    def consenting(data: bytes) -> bytes:
        shared = open_task(data, plan)[1]
        delta = train("site_a", rounds, shared)
        given = consent_of("site_a", digest_of(own_model(shared, delta)), plan)
        body = body_of("train", 2).model_copy(update={"consent": given})
        return answer(task_digest(data), "site_a", body, delta)

    data = with_faults(consenting, [Fault(site="site_a", kind=kind)], Means())(task)
    header, delta = open_answer(data, plan, task=task_digest(task), stage="train", site="site_a")
    assert isinstance(header.body, Trained) and header.body.consent is not None
    assert header.body.consent.model == digest_of(own_model(model, delta))
