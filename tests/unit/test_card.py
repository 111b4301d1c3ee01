"""Model cards: only what is known, the worst hospital first, loudly where nothing is private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_plans import built_plan, private_plan, tiny_model
from study_results import HOSPITALS, make_plan, make_result, make_stages

from fedseg.modelfile import save_model
from fedseg.plan import StudyPlan
from fedseg.privacy.promised import record_of
from fedseg.reports.card import ModelCard, card_of_history, card_of_model, card_of_result
from fedseg.reports.cardpage import CARD, to_markdown, write_card
from fedseg.result import SiteAnswer, StageRecord

SECTIONS = (
    "Model details",
    "Intended use",
    "Factors",
    "Metrics",
    "Evaluation data",
    "Training data",
    "Quantitative analyses",
    "Ethical considerations",
    "Caveats and recommendations",
    "How to load it",
)
MODEL = "c" * 64


def sections(text: str) -> dict[str, str]:
    parts = text.split("\n## ")[1:]
    return {part.split("\n")[0]: part for part in parts}


def front(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def bare_history(sites: tuple[str, ...] = ("a", "b")) -> tuple[StageRecord, ...]:
    """Everybody enlists and trains, and tells no number."""
    return tuple(
        StageRecord(
            round=round_,
            stage=stage,
            attempt=1,
            bytes_down=1,
            bytes_up=1,
            answers=tuple(SiteAnswer(site=s, patients=None, bytes_up=1) for s in sites),
            failures=(),
        )
        for round_, stage in ((0, "enlist"), (1, "train"), (1, "release"))
    )


def test_every_standard_section_is_there_in_order() -> None:
    text = to_markdown(card_of_result(make_result()))
    assert tuple(sections(text)) == SECTIONS


def test_the_worst_hospital_is_the_first_that_is_read_and_the_first_in_the_front_matter() -> None:
    result = make_result()
    card = card_of_result(result)
    last = [record for record in result.stages if record.stage == "evaluate"][-1]
    worst = min(last.answers, key=lambda answer: answer.mean_dice or 0.0)
    text = to_markdown(card)
    assert card.measured[0].site == worst.site
    assert (
        sections(text)["Quantitative analyses"]
        .split("\n")[2]
        .startswith(f"The shared model fares worst at {worst.site}".replace("_", "\\_"))
    )
    (entry,) = front(text)["model-index"]
    assert entry["results"][0]["dataset"]["name"] == f"held-back patients of {worst.site}"
    dice = {m["type"]: m["value"] for m in entry["results"][0]["metrics"]}["dice"]
    assert dice == pytest.approx(worst.mean_dice, abs=1e-6)


def test_digests_and_numbers_are_those_of_the_study() -> None:
    result = make_result()
    card = card_of_result(result)
    assert (card.plan, card.model, card.rounds) == (result.plan_digest, result.model_digest, 20)
    assert card.training is not None
    told = {site.site: (site.patients, site.rounds) for site in card.training}
    assert told["hospital_1"] == (30, 20)
    assert told["hospital_3"][1] == 18  # it failed in two rounds
    assert "simulated on one computer" in " ".join(card.caveats)


def test_what_was_not_told_is_said_not_to_be_told() -> None:
    plan = built_plan(privacy={"guarantee": "none", "outputs": {"metrics": "none"}})
    card = card_of_history(plan, bare_history(), MODEL, sites=("c",))
    text = to_markdown(card)
    assert "Numbers of patients of a, b, c." in card.missing
    assert "How the model does at a, b, c." in card.missing
    assert "model-index" not in front(text)
    assert sections(text)["Training data"].count("not told") == 3
    assert "withheld" in sections(text)["Evaluation data"]
    assert "Licence: not told by the plan." in text
    assert [site.rounds for site in card.training or ()] == [1, 1, 0]


def test_a_plan_without_a_guarantee_says_that_there_is_none() -> None:
    card = card_of_history(make_plan(), make_stages(4, HOSPITALS, ("anterior", "posterior")), MODEL)
    assert card.standing == "none"
    assert card.guarantee[0].startswith("NO GUARANTEE: images stay in their hospitals, but updates")
    assert "**NO GUARANTEE" in to_markdown(card)


def private_cards() -> tuple[ModelCard, ModelCard, StudyPlan]:
    plan, history = private_plan(), bare_history()
    kept, seeded = (
        card_of_history(plan, history, MODEL, guarantee=record_of(plan, history, private=private))
        for private in (True, False)
    )
    return kept, seeded, plan


def test_a_guarantee_names_epsilon_delta_and_unit_and_a_seeded_one_is_not_private() -> None:
    kept, seeded, plan = private_cards()
    assert plan.private is not None
    assert f"({plan.private.epsilon:g}, {plan.private.delta:g})-differential" in kept.guarantee[0]
    assert "each patient" in kept.guarantee[0] and kept.standing == "kept"
    assert front(to_markdown(kept))["tags"][-1] == "differential-privacy"
    text = to_markdown(seeded)
    assert "**NOT PRIVATE: the noise of this study came from a seed" in text
    assert "-differential privacy" not in text and "not-private" in front(text)["tags"]


def test_a_hospitals_card_knows_the_plan_and_no_other_hospital(tmp_path: Path) -> None:
    plan = built_plan()
    header = save_model(
        tmp_path / "tiny.safetensors", plan, tiny_model(), arm="federated", rounds=3
    )
    card = card_of_model(header, "tiny.safetensors")
    assert card.training is None and card.measured == ()
    text = to_markdown(card)
    assert "fedseg predict tiny.safetensors IMAGE1 --out masks" in text
    assert "Which hospitals took part" in " ".join(card.missing)
    assert not card.stays


def test_a_model_of_one_hospital_says_that_it_stays(tmp_path: Path) -> None:
    header = save_model(
        tmp_path / "own.safetensors",
        built_plan(),
        tiny_model(),
        arm="personal",
        rounds=3,
        released="d" * 64,
    )
    text = to_markdown(card_of_model(header))
    assert "keep it here" in text and "Any use outside of this hospital" in text
    assert f"Made from the shared model (SHA-256): `{'d' * 64}`" in text


def test_names_of_the_study_are_no_markup() -> None:
    task = make_plan().task.model_copy(update={"labels": {"<b>[x](y) `z`|": 1}})
    plan = make_plan().model_copy(update={"task": task})
    text = to_markdown(card_of_history(plan, (), MODEL))
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert "](y)" not in text.replace("\\](y)", "")


def test_both_files_hold_the_same_and_equal_studies_give_equal_bytes(tmp_path: Path) -> None:
    card = card_of_result(make_result())
    write_card(card, tmp_path / CARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-card.json", "model-card.md"]
    read = ModelCard.model_validate_json((tmp_path / "model-card.json").read_bytes())
    assert read == card
    assert json.loads(card.to_json()) == json.loads(card_of_result(make_result()).to_json())
    assert (tmp_path / CARD).read_text(encoding="utf-8") == to_markdown(read)
