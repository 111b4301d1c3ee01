"""The acceptance report: no-go wins over a pretty mean, the worst first, nothing from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_plans import private_plan
from study_results import make_plan
from test_pages import CHROMIUM, QUIET
from test_report import Page
from validation_results import estimate, make_pictures, make_validation

from fedseg.evaluation.evidence import Subgroup
from fedseg.evaluation.validation import ValidationResult
from fedseg.reports.acceptance import _annotated, patients_to_show, write_acceptance
from fedseg.reports.acceptance_words import check_lines, headline, privacy_words


def html_of(result: ValidationResult, folder: Path, pictures: bool = False) -> str:
    shown = make_pictures(patients_to_show(result, most=1)) if pictures else ()
    write_acceptance(result, shown, folder / "report.html", plans={make_plan().digest: make_plan()})
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


def first_page(html: str) -> str:
    return html.split('<div class="first">')[1].split('id="warnings"', maxsplit=1)[0]


def changed(result: ValidationResult, **verdict: Any) -> ValidationResult:
    return result.model_copy(update={"verdict": result.verdict.model_copy(update=verdict)})


def test_the_page_needs_nothing_from_outside_and_is_well_formed(tmp_path: Path) -> None:
    page = Page(html_of(make_validation(lesions=True, wild=(3,)), tmp_path, pictures=True))
    assert not {"script", "link", "iframe", "object", "base", "form"} & {t for t, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), (tag, attributes)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html and not re.search(r"url\(|@import", html)
    anchors = {a["href"][1:] for a in page.of("a")}
    assert anchors <= {attributes.get("id") for _, attributes in page.tags}


def test_every_figure_can_be_read_without_seeing(tmp_path: Path) -> None:
    page = Page(html_of(make_validation(lesions=True), tmp_path, pictures=True))
    pictures = page.of("img")
    assert len(pictures) == 1 + 4 + 2
    assert all(len(image["alt"]) > 20 for image in pictures)
    assert len(page.of("caption")) == len(page.of("table")) >= 8
    assert all(cell.get("scope") in {"row", "col"} for cell in page.of("th"))
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))


def test_no_go_wins_over_a_pretty_mean(tmp_path: Path) -> None:
    result = make_validation(wild=(3,), broken=("worst_case_dice_at_least",))
    mean = result.summary("finetuned").dice.mean
    assert mean is not None and mean > 0.8
    page = Page(html_of(result, tmp_path))
    first = first_page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "NO-GO" in first and "Do not use the model “finetuned” here" in first
    assert 'class="verdict no-go"' in first
    assert page.text.count("NO-GO") == 2  # the title and the stamp
    assert "keeps every threshold" not in page.text
    assert first.index("DOES NOT HOLD") < first.index("✓ holds")  # the broken one leads the table


def test_a_go_that_a_threshold_contradicts_is_not_printed(tmp_path: Path) -> None:
    broken = make_validation(broken=("dice_at_least",))
    with pytest.raises(ValueError, match="go needs thresholds"):
        html_of(changed(broken, decision="go"), tmp_path)
    with pytest.raises(ValueError, match="go needs thresholds"):
        html_of(changed(make_validation(), checks=()), tmp_path)
    with pytest.raises(ValueError, match="go needs thresholds"):
        html_of(changed(make_validation(), recommended=None), tmp_path)


def test_without_thresholds_nothing_is_decided(tmp_path: Path) -> None:
    result = make_validation(thresholds=None, names=("global",))
    assert headline(result) == "st_mary set no thresholds beforehand, so nothing is decided here."
    text = Page(html_of(result, tmp_path)).text
    assert "UNDECIDED" in text and "None were set." in text


def test_thresholds_say_what_was_asked_and_measured(tmp_path: Path) -> None:
    result = make_validation(count=12, broken=("patients_at_least",))
    own = [check for check in result.verdict.checks if check.candidate == "global"]
    lines = {line.name: line for line in check_lines(own)}
    bias = lines["Bias of the volume, at most"]
    assert (bias.asked, bias.found, bias.words) == ("10.0 %", "3.1 %", "of the label anterior")
    assert lines["Patients measured, at least"].found == "12"
    assert next(iter(lines)) == "Patients measured, at least"
    assert lines["Patients with an empty or wild prediction, at most"].asked == "10.0 %"


def test_patients_who_are_left_out_are_not_called_cases(tmp_path: Path) -> None:
    html = html_of(make_validation(), tmp_path)
    assert "Left out: 3 patients of all splits who withdrew." in html


def test_the_worst_patients_come_first(tmp_path: Path) -> None:
    result = make_validation(wild=(7,))
    assert patients_to_show(result)[0] == "P007"
    dices = {p.patient: p.dice for p in result.patients_of("finetuned")}
    shown = [dices[name] for name in patients_to_show(result)]
    assert shown == sorted(shown, key=lambda value: value or 0.0)
    first = first_page(html_of(result, tmp_path))
    assert first.index("P007") < first.index(patients_to_show(result)[1])
    assert "anterior: in the wrong place" in first


def test_reasons_call_thresholds_as_the_page_does(tmp_path: Path) -> None:
    said = "worst_case_dice_at_least (0.5) is broken: the lowest Dice is 0.120"
    held = "dice_at_least (0.8) is met: mean Dice is 0.9"
    result = changed(make_validation(broken=("dice_at_least",)), reasons=(held, said))
    first = first_page(html_of(result, tmp_path))
    assert "“Dice of the worst patient, at least 0.5” is broken: the lowest Dice is" in first
    assert "is met: mean Dice" not in first  # the table says it
    assert "“Mean Dice, at least 0.8” is met" in Page(html_of(result, tmp_path)).text


def test_a_label_that_the_hospital_does_not_draw_is_no_error() -> None:
    (picture,) = make_pictures(("P001",))
    only = _annotated(picture, [1])
    assert set(np.unique(only.truth)) == set(np.unique(only.prediction)) == {0, 1}
    assert (only.truth == (picture.truth == 1)).all()


def test_a_failure_without_a_dice_is_no_good_case() -> None:
    result = make_validation(wild=(2,))
    patients = tuple(
        p.model_copy(update={"dice": None}) if p.patient in {"P002", "P005"} else p
        for p in result.patients
    )
    order = patients_to_show(result.model_copy(update={"patients": patients}), most=16)
    assert (order[0], order[-1]) == ("P002", "P005")


def test_a_suppressed_group_shows_no_number(tmp_path: Path) -> None:
    leaking = Subgroup(
        by="sex",
        value="F",
        suppressed=True,
        patients=3,
        dice={"finetuned": estimate([0.4242, 0.4342])},
        failed={"finetuned": 77},
    )
    text = Page(html_of(make_validation(subgroups=(leaking,)), tmp_path)).text
    assert "too few to show" in text
    assert "0.429" not in text and "77" not in text
    row = text.split("By sex: Dice")[1].split("too few to show")[0]
    assert not re.search(r"\d", row)


def test_what_has_no_number_and_no_picture_is_said(tmp_path: Path) -> None:
    result = make_validation(
        names=("global",), count=2, comparisons=(), agreement=(), calibration=(), subgroups=()
    )
    text = Page(html_of(result, tmp_path)).text
    assert "No picture of this patient." in text
    assert "None, under any model." in text
    assert "Is it as sure" not in text and "The models against each other" not in text


def test_names_of_the_data_break_nothing(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>'
    html = html_of(make_validation(site=nasty, warnings=(nasty,)), tmp_path)
    assert "<script" not in html


def test_a_guarantee_is_said_in_words_and_loudly_where_the_noise_was_seeded() -> None:
    (candidate,) = make_validation(names=("global",)).candidates
    assert privacy_words(candidate, make_plan()).startswith("No guarantee")
    seeded = candidate.model_copy(update={"private": False})
    assert privacy_words(seeded, None).startswith("NOT PRIVATE")
    tuned = seeded.model_copy(update={"arm": "finetuned"})
    assert "must not leave the hospital" in privacy_words(tuned, None)
    kept = candidate.model_copy(update={"private": True})
    plan = private_plan()
    assert plan.private is not None
    assert f"({plan.private.epsilon:g}, {plan.private.delta:g})" in privacy_words(kept, plan)


def test_equal_results_give_equal_pages(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pages = [html_of(make_validation(), tmp_path / name) for name in "ab"]
    assert pages[0] == pages[1]


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None or shutil.which("pdftotext") is None, reason="no chromium or no pdftotext"
)
def test_the_first_printed_page_holds_verdict_thresholds_and_worst_cases(tmp_path: Path) -> None:
    page, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    reason = "A reason as long as reasons get: " + "it cannot be told from the others, " * 4
    result = make_validation(wild=(1, 2, 3), broken=("dice_at_least",))
    words = "bias of a label of a long name in percent is 3.1 (95 % interval −2.0 to 8.2)"
    checks = tuple(check.model_copy(update={"words": words}) for check in result.verdict.checks * 3)
    result = changed(result, reasons=(reason,) * 5, checks=checks)
    result = result.model_copy(
        update={"warnings": (reason,) * 3, "site": "a_hospital_of_a_long_name"}
    )
    write_acceptance(result, make_pictures(patients_to_show(result)), page)
    command = [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={printed}"]
    subprocess.run(
        [str(CHROMIUM), *QUIET, *command, page.as_uri()],
        capture_output=True,
        timeout=200,
        check=True,
    )
    first, second = (_text(printed, number) for number in (1, 2))
    assert "NO-GO" in first and "DOES NOT HOLD" in first
    for patient in patients_to_show(result, most=3):
        assert patient in first
    assert "Date, signature" in first
    assert "Warnings" in second and "DOES NOT HOLD" not in second.split("The verdict in full")[0]


def _text(printed: Path, page: int) -> str:
    """The text of one page of a PDF."""
    command = ["pdftotext", "-layout", "-f", str(page), "-l", str(page), str(printed), "-"]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout
