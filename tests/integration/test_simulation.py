"""A whole study in one process: what it leaves behind, and that equal studies are equal."""

from __future__ import annotations

import csv
import json
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tiny_studies import SITES, cohorts_of, lasting, tiny_federation, tiny_plan

import fedseg
from fedseg.arrays import digest_of
from fedseg.errors import DataError, PlanError
from fedseg.modelfile import load_model
from fedseg.models.zoo import build_network, load_tensors
from fedseg.plan import StudyPlan
from fedseg.reports.card import ModelCard
from fedseg.result import StudyResult, load_result, mean_of
from fedseg.simulation import Options, simulate
from fedseg.simulation.running import run_federation

Undisturbed = tuple[Path, StudyResult]


def test_the_model_file_tells_all_that_is_needed_to_use_it(undisturbed: Undisturbed) -> None:
    out, result = undisturbed
    header, tensors = load_model(out / "model.safetensors")
    assert (header.plan, header.arm, header.rounds) == (result.plan, "federated", 3)
    assert header.model_digest == result.model_digest == digest_of(tensors)
    assert header.plan_digest == result.plan_digest == result.plan.digest
    load_tensors(build_network(header.plan.model, header.plan.task), tensors)


def test_every_baseline_leaves_its_model(undisturbed: Undisturbed) -> None:
    out, result = undisturbed
    trained = [arm for arm in result.arms if arm.name != "finetuned"]
    for arm in trained:
        for site, digest in arm.models.items():
            name = {"federated": "model", "pooled": "model-pooled"}.get(
                arm.name, f"model-local-{site}"
            )
            header, _ = load_model(out / f"{name}.safetensors")
            assert header.model_digest == digest
            assert (header.arm, header.stays) == (arm.name, arm.name == "local")


def test_the_result_on_disk_is_the_one_that_was_returned(undisturbed: Undisturbed) -> None:
    out, result = undisturbed
    assert load_result(out / "result.json") == result
    schema = json.loads((Path(__file__).parents[2] / "docs" / "result.schema.json").read_bytes())
    assert set(schema["required"]) <= set(json.loads((out / "result.json").read_bytes()))


