"""Pictures and charts: the right cut, the right way round, whatever the names and shapes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from study_results import make_overlay, make_patients

from fedseg.reports.charts import Curve, curve_chart, dice_chart
from fedseg.reports.figures import (
    PLANES,
    Overlay,
    choose_patients,
    label_colours,
    overlay_pictures,
    visible_planes,
)
from fedseg.result import PatientScores


def _patient(name: str, dice: float | None) -> PatientScores:
    return PatientScores(site="a", patient=name, cases=1, dice={"organ": dice})


def _pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def _spot(where: tuple[slice, slice, slice]) -> Overlay:
    image = np.zeros((40, 40, 40), np.float32)
    image[where] = 1
    empty = np.zeros(image.shape, np.uint8)
    return Overlay("a", "p", "best", 1.0, image, empty, empty, (1.0, 1.0, 1.0))


def test_best_median_and_worst_are_three_patients() -> None:
    patients = [_patient(f"p{k}", dice) for k, dice in enumerate((0.5, 0.9, 0.7, None, 0.8))]
    assert choose_patients(patients) == {"best": "p1", "median": "p2", "worst": "p0"}
    assert choose_patients(patients[::-1]) == choose_patients(patients)


def test_few_patients_are_not_shown_twice() -> None:
    assert choose_patients([]) == {}
    assert choose_patients([_patient("p", None)]) == {}
    assert choose_patients([_patient("p", 0.5)]) == {"median": "p"}
    two = [_patient("p", 0.5), _patient("q", 0.6)]
    assert choose_patients(two) == {"best": "q", "worst": "p"}


def test_ties_go_by_name() -> None:
    patients = [_patient(name, 0.5) for name in "cabd"]
    assert choose_patients(patients) == {"best": "d", "median": "b", "worst": "a"}


@pytest.mark.parametrize(
    ("where", "panel", "row", "column"),
    [
        (np.s_[34:, :, :], 0, 0.5, 0.1),  # the patient's right: left of an axial picture
        (np.s_[:, 34:, :], 0, 0.1, 0.5),  # anterior: its top
        (np.s_[34:, :, :], 1, 0.5, 0.1),  # right: left of a coronal picture
        (np.s_[:, :, 34:], 1, 0.1, 0.5),  # superior: its top
        (np.s_[:, 34:, :], 2, 0.5, 0.1),  # anterior: left of a sagittal picture
        (np.s_[:, :, 34:], 2, 0.1, 0.5),  # superior: its top
    ],
)
def test_pictures_follow_the_radiological_convention(
    where: tuple[slice, slice, slice], panel: int, row: float, column: float
) -> None:
    pixels = _pixels(overlay_pictures(_spot(where), {"organ": 1})[0])
    side = pixels.shape[0]
    shown = pixels[:, panel * side : (panel + 1) * side].sum(axis=2)
    bright = np.mean(shown > 600, axis=None)
    assert 0.05 < bright < 0.3
    assert shown[int(row * side) + 8, int(column * side) + 8] > 600
    assert shown[int((1 - row) * side) - 12, int((1 - column) * side) - 12] < 100


def test_cuts_pass_through_the_largest_cross_section() -> None:
    overlay = make_overlay(labels=1)
    truth = np.zeros_like(overlay.truth)
    truth[10:12, 20:22, 5:30] = 1
    truth[8:20, 15:30, 24] = 1
    image = np.zeros_like(overlay.image)
    image[:, :, 24] = 1
    sharp = Overlay("a", "p", "best", 1.0, image, truth, truth, (1.0, 1.0, 1.0))
    pixels = _pixels(overlay_pictures(sharp, {"organ": 1})[0])
    assert pixels[100:200, 100:200].mean() > 200


def test_thick_slices_are_drawn_true_to_scale() -> None:
    flat = _spot(np.s_[:, :, :])
    image = np.random.default_rng(0).normal(2, 1, (40, 40, 10)).astype(np.float32)
    empty = np.zeros(image.shape, np.uint8)
    thick = Overlay("a", "p", "best", None, image, empty, empty, (1.0, 1.0, 2.0))
    side = _pixels(overlay_pictures(flat, {"organ": 1})[0]).shape[0]
    coronal = _pixels(overlay_pictures(thick, {"organ": 1})[0])[:, side : 2 * side].sum(axis=2)
    rows = np.flatnonzero(np.mean(coronal > 60, axis=1) > 0.3)
    assert (rows[-1] - rows[0] + 1) / side == pytest.approx(0.5, abs=0.03)


def test_truth_and_prediction_show_only_in_the_second_picture() -> None:
    plain, outlined = (_pixels(p) for p in overlay_pictures(make_overlay(), {"a": 1, "b": 2}))
    colour = [np.mean(np.ptp(pixels, axis=2) > 40) for pixels in (plain, outlined)]
    assert colour[0] == 0
    assert colour[1] > 0.03


@pytest.mark.parametrize("labels", [1, 20])
def test_any_number_of_labels_is_drawn(labels: int) -> None:
    names = {f"label {k}": k for k in range(1, labels + 1)}
    assert len(label_colours(names)) == labels
    overlay_pictures(make_overlay(labels=labels), names)


def test_a_single_slice_and_an_empty_patient_are_drawn() -> None:
    overlay = make_overlay(shape=(30, 24, 1))
    assert visible_planes(overlay) == PLANES[:1]
    overlay_pictures(overlay, {"a": 1, "b": 2})
    image = np.full((8, 8, 8), np.nan, np.float32)
    empty = np.zeros(image.shape, np.uint8)
    overlay_pictures(Overlay("a", "p", "worst", None, image, empty, empty, (1, 1, 1)), {"a": 1})


def test_shapes_that_differ_are_refused() -> None:
    overlay = make_overlay()
    wrong = Overlay(
        "a", "p", "best", 1.0, overlay.image, overlay.truth[1:], overlay.prediction, (1, 1, 1)
    )
    with pytest.raises(ValueError, match="same shape"):
        overlay_pictures(wrong, {"a": 1, "b": 2})


def test_equal_input_gives_equal_bytes() -> None:
    overlay = make_overlay()
    assert overlay_pictures(overlay, {"a": 1}) == overlay_pictures(overlay, {"a": 1})
    curves = [Curve("a", (1, 2), (0.5, 0.4)), Curve("all", (1, 2), (0.5, 0.4), bold=True)]
    assert curve_chart(curves, "Loss") == curve_chart(curves, "Loss")


def test_names_are_text_in_any_script() -> None:
    name = "<b>$x^2$ & 東京_病院"
    values = {name: {"federated": [p.mean_dice or 0 for p in make_patients("federated")]}}
    for svg in (dice_chart(values), curve_chart([Curve("_" + name, (1,), (0.5,))], "Loss")):
        assert "&lt;b&gt;$x^2$ &amp; 東京_病院" in svg.decode()
        assert "http://" not in svg.decode().replace("http://www.w3.org/", "").replace(
            "http://purl.org/", ""
        ).replace("http://creativecommons.org/", "")


def test_charts_stand_empty_hospitals_and_empty_studies() -> None:
    assert dice_chart({"a": {"federated": []}, "b": {}})
    assert dice_chart({})
    assert curve_chart([], "Loss")
