"""The report of a study: true in words and numbers, whole in one file, and never at a loss."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from small_plans import private_plan
from study_results import HOSPITALS, make_overlay, make_overlays, make_result

from fedseg.plan import StudyPlan
from fedseg.privacy.promised import record_of
from fedseg.privacy.words import withheld
from fedseg.reports import findings, traffic
from fedseg.reports.figures import Overlay
from fedseg.reports.study import write_report
from fedseg.result import Arm, ArmName, PatientScores, StageRecord, StudyResult
from fedseg.schema import InitialModel

VOID = {"meta", "img", "rect", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """The tags of a page, checked for balance, with their attributes and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _page(result: StudyResult, folder: Path, overlays: tuple[Overlay, ...] = ()) -> Page:
    path = folder / "report.html"
    write_report(result, overlays, path)
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def _study(*arms: tuple[ArmName, dict[str, list[float | None]]]) -> StudyResult:
    """A study with given Dice: arm -> hospital -> patients."""
    made = tuple(
        Arm(
            name=name,
            models={},
            gradient_steps=1,
            patients=tuple(
                PatientScores(site=site, patient=f"{site}{k}", cases=1, dice={"organ": value})
                for site, values in by_site.items()
                for k, value in enumerate(values)
            ),
        )
        for name, by_site in arms
    )
    result = make_result(sites=tuple(arms[0][1]), labels=("organ",), rounds=2)
    return result.model_copy(update={"arms": made})


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = _page(make_result(), tmp_path, make_overlays(HOSPITALS[:2]))
    assert not {"script", "link", "iframe", "object", "base", "form"} & {t for t, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "action"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    html = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import", html)


def test_the_page_can_be_read_without_seeing(tmp_path: Path) -> None:
    page = _page(make_result(), tmp_path, make_overlays(HOSPITALS[:1]))
    assert all(len(image["alt"]) > 20 for image in page.of("img"))
    assert len(page.of("caption")) == len(page.of("table")) >= 7
    assert all(cell.get("scope") in {"row", "col"} for cell in page.of("th"))
    assert page.of("html") == [{"lang": "en"}]
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))


def test_sections_come_in_the_readers_order(tmp_path: Path) -> None:
    page = _page(
        make_result(rehearsed=("hospital_2:crash",)), tmp_path, make_overlays(HOSPITALS[:1])
    )
    wanted = [
        "The shared model reached a mean Dice of",
        "faults were caused on purpose",
        "What was studied",
        "Results by hospital",
        "How training went",
        "Patients: best, median and worst",
        "What moved over the wire",
        "Sites that gave no usable answer",
        "updates may reveal training images to the coordinator",
        "Training by arm",
        "What this does and does not show",
        "Settings and digests",
    ]
    places = [page.text.index(text) for text in wanted]
    assert places == sorted(places)
    assert "hospital_2:crash" in page.text


def test_the_verdict_says_what_the_numbers_say() -> None:
    federated, local = [0.8, 0.9, 0.85, 0.82], [0.7, 0.79, 0.76, 0.7]
    result = _study(
        ("federated", {"a": federated, "b": [0.9, 0.9]}),
        ("local", {"a": local, "b": [0.8, 0.8]}),
        ("pooled", {"a": [0.9] * 4, "b": [0.9, 0.9]}),
    )
    said = findings.verdict(result)
    assert said[0] == (
        "The shared model reached a mean Dice of 0.862 on 6 patients that no hospital trained on."
    )
    assert said[1].startswith("It is better than what each hospital had alone by 0.103 (95 % inter")
    assert said[2] == "Every one of the 2 hospitals gains; b gains least (+0.100)."
    assert "reached 0.900 (shared model against it: −0.038" in said[3]


def test_what_the_initial_model_reached_is_said_beside_the_shared_one(tmp_path: Path) -> None:
    result = _study(("federated", {"a": [0.7, 0.8]}), ("initial", {"a": [0.6, 0.6]}))
    said = findings.verdict(result)
    assert said[1].startswith("The initial model reached 0.600 before any training")
    assert "+0.150" in said[1]
    page = _page(make_result(arms=("federated", "pooled", "local", "initial")), tmp_path)
    assert "Before any training" in page.text and "Initial" in page.text


def test_the_verdict_does_not_flatter() -> None:
    worse = _study(
        ("federated", {"a": [0.5, 0.52, 0.51], "b": [0.7, 0.71, 0.73]}),
        ("local", {"a": [0.6, 0.63, 0.61], "b": [0.6, 0.62, 0.63]}),
    )
    assert "no clear difference" in findings.verdict(worse)[1]
    assert findings.verdict(worse)[2] == "It is not better on average at a (−0.103)."
    low, high = [0.5, 0.52, 0.51] * 2, [0.6, 0.63, 0.61] * 2
    lost = _study(("federated", {"a": low}), ("local", {"a": high}))
    assert "It is worse than what each hospital had alone by 0.103" in findings.verdict(lost)[1]
    alone = _study(("federated", {"a": [0.5]}))
    assert findings.verdict(alone) == (
        "The shared model reached a mean Dice of 0.500 on 1 patient that no hospital trained on.",
        "No baseline was trained, so there is nothing to compare it with.",
    )
    one = _study(("federated", {"a": [0.5]}), ("local", {"a": [0.4]}))
    assert "one patient compared it is +0.100 against" in findings.verdict(one)[1]
    mute = _study(("federated", {"a": [None]}))
    assert "does not say how good it is" in findings.verdict(mute)[0]
    nothing = make_result().model_copy(update={"arms": ()})
    assert findings.verdict(nothing) == ("No shared model was measured in this study.",)


def test_a_few_patients_have_no_interval(tmp_path: Path) -> None:
    """Two of them would have one from the lower to the higher: no more than themselves."""
    few, more = [0.7, 0.9, 0.8, 0.75, 0.72], [0.6, 0.7, 0.7, 0.65, 0.5]
    result = _study(("federated", {"a": few}), ("local", {"a": more}), ("initial", {"a": more}))
    assert findings.table(result, "dice").total.cells["federated"].low is None
    said = findings.verdict(result)
    assert "the study added +0.144." in said[1]
    assert said[2].startswith("On the 5 patients compared it is +0.144 against")
    assert said[2].endswith("too few to say more.")
    assert "of fewer than 6 there is none" in _page(result, tmp_path).text
    six = findings.estimate([*few, 0.71])
    assert six.low is not None and six.low < six.mean  # type: ignore[operator]


def test_differences_are_paired_by_patient() -> None:
    result = _study(("federated", {"a": [0.8, 0.6, None]}), ("local", {"a": [0.7, None, 0.1]}))
    one, other = result.arms
    gain = findings.difference(one, other, "dice")
    assert (gain.patients, gain.low) == (1, None)
    assert gain.mean == pytest.approx(0.1)


def test_the_worst_hospital_is_in_view(tmp_path: Path) -> None:
    result = _study(("federated", {"a": [0.8, 0.9], "b": [0.6, 0.61], "c": []}))
    assert findings.worst_site(result) == "b"
    page = _page(result, tmp_path)
    assert "lowest Dice" in page.text
    assert "No patients were held back for measuring at c." in page.text
    assert "Fewer than 10 patients were measured at a (2), b (2)" in page.text


def test_numbers_are_written_for_people() -> None:
    assert findings.number(-0.0123, signed=True) == "−0.012"
    assert findings.number(-0.0001) == "0.000"
    assert findings.number(None) == "–"
    assert findings.count(1, "core") == "1 core"
    assert findings.count(1200, "patient") == "1,200 patients"


def test_traffic_adds_up() -> None:
    result = make_result()
    *lines, total = traffic.by_stage(result)
    assert [line.name for line in lines] == ["enlist", "train", "evaluate", "release"]
    assert total.bytes_up == sum(record.bytes_up for record in result.stages)
    train = lines[1]
    assert (train.messages_down, train.messages_up) == (100, 98)
    for rounds in (20, 90):
        by_round = traffic.by_round(make_result(rounds=rounds))
        assert len(by_round) <= traffic.MOST_LINES
        whole = sum(record.bytes_down for record in make_result(rounds=rounds).stages)
        assert sum(line.traffic.bytes_down for line in by_round) == whole
    assert traffic.spans([7, 1, 2, 3]) == "1–3, 7"


def test_failures_are_named_with_their_rounds(tmp_path: Path) -> None:
    (line,) = traffic.failures(make_result())
    assert (line.site, line.rounds, line.code) == ("hospital_3", "5–6", "not-finite")
    assert "a tensor of the update holds NaN" in _page(make_result(), tmp_path).text
    clean = make_result().model_copy(update={"stages": make_result().stages[:3]})
    assert "every site answered every task" in _page(clean, tmp_path).text


def test_names_from_the_data_are_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    result = make_result(sites=(evil, "b"), labels=("<i>x</i>", "y&z"), rehearsed=(evil,))
    page = _page(result, tmp_path, (make_overlay(site=evil, patient=evil),))
    assert evil in page.text and "<i>x</i>" in page.text
    assert not page.of("script") and not page.of("i")


@pytest.mark.parametrize("labels", [1, 20])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_any_task_has_a_page(tmp_path: Path, labels: int, dimensions: int) -> None:
    names = tuple(f"label{k}" for k in range(labels))
    result = make_result(labels=names, dimensions=dimensions, count=3, rounds=4)
    overlay = make_overlay(labels=labels, shape=(40, 30, 24 if dimensions == 3 else 1))
    page = _page(result, tmp_path, (overlay,))
    assert ("Dice by label, all patients" in page.text) == (labels > 1)


def test_a_study_of_one_hospital_has_a_report(tmp_path: Path) -> None:
    page = _page(make_result(sites=("only",), rounds=4), tmp_path)
    assert "Across the hospitals" not in page.text


def test_fine_tuned_models_are_shown_beside_the_shared_one(tmp_path: Path) -> None:
    page = _page(make_result(arms=("federated", "local", "finetuned")), tmp_path)
    assert "Fine-tuned at each hospital" in page.text
    assert "no guarantee covers them" in page.text
    assert any(
        said.startswith("Fine-tuned at each hospital on its own patients it reaches")
        for said in findings.verdict(make_result(arms=("federated", "finetuned")))
    )


