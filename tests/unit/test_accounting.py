"""The accountants against closed forms, against each other, and the promises made from them."""

from __future__ import annotations

from math import exp, inf, log, sqrt

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedseg.errors import PrivacyError
from fedseg.privacy.accounting import (
    PrivacyFilter,
    calibrate,
    epsilon_spent,
    opinions,
    require_small_delta,
    state,
)
from fedseg.privacy.guarantee import Guarantee, rounded_up
from fedseg.privacy.lossdist import composed
from fedseg.privacy.mechanisms import Mechanism, merged
from fedseg.privacy.opinions import rdp_epsilon

Work = list[tuple[float, float, int]]

# Unlike one another: full batch and sampled, few steps and many, one noise and three; each with the
# factor on its noise with which it costs an epsilon of TARGETS at delta 1e-5.
TARGETS = (0.1, 0.5, 1.0, 3.0, 10.0)
SHAPES: list[tuple[Work, tuple[float, ...]]] = [
    ([(1.0, 1.0, 1)], (30.77, 7.035, 3.736, 1.393, 0.5001)),
    ([(1.0, 1.0, 50)], (217.6, 49.75, 26.4, 9.841, 3.543)),
    ([(1.0, 0.1, 100)], (30.94, 7.218, 3.95, 1.676, 0.8378)),
    ([(1.0, 0.01, 1000)], (9.801, 2.388, 1.418, 0.8148, 0.5477)),
    ([(1.0, 0.5, 7)], (41.0, 9.63, 5.265, 2.158, 0.9154)),
    (
        [(1.0, 1.0, 20), (4.0, 0.1, 300), (0.6, 0.02, 100)],
        (138.6, 31.7, 16.82, 6.27, 2.258),
    ),
    ([(1.0, 1.0, 3), (20.0, 1.0, 5)], (53.38, 12.22, 6.477, 2.418, 0.868)),
]


def _marks(work: Work, target: float) -> tuple[pytest.MarkDecorator, ...]:
    """PRV takes half a minute for a tenth of an epsilon over hundreds of steps."""
    long = target < 0.5 and sum(steps for *_, steps in work) > 200
    return (pytest.mark.slow,) if long else ()


GRID = [
    pytest.param(work, noise, target, id=f"{work}-{target}", marks=_marks(work, target))
    for work, factors in SHAPES
    for noise, target in zip(factors, TARGETS, strict=True)
]


