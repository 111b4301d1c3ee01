"""Whom a hospital's audit and notes say that a model was trained on, through every fine-tuning."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from small_hospitals import (
    NOW,
    STUDY,
    Consortium,
    Hospital,
    approved,
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    hospital,
    phantoms,
    text,
    tiny_built,
)
from small_plans import tiny_model

from fedseg.alone import plan_alone
from fedseg.errors import DataError
from fedseg.modelfile import ModelHeader, save_model
from sites.approval import frozen_record
from sites.audit import record
from sites.cohort import load_cohort
from sites.decision import approve
from sites.heldback import SEEN, House, Source, held_back
from sites.origins import Origins, keep_note, known_note, trained_on

OTHER = "0" * 64
EVERYBODY = (*(f"Pa{number:02}" for number in range(1, 7)), "Pa", "Pb", "Pc", "Pd")


def header(site: Hospital, folder: Path, seed: int, arm: str, rounds: int = 3) -> ModelHeader:
    """Of a model of the site's study; each seed is another model."""
    plan = site.consortium.plan
    plan = plan_alone(plan) if arm == "local" else plan
    released = OTHER if arm == "finetuned" else None
    model = tiny_model(seed)
    return save_model(folder / f"{seed}", plan, model, arm=arm, rounds=rounds, released=released)


def origins(site: Hospital, *headers: ModelHeader) -> Origins:
    """Of some models, named by their place."""
    named = {f"{number}": each for number, each in enumerate(headers)}
    return trained_on(House(site.folder, site.signing), named, EVERYBODY)


def entered(site: Hospital, event: str, model: ModelHeader, *patients: str, **facts: str) -> None:
    """A training of some patients is noted, and in the audit."""
    digest = keep_note(site.folder, site.signing, patients)
    now = lambda: text(NOW)  # noqa: E731
    said = {"model": model.model_digest, "trained_on": digest, **facts}
    record(site.folder, site.signing, event, now, **said)


def test_what_a_model_was_fine_tuned_from_counts_however_often(
    site: Hospital, tmp_path: Path
) -> None:
    local, first, second = (header(site, tmp_path, seed, "local") for seed in (1, 2, 3))
    entered(site, "trained_locally", local, "Pa", "Pb")
    entered(site, "finetuned", first, "Pc", start=local.model_digest)
    entered(site, "finetuned", second, "Pd", "Pd", start=first.model_digest)
    assert origins(site, local) == Origins(frozenset({"Pa", "Pb"}))
    assert origins(site, first) == Origins(frozenset({"Pa", "Pb", "Pc"}))
    assert origins(site, second) == Origins(frozenset({"Pa", "Pb", "Pc", "Pd"}))
    assert origins(site, header(site, tmp_path, 4, "local")) == Origins()


def test_every_approval_of_a_plan_counts_for_its_models(tmp_path: Path) -> None:
    plan, model = tiny_built()
    data = phantoms(tmp_path / "data", patients=6)
    site = hospital(tmp_path / "site", data, Consortium(plan, model))
    shared = header(site, tmp_path, 1, "federated")
    initial = header(site, tmp_path, 2, "initial", rounds=0)
    train = load_cohort(site.folder, STUDY, plan).split("train").patients
    assert origins(site, shared) == Origins(frozenset(train))
    assert origins(site, initial) == Origins()
    table = data / "sites.csv"
    table.write_text(table.read_text().replace("train", "test", 1))
    approved(site.folder, site.consortium, data)
    left = load_cohort(site.folder, STUDY, plan).split("train").patients
    assert len(left) == len(train) - 1
    assert origins(site, shared) == Origins(frozenset(train))


@pytest.mark.parametrize("harm", ["missing", "edited", "torn"])
def test_a_note_that_is_not_as_it_was_written_is_not_believed(
    site: Hospital, tmp_path: Path, harm: str
) -> None:
    shared, local = header(site, tmp_path, 1, "federated"), header(site, tmp_path, 2, "local")
    entered(site, "trained_locally", local, "Pa")
    path = site.folder.trained / f"{site.audited('trained_locally')[0].facts['trained_on']}.json"
    if harm == "missing":
        path.unlink()
    else:
        path.write_text('{"patients": []}' if harm == "edited" else "{")
    found = origins(site, shared, local)
    assert found.unknown == ("1",) and found.seen == origins(site, shared).seen
    entered(site, "trained_locally", local, "Pa")
    assert origins(site, local) == Origins(frozenset({"Pa"}))


