"""What progress, dashboard and reports tell of hospitals' own models."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from memory_grid import Kept
from own_models import (
    PLAN,
    ROUNDS,
    Runner,
    last,
    measured,
    reply,
)
from pure_studies import SITES
from small_plans import answer, built_plan, tiny_model

from coordinator.dashboard.notices import Situation
from coordinator.dashboard.page import render
from coordinator.progress.keeper import ProgressKeeper
from coordinator.rounds.events import Event, StageClosed, StageOpened
from fedseg.aggregation.rounds import StudyState, first_state
from fedseg.reports import ownmodels
from fedseg.updates import (
    Refused,
    TaskHeader,
    peek,
    task_digest,
)


class Shown(Kept):
    """A store whose states a progress document shows."""

    def __init__(self, keeper: ProgressKeeper) -> None:
        super().__init__()
        self._keeper = keeper

    def save(self, state: StudyState) -> None:
        super().save(state)
        self._keeper.stored(state)


def keeper_in(folder: Path) -> ProgressKeeper:
    """Keeps the progress of a study that begins."""
    start = first_state(PLAN, tiny_model())
    return ProgressKeeper(folder / "progress.json", PLAN, start, sites=SITES)


class TestTold:
    def test_the_progress_shows_whose_model_and_no_curve_takes_it_for_the_shared_one(
        self, tmp_path: Path
    ) -> None:
        keeper = keeper_in(tmp_path)
        left: list[float | None] = []
        runner = Runner(tmp_path)

        def look(event: Event) -> None:
            keeper(event)
            left.append(keeper.document().left_s)
            if isinstance(event, StageOpened):
                shown = keeper.document().open
                assert shown is not None and shown.owner == event.owner

        runner.kept = Shown(keeper)
        runner.run(observe=look)
        told = keeper.document()
        assert told.finished
        own = [s for s in told.stages if s.owner is not None]
        assert [s.dice for s in own] == [None] * 3
        assert own[1].own_dice == pytest.approx({site: measured("site_b", site) for site in SITES})
        curve = told.site("site_a")
        assert curve is not None and curve.dice[-1].value == pytest.approx(measured(None, "site_a"))

    def test_the_dashboard_says_how_each_own_model_fares(self, tmp_path: Path) -> None:
        keeper = keeper_in(tmp_path)
        runner = Runner(tmp_path)
        runner.kept = Shown(keeper)
        shown: list[str] = []

        def look(event: Event) -> None:
            keeper(event)
            if isinstance(event, StageOpened) and event.owner == "site_b":
                shown.append(render(PLAN, keeper.document(), Situation()))

        runner.run(observe=look)
        shown.append(render(PLAN, keeper.document(), Situation()))
        during, after = shown
        assert "Hospitals are measuring site_b’s own model" in during
        assert "site_a’s own model fares worst at site_a: Dice 0.100" in during
        assert "site_b’s own model fares" not in during
        assert all(f"{site}’s own model fares worst" in after for site in SITES)

    @pytest.mark.parametrize("home", [("site_c",), SITES])
    def test_the_dashboard_names_whose_own_model_stayed_at_home(
        self, home: tuple[str, ...], tmp_path: Path
    ) -> None:
        keeper = keeper_in(tmp_path)
        silent = {site: partial(reply, site=site, consents=False) for site in home}
        runner = Runner(tmp_path, **silent)
        runner.kept = Shown(keeper)
        runner.run(observe=keeper)
        page = render(PLAN, keeper.document(), Situation())
        who = "site_c" if len(home) == 1 else "site_a, site_b and site_c"
        assert f"did not consent: the own model of {who}." in page
        assert ownmodels.NOT_YET not in page

    def test_who_gave_no_last_update_is_named_and_nobody_before_the_round_is_over(
        self, tmp_path: Path
    ) -> None:
        """site_c alone answers the first attempt, and not the second, which counts."""
        tries: dict[str, int] = {}

        def in_turn(task: bytes, site: str) -> bytes:
            if last(peek(task, TaskHeader, max_bytes=10**7)):
                tries[site] = tries.get(site, 0) + 1
                if (tries[site] == 1) != (site == "site_c"):
                    return answer(task_digest(task), site, Refused(code="failed"), None)
            return reply(task, site, consents=site != "site_c")

        keeper = keeper_in(tmp_path)
        runner = Runner(tmp_path, **{site: partial(in_turn, site=site) for site in SITES})
        runner.kept = Shown(keeper)
        pages: list[str] = []

        def look(event: Event) -> None:
            keeper(event)
            if isinstance(event, StageClosed) and (event.record.round, event.record.stage) == (
                ROUNDS, "train",
            ):  # fmt: skip
                pages.append(render(PLAN, keeper.document(), Situation()))
                known = ownmodels.own_models(PLAN, runner.kept.states[-1].history)
                assert (known is None) == (len(pages) == 1)

        end = runner.run(observe=look)
        pages.append(render(PLAN, keeper.document(), Situation()))
        said = ownmodels.sentences(PLAN, ownmodels.own_models(PLAN, end.history))
        missing = "No update of the last round, so no own model: site_c."
        assert [ownmodels.NOT_YET in page for page in pages] == [True, True, False]
        assert [missing in page for page in pages] == [False, False, True] and missing in said
        assert not [page for page in (*pages, *said) if "did not consent" in page]

    def test_the_worst_comes_first_then_the_spread_then_the_mean(self, tmp_path: Path) -> None:
        found = ownmodels.own_models(PLAN, Runner(tmp_path).run().history)
        assert found is not None
        assert list(found.measured) == list(SITES)  # by the worst hospital of each
        said = ownmodels.sentences(PLAN, found)[1]
        assert said.startswith("site_a’s own model fares worst at site_a: Dice 0.100; the standard")
        assert said.index("standard deviation") < said.index("mean 0.110") < said.index("At home")

    def test_what_is_recorded_agrees_with_the_stages(self, tmp_path: Path) -> None:
        history = Runner(tmp_path).run().history
        rows = ownmodels.recorded(ownmodels.own_models(PLAN, history), history)
        assert [row.site for row in rows] == list(SITES)
        for row in rows:
            for site in SITES:
                assert row.scores[site] == {"dice": pytest.approx(measured(row.site, site))}

    def test_before_the_last_round_and_in_other_plans_the_words_say_so(self) -> None:
        plan = built_plan()
        assert "passed on" in ownmodels.sentences(plan, ownmodels.own_models(plan, ()))[0]
        assert (
            "After the last round" in ownmodels.sentences(PLAN, ownmodels.own_models(PLAN, ()))[0]
        )
