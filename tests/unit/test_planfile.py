"""Plan files: the examples hold, and building records the initial model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_plans import values
from typer.testing import CliRunner

from fedseg import modelfile
from fedseg.arrays import digest_of, schema_of
from fedseg.cli import app
from fedseg.errors import DataError, PlanError, PrivacyError, RoundError, TrustError
from fedseg.modelfile import load_model, save_model
from fedseg.plan import load_plan, parse_plan
from fedseg.planfile import (
    EXAMPLES,
    build,
    example,
    initial_path,
    load_initial,
    load_written,
    write_example,
)
from fedseg.privacy.promised import require_kept

TEXT = """\
# why this study exists
study: tiny            # a comment that stays
task:
  dimensions: 3
  channels: [{name: T1w, modality: MR}]
  labels: {anterior: 1, posterior: 2}
  spacing_mm: [1, 1, 2]
  patch_size: [8, 8, 8]
model:
  options: {channels: [4, 8]}
# the end
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_holds(name: str) -> None:
    assert parse_plan(example(name).encode()).initial is None
    assert "#" in example(name)


@pytest.mark.parametrize("name", ["mr-3d", "mr-3d-private"])
def test_an_example_shows_every_field_of_its_guarantee(name: str) -> None:
    text = example(name)
    plan = parse_plan(text.encode())
    section = text[text.index("\nprivacy:") :]
    for field in (*type(plan.privacy).model_fields, *type(plan.privacy.outputs).model_fields):
        assert f"{field}:" in section, field


def test_the_private_example_keeps_its_promise_once_built(path: Path) -> None:
    path.write_text(example("mr-3d-private").replace("[32, 64, 128]", "[4, 8, 16]"))
    plan = build(path)
    assert plan.private is not None and plan == load_plan(path)
    found = require_kept(plan)
    assert 7.9 < found.train.epsilon <= 8.0
    assert found.held_back is not None and 7.9 < found.held_back.epsilon <= 8.0
    assert plan.private.outputs.counts == plan.private.outputs.losses == "none"


@pytest.mark.parametrize("size", [2, 7])
def test_a_batch_size_under_a_guarantee_is_refused_since_nothing_reads_it(
    path: Path, size: int
) -> None:
    text = example("mr-3d-private").replace("[32, 64, 128]", "[4, 8, 16]")
    path.write_text(text.replace("training:\n", f"training:\n  batch_size: {size}\n"))
    before = path.read_text()
    for act in (build, load_written):
        with pytest.raises(PlanError, match=r"training\.batch_size .* privacy\.rate"):
            act(path)
    assert path.read_text() == before
    path.write_text(text)
    plan = build(path)
    path.write_bytes(plan.canonical_bytes + b"\n")
    assert load_written(path) == plan, "the canonical bytes name every default"
    build(path)
    assert path.read_text().startswith("{\n"), "built again it is indented"
    assert load_written(path) == plan


def test_a_plan_is_checked_and_shown_with_its_noise(path: Path) -> None:
    path.write_text(example("mr-3d-private").replace("[32, 64, 128]", "[4, 8, 16]"))
    runner = CliRunner(env={"COLUMNS": "200"})
    shown = runner.invoke(app, ["plan", "show", str(path)])
    assert "not calibrated yet: fedseg plan build" in shown.output
    plan = build(path)
    shown = runner.invoke(app, ["plan", "show", str(path)])
    checked = runner.invoke(app, ["plan", "check", str(path)])
    for output in (shown.output, checked.output):
        assert f"multiplier {plan.noise.training:.4g} in each of 24 releases gives" in output
        assert "at delta 0.001" in output and "MORE THAN" not in output
    assert checked.exit_code == 0
    weak = path.read_text().replace(repr(plan.noise.training), repr(plan.noise.training / 2))
    path.write_text(weak)
    checked = runner.invoke(app, ["plan", "check", str(path)])
    assert isinstance(checked.exception, PrivacyError)
    shown = runner.invoke(app, ["plan", "show", str(path)])
    assert "MORE THAN PROMISED (8)" in " ".join(shown.output.split())


def test_a_plan_without_a_guarantee_says_so_when_it_is_checked(path: Path) -> None:
    checked = CliRunner().invoke(app, ["plan", "check", str(path)])
    assert checked.exit_code == 0 and "privacy guarantee: None: images stay" in checked.output


def test_the_first_example_shows_every_field() -> None:
    plan = parse_plan(example().encode())
    text = example()
    for section, value in plan.model_dump(exclude={"initial", "calibrated"}).items():
        assert f"{section}:" in text
        for field in value if isinstance(value, dict) else ():
            assert field in text, f"{section}.{field}"