def test_who_would_not_be_measured_anyway_is_not_said_to_be_left_out(tmp_path: Path) -> None:
    """Patients of val tell a fine-tuning when to stop; its model is measured on test."""
    plan, model = tiny_built()
    data = phantoms(tmp_path / "data", patients=6)
    table = data / "sites.csv"
    table.write_text(table.read_text().replace(",val,", ",test,", 1))
    site = hospital(tmp_path / "site", data, Consortium(plan, model))
    cohort, house = load_cohort(site.folder, STUDY, plan), House(site.folder, site.signing)
    (tested,), (asked,) = cohort.split("test").patients, cohort.split("val").patients
    source, unseen = Source(None), lambda _cases: nullcontext(lambda _name: None)
    shared = header(site, tmp_path, 1, "federated")
    tuned, worse = header(site, tmp_path, 2, "finetuned"), header(site, tmp_path, 3, "finetuned")
    entered(site, "finetuned", tuned, asked, start=shared.model_digest)
    found = held_back({"shared": shared, "tuned": tuned}, source, house, unseen)
    assert (found.split, found.cohort.patients, found.left_out) == ("test", (tested,), {})
    entered(site, "finetuned", worse, tested, start=shared.model_digest)
    found = held_back({"worse": worse}, source, house, unseen)
    assert (found.split, found.cohort.patients, found.left_out) == ("val", (asked,), {SEEN: 1})
    with pytest.raises(DataError, match=f"2 {SEEN}"):
        held_back({"tuned": tuned, "worse": worse}, source, house, unseen)


def test_a_training_that_was_never_noted_brings_a_warning(site: Hospital, tmp_path: Path) -> None:
    local = header(site, tmp_path, 1, "local")
    record(
        site.folder, site.signing, "trained_locally", lambda: text(NOW), model=local.model_digest
    )
    assert origins(site, local) == Origins(unknown=("0",))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as others")
def test_root_believes_no_note_that_the_trainer_could_not_read(site: Hospital) -> None:
    (note,) = site.folder.trained.iterdir()
    with tempfile.TemporaryDirectory(prefix="fedseg-test-") as name:
        ours = Path(name) / "ours.json"
        note.rename(ours)
        note.symlink_to(ours)
        os.chown(site.folder.trainer, 65533, 65533)
        assert known_note(site.folder, note.stem) is None
    assert os.geteuid() == 0


def test_names_are_in_no_note_and_cannot_be_tried_without_the_key(tmp_path: Path) -> None:
    """Two hospitals with the same names share no hash."""
    hidden = []
    for name in ("one", "other"):
        data = phantoms(tmp_path / name, patients=6)
        site = hospital(tmp_path / f"{name}-site", data)
        train = load_cohort(site.folder, STUDY, site.consortium.plan).split("train").patients
        (note,) = site.folder.trained.iterdir()
        assert not [patient for patient in train if patient in note.read_text()]
        found = known_note(site.folder, note.stem)
        assert found is not None and len(found.patients) == len(train)
        hidden.append(set(found.patients))
    assert not hidden[0] & hidden[1]


def test_approving_the_same_data_again_reads_none_of_them(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a new list of sites, say; a note that is gone is written again."""
    plan, key = site.consortium.plan, site.signing
    frozen = frozen_record(site.folder, STUDY, plan.digest)
    assert frozen is not None
    again = partial(
        approve, site.folder, STUDY, frozen, key, any_later_sites=True, by="me",
        now=lambda: text(NOW),
    )  # fmt: skip
    with monkeypatch.context() as unread:
        unread.setattr("sites.cohort.recorded_cohort", pytest.fail)
        again()
    (note,) = site.folder.trained.iterdir()
    note.unlink()
    again()
    assert list(site.folder.trained.iterdir()) == [note]
    assert [entry.facts["trained_on"] for entry in site.audited("plan_approved")] == [note.stem] * 3


def test_notes_are_for_the_trainer_alone(site: Hospital) -> None:
    notes = list(site.folder.trained.iterdir())
    assert notes and stat.S_IMODE(site.folder.trained.stat().st_mode) == 0o700
    assert {stat.S_IMODE(note.stat().st_mode) for note in notes} == {0o600}
