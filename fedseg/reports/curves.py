"""Every number that the sites sent, round by round, as a table and as TensorBoard events.

OUT/curves.csv is a function of the result without its block `run`: equal studies give equal bytes.
An empty site means all sites together (scores and losses: the mean weighted by patients; bytes
and counts: the sum), an empty label the mean over the foreground labels. OUT/tensorboard has one
run a site and one for all; its time axis, and only that, comes from `run`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from fedseg.durable import write_atomically
from fedseg.errors import MissingExtraError
from fedseg.result import SiteAnswer, StageRecord, StudyResult, mean_of, weighted_mean

ALL = ""


class Point(NamedTuple):
    """One number of one stage; see the module for the empty site and the empty label."""

    round: int
    stage: str
    attempt: int
    site: str
    metric: str
    label: str
    value: float


def points(result: StudyResult) -> Iterator[Point]:
    """All numbers of all stages, in the order of the stages: each site, then all sites."""
    for record in result.stages:
        if record.owner is not None:  # one hospital's own model is no point of the shared one's
            continue
        own = {answer.site: tuple(_answer_points(answer)) for answer in record.answers}
        everyone: list[tuple[str, str, float]] = list(_together(record, own))
        for site, values in (*own.items(), (ALL, everyone)):
            for metric, label, value in values:
                yield Point(record.round, record.stage, record.attempt, site, metric, label, value)


def write_curves(result: StudyResult, folder: Path) -> None:
    """Write folder/curves.csv and folder/tensorboard; what is there of an earlier run is replaced.

    Raises:
        MissingExtraError: the package tensorboard is not installed (curves.csv is written first).
        StorageError: curves.csv cannot be written; the one before it is untouched.
    """
    rows = tuple(points(result))
    write_atomically(folder / "curves.csv", _csv(rows))
    _write_events(rows, _stage_times(result), folder / "tensorboard")


def _answer_points(answer: SiteAnswer) -> Iterator[tuple[str, str, float]]:
    """(metric, label, value) of one answer."""
    if answer.patients:  # the receipt of a released model counts none
        yield "patients", "", answer.patients
    yield "bytes_up", "", answer.bytes_up
    if answer.steps:
        yield "steps", "", answer.steps
    if answer.loss is not None:
        yield "loss", "", answer.loss
    for metric, scores in answer.scores.items():
        for label, score in scores.items():
            if score is not None:
                yield metric, label, score
        mean = mean_of(scores)
        if mean is not None:
            yield metric, "", mean


def _together(
    record: StageRecord, own: dict[str, tuple[tuple[str, str, float], ...]]
) -> Iterator[tuple[str, str, float]]:
    """(metric, label, value) over all sites of a stage."""
    patients = {answer.site: answer.patients for answer in record.answers}
    keys = list(dict.fromkeys((m, label) for values in own.values() for m, label, _ in values))
    for metric, label in keys:
        found = [
            (value, patients[site])
            for site, values in own.items()
            for m, name, value in values
            if (m, name) == (metric, label)
        ]
        if metric in ("patients", "steps"):
            yield metric, label, sum(value for value, _ in found)
        elif metric != "bytes_up":
            yield metric, label, weighted_mean(found) or 0.0
    yield "bytes_up", "", record.bytes_up
    yield "bytes_down", "", record.bytes_down
    yield "failures", "", len(record.failures)


def _csv(rows: Sequence[Point]) -> bytes:
    """The table with a header and plain newlines; numbers in the shortest exact form."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Point._fields)
    writer.writerows(rows)
    return text.getvalue().encode()


def _stage_times(result: StudyResult) -> dict[tuple[int, str, int], float]:
    """Unix time at which each stage closed; from zero where the start is not an ISO date.

    Where the seconds are not one a stage, nobody knows whose they are: all stages close at the
    start.
    """
    try:
        started = datetime.fromisoformat(result.run.started)
    except ValueError:
        started = datetime.fromtimestamp(0, UTC)
    now = started.timestamp()
    known = len(result.run.stage_s) == len(result.stages)
    seconds_of = result.run.stage_s if known else (0.0,) * len(result.stages)
    times = {}
    for record, seconds in zip(result.stages, seconds_of, strict=True):
        now += seconds
        times[record.round, record.stage, record.attempt] = now
    return times


def _write_events(
    rows: Sequence[Point], times: dict[tuple[int, str, int], float], folder: Path
) -> None:
    """One folder with one event file a site."""
    try:
        event_file: Any = import_module("tensorboard.summary.writer.record_writer")
        event_pb2: Any = import_module("tensorboard.compat.proto.event_pb2")
        summary_pb2: Any = import_module("tensorboard.compat.proto.summary_pb2")
    except ModuleNotFoundError:
        raise MissingExtraError("simulation", "tensorboard") from None
    for site, name in _folder_names(dict.fromkeys(row.site for row in rows)).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        writer = event_file.RecordWriter((folder / name / "events.out.tfevents.fedseg").open("wb"))
        writer.write(
            event_pb2.Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString()
        )
        for row in rows:
            if row.site == site:
                scalar = {"tag": _tag(row), "simple_value": row.value}
                summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(**scalar)])
                at = times.get((row.round, row.stage, row.attempt), 0.0)
                event = event_pb2.Event(wall_time=at, step=row.round, summary=summary)
                writer.write(event.SerializeToString())
        writer.close()


def _tag(row: Point) -> str:
    """The scalar's name: stage, metric and, where there is one, the label."""
    return "/".join(part for part in (row.stage, row.metric, row.label) if part)


def _folder_names(sites: Iterable[str]) -> dict[str, str]:
    """A folder name for each site, safe on every file system and never used twice."""
    names: dict[str, str] = {}
    for site in sites:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", site)[:80] if site else "all_sites"
        name, number = plain, 1
        while name.lower() in {taken.lower() for taken in names.values()}:
            number += 1
            name = f"{plain}_{number}"
        names[site] = name
    return names
