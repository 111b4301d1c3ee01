"""Whose updates stand out: what is counted, what is not, and how seldom honest sites are named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_plans import built_plan

from coordinator.commands.status_page import page
from coordinator.dashboard.notices import Situation, notices
from coordinator.progress.document import Progress
from coordinator.running.control import Snapshot
from fedseg.aggregation.likeness import WIDTH, Sketches, known
from fedseg.aggregation.suspicions import NOISY, grounds, robust_z, sentence, suspicions
from fedseg.arrays import schema_of
from fedseg.result import SiteAnswer, StageRecord

SITES = tuple(f"site_{letter}" for letter in "abcdefghij")


def answer(site: str, norm: float | None = 1.0, agreement: float | None = 0.4, **more: Any) -> Any:
    return SiteAnswer(
        site=site, patients=4, bytes_up=1, update_norm=norm, update_agreement=agreement, **more
    )


def rounds(*answers: Sequence[SiteAnswer], stage: str = "train") -> list[StageRecord]:
    return [
        StageRecord(
            round=number, stage=stage, attempt=1, bytes_down=1, bytes_up=1, answers=tuple(some),
            failures=(),
        )
        for number, some in enumerate(answers, start=1)
    ]  # fmt: skip


def one_round(**liar: Any) -> list[SiteAnswer]:
    """Nine sites that are alike, within a few per cent, and site_c."""
    honest = [
        answer(site, norm=1.0 + 0.02 * i, agreement=0.4 + 0.01 * i)
        for i, site in enumerate(SITES)
        if site != "site_c"
    ]
    return [*honest, answer("site_c", **liar)]


@pytest.mark.parametrize(
    ("liar", "ground", "words"),
    [
        ({"agreement": -0.4}, "away", "point away from everybody else's in 4 of 4 rounds"),
        ({"agreement": 0.05}, "apart", "agree far less with the others' .* in 4 of 4 rounds"),
        ({"norm": 4.0}, "large", "far larger than the others' in 4 of 4 rounds"),
        ({"norm": 0.2}, "small", "far smaller than the others' in 4 of 4 rounds"),
        (
            {"norm": 0.0, "agreement": None},
            "small",
            "far smaller than the others' in 4 of 4 rounds",
        ),
        ({"update_twin": "site_a"}, "same", "the same as another site's in 4 of 4 rounds"),
    ],
)
def test_each_ground_is_named_in_plain_words(liar: dict[str, Any], ground: str, words: str) -> None:
    assert grounds(one_round(**liar)) == {"site_c": (ground,)}
    found = suspicions(rounds(*[one_round(**liar)] * 4))
    assert list(found) == ["site_c"]
    assert len(found["site_c"]) == 1
    assert re.search(words, found["site_c"][0])


def test_sites_that_are_alike_are_not_suspicious() -> None:
    assert suspicions(rounds(*[one_round(norm=1.3, agreement=0.3)] * 10)) == {}


def test_twice_is_chance_and_a_third_of_the_rounds_is_too() -> None:
    bad, good = one_round(agreement=-0.4), one_round()
    assert suspicions(rounds(bad, bad)) == {}
    assert suspicions(rounds(bad, bad, bad)) != {}
    assert suspicions(rounds(*[bad] * 3, *[good] * 6)) == {}
    assert suspicions(rounds(*[bad] * 3, *[good] * 3)) != {}


def test_three_sites_tell_nothing_of_each_other() -> None:
    few = [answer("site_a"), answer("site_b"), answer("site_c", norm=90.0, agreement=-0.9)]
    assert suspicions(rounds(*[few] * 5)) == {}


def test_only_closed_rounds_of_training_count_and_each_once() -> None:
    bad = one_round(agreement=-0.4)
    assert suspicions(rounds(bad, bad, bad, stage="evaluate")) == {}
    open_ones = [[answer(site, norm=None, agreement=None) for site in SITES]] * 5
    assert suspicions(rounds(*open_ones)) == {}
    again = [record.model_copy(update={"round": 1}) for record in rounds(bad, bad, bad)]
    assert suspicions(again) == {}


def test_robust_z_by_hand() -> None:
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 100.0}
    found = robust_z(values, 0.1)
    assert found["c"] == 0
    assert found["e"] == pytest.approx(97 / 1.4826)  # the deviations' median is 1
    assert robust_z(values, 10.0)["e"] == pytest.approx(9.7)
    assert robust_z({}, 1.0) == {}


def test_page_and_notices_say_what_to_do() -> None:
    said = ("its updates point away from everybody else's in 9 of 10 rounds",)
    progress = Progress(
        study="tiny", plan=built_plan().digest, rounds=10, rounds_closed=10, minimum_sites=2,
        attempts=2, started="2026-11-22T10:00:00Z", updated="2026-11-22T10:00:00Z",
        phase="running", suspicions={"site_c": said},
    )  # fmt: skip
    (found,) = notices(progress, Situation())
    assert found.level == "look"
    assert found.what == sentence("site_c", said)
    assert found.what == f"site_c: {said[0]}. Look at its data before you exclude it."
    private = progress.model_copy(update={"private": True})
    assert notices(private, Situation())[0].advice == NOISY
    finished = progress.model_copy(update={"phase": "finished"})
    assert found in notices(finished, Situation())
    seen = Snapshot(
        study="tiny", address="fl.example.org:443", daemon=None, paused=False, progress=private,
        warnings=(),
    )  # fmt: skip
    console = Console(file=StringIO(), width=300)
    console.print(page(seen, datetime(2026, 11, 22, tzinfo=UTC)))
    assert f"{found.what} {NOISY}" in console.file.getvalue()


def test_cosines_between_sites_are_near_the_exact_ones() -> None:
    rng = np.random.default_rng(3)
    shared = rng.normal(size=(60_000,))
    updates = {}
    for i, site in enumerate(SITES[:5]):
        own = (shared + (0.5 + i) * rng.normal(size=shared.shape)).astype(np.float32)
        updates[site] = {"a": own[:50_001].reshape(-1, 3), "b": own[50_001:]}
    sketches = Sketches(schema_of(updates["site_a"]), seed=1)
    for site, update in updates.items():
        sketches.keep(site, sketches.look(update))
    flat = {s: np.concatenate([u["a"].ravel(), u["b"]]).astype(float) for s, u in updates.items()}
    exact = np.corrcoef(list(flat.values()))
    found = sketches.beside()
    for row, site in enumerate(updates):
        others = [value for column, value in enumerate(exact[row]) if column != row]
        agreement = found[site].agreement
        assert agreement == pytest.approx(np.median(others), abs=4 / WIDTH**0.5)
        assert found[site].norm == pytest.approx(np.linalg.norm(flat[site]), rel=1e-12)
        assert found[site].twin is None
    came = sum(flat.values())
    cosines = sketches.cosines(dict.fromkeys(updates, 1.0))
    for site, own in flat.items():
        both = np.linalg.norm(own) * np.linalg.norm(came)
        assert cosines[site] == pytest.approx(own @ came / both, abs=4 / WIDTH**0.5)


def test_twins_are_seen_whatever_their_size() -> None:
    rng = np.random.default_rng(4)
    one, other = ({"a": rng.normal(size=(999,)).astype(np.float32)} for _ in range(2))
    sketches = Sketches(schema_of(one), seed=1)
    for site, update in (("c", one), ("a", {"a": 3 * one["a"]}), ("b", other)):
        sketches.keep(site, sketches.look(update))
    assert {site: like.twin for site, like in sketches.beside().items()} == {
        "a": "c", "b": None, "c": "a"
    }  # fmt: skip


def test_nothing_but_numbers_gets_into_the_record() -> None:
    zero, huge = {"a": np.zeros(5, np.float64)}, {"a": np.full(5, 1e300)}
    sketches = Sketches(schema_of(zero), seed=1)
    for site, update in (("a", zero), ("b", huge), ("c", {"a": np.ones(5)})):
        sketches.keep(site, sketches.look(update))
    found = sketches.beside()
    assert found["a"].agreement is None
    assert known(found["b"].norm) is None
    assert known(1.23456789) == 1.23457
    alone = Sketches(schema_of(zero), seed=1)
    alone.keep("a", alone.look(huge))
    assert alone.beside()["a"].agreement is None
