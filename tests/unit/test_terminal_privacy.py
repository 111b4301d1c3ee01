"""What a terminal says of privacy: of a study that begins and ends, and of a model in use."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console
from small_plans import built_plan, private_plan, tiny_model
from study_results import make_result

from fedseg.commands.models import _load
from fedseg.commands.simulations import privacy
from fedseg.modelfile import ModelHeader, load_model, save_model
from fedseg.plan import StudyPlan
from fedseg.planfile import build, example, initial_path
from fedseg.privacy.promised import record_of
from fedseg.result import StageRecord, StudyResult
from fedseg.simulation.display import Display

PLAN = private_plan()


def _result(plan: StudyPlan, private: bool = True) -> StudyResult:
    result = make_result(rounds=2)
    stages: tuple[StageRecord, ...] = result.stages
    return result.model_copy(
        update={"plan": plan, "guarantee": record_of(plan, stages, private=private)}
    )


def _said(plan: StudyPlan, *, seeded: bool = False) -> str:
    console = Console(file=StringIO(), width=200, record=True)
    Display(plan, console, seeded=seeded)
    return console.export_text()


def test_a_study_begins_with_its_guarantee() -> None:
    assert "(4, 0.001)-differential privacy for each patient" in _said(PLAN)
    assert _said(PLAN, seeded=True).startswith("NOT PRIVATE")
    assert "differential privacy" not in _said(PLAN, seeded=True)


def test_a_study_ends_with_what_it_spent() -> None:
    spent = privacy(_result(PLAN))
    assert spent.startswith("privacy: epsilon 3.") and "of 4 spent at delta 0.001" in spent
    assert "NOT PRIVATE" in privacy(_result(PLAN, private=False))
    assert "NONE" in privacy(_result(built_plan()))


def test_a_result_and_its_guarantee_belong_together() -> None:
    value = _result(PLAN).model_dump()
    assert StudyResult.model_validate(value).guarantee is not None
    with pytest.raises(ValidationError, match="belong together"):
        StudyResult.model_validate(value | {"guarantee": None})
    with pytest.raises(ValidationError, match="belong together"):
        StudyResult.model_validate(value | {"plan": built_plan().model_dump()})


@pytest.mark.parametrize(
    ("plan", "rounds", "seeded", "private"),
    [
        (PLAN, 3, False, True),
        (PLAN, 3, True, False),
        (PLAN, 0, False, None),
        (built_plan(), 3, False, None),
    ],
)
def test_a_model_file_says_whether_it_keeps_a_guarantee(
    tmp_path: Path, plan: StudyPlan, rounds: int, seeded: bool, private: bool | None
) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, plan, tiny_model(), arm="federated", rounds=rounds, seeded=seeded)
    assert load_model(path)[0].private is private


def test_no_model_keeps_a_guarantee_that_its_plan_does_not_give(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, built_plan(), tiny_model(), arm="federated", rounds=3)
    value = load_model(path)[0].model_dump()
    with pytest.raises(ValidationError, match="without a guarantee"):
        ModelHeader.model_validate(value | {"private": True})


def test_a_model_of_a_seeded_run_says_so_when_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(example("mr-3d-private").replace("[32, 64, 128]", "[4, 8, 16]"))
    plan = build(path)
    tensors = load_model(initial_path(path))[1]
    for seeded in (False, True):
        save_model(tmp_path / "m", plan, tensors, arm="federated", rounds=2, seeded=seeded)
        _load(tmp_path / "m", "cpu")
        assert ("NOT PRIVATE" in capsys.readouterr().err) is seeded
