"""Hospitals' own models: which plans measure them, what is kept, and what a consent is worth."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_models import (
    PLAN,
    ROUNDS,
    Runner,
    before_last_round,
    consent_of,
    expected_own,
)
from pure_studies import SITES
from small_parties import Party
from small_plans import built_plan, private_values, tiny_model, values

from fedseg.aggregation.ownmodels import LetGo, LostModelError, OwnModels, own_model
from fedseg.aggregation.rounds import ahead, open_stage
from fedseg.arrays import digest_of
from fedseg.errors import TrustError
from fedseg.plan import StudyPlan
from fedseg.updates import (
    AnswerHeader,
    TaskHeader,
    Trained,
    open_task,
    seal_answer,
    seal_task,
)

SUPPRESSED = {"privacy__outputs": {"metrics": "suppressed"}}


def own_task(plan: StudyPlan) -> TaskHeader:
    """The task to measure the own model of site_a, which is the tiny one."""
    digest = digest_of(tiny_model())
    return TaskHeader(
        study=plan.study,
        plan=plan.digest,
        round=ROUNDS,
        stage="own",
        attempt=1,
        model=digest,
        consent=consent_of("site_a", digest, plan),
    )


class TestPlan:
    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"aggregation__strategy": "fedbn"}, "keeps a part"),
            ({"aggregation__strategy": "fedper"}, "keeps a part"),
            ({"aggregation__strategy": "ditto", "aggregation__ditto_lambda": 0.1}, "keeps a part"),
            ({"aggregation__minimum_sites": 1}, "no other hospital"),
            (
                {"privacy": {"guarantee": "none", "outputs": {"metrics": "none"}}},
                "no hospital tell",
            ),
        ],
    )
    def test_own_models_are_refused_where_they_make_no_sense(
        self, changes: dict[str, Any], why: str
    ) -> None:
        StudyPlan.model_validate(values(**changes))
        with pytest.raises(ValueError, match=f"own_models: .*{why}"):
            StudyPlan.model_validate(values(evaluation__own_models=True, **changes))

    def test_noised_metrics_would_be_charged_for_nobody_knows_how_many(self) -> None:
        noised = {"privacy__outputs": {"metrics": "noised"}, "privacy__expected_validation": 2}
        StudyPlan.model_validate(private_values(**noised))
        with pytest.raises(ValueError, match=r"own_models: .*noised charges"):
            StudyPlan.model_validate(private_values(evaluation__own_models=True, **noised))
        StudyPlan.model_validate(private_values(evaluation__own_models=True, **SUPPRESSED))

    def test_a_plan_without_keeps_the_digest_that_it_had(self) -> None:
        assert b"own_models" not in built_plan().canonical_bytes
        assert b'"own_models":true' in PLAN.canonical_bytes
        again = StudyPlan.model_validate_json(PLAN.canonical_bytes)
        assert (again, again.digest) == (PLAN, PLAN.digest)
        assert StudyPlan.model_validate(values(evaluation__own_models=False)).digest == (
            StudyPlan.model_validate(values()).digest
        )

    @pytest.mark.parametrize("rule", [{"rule": "median"}, {"rule": "norm_bound", "norm": 0.1}])
    def test_every_rule_keeps_the_updates_as_they_came(
        self, rule: dict[str, Any], tmp_path: Path
    ) -> None:
        plan = built_plan(
            evaluation__own_models=True,
            aggregation__combine=rule,
            aggregation__weighting="uniform",
            aggregation__minimum_sites=3,
        )
        runner = Runner(tmp_path, plan)
        end = runner.run()
        shared = before_last_round(runner.kept)
        told = {a.site: a.own for r in end.history for a in r.answers if a.own}
        assert told == {site: expected_own(shared, site) for site in SITES}


class TestStore:
    def test_what_is_kept_comes_back_and_is_for_the_owner_of_the_folder_alone(
        self, tmp_path: Path
    ) -> None:
        store, model = OwnModels(tmp_path / "own", PLAN), tiny_model(3)
        consent = consent_of("site_a", digest_of(model))
        store.keep(LetGo(consent=consent), model)
        assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
        (file,) = (tmp_path / "own").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        found, tensors = store.load("site_a", consent.model)
        assert (found.consent, digest_of(tensors)) == (consent, consent.model)
        store.keep(LetGo(consent=consent_of("site_b", digest_of(model))), model)
        (tmp_path / "own" / "site_a.own.part").write_bytes(b"what a crash left")
        store.keep_only(["site_a", "site_c"])
        assert list((tmp_path / "own").iterdir()) == [file]
        store.keep_only([])
        store.keep_only([])
        assert not (tmp_path / "own").exists()

    def test_another_one_a_damaged_one_and_none_are_lost(self, tmp_path: Path) -> None:
        store, model = OwnModels(tmp_path / "own", PLAN), tiny_model(3)
        consent = consent_of("site_a", digest_of(model))
        with pytest.raises(LostModelError, match="cannot be read"):
            store.load("site_a", consent.model)
        store.keep(LetGo(consent=consent), model)
        with pytest.raises(LostModelError, match="not the one"):
            store.load("site_a", "0" * 64)
        (file,) = (tmp_path / "own").iterdir()
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(LostModelError, match="not the one"):
            store.load("site_a", consent.model)
        file.write_bytes(data[:-1])
        with pytest.raises(LostModelError, match="damaged"):
            store.load("site_a", consent.model)
        file.rename(file.with_name("site_b.own")).write_bytes(data)
        with pytest.raises(LostModelError, match="not the one"):
            store.load("site_b", consent.model)

    @given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), st.integers(0, 99))
    def test_an_own_model_is_the_sum_in_the_models_type_and_frozen_parts_stay(
        self, shared: list[float], seed: int
    ) -> None:
        old = np.asarray(shared, np.float32)
        step = np.random.default_rng(seed).normal(size=old.shape).astype(np.float32)
        found = own_model({"a": old, "frozen": old}, {"a": step})
        assert found["a"].dtype == np.float32 and found["frozen"] is old
        exact = old.astype(np.float64) + step.astype(np.float64)
        assert np.array_equal(found["a"], exact.astype(np.float32))


class TestConsent:
    def test_only_its_own_key_and_its_own_words_count(self) -> None:
        one, other = Party("site_a"), Party("site_b")
        good = consent_of("site_a", "1" * 64).signed(one.signing)
        good.require_signed(one.signing.public)
        bad = [
            good.signed(other.signing),
            consent_of("site_a", "1" * 64),
            *(
                good.model_copy(update=change)
                for change in (
                    {"model": "2" * 64},
                    {"plan": "2" * 64},
                    {"study": "other"},
                    {"site": "site_b"},
                )
            ),
        ]
        for each in bad:
            with pytest.raises(TrustError, match="has not consented"):
                each.require_signed(one.signing.public)

    @pytest.mark.parametrize(
        "changes",
        [
            {"stage": "evaluate"},
            {"round": 2},
            {"consent": None},
            {"consent": consent_of("site_a", "1" * 64)},
            {"consent": consent_of("site_a", digest_of(tiny_model()), plan="1" * 64)},
            {"consent": consent_of("site_a", digest_of(tiny_model()), study="other")},
        ],
    )
    def test_a_task_brings_one_own_model_under_a_consent_to_just_that(
        self, changes: dict[str, Any]
    ) -> None:
        model, good = tiny_model(), own_task(PLAN)
        header, _ = open_task(seal_task(good, model), PLAN)
        assert header.owner == "site_a"
        with pytest.raises(TrustError):
            open_task(seal_task(good.model_copy(update=changes), model), PLAN)

    def test_a_plan_without_own_models_opens_no_such_task(self) -> None:
        plan = built_plan()
        with pytest.raises(TrustError, match="does not say"):
            open_task(seal_task(own_task(plan), tiny_model()), plan)


def test_stages_to_come_grow_when_consents_are_there(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    runner.run()
    start, trained = runner.kept.states[0], runner.kept.states[4]
    assert [p.stage for p in ahead(start.position, PLAN, start.history)].count("own") == 0
    assert [p.owner for p in ahead(trained.position, PLAN, trained.history)] == [
        None,
        *SITES,
        None,
    ]
    own = next(s for s in runner.kept.states if s.position and s.position.stage == "own")
    with pytest.raises(ValueError, match="nobody said where"):
        open_stage(own, PLAN)


def test_a_private_answer_is_as_long_with_a_consent_as_without() -> None:
    plan = StudyPlan.model_validate(private_values(evaluation__own_models=True, **SUPPRESSED))
    plan = plan.model_copy(update={"initial": PLAN.initial})
    given = consent_of("site_a", "1" * 64, plan)
    sizes = set()
    for consent in (None, given, given.signed(Party("site_a").signing)):
        body = Trained(patients=None, steps=20, loss=None, consent=consent)
        header = AnswerHeader(task="0" * 64, site="site_a", body=body)
        sizes.add(len(seal_answer(header, tiny_model(), plan)))
    assert len(sizes) == 1
