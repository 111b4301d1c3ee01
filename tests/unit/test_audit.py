"""The audit finds planted faults and leaves honest mechanisms alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from audited_plans import FAULTS, SIZES, Favourites, FixedSize, Shuffled, WrongNoise, audited_plan
from private_plans import private_plan
from scipy import stats

from fedseg.errors import PlanError
from fedseg.learning import private
from fedseg.learning.persample.clipped import clipped_sum
from fedseg.plan import StudyPlan
from fedseg.privacy.audit.bounds import llr, of_any, of_schedule
from fedseg.privacy.audit.canaries import Coordinates, transcript
from fedseg.privacy.audit.checks import idle_check, noise_check, sampling_check, share_check
from fedseg.privacy.audit.report import audited, judged, whole_study
from fedseg.privacy.audit.rounds import idle_rounds, one_patients_share
from fedseg.privacy.noise import Noise

CANARIES = 2000
SEED = 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_above_the_claim(fault: str) -> None:
    plan = audited_plan()
    found = judged(plan, transcript(plan, SIZES, CANARIES, SEED, step=FAULTS[fault]))
    assert found.claimed == 1.0
    assert found.canaries == CANARIES
    assert found.bound.epsilon > found.claimed
    assert found.verdict == "refuted"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_with_poisson_sampling(fault: str) -> None:
    plan = audited_plan(rate=0.25, steps=8)
    seen = transcript(plan, SIZES, CANARIES, SEED, step=FAULTS[fault])
    assert judged(plan, seen).bound.epsilon > 1.0


def test_noise_of_the_wrong_variance_is_found_directly() -> None:
    plan = audited_plan()
    for fault in ("no noise", "half the noise", "noise divided twice"):
        seen = transcript(plan, SIZES, 200, SEED, step=FAULTS[fault])
        assert not noise_check(seen, plan.noise.training).holds
    a_tenth_less = transcript(
        plan, SIZES, 1000, SEED,
        source=lambda purpose: WrongNoise(Noise.seeded(SEED, purpose), lambda s: 0.9 * s),
    )  # fmt: skip
    assert not noise_check(a_tenth_less, plan.noise.training).holds


def test_noise_missing_in_one_tensor_or_used_twice_is_found_directly() -> None:
    plan = audited_plan()
    seen = transcript(plan, SIZES, 1000, SEED)
    assert noise_check(seen, plan.noise.training).holds
    seen.values[:, seen.tensors == 1] *= 0.1
    assert not noise_check(seen, plan.noise.training).holds
    again = transcript(plan, SIZES, 1000, SEED)
    again.values[1:] = again.values[:1]
    assert not noise_check(again, plan.noise.training).holds


def test_an_honest_mechanism_is_refuted_no_more_often_than_the_confidence_allows() -> None:
    plan = audited_plan()
    work = whole_study(plan)
    above = checks = assumed = 0
    for seed in range(100):
        seen = transcript(plan, SIZES, 200, seed)
        scores = llr(seen.values, 1.0)
        above += of_schedule(scores, seen.members, work, 1e-5, 0.95).epsilon > 1.0
        assumed += of_any(scores, seen.members, 1e-5, 0.95).epsilon > 1.0
        checks += not noise_check(seen, plan.noise.training).holds
    assert stats.binomtest(above, 100, 0.05, alternative="greater").pvalue > 0.01
    assert stats.binomtest(assumed, 100, 0.05, alternative="greater").pvalue > 0.01
    assert checks <= 2


@pytest.mark.slow
def test_honest_poisson_sampling_is_refuted_no_more_often_than_the_confidence_allows() -> None:
    plan = audited_plan(rate=0.25, steps=8)
    work, above = whole_study(plan), 0
    for seed in range(400):
        seen = transcript(plan, SIZES, 200, seed)
        scores = llr(seen.values, 0.25)
        above += of_schedule(scores, seen.members, work, 1e-5, 0.95).epsilon > 1.0
    assert stats.binomtest(above, 400, 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_with_more_canaries_faults_are_found_without_any_assumption(fault: str) -> None:
    plan = audited_plan()
    seen = transcript(plan, SIZES, 20_000, SEED, step=FAULTS[fault])
    assert judged(plan, seen).any_mechanism.epsilon > 1.0


def test_an_audit_of_an_honest_plan_says_what_it_could_not_see() -> None:
    found = audited(audited_plan(), SIZES, canaries=CANARIES, seed=SEED)
    assert found.verdict == "not refuted"
    assert 0 < found.bound.epsilon <= found.claimed < found.any_mechanism.ceiling
    assert found.accounted == pytest.approx(1.0, rel=1e-3)
    assert all(check.holds for check in found.checks)
    assert "no proof" in found.text
    few = audited(audited_plan(), SIZES, canaries=4, seed=SEED)
    assert few.bound.ceiling == 0
    assert "more canaries" in few.text


def test_a_plan_with_less_noise_than_its_promise_is_refuted_by_its_own_figures() -> None:
    plan = audited_plan()
    weak = plan.noise.model_copy(update={"training": 0.8 * plan.noise.training})
    plan = plan.model_copy(update={"calibrated": weak})
    found = judged(plan, transcript(plan, SIZES, 100, SEED))
    assert any("build the plan again" in reason for reason in found.reasons)


@pytest.mark.parametrize("source", [FixedSize, Shuffled, Favourites])
def test_a_sampler_that_is_not_poisson_is_found(source: type[Noise]) -> None:
    plan = audited_plan(rate=0.1, steps=20)
    wrong = source(bytes(Noise.seeded(SEED, "draws").bytes(32)))
    assert not sampling_check(idle_rounds(plan, 100, 100, wrong).drawn, 0.1, SEED).holds


def test_poisson_sampling_holds() -> None:
    plan = audited_plan(rate=0.1, steps=20)
    seen = [
        sampling_check(idle_rounds(plan, 40, 40, Noise.seeded(seed, "draws")).drawn, 0.1, seed)
        for seed in range(3)
    ]
    assert all(check.holds for check in seen)
    assert min(check.p for check in seen) < 1.0


def test_a_full_batch_that_leaves_somebody_out_is_found() -> None:
    plan = audited_plan()
    drawn = idle_rounds(plan, 20, 3, Noise.seeded(SEED, "draws")).drawn
    assert drawn.all()
    assert sampling_check(drawn, 1.0, SEED).holds
    drawn[2, 3] = False
    assert not sampling_check(drawn, 1.0, SEED).holds


def test_the_noise_of_the_trainers_own_round_is_tested() -> None:
    plan = audited_plan(rate=0.25, steps=8)
    sigma = plan.noise.training
    honest = idle_rounds(plan, 5, 50, Noise.seeded(SEED, "draws")).noise
    assert idle_check(honest, sigma).holds
    half = WrongNoise(Noise.seeded(SEED, "draws"), lambda s: s / 2)
    assert not idle_check(idle_rounds(plan, 5, 50, half).noise, sigma).holds
    again = np.repeat(honest[:1], 50, axis=0)
    assert not idle_check(again, sigma).holds


@pytest.mark.parametrize("dimensions", [2, 3])
def test_one_patient_adds_the_clip_norm_in_the_trainers_own_round(dimensions: int) -> None:
    plan = private_plan(dimensions, model={"dropout": 0.1})
    share = one_patients_share(plan, SEED)
    assert share == pytest.approx(1.0, abs=1e-3)
    assert share_check(share).holds


def test_a_trainer_that_clips_by_patch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_patch(network: Any, loss: Any, batch: Any, patients: Any, *rest: Any, **how: Any) -> Any:
        return clipped_sum(network, loss, batch, torch.arange(len(patients)), *rest, **how)

    monkeypatch.setattr(private, "clipped_sum", by_patch)
    share = one_patients_share(private_plan(), SEED)
    assert share > 1.5
    assert not share_check(share).holds


def test_a_canary_gives_exactly_the_clip_norm_in_its_own_coordinate() -> None:
    network = Coordinates({"a.weight": 5, "b": 3})
    inputs = torch.tensor([[6.0, 5.0], [1.0, 5.0], [6.0, 5.0]])
    found = clipped_sum(
        network, lambda out, _: out, (inputs, torch.zeros(3)), torch.tensor([6, 1, 6]), 0.5
    )
    assert found.sum["a/weight"].tolist() == pytest.approx([0, 0.5, 0, 0, 0], rel=1e-4)
    assert found.sum["b"].tolist() == pytest.approx([0, 0.5, 0], rel=1e-4)
    assert found.norms.tolist() == [5.0, 5.0]


def test_automatic_clipping_and_empty_draws_are_audited_too() -> None:
    plan = audited_plan(rate=0.25, steps=8)
    promise = plan.private
    assert promise is not None
    changed = {"clipping": "automatic", "clip_norm": 1e-3, "rate": 0.01}
    plan = plan.model_copy(update={"privacy": promise.model_copy(update=changed)})
    seen = transcript(plan, SIZES, 60, SEED, step=FAULTS["no noise"])
    drawn = seen.values > 0.5
    assert drawn.any()
    assert not drawn.any(1).all()
    assert seen.values[drawn] == pytest.approx(1.0, abs=0.02)
    assert not seen.values[~drawn].any()


def test_canaries_fit_into_small_networks_by_several_runs() -> None:
    plan = audited_plan()
    seen = transcript(plan, {"head": 30, "norm": 4}, 100, SEED)
    assert seen.values.shape == (5, 100)
    assert np.bincount(seen.tensors).tolist() == [88, 12]  # runs of 34, 34 and 32
    again = transcript(plan, {"head": 30, "norm": 4}, 100, SEED)
    assert np.array_equal(seen.values, again.values)


def test_a_plan_without_a_guarantee_has_nothing_to_audit() -> None:
    open_plan = StudyPlan.model_validate(
        audited_plan().model_dump(exclude={"privacy", "calibrated"})
    )
    with pytest.raises(PlanError):
        transcript(open_plan, SIZES, 10, SEED)
    with pytest.raises(ValueError, match="canaries"):
        transcript(audited_plan(), {}, 10, SEED)
