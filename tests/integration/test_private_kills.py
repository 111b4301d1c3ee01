"""A private site killed at any moment: every debit stays, every task has one answer, ever."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from random import Random

import pytest
import torch
from private_sites import (
    PHASES,
    account_of,
    killed_child,
    ledger_of,
    register,
    spend,
    tasks_of,
    trainer_of,
)
from tiny_studies import tiny_private_plan

from fedseg.imaging.cases import Cohort
from fedseg.imaging.manifests import read_manifest
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.privacy.schedule import mechanism_of
from fedseg.promise import Calibration
from fedseg.updates import TaskHeader, peek
from sites.spending import reservation_of
from sites.trainer import Trainer

# Lines of a phase's code in about one task and a half.
LINES = {"debit and commit": 400, "train": 80, "store": 160, "leave": 40}


def small_private_plan() -> StudyPlan:
    plan = tiny_private_plan(
        model={"options": {"channels": [2, 4], "residual_units": 0}},
        aggregation={"minimum_sites": 1},
        evaluation={"every_rounds": 1},
        privacy={"rate": 1.0, "patches_per_patient": 1},
    )
    noise = Calibration(training=2.0, metrics=2.0)
    return plan.model_copy(update={"initial": initial_model(plan)[0], "calibrated": noise})


@pytest.fixture(scope="module")
def private() -> StudyPlan:
    return small_private_plan()


@pytest.fixture(scope="module")
def cohort(data: Path, private: StudyPlan) -> Cohort:
    return read_manifest(data, private.task).cohort("hospital_a")


def check(folder: Path, plan: StudyPlan, tasks: dict[str, bytes], before: Counter[str]) -> None:
    """All that must hold after a kill; `before` are the debits there were, and is brought on."""
    book = ledger_of(folder).book  # verified against the audit
    debits = {key: debit.attempts for key, debit in book.debits.items()}
    assert all(debits.get(key, 0) >= count for key, count in before.items()), "a debit is lost"
    before.update({key: count - before[key] for key, count in debits.items()})
    files = {p.name: p.read_bytes() for p in (folder / "answers").glob("*.answer")}
    sent: dict[str, set[str]] = {}
    place = folder.parent / "sent"
    for line in place.read_text().splitlines() if place.exists() else ():
        name, answer = line.split(":")
        sent.setdefault(name, set()).add(answer)
    for name, answers in sent.items():
        assert len(answers) == 1, f"two answers to {name}"
        if name.endswith("release"):
            continue
        key = reservation_of(peek(tasks[name], TaskHeader, max_bytes=10**7))
        assert key in book.debits, f"an answer without a debit: {name}"
        committed = book.debits[key].answer
        assert committed, f"an answer left that was not committed: {name}"
        (stored,) = (data for file, data in files.items() if key in file)
        assert hashlib.sha256(stored).hexdigest() == committed


def kill(
    folder: Path, plan: StudyPlan, cohort: Cohort, data: Path, kills: int, seed: int
) -> Counter[str]:
    """Kill sites until so many kills met a living process; each study goes on to its end."""
    random, met, study = Random(seed), Counter[str](), 0
    phases = cycle([*PHASES, None])
    named = dict(tasks_of(plan))
    while met.total() < kills:
        study += 1
        site = folder / str(study) / "site"
        site.mkdir(parents=True)
        (site.parent / "cache").symlink_to(data)
        register(ledger_of(site), plan, cohort)
        before: Counter[str] = Counter()

        def make(site: Path = site) -> Trainer:
            return trainer_of(site, plan, cohort, account_of(ledger_of(site), plan, site))

        alive = True
        while alive and met.total() < kills:
            phase = next(phases)
            point = random.randint(1, LINES[phase]) if phase else random.uniform(0.02, 0.5)
            alive = killed_child(site, make, list(named.items()), phase, point)
            met[str(phase)] += alive
            check(site, plan, named, before)
        spend(site, make, list(named.items()))
        check(site, plan, named, before)
        book = ledger_of(site).book
        assert len(book.debits) == 2 * plan.aggregation.rounds
        charged = {use: [d.mechanism for d in book.debits.values() if d.use == use]
                   for use in ("train", "val")}  # fmt: skip
        assert charged == {use: [mechanism_of(plan, use)] * 3 for use in ("train", "val")}  # type: ignore[arg-type]
        assert len((site.parent / "sent").read_text().splitlines()) == 2 * len(named)
        assert not list(site.rglob("*.part"))
    return met


def test_twenty_kills_lose_no_debit_and_give_no_second_answer(
    private: StudyPlan, cohort: Cohort, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    (tmp_path / "cache").mkdir()
    met = kill(tmp_path, private, cohort, tmp_path / "cache", 20, seed=1)
    assert len(met) == len(PHASES) + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_kills_lose_no_debit_and_give_no_second_answer(
    private: StudyPlan, cohort: Cohort, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    (tmp_path / "cache").mkdir()
    started = time.monotonic()
    met = kill(tmp_path, private, cohort, tmp_path / "cache", 200, seed=2)
    print(f"{dict(met)} in {time.monotonic() - started:.0f} s")
    assert met.total() == 200