def mechanisms(work: Work, noise: float = 1.0) -> tuple[Mechanism, ...]:
    return tuple(Mechanism(noise_multiplier=s * noise, rate=q, steps=n) for s, q, n in work)


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Balle and Wang 2018, Theorem 8, sensitivity 1."""
    low, high = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
    return float(norm.cdf(low) - exp(epsilon) * norm.cdf(high))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    return float(brentq(lambda e: gaussian_delta(sigma, e) - delta, 1e-9, 200, xtol=1e-12))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-7])
def test_one_full_batch_step_is_the_gaussian_mechanism(sigma: float, delta: float) -> None:
    exact = gaussian_epsilon(sigma, delta)
    found = epsilon_spent([Mechanism(noise_multiplier=sigma)], delta)
    assert exact <= found <= exact * 1.001 + 1e-9
    seen = opinions([Mechanism(noise_multiplier=sigma)], delta)
    assert seen.prv_low <= exact <= seen.prv_high
    assert exact < seen.rdp


def test_full_batch_steps_add_up_to_one_with_less_noise() -> None:
    exact = gaussian_epsilon(1 / sqrt(30 / 25 + 12 / 49), 1e-5)
    work = [Mechanism(noise_multiplier=5, steps=30), Mechanism(noise_multiplier=7, steps=12)]
    assert exact <= epsilon_spent(work, 1e-5) <= exact * 1.001


def test_a_figure_by_hand() -> None:
    """Sigma 1, epsilon 1: Phi(-1/2) - e Phi(-3/2) = 0.308538 - 2.718282 * 0.066807 = 0.126937."""
    (removed, added) = composed([Mechanism(noise_multiplier=1)])
    assert removed.delta(1.0) == pytest.approx(0.126937, rel=1e-3)
    assert added.delta(1.0) == pytest.approx(0.126937, rel=1e-3)
    assert removed.delta(1.0) >= 0.1269365


def test_one_sampled_step_in_closed_form() -> None:
    """Removing a patient: delta is q times that of the Gaussian at log(1 + (e^eps - 1) / q)."""
    sigma, q, epsilon = 0.8, 0.2, 1.3
    exact = q * gaussian_delta(sigma, _amplified(q, epsilon))
    removed, added = composed([Mechanism(noise_multiplier=sigma, rate=q)])
    assert exact <= removed.delta(epsilon) <= exact * 1.002
    assert added.delta(epsilon) < removed.delta(epsilon)


def _amplified(q: float, epsilon: float) -> float:
    return log(1 + (exp(epsilon) - 1) / q)


# By dp-accounting 0.6.0 (Google): connect-the-dots PLD, interval 1e-4.
GOOGLE: list[tuple[Work, float, float]] = [
    ([(4.24, 1, 50)], 1e-5, 8.009715595),
    ([(9.83, 1, 50)], 1e-5, 3.001032648),
    ([(26.4, 1, 50)], 1e-5, 0.999150010),
    ([(1.0, 0.01, 1000)], 1e-5, 1.828243646),
    ([(0.6, 0.05, 100)], 1e-3, 7.461193078),
    ([(1.0, 1, 1)], 1e-5, 4.377178100),
    ([(5.0, 1, 20), (20.0, 0.1, 300), (3.0, 0.02, 100)], 1e-6, 4.343009575),
    ([(200.0, 1, 10)], 1e-5, 0.045244247),
    ([(0.5, 0.001, 500)], 1e-5, 2.877673435),
]


@pytest.mark.parametrize(("work", "delta", "theirs"), GOOGLE)
def test_ours_is_google_s(work: Work, delta: float, theirs: float) -> None:
    assert epsilon_spent(mechanisms(work), delta) == pytest.approx(theirs, rel=5e-4)


@pytest.mark.parametrize(("work", "noise", "target"), GRID)
def test_pld_and_prv_agree_and_rdp_is_above(work: Work, noise: float, target: float) -> None:
    done = mechanisms(work, noise)
    seen = opinions(done, 1e-5)
    assert seen.pld == pytest.approx(target, rel=0.02)
    assert abs(seen.pld - seen.prv_high) <= 0.01 * seen.pld
    assert (seen.prv_high - seen.prv_low) / 2 <= 0.002 * seen.prv_low
    assert seen.prv_low <= seen.pld <= seen.prv_high * 1.001
    assert seen.agree
    assert seen.rdp >= seen.pld


def test_the_order_of_work_does_not_matter() -> None:
    work = mechanisms([(5, 1, 20), (20, 0.1, 300)])
    split = [*reversed(work), Mechanism(noise_multiplier=9, steps=2)]
    joined = [Mechanism(noise_multiplier=9), *work, Mechanism(noise_multiplier=9)]
    assert merged(split) == merged(joined)
    assert epsilon_spent(split, 1e-5) == epsilon_spent(joined, 1e-5)


def test_nothing_costs_nothing_and_everything_costs_more() -> None:
    assert epsilon_spent([], 1e-5) == 0
    spent = [epsilon_spent([Mechanism(noise_multiplier=9, steps=n)], 1e-5) for n in (1, 2, 4, 8)]
    assert spent == sorted(spent) and spent[0] > 0


@pytest.mark.parametrize(("epsilon", "sigma"), [(8, 4.244), (3, 9.833), (1, 26.38)])
def test_calibrated_noise_keeps_the_promise_and_no_more(epsilon: float, sigma: float) -> None:
    found = calibrate(epsilon, 1e-5, [(1.0, 50)])
    assert found == pytest.approx(sigma, rel=1e-3)
    assert gaussian_epsilon(found / sqrt(50), 1e-5) <= epsilon
    assert epsilon_spent([Mechanism(noise_multiplier=found * 0.999, steps=50)], 1e-5) > epsilon


def test_what_is_released_besides_takes_more_noise() -> None:
    metrics = [Mechanism(noise_multiplier=20, steps=4)]
    alone, beside = (calibrate(3, 1e-5, [(0.2, 100), (1, 5)], more) for more in ([], metrics))
    assert beside > alone
    with pytest.raises(PrivacyError, match="no noise keeps epsilon"):
        calibrate(0.1, 1e-5, [(1, 1)], metrics)


@pytest.mark.parametrize("epsilon", [0, -1, inf, float("nan")])
def test_an_epsilon_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match="epsilon"):
        calibrate(epsilon, 1e-5, [(1, 1)])
    with pytest.raises(PrivacyError, match="epsilon"):
        PrivacyFilter.for_budget(epsilon, 1e-5)


@pytest.mark.parametrize("delta", [0, 1e-10, 1, float("nan")])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        epsilon_spent([Mechanism(noise_multiplier=1)], delta)


def test_hardly_any_noise_is_counted_for_what_it_is() -> None:
    exact = gaussian_epsilon(0.1, 1e-5)
    assert exact <= epsilon_spent([Mechanism(noise_multiplier=0.1)], 1e-5) <= exact * 1.001
    assert epsilon_spent([Mechanism(noise_multiplier=0.05, steps=100)], 1e-5) == inf


def test_delta_must_be_below_one_over_the_cohort() -> None:
    require_small_delta(1e-3, 999)
    with pytest.raises(PrivacyError, match="1000 patients"):
        require_small_delta(1e-3, 1000)


def test_a_person_under_two_ids_costs_at_most_what_two_shares_cost() -> None:
    once = Mechanism(noise_multiplier=4, rate=0.1, steps=10)
    twice = once.of_records(2)
    assert (twice.noise_multiplier, twice.rate) == (2, pytest.approx(0.19))
    assert once.of_records(1) is once
    assert epsilon_spent([twice], 1e-5) > 2 * epsilon_spent([once], 1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 1, 3, 8, 20])
def test_the_filter_lets_nearly_all_full_batch_work_through(epsilon: float) -> None:
    """At its one order the filter gives what RDP over all orders gives, for Gaussian work."""
    rule = PrivacyFilter.for_budget(epsilon, 1e-5)
    noise = sqrt(200.5 * rule.order / (2 * rule.budget))
    step = Mechanism(noise_multiplier=noise)
    fits = int(rule.budget / rule.cost([step]))
    done = [Mechanism(noise_multiplier=noise, steps=fits)]
    assert fits == 200 and epsilon_spent(done, 1e-5) < epsilon
    assert epsilon * 0.98 < rdp_epsilon(done, 1e-5) <= epsilon
    assert rule.room(rule.cost([step]) * fits) and not rule.room(rule.cost([step]) * (fits + 1))
    assert rule.epsilon_so_far(0) == 0
    assert rule.epsilon_so_far(rule.budget) == pytest.approx(epsilon)


def test_a_budget_without_room_is_refused() -> None:
    assert PrivacyFilter(0.001, 1e-5, 2).budget < 0
    assert not PrivacyFilter(0.001, 1e-5, 2).room(0)


def test_a_guarantee_says_all_of_it() -> None:
    text = state([Mechanism(noise_multiplier=4.24, steps=50)], 1e-5).text
    for part in ("(8.02, 1e-05)", "patient", "one patient more", "full batch", "4.24", "two hosp"):
        assert part in text
    shared = state([Mechanism(noise_multiplier=4, rate=0.1, steps=9, noise="shared")], 1e-5)
    assert "Poisson" in shared.text and "other sites" in shared.text


def test_a_seeded_run_promises_nothing() -> None:
    assert Guarantee(1, 1e-5, (), 1, private=False).text.startswith("NOT PRIVATE")


def test_accountants_that_disagree_promise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedseg.privacy.accounting.prv_epsilon", lambda *_: (1.0, 1.1))
    with pytest.raises(PrivacyError, match="disagree"):
        state([Mechanism(noise_multiplier=4.24, steps=50)], 1e-5)


@pytest.mark.parametrize(
    ("epsilon", "text"), [(8.001, "8.01"), (3.0, "3.00"), (0.1234, "0.124"), (inf, "infinite")]
)
def test_an_epsilon_is_never_rounded_down(epsilon: float, text: str) -> None:
    assert rounded_up(epsilon) == text
