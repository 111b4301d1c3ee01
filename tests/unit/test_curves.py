"""Curves: the numbers of the stages, in a table and in TensorBoard's own format."""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path

import pytest
from study_results import make_result
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from fedseg.reports.curves import points, write_curves
from fedseg.result import weighted_mean


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_equal_studies_give_equal_tables_whatever_the_machine(tmp_path: Path) -> None:
    result = make_result(rounds=4)
    slow = result.model_copy(update={"run": result.run.model_copy(update={"stage_s": (1.0,)})})
    write_curves(result, tmp_path / "a")
    write_curves(slow, tmp_path / "b")
    assert (tmp_path / "a/curves.csv").read_bytes() == (tmp_path / "b/curves.csv").read_bytes()


def test_the_table_holds_what_the_sites_answered(tmp_path: Path) -> None:
    result = make_result(rounds=4)
    write_curves(result, tmp_path)
    rows = _rows(tmp_path / "curves.csv")
    answer = result.stages[1].answers[1]
    (loss,) = [
        row
        for row in rows
        if (row["round"], row["stage"], row["site"], row["metric"])
        == ("1", "train", answer.site, "loss")
    ]
    assert float(loss["value"]) == answer.loss
    (down,) = [
        r for r in rows if (r["round"], r["stage"], r["metric"]) == ("1", "train", "bytes_down")
    ]
    assert (int(down["value"]), down["site"]) == (result.stages[1].bytes_down, "")


def test_all_sites_are_weighted_by_patients() -> None:
    record = make_result(rounds=1).stages[1]
    (mean,) = [
        p.value for p in points(make_result(rounds=1)) if p.site == "" and p.metric == "loss"
    ]
    weights = [a.patients for a in record.answers]
    losses = [a.loss or 0 for a in record.answers]
    expected = sum(w * v for w, v in zip(weights, losses, strict=True)) / sum(weights)
    assert mean == pytest.approx(expected)
    assert weighted_mean([(1.0, 0), (3.0, 0)]) == 2.0
    assert weighted_mean([]) is None


def test_tensorboard_reads_the_events_back(tmp_path: Path) -> None:
    result = make_result(rounds=4)
    write_curves(result, tmp_path)
    write_curves(result, tmp_path)
    runs = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert runs == ["all_sites", *(site.name for site in result.sites)]
    file = tmp_path / "tensorboard" / "hospital_1" / "events.out.tfevents.fedseg"
    events = [e for e in EventFileLoader(str(file)).Load() if e.HasField("summary")]
    values = {(e.step, v.tag): v.tensor.float_val[0] for e in events for v in e.summary.value}
    assert values[1, "train/loss"] == pytest.approx(result.stages[1].answers[0].loss)
    assert (4, "evaluate/dice/anterior") in values
    assert (4, "evaluate/hd95") in values


def _wall_times(folder: Path) -> list[float]:
    file = folder / "tensorboard" / "all_sites" / "events.out.tfevents.fedseg"
    return [e.wall_time for e in EventFileLoader(str(file)).Load() if e.HasField("summary")]


def test_times_are_shown_only_where_they_are_known(tmp_path: Path) -> None:
    """A study that was killed between a stage and its time has fewer times than stages."""
    result = make_result(rounds=2)
    start = datetime.fromisoformat(result.run.started).timestamp()
    write_curves(result, tmp_path / "whole")
    assert max(_wall_times(tmp_path / "whole")) == start + 9.5 * len(result.stages)
    short = result.run.model_copy(update={"stage_s": result.run.stage_s[1:]})
    write_curves(result.model_copy(update={"run": short}), tmp_path / "killed")
    assert set(_wall_times(tmp_path / "killed")) == {start}


def test_site_names_never_leave_the_folder(tmp_path: Path) -> None:
    write_curves(make_result(sites=("../up", "..\\up", "Klinik Süd"), rounds=1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.csv", "tensorboard"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 4


def test_a_study_without_rounds_gives_an_empty_table(tmp_path: Path) -> None:
    write_curves(make_result().model_copy(update={"stages": ()}), tmp_path)
    assert _rows(tmp_path / "curves.csv") == []
