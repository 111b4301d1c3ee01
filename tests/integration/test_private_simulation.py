"""A private study from beginning to end on phantoms: what leaves, what it costs, what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_studies import lasting, tiny_private_plan

from fedseg.errors import DataError, PlanError, PrivacyError
from fedseg.modelfile import load_model
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.privacy.ledger import AuditWitness, Ledger
from fedseg.promise import Calibration
from fedseg.result import StudyResult, load_result
from fedseg.security.keys import SigningKey
from fedseg.simulation import Options, simulate

SITES = ("hospital_a", "hospital_b", "hospital_c", "hospital_d")


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    """A private study with a pooled baseline."""
    out = tmp_path_factory.mktemp("private") / "out"
    return out, simulate(tiny_private_plan(), data, out, Options(baselines=("pooled",)))


def ledger_of(out: Path, site: str) -> Ledger:
    folder = out / "federated" / "sites" / site
    key = SigningKey((folder / "signing.key").read_bytes())
    witness = AuditWitness(folder / "audit.jsonl", key, lambda: "now")
    secret = (folder / "ledger.secret").read_bytes()
    return Ledger.open(folder / "ledger.sqlite", secret, witness, lambda: "now")


def test_a_private_study_states_its_guarantee_and_measures_its_model(
    study: tuple[Path, StudyResult],
) -> None:
    out, result = study
    record = result.guarantee
    assert record is not None and record.private
    assert 0 < record.epsilon_spent <= record.epsilon == 8.0
    assert "NOT PRIVATE" not in record.text
    federated = result.arm("federated")
    assert federated and all(p.mean_dice is not None for p in federated.patients)
    initial = result.arm("initial")
    assert initial and initial.gradient_steps == 0
    assert set(initial.models.values()) == {result.plan.built.digest}
    assert len(initial.patients) == len(federated.patients)
    assert load_model(out / "model.safetensors")[0].private is True
    assert load_model(out / "model-pooled.safetensors")[0].private is None
    assert load_result(out / "result.json") == result


def test_nothing_leaves_but_what_the_plan_lets_out(study: tuple[Path, StudyResult]) -> None:
    sizes: dict[str, set[int]] = {}
    for stage in study[1].stages:
        for answer in stage.answers:
            sizes.setdefault(stage.stage, set()).add(answer.bytes_up)
            assert not answer.patients and answer.loss is None and answer.head is None
            if stage.stage == "evaluate":
                assert all(0 <= (v if v is not None else -1) <= 1
                           for v in answer.scores["dice"].values())  # fmt: skip
    assert all(len(found) == 1 for found in sizes.values())


def test_every_round_is_in_the_ledger_of_every_site(study: tuple[Path, StudyResult]) -> None:
    for site in SITES:
        book = ledger_of(study[0], site).book
        uses = [debit.use for debit in book.debits.values()]
        assert (uses.count("train"), uses.count("val")) == (3, 2)
        assert all(debit.answer and debit.attempts == 1 for debit in book.debits.values())
        assert book.left("tiny") == ()


def test_a_seeded_run_repeats_and_says_that_it_is_not_private(data: Path, tmp_path: Path) -> None:
    plan = tiny_private_plan(aggregation={"rounds": 2})
    seeded = Options(noise_seed=5)
    first = simulate(plan, data, tmp_path / "first", seeded)
    simulate(plan, data, tmp_path / "again", seeded)
    assert lasting(tmp_path / "first") == lasting(tmp_path / "again")
    assert first.guarantee is not None and not first.guarantee.private
    assert "NOT PRIVATE" in first.guarantee.text
    assert load_model(tmp_path / "first" / "model.safetensors")[0].private is False
    other = simulate(plan, data, tmp_path / "other", Options(noise_seed=6))
    assert other.model_digest != first.model_digest
    site = tmp_path / "first" / "federated" / "sites" / "hospital_a"
    (model,) = (site / "models").glob("*.safetensors")
    assert load_model(model)[0].private is False
    with pytest.raises(DataError, match="--noise-seed 5"):
        simulate(plan, data, tmp_path / "first", Options(resume=True))


def test_a_seed_without_a_guarantee_is_refused(data: Path, plan: StudyPlan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="noise-seed"):
        simulate(plan, data, tmp_path / "out", Options(noise_seed=5))


def test_weaker_noise_than_the_promise_needs_is_refused(data: Path, tmp_path: Path) -> None:
    weak = tiny_private_plan().model_copy(
        update={"calibrated": Calibration(training=0.3, metrics=2.0)}
    )
    with pytest.raises(PrivacyError, match="epsilon"):
        simulate(weak, data, tmp_path / "out")


def test_a_private_study_trains_the_part_that_the_plan_names(data: Path, tmp_path: Path) -> None:
    plan = tiny_private_plan(
        training={"gradient_clip_norm": None, "trainable": "head"}, aggregation={"rounds": 2}
    )
    simulate(plan, data, tmp_path / "out", Options(baselines=("pooled",)))
    start = initial_model(plan)[1]
    for name in ("model", "model-pooled"):
        model = load_model(tmp_path / "out" / f"{name}.safetensors")[1]
        changed = {key for key in model if not np.array_equal(model[key], start[key])}
        assert changed and len({key.rpartition(".")[0] for key in changed}) == 1


def test_a_run_notes_where_its_noise_came_from(study: tuple[Path, StudyResult]) -> None:
    assert json.loads((study[0] / "noise.json").read_bytes()) == {"seed": None}
