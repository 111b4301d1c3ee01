"""What private work costs at a site, and that it is answered once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from private_plans import private_plan
from private_sites import LIMITS, account_of, ledger_of, register, task, trainer_of

import sites.spending
import sites.trainer
from fedseg.arrays import Arrays
from fedseg.errors import NotFiniteError, PrivacyError, StorageError, TrustError
from fedseg.imaging.cases import Cohort
from fedseg.imaging.manifests import read_manifest
from fedseg.imaging.phantoms import write_phantoms
from fedseg.learning.strategies import Memory
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.privacy.ledger import Ledger
from fedseg.privacy.noise import Noise
from fedseg.updates import (
    AnswerHeader,
    Body,
    Refused,
    TaskHeader,
    Trained,
    open_answer,
    peek,
    task_digest,
)
from sites.journal import Journal
from sites.spending import Account, reservation_of
from sites.state import Memories
from sites.trainer import Trainer

OPTIONS: dict[str, Any] = {"aggregation": {"rounds": 2, "weighting": "uniform", "attempts": 2}}
PLAN = private_plan(3, **OPTIONS)
NOISED = private_plan(3, metrics=3.0, **OPTIONS)
MODEL = initial_model(PLAN)[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder, sites=1, patients_per_site=(4,), shape=(16, 16, 16))
    found = read_manifest(folder, PLAN.task)
    binary = tuple((value, min(value, 1)) for value in range(4))
    return replace(found.cohort(found.sites[0]), label_map=binary)


def site(tmp_path: Path, plan: StudyPlan, cohort: Cohort, **options: Any) -> Trainer:
    folder = tmp_path / "site"
    folder.mkdir(exist_ok=True)
    ledger = ledger_of(folder)
    register(ledger, plan, cohort)
    return trainer_of(folder, plan, cohort, account_of(ledger, plan, folder), **options)


def train_task(round_: int = 1, model: Arrays = MODEL, **more: Any) -> bytes:
    return task(PLAN, "train", round_, model, **more)


def body_of(answer: bytes) -> Body:
    return peek(answer, AnswerHeader, max_bytes=10**7).body


def delta_of(answer: bytes, asked: bytes, plan: StudyPlan = PLAN) -> Arrays:
    return open_answer(answer, plan, task=task_digest(asked), stage="train", site=None, model=None)[
        1
    ]


def same(one: Arrays, other: Arrays) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def reason(tmp_path: Path) -> str:
    return str(Journal(tmp_path / "site" / "journal.jsonl").read("refused")[-1]["reason"])


def test_no_private_training_without_an_account(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="account"):
        trainer_of(tmp_path / "site", PLAN, cohort, None)


def test_no_private_training_of_a_plan_or_patients_that_are_not_registered(
    cohort: Cohort, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    ledger = ledger_of(folder)
    with pytest.raises(PrivacyError, match="not registered"):
        trainer_of(folder, PLAN, cohort, account_of(ledger, PLAN, folder))
    fewer = Cohort(cohort.site, cohort.cases[1:], cohort.label_map)
    assert cohort.cases[0].split == "train"
    register(ledger, PLAN, fewer)
    with pytest.raises(PrivacyError, match="1 patients of the cohort"):
        trainer_of(folder, PLAN, cohort, account_of(ledger, PLAN, folder))
    weaker = PLAN.model_copy(
        update={"calibrated": PLAN.noise.model_copy(update={"training": 0.06})}
    )
    with pytest.raises(PrivacyError, match="another plan"):
        trainer_of(folder, weaker, fewer, account_of(ledger, weaker, folder))


def test_a_repeated_task_gets_the_stored_answer_and_costs_nothing(
    cohort: Cohort, tmp_path: Path
) -> None:
    trainer = site(tmp_path, PLAN, cohort)
    first = trainer.handle(train_task())
    again = trainer.handle(train_task())
    other_attempt = train_task(attempt=2)
    second = trainer.handle(other_attempt)
    reopened = site(tmp_path, PLAN, cohort).handle(train_task())
    delta = delta_of(first, train_task())
    for answer, asked in ((again, train_task()), (second, other_attempt), (reopened, train_task())):
        assert same(delta_of(answer, asked), delta) and len(answer) == len(first)
    book = ledger_of(tmp_path / "site").book
    assert len(book.debits) == 1
    assert len(Journal(tmp_path / "site" / "journal.jsonl").read("trained")) == 1
    assert body_of(first) == Trained(patients=None, steps=2, loss=None)


def test_another_model_of_a_round_is_another_release_and_the_schedule_ends(
    cohort: Cohort, tmp_path: Path
) -> None:
    trainer = site(tmp_path, PLAN, cohort)
    for shift in range(3):
        model = {name: np.add(a, np.float32(shift), dtype=np.float32) for name, a in MODEL.items()}
        answer = trainer.handle(train_task(model=model))
        assert body_of(answer).kind == ("train" if shift < 2 else "refused")
    assert "schedule" in reason(tmp_path)
    assert len(Journal(tmp_path / "site" / "journal.jsonl").read("trained")) == 2


def test_a_register_that_was_exchanged_before_the_debit_charges_nobody_else(
    cohort: Cohort, tmp_path: Path
) -> None:
    """Another cohort is approved between a trainer's look at the register and its first debit."""
    plan = private_plan(3, metrics=1.0, **OPTIONS)
    trainer = site(tmp_path, plan, cohort)
    ledger = ledger_of(tmp_path / "site")
    splits = {case.split: case.name for case in cohort.cases}
    fewer = cohort.without([splits["train"], splits["val"]])
    register(ledger, plan, fewer)
    for stage in ("train", "evaluate"):
        asked = task(plan, stage, 1, MODEL)
        assert body_of(trainer.handle(asked)) == Refused(code="plan")
        assert "not in the ledger's register" in reason(tmp_path)
    assert not list((tmp_path / "site" / "answers").glob("*.answer"))
    again = trainer_of(tmp_path / "site", plan, fewer, account_of(ledger, plan, tmp_path / "site"))
    assert body_of(again.handle(task(plan, "train", 1, MODEL))).kind == "train"
    (debit,) = (d for d in ledger.refresh().debits.values() if d.use == "train")
    assert debit.attempts == 2 and debit.answer