def test_building_records_digest_and_schema_and_keeps_comments(path: Path) -> None:
    before = load_plan(path)
    plan = build(path)
    header, tensors = load_model(initial_path(path))
    assert plan == load_plan(path) == header.plan
    assert plan.model_copy(update={"initial": None}) == before
    assert plan.built.digest == digest_of(tensors) == header.model_digest
    assert plan.built.tensors == schema_of(tensors)
    assert path.read_text().startswith(TEXT)
    assert (header.arm, header.rounds) == ("initial", 0)


def test_building_twice_gives_the_same_bytes(path: Path) -> None:
    build(path)
    once = path.read_bytes(), initial_path(path).read_bytes()
    build(path)
    assert (path.read_bytes(), initial_path(path).read_bytes()) == once


def test_a_changed_plan_is_built_anew(path: Path) -> None:
    first = build(path)
    path.write_text(path.read_text() + "training: {seed: 3}\n")
    second = build(path)
    assert second.training.seed == 3
    assert second.built.digest != first.built.digest
    assert path.read_text().count("initial:") == 1
    assert path.read_text().count("Written by") == 1


@pytest.mark.parametrize(
    "tail",
    ["initial: null\n", "initial:\n\n", f"initial:\n  digest: {'a' * 64}\n\n  tensors: []\n"],
)
def test_an_initial_block_in_the_middle_is_replaced(path: Path, tail: str) -> None:
    path.write_text(tail + TEXT)
    if "tensors" in tail:
        path.write_text(tail.replace("[]", "[{name: x, shape: [1], dtype: float32}]") + TEXT)
    plan = build(path)
    assert load_plan(path) == plan
    assert path.read_text().startswith(TEXT)


def test_a_plan_that_does_not_hold_is_left_alone(path: Path) -> None:
    path.write_text(TEXT.replace("[8, 8, 8]", "[8, 9, 8]"))
    before = path.read_bytes()
    with pytest.raises(PlanError, match="multiple of 2"):
        build(path)
    assert path.read_bytes() == before
    assert not initial_path(path).exists()


def test_the_initial_model_is_found_beside_the_plan(path: Path) -> None:
    assert load_initial(path) is None
    plan = build(path)
    found = load_initial(path)
    assert found is not None
    assert digest_of(found) == plan.built.digest
    initial_path(path).unlink()
    assert load_initial(path) is None


def test_a_wrong_initial_model_is_refused(path: Path) -> None:
    plan = build(path)
    tensors = {name: a + 1 for name, a in load_model(initial_path(path))[1].items()}
    save_model(initial_path(path), plan, tensors, arm="initial", rounds=0)
    with pytest.raises(PlanError, match="not the model that the plan names"):
        load_initial(path)


def test_a_damaged_initial_model_is_refused(path: Path) -> None:
    build(path)
    data = bytearray(initial_path(path).read_bytes())
    data[-1] ^= 1
    initial_path(path).write_bytes(data)
    with pytest.raises(TrustError, match="not the ones that its header names"):
        load_initial(path)


def test_a_model_file_names_its_own_plan(path: Path, tmp_path: Path) -> None:
    plan = build(path)
    data = initial_path(path).read_bytes()
    other = data.replace(plan.digest.encode(), b"0" * 64)
    assert other != data
    (tmp_path / "other").write_bytes(other)
    with pytest.raises(TrustError, match="digest is not that of the plan"):
        load_model(tmp_path / "other")
    with pytest.raises(DataError, match="cannot read the model"):
        load_model(tmp_path / "none")


def test_a_model_file_beyond_all_bounds_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(modelfile.MAX_MODEL_BYTES + 1)  # sparse
    monkeypatch.setattr(Path, "read_bytes", lambda _path: pytest.fail("it was read"))
    with pytest.raises(TrustError, match="at most 8589934592 are allowed"):
        load_model(tmp_path / "large")


def test_an_example_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    write_example(path, example())
    with pytest.raises(DataError, match="is there already"):
        write_example(path, example())


def test_a_plan_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RoundError, match="cannot write"):
        write_example(tmp_path / "file" / "plan.yaml", example())


def test_a_model_without_axes_survives(tmp_path: Path) -> None:
    plan = parse_plan(TEXT.encode())
    save_model(tmp_path / "m", plan, {"x": np.float32(3)}, arm="local", rounds=2)
    header, tensors = load_model(tmp_path / "m")
    assert (header.arm, header.rounds, tensors["x"].shape) == ("local", 2, ())
    assert values()["study"] == header.plan.study