def test_the_card_beside_the_model_is_true_and_its_lines_load_it(
    undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = undisturbed
    card = ModelCard.model_validate_json((out / "model-card.json").read_bytes())
    assert (card.model, card.plan) == (result.model_digest, result.plan_digest)
    assert sorted(site.site for site in card.measured) == sorted(SITES)
    lines = (out / "model-card.md").read_text(encoding="utf-8").split("```python\n")[1]
    monkeypatch.chdir(out)
    found: dict[str, Any] = {}
    exec(lines.split("```")[0], found)
    assert found["header"].model_digest == result.model_digest
    assert digest_of(found["tensors"]) == result.model_digest


def test_every_site_has_a_card_beside_its_model(undisturbed: Undisturbed) -> None:
    out, result = undisturbed
    for site in SITES:
        models = out / "federated" / "sites" / site / "models"
        (path,) = models.glob("*-card.json")
        card = ModelCard.model_validate_json(path.read_bytes())
        assert (card.model, card.training) == (result.model_digest, None)
        assert not any(other in path.read_text(encoding="utf-8") for other in SITES)


def test_every_stage_and_patient_is_in_the_result(undisturbed: Undisturbed) -> None:
    _, result = undisturbed
    stages = [(record.round, record.stage) for record in result.stages]
    third = [(3, "train"), (3, "evaluate"), (3, "release")]
    assert stages == [(0, "enlist"), (1, "train"), (2, "train"), (2, "evaluate"), *third]
    assert all([a.site for a in record.answers] == list(SITES) for record in result.stages)
    assert not any(record.failures for record in result.stages)
    assert [arm.name for arm in result.arms] == ["federated", "pooled", "local", "finetuned"]
    held_back = sum(site.patients["val"] for site in result.sites)
    assert all(len(arm.patients) == held_back for arm in result.arms)
    assert all(mean_of(p.dice) is not None for arm in result.arms for p in arm.patients)


def test_every_site_has_the_released_model(undisturbed: Undisturbed) -> None:
    out, result = undisturbed
    for site in SITES:
        models = out / "federated" / "sites" / site / "models"
        about, model = load_model(models / f"{result.plan.study}.safetensors")
        assert digest_of(model) == about.model_digest == result.model_digest


def test_every_arm_takes_the_same_number_of_steps(undisturbed: Undisturbed) -> None:
    _, result = undisturbed
    study = [arm for arm in result.arms if arm.name != "finetuned"]
    assert {arm.gradient_steps for arm in study} == {len(SITES) * 3 * 2}
    assert set(result.run.compute_s) == {"federated", "pooled", "local", "finetuned"}


def test_the_traffic_is_what_was_sent(undisturbed: Undisturbed) -> None:
    _, result = undisturbed
    model = result.plan.built.nbytes
    for record in result.stages:
        carried_down, carried_up = record.stage != "enlist", record.stage == "train"
        assert (record.bytes_down > len(SITES) * model) == carried_down
        assert (record.bytes_up > len(SITES) * model) == carried_up
        assert record.bytes_up == sum(answer.bytes_up for answer in record.answers)


def test_curves_are_there_as_a_table_and_for_tensorboard(undisturbed: Undisturbed) -> None:
    out, result = undisturbed
    with (out / "curves.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    train = next(r for r in result.stages if r.stage == "train").answers[0]
    losses = [r for r in rows if (r["round"], r["site"], r["metric"]) == ("1", train.site, "loss")]
    assert [float(row["value"]) for row in losses] == [train.loss]
    runs = {folder.name for folder in (out / "tensorboard").iterdir()}
    assert runs == {*SITES, "all_sites"}
    assert all(any(folder.iterdir()) for folder in (out / "tensorboard").iterdir())


def test_the_report_needs_nothing_from_outside(undisturbed: Undisturbed) -> None:
    out, result = undisturbed
    html = (out / "report.html").read_text(encoding="utf-8")
    loads = re.findall(r"""(?:src|srcset|data|action|poster)\s*=\s*["']?([^"'\s>]+)""", html)
    assert len([load for load in loads if load.startswith("data:image/")]) > len(SITES)
    assert not [load for load in loads if re.match(r"(?:https?:)?//", load)]
    assert not re.search(r"<link[^>]+href|@import|url\(\s*['\"]?(?!data:|#)", html)
    assert "<script src" not in html
    assert all(site in html for site in SITES)
    assert result.plan_digest in html
    assert result.model_digest in html


def test_prepared_cases_are_closed_to_others(undisturbed: Undisturbed) -> None:
    cache = undisturbed[0] / "cache"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.iterdir()} == {0o600}


def test_equal_studies_give_equal_bytes(
    undisturbed: Undisturbed, data: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    options = Options(baselines=("pooled", "local"))
    fedseg.simulate(plan, str(data), str(tmp_path / "out"), options)
    assert lasting(tmp_path / "out") == lasting(undisturbed[0])
    curves = (tmp_path / "out" / "curves.csv").read_bytes()
    assert curves == (undisturbed[0] / "curves.csv").read_bytes()


def test_another_seed_gives_another_model(
    undisturbed: Undisturbed, data: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(training={"seed": 8})
    federation = tiny_federation(plan, cohorts_of(data, plan), tmp_path / "f", tmp_path / "cache")
    assert digest_of(run_federation(federation).state.server.model) != undisturbed[1].model_digest


def _shuffled(seed: int) -> Callable[[list[int]], list[int]]:
    """Another order of nodes at every call."""
    rng = Random(seed)
    return lambda nodes: rng.sample(nodes, len(nodes))


@pytest.mark.parametrize(
    "arrange",
    [lambda nodes: sorted(nodes, reverse=True), _shuffled(1), _shuffled(2)],
    ids=["reversed", "shuffled", "shuffled again"],
)
def test_the_order_of_the_answers_changes_no_bit(
    arrange: Callable[[list[int]], list[int]],
    undisturbed: Undisturbed,
    data: Path,
    plan: StudyPlan,
    tmp_path: Path,
) -> None:
    federation = tiny_federation(plan, cohorts_of(data, plan), tmp_path / "f", tmp_path / "cache")
    finished = run_federation(federation, arrange=arrange)
    assert digest_of(finished.state.server.model) == undisturbed[1].model_digest
    assert finished.state.history == undisturbed[1].stages


def test_the_order_of_the_sites_changes_no_bit(
    undisturbed: Undisturbed, data: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    cohorts = cohorts_of(data, plan)[::-1]
    federation = tiny_federation(plan, cohorts, tmp_path / "f", tmp_path / "cache")
    finished = run_federation(federation)
    assert digest_of(finished.state.server.model) == undisturbed[1].model_digest
    assert finished.state.history == undisturbed[1].stages


def test_without_one_site_the_model_is_another(
    undisturbed: Undisturbed, data: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    cohorts = cohorts_of(data, plan)[:3]
    federation = tiny_federation(plan, cohorts, tmp_path / "f", tmp_path / "cache")
    state = run_federation(federation).state
    assert digest_of(state.server.model) != undisturbed[1].model_digest
    assert all(np.isfinite(array).all() for array in state.server.model.values())


def test_too_few_sites_are_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    plan = tiny_plan(aggregation={"minimum_sites": 5})
    with pytest.raises(PlanError, match="minimum_sites is 5, but the data have 4"):
        simulate(plan, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_refused(data: Path, plan: StudyPlan, tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("keep me")
    with pytest.raises(DataError, match="not empty"):
        simulate(plan, data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def test_data_without_sites_are_divided(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    with (data / "sites.csv").open(newline="") as stream:
        rows = [
            ",".join((subject, split, patient)) for subject, _, split, patient in csv.reader(stream)
        ]
    (copy / "sites.csv").write_text("\n".join(rows))
    plan = tiny_plan(aggregation={"rounds": 2})
    result = simulate(plan, copy, tmp_path / "out", Options(partition="iid", sites=3))
    assert len(result.sites) == 3
    assert sum(sum(site.cases.values()) for site in result.sites) == len(rows) - 1