@pytest.mark.parametrize("arms", [("federated",), ("federated", "pooled"), ("local", "federated")])
def test_missing_baselines_leave_no_gaps(tmp_path: Path, arms: tuple[ArmName, ...]) -> None:
    page = _page(make_result(arms=arms, rounds=4), tmp_path)
    assert ("Federated − local" in page.text) == ("local" in arms)
    assert "Not every arm was trained" in page.text


def test_a_study_without_scores_or_stages_has_a_page(tmp_path: Path) -> None:
    page = _page(make_result(scored=False, rounds=2), tmp_path)
    assert "does not say how good it is" in page.text
    bare = make_result(rounds=1).model_copy(update={"arms": (), "stages": (), "sites": ()})
    page = _page(bare, tmp_path)
    assert "No round was recorded." in page.text


def test_a_built_plan_shows_its_size_and_not_every_tensor(tmp_path: Path) -> None:
    tensors = [{"name": "w", "shape": [10, 20], "dtype": "float32"}] * 3
    initial = InitialModel.model_validate({"digest": "0" * 64, "tensors": tensors})
    result = make_result(rounds=2)
    plan = result.plan.model_copy(update={"initial": initial})
    page = _page(result.model_copy(update={"plan": plan}), tmp_path)
    assert "600 parameters" in page.text
    assert "3 tensors" in page.text


def test_five_hospitals_stay_small_and_quick(tmp_path: Path) -> None:
    started = time.process_time()
    write_report(make_result(), make_overlays(), tmp_path / "report.html")
    assert time.process_time() - started < 15
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_equal_studies_give_equal_pages(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(make_result(rounds=4), make_overlays(HOSPITALS[:1]), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def _private(*, private: bool = True, **outputs: Any) -> StudyResult:
    """A private study of two rounds, with what leaves besides."""
    more: dict[str, Any] = {}
    if outputs.get("metrics") == "noised":
        more = {"privacy__expected_validation": 11, "evaluation__metrics": ["dice"]}
    plan = private_plan(privacy__outputs=outputs, privacy__epsilon=3.0, **more)
    result = make_result(rounds=2, sites=HOSPITALS[:2])
    stages = tuple(_closed(record, plan) for record in result.stages)
    record = record_of(plan, stages, private=private)
    return StudyResult.model_validate(
        result.model_dump()
        | {"plan": plan.model_dump(), "plan_digest": plan.digest}
        | {"stages": [stage.model_dump() for stage in stages], "guarantee": record}
    )


def _closed(record: StageRecord, plan: StudyPlan) -> StageRecord:
    """A stage of which nothing left that the plan withholds."""
    kept: dict[str, Any] = {}
    if withheld(plan, "counts"):
        kept["patients"] = None
    if withheld(plan, "losses"):
        kept["loss"] = None
    if withheld(plan, "metrics"):
        kept["scores"] = {}
    answers = tuple(answer.model_copy(update=kept) for answer in record.answers)
    return record.model_copy(update={"answers": answers})


def test_a_private_study_prints_its_guarantee_in_full(tmp_path: Path) -> None:
    result = _private()
    page = _page(result, tmp_path, make_overlays(HOSPITALS[:1]))
    assert result.guarantee is not None and result.guarantee.text in page.text
    assert "Differentially private: epsilon 3 at delta 0.001 for each patient" in page.text
    for words in ("Unit", "Neighbours:", "Sampling:", "Not covered:", "95.3 of 100 cases"):
        assert words in page.text
    assert "NOT PRIVATE" not in page.text and "NONE" not in page.text
    assert "This page itself is not covered" in page.text


def test_what_is_withheld_is_not_claimed_to_have_been_sent(tmp_path: Path) -> None:
    page = _page(_private(), tmp_path)
    wire = page.text[page.text.index("What moved over the wire") :]
    assert "the change of these tensors and the number of steps" in wire
    assert "mean loss" not in wire and "their mean Dice" not in wire
    assert "at the start, no number" in wire
    assert "withheld" in wire
    assert "weighted by patients" not in page.text
    open_ = _page(_private(counts="suppressed", metrics="noised"), tmp_path)
    measured = "the number of held-back patients and their mean Dice by label with noise added"
    assert f"after measuring, {measured};" in open_.text
    assert "Withheld where about fewer than 5 patients: counts." in open_.text
    assert open_.text.count("Guarantee:") == 2


def test_a_seeded_run_is_loudly_not_private(tmp_path: Path) -> None:
    page = _page(_private(private=False, metrics="noised"), tmp_path)
    assert page.text.count("NOT PRIVATE") >= 3
    assert "Differentially private:" not in page.text
    assert "Would have spent, with secret noise" in page.text
    assert "no: the noise was seeded" in page.text
    assert "of 100 cases" not in page.text


def test_a_study_without_a_guarantee_says_none(tmp_path: Path) -> None:
    page = _page(make_result(), tmp_path)
    assert "Privacy guarantee: NONE." in page.text
    assert "No guarantee." in page.text
    assert "The guarantee in full" not in page.text