def test_work_that_a_crash_cut_short_begins_anew_with_fresh_noise_and_no_new_debit(
    cohort: Cohort, tmp_path: Path
) -> None:
    trainer = site(tmp_path, PLAN, cohort)
    folder = tmp_path / "site"
    header = peek(train_task(), TaskHeader, max_bytes=10**7)
    account = account_of(ledger_of(folder), PLAN, folder)
    seen = []

    def cut_short() -> tuple[Body, Arrays]:
        seen.append(trainer._train_privately(header, MODEL)[1])
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            account.answer(header, cut_short)
    _, delta = account.answer(header, lambda: trainer._train_privately(header, MODEL))
    first, second = seen
    assert first and second and delta
    assert not same(first, second) and not same(second, delta)
    (debit,) = ledger_of(folder).book.debits.values()
    assert debit.attempts == 3 and debit.answer


def test_an_answer_that_was_stored_before_a_crash_is_the_answer(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = site(tmp_path, PLAN, cohort)

    def no_room(*_: object) -> None:
        raise StorageError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(Ledger, "commit", no_room)
        assert body_of(trainer.handle(train_task())).kind == "refused"
    (stored,) = (tmp_path / "site" / "answers").glob("*.answer")
    data = stored.read_bytes()
    assert stored.stat().st_mode & 0o777 == 0o600
    answer = site(tmp_path, PLAN, cohort).handle(train_task())
    assert body_of(answer).kind == "train"
    assert stored.read_bytes() == data
    assert len(Journal(tmp_path / "site" / "journal.jsonl").read("trained")) == 1


def test_a_crashed_attempt_is_not_remembered_in_any_later_round(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a retry would be a second release of one debit: the first is in the next round."""
    trainer = site(tmp_path, PLAN, cohort)
    assert PLAN.training.optimiser.state == "keep"

    def power_cut(*_: object, **__: object) -> None:
        raise StorageError("dark")

    def remembered() -> Memory:
        return Memories(tmp_path / "site" / "state", PLAN).before(2)

    with monkeypatch.context() as broken:
        broken.setattr(sites.spending, "write_atomically", power_cut)
        assert body_of(trainer.handle(train_task())).kind == "refused"
    assert len(Journal(tmp_path / "site" / "journal.jsonl").read("trained")) == 1
    assert remembered() == Memory()
    with monkeypatch.context() as broken:  # it was answered and committed, then the lights went out
        broken.setattr(Memories, "accept", power_cut)
        assert body_of(trainer.handle(train_task())).kind == "refused"
    assert remembered() == Memory()
    again = site(tmp_path, PLAN, cohort)
    assert body_of(again.handle(train_task())).kind == "train"
    assert len(Journal(tmp_path / "site" / "journal.jsonl").read("trained")) == 2
    assert remembered().optimiser
    assert not list((tmp_path / "site" / "state").glob("*.proposed"))


def test_a_retry_whose_weights_are_not_finite_leaves_nothing_of_the_attempt_before(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = site(tmp_path, PLAN, cohort)

    def power_cut(*_: object, **__: object) -> None:
        raise StorageError("dark")

    def explode(*_: object, **__: object) -> None:
        raise NotFiniteError("not finite")

    with monkeypatch.context() as broken:
        broken.setattr(sites.spending, "write_atomically", power_cut)
        trainer.handle(train_task())
    with monkeypatch.context() as broken:
        broken.setattr(sites.trainer, "train_round_privately", explode)
        assert body_of(trainer.handle(train_task())).kind == "refused"
    assert ledger_of(tmp_path / "site").book.debits.popitem()[1].answer
    assert Memories(tmp_path / "site" / "state", PLAN).before(2) == Memory()


@pytest.mark.parametrize("fate", ["changed", "removed"])
def test_a_committed_answer_that_is_lost_is_never_worked_for_again(
    fate: str, cohort: Cohort, tmp_path: Path
) -> None:
    trainer = site(tmp_path, PLAN, cohort)
    trainer.handle(train_task())
    (stored,) = (tmp_path / "site" / "answers").glob("*.answer")
    if fate == "removed":
        stored.unlink()
    else:
        data = bytearray(stored.read_bytes())
        data[-1] ^= 1
        stored.write_bytes(data)
    answer = trainer.handle(train_task())
    assert body_of(answer).model_dump() == {"kind": "refused", "code": "task"}
    assert len(Journal(tmp_path / "site" / "journal.jsonl").read("trained")) == 1


def test_no_budget_no_training(cohort: Cohort, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    ledger = ledger_of(folder)
    register(ledger, PLAN, cohort)
    poor = replace(LIMITS, total_epsilon=1e-3)
    account = Account(ledger, PLAN, folder / "answers", lambda: poor)
    trainer = trainer_of(folder, PLAN, cohort, account)
    answer = trainer.handle(train_task())
    assert body_of(answer).model_dump() == {"kind": "refused", "code": "plan"}
    assert not ledger_of(folder).book.debits and not (folder / "state").exists()


def test_weights_that_run_away_are_answered_once(cohort: Cohort, tmp_path: Path) -> None:
    wild = private_plan(
        3,
        training={"optimiser": {"name": "sgd", "learning_rate": 1e38, "weight_decay": 1e5}},
        **OPTIONS,
    )
    trainer = site(tmp_path, wild, cohort)
    asked = task(wild, "train", 1, initial_model(wild)[1])
    for _ in range(2):
        # Not "not_finite", which is coarser for a private plan.
        assert body_of(trainer.handle(asked)).model_dump() == {"kind": "refused", "code": "failed"}
    (debit,) = ledger_of(tmp_path / "site").book.debits.values()
    assert debit.attempts == 1 and debit.answer
    assert "not finite" in reason(tmp_path)


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_patient_that_cannot_be_read_shows_in_nothing_that_leaves(
    stage: str, cohort: Cohort, tmp_path: Path
) -> None:
    asked = task(NOISED, stage, 1, MODEL)
    answers = {}
    for name, gone in (("whole", False), ("broken", True)):
        cases: Sequence[Any] = cohort.cases
        if gone:
            nowhere = (tmp_path / "nowhere.nii.gz",)
            split = "train" if stage == "train" else "val"
            first = next(c for c in cases if c.split == split)
            cases = [replace(c, images=nowhere) if c == first else c for c in cases]
        own = Cohort(cohort.site, tuple(cases), cohort.label_map)
        (tmp_path / name).mkdir()
        trainer = site(tmp_path / name, NOISED, own, noise=lambda p: Noise.seeded(1, p))
        answers[name] = trainer.handle(asked)
    whole, broken = answers["whole"], answers["broken"]
    assert len(whole) == len(broken)
    said, heard = body_of(whole), body_of(broken)
    assert said.kind == heard.kind == stage
    assert list(said.model_dump()) == list(heard.model_dump())
    if stage == "train":
        assert said == heard
        assert delta_of(whole, asked, NOISED).keys() == delta_of(broken, asked, NOISED).keys()
        (entry,) = Journal(tmp_path / "broken" / "site" / "journal.jsonl").read("trained")
        assert entry["lost"] == 2


def test_noised_metrics_are_paid_for_by_held_back_patients(cohort: Cohort, tmp_path: Path) -> None:
    trainer = site(tmp_path, NOISED, cohort)
    asked = task(NOISED, "evaluate", 1, MODEL)
    first, again = trainer.handle(asked), trainer.handle(asked)
    said = body_of(first)
    assert said == body_of(again)
    assert said.kind == "evaluate" and said.patients is None
    assert 0 <= (said.scores["dice"]["ball"] or 0) <= 1
    (debit,) = ledger_of(tmp_path / "site").book.debits.values()
    assert debit.use == "val" and debit.mechanism.noise_multiplier == 3.0


def test_withheld_metrics_are_neither_measured_nor_charged(cohort: Cohort, tmp_path: Path) -> None:
    trainer = site(tmp_path, PLAN, cohort)
    said = body_of(trainer.handle(task(PLAN, "evaluate", 1, MODEL)))
    assert said.kind == "evaluate" and said.patients is None
    assert said.scores == {"dice": {"ball": None}}
    assert not ledger_of(tmp_path / "site").book.debits


def test_a_patient_who_withdrew_is_charged_and_not_read(cohort: Cohort, tmp_path: Path) -> None:
    trainer = site(tmp_path, PLAN, cohort)
    ledger = ledger_of(tmp_path / "site")
    for patient in cohort.split("train").patients:
        ledger.withdraw(ledger.key_of(patient), "asked for it")
    assert body_of(trainer.handle(train_task())).kind == "train"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    ledger = ledger_of(tmp_path / "site")
    assert all(ledger.book.charges(ledger.key_of(p)) for p in cohort.split("train").patients)


def test_a_task_must_acknowledge_a_head_that_the_ledger_had(cohort: Cohort, tmp_path: Path) -> None:
    trainer = site(tmp_path, PLAN, cohort)
    first = trainer.handle(train_task())
    head = peek(first, AnswerHeader, max_bytes=10**7).head
    assert head
    good = train_task(2, heads={cohort.site: head})
    assert body_of(trainer.handle(good)).kind == "train"
    bad = train_task(2, heads={cohort.site: "0" * 64})
    assert body_of(trainer.handle(bad)).model_dump() == {"kind": "refused", "code": "task"}


def test_a_reservation_is_for_a_model_not_an_attempt() -> None:
    header = peek(train_task(), TaskHeader, max_bytes=10**7)
    key = reservation_of(header)
    assert key == reservation_of(header.model_copy(update={"attempt": 2, "heads": {"a": "0" * 64}}))
    others = [{"round": 2}, {"model": "0" * 64}, {"stage": "evaluate"}, {"plan": "0" * 64}]
    assert len({key, *(reservation_of(header.model_copy(update=u)) for u in others)}) == 5


def test_two_threads_with_one_task_have_one_answer(cohort: Cohort, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    trainers = [site(tmp_path, PLAN, cohort) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda trainer: trainer.handle(train_task()), trainers))
    deltas = [delta_of(answer, train_task()) for answer in answers]
    assert same(deltas[0], deltas[1]) and same(deltas[0], deltas[2])
    assert len(Journal(tmp_path / "site" / "journal.jsonl").read("trained")) == 1


def test_a_stored_answer_of_another_task_is_not_given(cohort: Cohort, tmp_path: Path) -> None:
    trainer = site(tmp_path, PLAN, cohort)
    trainer.handle(train_task())
    folder = tmp_path / "site"
    (stored,) = (folder / "answers").glob("*.answer")
    header = peek(train_task(2), TaskHeader, max_bytes=10**7)
    stored.rename(stored.with_name(f"000002-train-{reservation_of(header)}.answer"))
    account = account_of(ledger_of(folder), PLAN, folder)
    with pytest.raises(TrustError, match="another task"):
        account.answer(header, lambda: trainer._train_privately(header, MODEL))
