"""What a hospital's audit says of the data that a model was made of, through every fine-tuning."""

from __future__ import annotations

from pathlib import Path

from small_hospitals import (
    NOW,
    STUDY,
    Hospital,
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    text,
)
from small_plans import tiny_model

from fedseg.alone import plan_alone
from fedseg.modelfile import ModelHeader, save_model
from sites.approval import frozen_record
from sites.audit import record
from sites.heldback import House
from sites.origins import made_of_other_data

OTHER = "0" * 64


def header(site: Hospital, folder: Path, seed: int, arm: str, rounds: int = 3) -> ModelHeader:
    """Of a model of the site's study; each seed is another model."""
    plan = site.consortium.plan
    plan = plan_alone(plan) if arm == "local" else plan
    released = OTHER if arm == "finetuned" else None
    model = tiny_model(seed)
    return save_model(folder / f"{seed}", plan, model, arm=arm, rounds=rounds, released=released)


def warned(site: Hospital, fingerprint: str, *headers: ModelHeader) -> list[bool]:
    """Of which models a warning comes."""
    house = House(site.folder, site.signing)
    return [bool(made_of_other_data(house, {"it": each}, fingerprint)) for each in headers]


def tuned(site: Hospital, start: ModelHeader, model: ModelHeader, data: str) -> None:
    """The entry of a fine-tuning."""
    facts = {"start": start.model_digest, "model": model.model_digest, "data": data}
    record(site.folder, site.signing, "finetuned", lambda: text(NOW), **facts)


def approved_data(site: Hospital) -> str:
    """Fingerprint of the data that the plan was approved with."""
    found = frozen_record(site.folder, STUDY, site.consortium.plan.digest)
    assert found is not None
    return found.fingerprint


def test_what_a_model_was_fine_tuned_from_counts_however_often(
    site: Hospital, tmp_path: Path
) -> None:
    here = approved_data(site)
    local, first, second = (
        header(site, tmp_path, seed, arm)
        for seed, arm in enumerate(("local", "finetuned", "finetuned"), 1)
    )
    facts = {"model": local.model_digest, "data": here}
    record(site.folder, site.signing, "trained_locally", lambda: text(NOW), **facts)
    tuned(site, local, first, here)
    tuned(site, first, second, here)
    assert warned(site, here, local, first, second) == [False, False, False]
    facts["data"] = OTHER
    record(site.folder, site.signing, "trained_locally", lambda: text(NOW), **facts)
    assert warned(site, here, local, first, second) == [True, True, True]


def test_only_the_start_of_other_data_warns_of_what_came_from_it(
    site: Hospital, tmp_path: Path
) -> None:
    here = approved_data(site)
    start, first, second = (header(site, tmp_path, seed, "finetuned") for seed in (1, 2, 3))
    tuned(site, start, first, OTHER)
    tuned(site, first, second, here)
    assert warned(site, here, start, first, second) == [False, True, True]


def test_a_model_of_no_round_was_trained_on_nobody(site: Hospital, tmp_path: Path) -> None:
    initial = header(site, tmp_path, 1, "initial", rounds=0)
    shared = header(site, tmp_path, 2, "federated")
    assert warned(site, OTHER, initial, shared) == [False, True]
