"""Noised metrics are attacked: faults in them are found, the honest mechanism is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from audited_plans import WrongNoise, audited_plan, scored_plan
from scipy import stats

from fedseg.evaluation import private
from fedseg.privacy.audit.bounds import llr, of_schedule
from fedseg.privacy.audit.canaries import Source
from fedseg.privacy.audit.metrics import metrics_audited, metrics_transcript
from fedseg.privacy.audit.report import audited
from fedseg.privacy.mechanisms import Mechanism
from fedseg.privacy.noise import Noise
from fedseg.privacy.schedule import allowed

SEED = 1


def altered(share: float) -> Source:
    """Noise of a share of the standard deviation that was asked for."""
    return lambda purpose: WrongNoise(Noise.seeded(SEED, purpose), lambda sigma: share * sigma)


def evaluations() -> Mechanism:
    (found,) = (each.mechanism for each in allowed(scored_plan()) if each.use == "val")
    return found


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_metrics_with_too_little_noise_are_found_above_the_claim(share: float) -> None:
    found = metrics_audited(scored_plan(), 500, SEED, 0.95, source=altered(share))
    assert found is not None
    assert found.bound.epsilon > 1.0
    assert not found.check.holds


def test_a_patient_whose_scores_are_not_clipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room on both sides cuts the most off: what is left is still far more than one patient."""

    def as_it_is(value: float | None) -> float:
        return value or 0.0

    monkeypatch.setattr(private, "_in_range", as_it_is)
    found = metrics_audited(scored_plan(), 200, SEED, 0.95)
    assert found is not None
    assert found.bound.epsilon > 1.0
    assert found.check.holds, "the noise is as it was"


def test_honest_metrics_are_not_refuted_and_the_patient_counts_exactly_once() -> None:
    plan = scored_plan()
    found = metrics_audited(plan, 500, SEED, 0.95)
    assert found is not None
    assert 0 < found.bound.epsilon <= found.accounted < found.bound.ceiling
    assert found.accounted == pytest.approx(1.0, rel=1e-3)
    assert found.check.holds
    quiet = metrics_transcript(plan, 40, SEED, source=altered(0.0))
    np.testing.assert_allclose(
        quiet.values, np.broadcast_to(quiet.members, quiet.values.shape), atol=1e-9
    )


def test_an_honest_release_is_refuted_no_more_often_than_the_confidence_allows() -> None:
    above = 0
    plan, work = scored_plan(), evaluations()
    whole = metrics_transcript(plan, 2000, SEED)
    for part in range(20):
        own = slice(100 * part, 100 * (part + 1))
        scores = llr(whole.values[:, own], 1.0)
        above += of_schedule(scores, whole.members[own], work, 1e-5, 0.95).epsilon > 1.0
    assert stats.binomtest(above, 20, 0.05, alternative="greater").pvalue > 0.01


def test_the_audit_says_what_it_found_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"head": 400}
    assert audited(audited_plan(), sizes, canaries=50, seed=SEED).metrics is None
    found = audited(scored_plan(), sizes, canaries=200, seed=SEED)
    assert found.metrics is not None
    assert found.verdict == "not refuted", found.reasons
    assert found.as_json["metrics"]["bound"]["guesses"] == 200

    def quietly(*args: Any) -> Any:
        return private_noised_means(*args[:2], altered(0.0)("none"))

    private_noised_means = private.noised_means
    monkeypatch.setattr("fedseg.privacy.audit.metrics.noised_means", quietly)
    refuted = audited(scored_plan(), sizes, canaries=200, seed=SEED)
    assert any("noised metrics show an epsilon" in reason for reason in refuted.reasons)
    assert any("noise on metrics" in reason for reason in refuted.reasons)
