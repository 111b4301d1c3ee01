"""The study plan: what is refused and with which words, and what its digest depends on."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from small_plans import built_plan, private_plan, values

from fedseg.errors import PlanError
from fedseg.plan import MOST_TOLD, StudyPlan, load_plan, parse_plan
from fedseg.schema import TensorSpec
from fedseg.strictyaml import MAX_BYTES


def parse(**changes: Any) -> StudyPlan:
    return parse_plan(yaml.safe_dump(values(**changes)).encode())


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        ({"study": "Tiny Study"}, "study", "should match pattern"),
        ({"study": None}, "study", "fedseg plan new"),
        ({"stduy": "tiny"}, "stduy", "misspelt"),
        ({"training__optimizer": {}}, "training.optimizer", "misspelt"),
        ({"aggregation__learning_rate": 1.0}, "aggregation.learning_rate", "wrong section"),
        ({"format": "fedseg-plan/2"}, "format", "fedseg-plan/1"),
        ({"task__spacing_mm": [1.0, 1.0]}, "task", r"spacing_mm needs 3 numbers .* not 2"),
        ({"task__patch_size": [8, 8]}, "task", r"patch_size needs 3 numbers"),
        ({"task__spacing_mm": [1.0, 1.0, 0.0]}, "task.spacing_mm.2", "greater than 0"),
        (
            {"task__spacing_mm": [1.0, 1.0, float("nan")]},
            "task.spacing_mm.2",
            "greater than|finite",
        ),
        ({"task__labels": {"a": 1, "b": 3}}, "task", r"labels must be numbered 1, 2, 3.*manifest"),
        ({"task__labels": {"a": 0, "b": 1}}, "task", r"0 is the background"),
        ({"task__labels": {}}, "task.labels", "at least 1 item"),
        ({"task__channels": []}, "task.channels", "at least 1 item"),
        ({"task__dimensions": 4}, "task.dimensions", "2 or 3"),
        (
            {"task__channels": [{"name": "ct", "modality": "CT"}]},
            "task",
            r"normalisation\.CT\.window_hu is missing.*\[-160, 240\]",
        ),
        (
            {"task__normalisation": {"CT": {"window_hu": [240, -160]}}},
            "task.normalisation.CT",
            "lower end must be below the upper",
        ),
        (
            {"task__normalisation": {"CT": {"window_hu": [float("-inf"), 0.0]}}},
            "task.normalisation.CT.window_hu.0",
            "finite",
        ),
        (
            {"task__normalisation": {"MR": {"percentiles": [60, 99]}}},
            "task.normalisation.MR.percentiles.0",
            "less than 50",
        ),
        ({"task__patch_size": [8, 9, 8]}, "plan", r"multiple of 2.*change \[9\]"),
        ({"task__patch_size": [2, 2, 2]}, "plan", "single voxel.*enlarge the patch"),
        ({"model__version": "2"}, "model", "unet has version 1"),
        ({"model__options": {"channels": [4]}}, "model.channels", "at least 2 items"),
        ({"model__options": {"chanels": [4, 8]}}, "model.chanels", "misspelt"),
        (
            {"model__options": {"channels": [4, 6], "norm": "group", "groups": 4}},
            "model",
            r"groups=4 does not divide the channels \[6\]",
        ),
        ({"model__options": {"norm": "batch"}}, "model.norm", "mixes patients.*use instance"),
        ({"model__options": {"norm": "BATCH_NORM"}}, "model.norm", "mixes patients"),
        (
            {"model": {"network": "own", "options": {"x": [1.0, float("nan")]}}},
            "model",
            "must be finite",
        ),
        (
            {"training__steps_per_round": 0},
            "training.steps_per_round",
            "greater than or equal to 1",
        ),
        ({"training__foreground_share": float("nan")}, "training.foreground_share", "less than"),
        ({"training__seed": 2**63}, "training.seed", "less than"),
        ({"training__optimiser": {"state": "stay"}}, "training.optimiser.state", "keep"),
        ({"training__augmentation": {"flip_axes": [3]}}, "training.augmentation.flip_axes.0", "2"),
        (
            {"training__schedule": {"warmup_rounds": 3}},
            "plan",
            r"warmup_rounds must be below .*\(3\)",
        ),
        (
            {"aggregation__strategy": "fedprox"},
            "aggregation",
            r"proximal_mu must be above 0.*0\.01",
        ),
        ({"aggregation__proximal_mu": 0.1}, "aggregation", "proximal_mu belongs to fedprox"),
        ({"aggregation__minimum_sites": 0}, "aggregation.minimum_sites", "greater than or equal"),
        ({"aggregation__round_timeout_s": float("inf")}, "aggregation.round_timeout_s", "finite"),
        ({"aggregation__server_momentum": 1.0}, "aggregation.server_momentum", "less than 1"),
        ({"evaluation__metrics": ["nsd"]}, "evaluation", "must name dice"),
        ({"evaluation__metrics": ["dice", "dice"]}, "evaluation", "each metric once"),
        ({"privacy__guarantee": "central"}, "privacy", "'none', 'local'"),
        ({"initial": {"digest": "0" * 64, "tensors": []}}, "initial.tensors", "at least 1 item"),
        ({"initial": {"digest": "x", "tensors": []}}, "initial.digest", "pattern"),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(
    changes: dict[str, Any], field: str, remedy: str
) -> None:
    with pytest.raises(PlanError) as caught:
        parse(**changes)
    lines = [line for line in str(caught.value).splitlines() if line.startswith(f"  {field}: ")]
    assert lines, str(caught.value)
    assert any(re.search(remedy, line) for line in lines), lines


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"aggregation__weighting": "patients"}, r"weighting: patients .* say uniform"),
        ({"training__gradient_clip_norm": 12.0}, r"gradient_clip_norm must be null"),
        ({"privacy__release_after_s": 60.0}, r"below aggregation\.round_timeout_s \(60\)"),
        ({"privacy__outputs": {"metrics": "noised"}}, r"hd95 has no upper end"),
        ({"privacy__expected_validation": None}, r"declared, not counted"),
    ],
)
def test_a_private_plan_refuses_what_would_break_it(changes: dict[str, Any], remedy: str) -> None:
    plan = private_plan().model_dump(mode="json")
    plan["privacy"]["outputs"] = {"metrics": "noised"}
    plan["privacy"]["expected_validation"] = 2
    plan["evaluation"]["metrics"] = ["dice"]
    if "outputs" in str(changes):
        plan["evaluation"]["metrics"] = ["dice", "hd95"]
    for path, value in changes.items():
        section, _, field = path.partition("__")
        plan[section][field] = value
    with pytest.raises(PlanError, match=remedy):
        parse_plan(yaml.safe_dump(plan).encode())


def test_a_2d_task_takes_no_third_axis() -> None:
    task = {"dimensions": 2, "spacing_mm": [1, 1], "patch_size": [8, 8]}
    changes = {f"task__{key}": value for key, value in task.items()}
    assert parse(**changes).task.dimensions == 2
    with pytest.raises(PlanError, match="flip_axes names an axis the task does not have"):
        parse(**changes, training__augmentation={"flip_axes": [2]})


def test_every_wrong_field_is_told_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        parse(study="A", training__batch_size=0, evaluation__every_rounds=0)
    assert str(caught.value).count("\n  ") == 3


def test_of_very_many_wrong_fields_the_first_are_told() -> None:
    with pytest.raises(PlanError) as caught:
        parse(study="A", task__spacing_mm=["far"] * 300)
    *told, rest = str(caught.value).split("\n  ")
    assert len(told) == 1 + MOST_TOLD and rest == f"and {301 - MOST_TOLD} more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be a YAML mapping"),
        (b"- 1\n- 2\n", "must be a YAML mapping"),
        (b"study: a\nstudy: b\n", "the key 'study' is given twice"),
        (b"task: {labels: {a: 1, a: 2}}\n", "the key 'a' is given twice"),
        (b"a: &x [1]\nb: *x\n", r"aliases \(\*name\) are not allowed"),
        (b"a: &x [*x]\n", "aliases"),
        (b"a: &x {b: 1}\nc:\n  <<: *x\n", "aliases"),
        (b"a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        (b"a: !!int abc\n", "not valid YAML"),
        (b"a: !!bool abc\n", "not valid YAML"),
        (b'a: !!int ""\n', "not valid YAML"),
        (b"a: 2001-99-99\n", "not valid YAML"),
        (b"? [a, b]\n: 1\n", "not valid YAML"),
        (b"? {a: b}\n: 1\n", "not valid YAML"),
        (b"a: " + b"9" * 5000, "not valid YAML"),
        (b"a: \x00", "not valid YAML"),
        (b"a: \xff\xfe", "not valid YAML"),
        (b"[" * 20_000, "not valid YAML"),
        (b"a: [1, 2\n", "not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b" " * (MAX_BYTES + 1), f"larger than {MAX_BYTES} bytes"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_plan_is_a_plan_error(text: bytes, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(text)


def test_a_bomb_of_aliases_is_refused_before_it_grows() -> None:
    bomb = ["model:", "  network: own", "  options:", "    a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 12):
        bomb.append(f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]")
    started = time.process_time()
    with pytest.raises(PlanError, match="aliases"):
        parse_plan("\n".join(bomb).encode())
    assert time.process_time() - started < 2


def test_many_keys_take_no_quadratic_time() -> None:
    text = b"".join(b"key%d: 1\n" % n for n in range(10_000))
    started = time.process_time()
    with pytest.raises(PlanError):
        parse_plan(text)
    assert time.process_time() - started < 10


def test_a_file_that_is_not_there_is_a_plan_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(PlanError, match="cannot read the plan"):
            load_plan(path)


def test_key_order_defaults_and_notation_leave_the_digest() -> None:
    plan = parse()
    backwards = dict(reversed(values().items()))
    text = json.dumps(backwards, indent=3).replace("1.0", "1.00")
    assert parse_plan(text.encode()).digest == plan.digest
    spelt_out = plan.model_dump(mode="json")
    assert StudyPlan.model_validate(spelt_out).digest == plan.digest
    assert parse(task__spacing_mm=[1, 1, 2]).digest == plan.digest


def test_canonical_bytes_are_sorted_json_that_gives_the_same_plan() -> None:
    plan = built_plan()
    value = json.loads(plan.canonical_bytes)
    assert plan.canonical_bytes == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    assert parse_plan(plan.canonical_bytes) == plan
    assert parse_plan(plan.canonical_bytes).canonical_bytes == plan.canonical_bytes


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: Any = None
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    if inner is None:
        return [path]
    return [leaf for key, part in inner for leaf in _leaves(part, (*path, key))]


def _changed(leaf: Any) -> list[Any]:
    """Other values for one field; at least one of them holds in every field that has a choice."""
    if isinstance(leaf, bool):
        return [not leaf]
    if isinstance(leaf, (int, float)):
        return [leaf + 0.25, leaf + 1, leaf + 2, leaf * 0.5, leaf - 0.25]
    words = ["CT", "MR", "group", "sgd", "reset", "constant", "uniform", "hd95", "own", "float64"]
    words += ["none", "suppressed", "norms", "patients"]
    return [*words, f"{leaf}x", "0" * 64, 1.0]


def test_any_changed_value_changes_the_digest() -> None:
    options = {"channels": [4, 8], "groups": 4}
    normalisation = {"CT": {"window_hu": [-100.0, 200.0]}}
    plan = built_plan(
        task__normalisation=normalisation,
        model__options=options,
        aggregation__weighting="uniform",  # with it, counts may be withheld
    )
    original = json.loads(plan.canonical_bytes)
    only_choice = {"format", "loss", "guarantee", "rule", "proximal_mu", "ditto_lambda"}
    only_choice |= {"server_momentum", "server_beta2", "server_tau"}  # of other strategies
    for path in _leaves(original):
        digests = set()
        leaf = _at(original, path)
        for other in (value for value in _changed(leaf) if value != leaf):
            value = json.loads(plan.canonical_bytes)
            _at(value, path[:-1])[path[-1]] = other
            try:
                digests.add(StudyPlan.model_validate(value).digest)
            except ValidationError:
                continue
        assert plan.digest not in digests, path
        alone = (
            path[-1] in only_choice
            or path == ("calibrated",)
            or path in {("task", "dimensions"), ("model", "version")}
        )
        alone = (
            alone
            or path[:2] in {("task", "labels"), ("evaluation", "metrics")}
            or path == ("aggregation", "strategy")
        )
        assert digests or alone, path


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_a_plan_is_frozen() -> None:
    plan = built_plan()
    for part, field in ((plan, "study"), (plan.task, "dimensions"), (plan.training, "seed")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, getattr(part, field))


def test_a_plan_that_is_not_built_says_how() -> None:
    with pytest.raises(PlanError, match="fedseg plan build"):
        _ = parse().built
    assert built_plan().built.nbytes == 4 * (6 + 2 + 1)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("float32", (2, 3), 24), ("float64", (), 8), ("float16", (0, 9), 0), ("uint8", (5,), 5)],
)
def test_a_spec_knows_its_size(dtype: Any, shape: tuple[int, ...], nbytes: int) -> None:
    assert TensorSpec(name="x", shape=shape, dtype=dtype).nbytes == nbytes
