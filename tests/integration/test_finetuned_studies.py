"""Every simulated study ends with each hospital fine-tuning the shared model for itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_studies import lasting, tiny_plan, tiny_private_plan

from fedseg.errors import DataError, PlanError
from fedseg.imaging.phantoms import write_phantoms
from fedseg.learning.finetune import Finetuning
from fedseg.modelfile import load_model
from fedseg.planfile import build, write_example
from fedseg.result import StudyResult
from fedseg.simulation import Options, simulate
from fedseg.simulation.options import Progress

SETTINGS = Finetuning(steps=9, check_every=3, patience=3, learning_rate=0.02)
PLAN = tiny_plan(aggregation={"rounds": 2})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals with 4, 3 and 2 patients to train on: too few at the last."""
    folder = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(folder, sites=3, patients_per_site=(6, 5, 4), shape=(20, 20, 20))


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    out = tmp_path_factory.mktemp("study") / "out"
    return out, simulate(PLAN, data, out, Options(finetune=SETTINGS))


def test_hospitals_with_enough_patients_have_a_model_of_their_own(
    study: tuple[Path, StudyResult],
) -> None:
    out, result = study
    own, shared = result.arm("finetuned"), result.arm("federated")
    assert own is not None and shared is not None
    assert own.models["hospital_c"] == result.model_digest
    assert own.of_site("hospital_c") == shared.of_site("hospital_c")
    files = sorted(path.name for path in out.glob("model-finetuned-*"))
    assert files == [f"model-finetuned-hospital_{x}.safetensors" for x in "ab"]
    for site in ("hospital_a", "hospital_b"):
        header, _ = load_model(out / f"model-finetuned-{site}.safetensors")
        assert (header.arm, header.released) == ("finetuned", result.model_digest)
        assert header.stays and header.model_digest == own.models[site]
    assert any(own.models[site] != result.model_digest for site in own.models)
    assert own.gradient_steps == 2 * 9 and result.run.compute_s["finetuned"] > 0
    page = (out / "report.html").read_text()
    assert "Fine-tuned at each hospital" in page and "hospital_c fine-tuning found nothing" in page


def test_a_study_killed_while_hospitals_fine_tune_ends_with_the_same_bits(
    study: tuple[Path, StudyResult], data: Path, tmp_path: Path
) -> None:
    class Kill(Exception):  # noqa: N818
        """Stands for a kill."""

    def killing(progress: Progress) -> None:
        if progress.event == "fine-tuning at hospital_b (2 of 3)":
            raise Kill

    out = tmp_path / "out"
    with pytest.raises(Kill):
        simulate(PLAN, data, out, Options(finetune=SETTINGS), killing)
    kept = out / "finetuned" / "sites" / "hospital_a" / "finetuning.safetensors"
    before = kept.read_bytes()
    other = Options(finetune=SETTINGS.model_copy(update={"kind": "norms"}), resume=True)
    with pytest.raises(DataError, match="another fine-tuning"):
        simulate(PLAN, data, out, other)
    simulate(PLAN, data, out, Options(finetune=SETTINGS, resume=True))
    assert kept.read_bytes() == before
    assert lasting(out) == lasting(study[0])
    for site in "ab":
        name = f"model-finetuned-hospital_{site}.safetensors"
        assert (out / name).read_bytes() == (study[0] / name).read_bytes()


def test_a_study_may_end_without_it(data: Path, tmp_path: Path) -> None:
    result = simulate(PLAN, data, tmp_path / "out", Options(finetune=None))
    assert [arm.name for arm in result.arms] == ["federated"]
    assert "finetuned" not in result.run.compute_s
    assert not list((tmp_path / "out").glob("*finetuned*"))


def test_no_study_starts_from_what_a_hospital_made_for_itself(
    study: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    own = shutil.copy(study[0] / "model-finetuned-hospital_a.safetensors", tmp_path / "own")
    path = tmp_path / "next.yaml"
    write_example(path, PLAN.model_dump_json())
    with pytest.raises(PlanError, match="does not leave that hospital"):
        build(path, Path(own))


def test_after_a_private_study_it_keeps_no_guarantee_and_says_so(
    data: Path, tmp_path: Path
) -> None:
    plan = tiny_private_plan(aggregation={"rounds": 1}, evaluation={"every_rounds": 1},
                             training={"schedule": {"warmup_rounds": 0}})  # fmt: skip
    out = tmp_path / "out"
    result = simulate(plan, data, out, Options(finetune=SETTINGS))
    assert result.arm("finetuned") is not None
    header, _ = load_model(out / "model-finetuned-hospital_a.safetensors")
    assert header.plan.private is not None and header.private is False and header.stays
    assert load_model(out / "model.safetensors")[0].private is True
    assert "no guarantee covers them" in (out / "report.html").read_text()
