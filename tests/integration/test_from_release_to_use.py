"""From a release to the clinic: finetune, validate, accept, predict, by the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import pytest
from small_hospitals import Consortium, Hospital, hospital
from tiny_studies import fedseg, tiny_plan

from fedseg.chain import verify_chain
from fedseg.imaging.phantoms import write_phantoms
from fedseg.modelfile import load_model
from fedseg.plan import StudyPlan
from fedseg.simulation import Options, simulate

PLAN = tiny_plan(aggregation={"rounds": 2, "minimum_sites": 1}, training={"steps_per_round": 5})
LOW = "acceptance:\n  dice_at_least: 0.0\n  failures_share_at_most: 1.0\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight patients of one hospital, two of them held back."""
    folder = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(folder, sites=1, patients_per_site=(8,), shape=(20, 20, 20))


@pytest.fixture(scope="module")
def site(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A hospital to which a study's model was released."""
    folder = tmp_path_factory.mktemp("site")
    result = simulate(PLAN, data, folder / "out", Options(finetune=None))
    plan: StudyPlan = result.plan
    _, model = load_model(folder / "out" / "model.safetensors")
    site = hospital(folder / "site", data, Consortium(plan, model))
    released = (folder / "out" / "model.safetensors").read_bytes()
    site.folder.model(plan.study).write_bytes(released)
    site.folder.policy.write_text(f"privacy_none: true\n{LOW}")
    return site


@pytest.mark.slow
def test_a_hospital_goes_all_the_way(site: Hospital, data: Path, tmp_path: Path) -> None:
    at = ("--site", site.folder.path)

    def done(*words: object, status: int = 0) -> str:
        ran = fedseg(*words, *at, module="sites")
        assert ran.returncode == status, ran.stdout + ran.stderr
        assert "Traceback" not in ran.stderr
        return ran.stdout + ran.stderr

    image = sorted((data / "images").glob("*.nii.gz"))[0]
    assert "is in use at this site" in done("predict", image, "--out", tmp_path / "a", status=1)
    quick = ("--steps", 40, "--check-every", 10, "--learning-rate", 0.02)
    assert "does not leave this hospital" in done("finetune", "tiny", *quick)
    own, _ = load_model(site.folder.models / "tiny-finetuned.safetensors")
    refused = done("accept", "tiny-finetuned", "--reason", "looks good", status=1)
    assert "no validation here measured" in refused
    done("validate", "tiny", "tiny-finetuned")
    (validation,) = (site.folder.path / "validations").glob("*/validation.json")
    verdict = json.loads(validation.read_text())["verdict"]["decision"]
    override = ("--override",) if verdict == "no-go" else ()
    done("accept", "tiny-finetuned", *override, "--reason", "better here")
    done("predict", image, "--out", tmp_path / "masks")
    (mask,) = (tmp_path / "masks").iterdir()
    header = nibabel.load(mask).header  # type: ignore[attr-defined]
    assert bytes(header["descrip"].item()).decode() == f"fedseg {own.model_digest}"
    listed = json.loads(done("models", "--json"))["models"]
    states = {each["file"]: each["state"] for each in listed}
    assert states == {"tiny.safetensors": "not decided", "tiny-finetuned.safetensors": "in use"}
    assert done("reject", "tiny-finetuned", "--reason", "a case went wrong")
    assert "is in use at this site" in done("predict", image, "--out", tmp_path / "b", status=1)
    events = [e.event for e in verify_chain(site.folder.audit, site.signing.public)]
    assert events[-4] == "finetuned" and events[-3] == "validated"
    assert events[-2].startswith("model_accepted") and events[-1] == "model_rejected"
