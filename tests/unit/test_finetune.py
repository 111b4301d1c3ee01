"""Fine-tuning at one hospital: what each kind trains, when it stops, and that a kill hurts none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from private_plans import private_plan
from test_local import case_of, plan_of

from fedseg.arrays import digest_of
from fedseg.errors import DataError, PlanError
from fedseg.imaging.cases import Case, Cohort
from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.finetune import (
    KINDS,
    Finetuning,
    Kind,
    State,
    finetune,
    finetuned_model,
    finetuning_plan,
    has_stopped,
)
from fedseg.learning.finetuned import finetune_to_the_end, looks, save_finetuned
from fedseg.learning.local import train_round
from fedseg.learning.stopping import TooFewError, divided
from fedseg.modelfile import load_model, save_model
from fedseg.models.parts import freeze
from fedseg.models.zoo import build_network, initial_model, load_tensors, readapted, state_tensors
from fedseg.network import Adapters
from fedseg.plan import StudyPlan
from fedseg.planfile import build

PATIENTS = {f"p{i}": [case_of(i)] for i in range(3)}
STOPPING = {"q": [case_of(7)]}
SHORT = Finetuning(steps=6, check_every=2, patience=10, learning_rate=0.01, rank=1)


def built(**changes: Any) -> tuple[StudyPlan, dict[str, Any]]:
    plan = plan_of(**changes)
    record, model = initial_model(plan)
    return plan.model_copy(update={"initial": record}), dict(model)


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before if not np.array_equal(before[name], after[name])}


def tuned(
    kind: Kind, plan: StudyPlan, model: dict[str, Any], **more: Any
) -> tuple[dict[str, Any], State]:
    """The last weights (not the best ones) in the plan's schema, and the last state."""
    settings = SHORT.model_copy(update={"kind": kind, **more})
    *_, last = finetune(plan, model, PATIENTS, STOPPING, settings, site="A")
    pretended = State(last.model, last.optimiser, last.model, (0.0, *last.scores[1:], 2.0))
    return finetuned_model(plan, model, settings, pretended), last


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_its_own_part_in_the_schema_of_the_plan(kind: Kind) -> None:
    plan, model = built()
    after, _ = tuned(kind, plan, model)
    load_tensors(build_network(plan.model, plan.task), after)
    network = build_network(plan.model, plan.task)
    parts = {"head": "head", "norms": "norms"}
    if kind in parts:
        assert changed(model, after) == set(freeze(network, parts[kind]))  # type: ignore[arg-type]
    elif kind == "adapters":
        found = changed(model, after)
        assert found and all(name.endswith("weight") and model[name].ndim > 1 for name in found)
    else:
        assert changed(model, after) == {n for n, _ in network.named_parameters()}


def test_the_pull_keeps_ditto_nearer_to_the_shared_model() -> None:
    plan, model = built()

    def moved(kind: Kind, **more: Any) -> float:
        after, _ = tuned(kind, plan, model, steps=20, check_every=10, **more)
        return float(sum(np.square(after[n] - model[n]).sum() for n in model))

    free, tied, hard = moved("full"), moved("ditto", pull=1.0), moved("ditto", pull=20.0)
    assert hard < tied < free
    assert moved("ditto", pull=1e-12) == pytest.approx(free, rel=1e-4)


def test_its_steps_are_those_of_a_round() -> None:
    """No second training loop: full fine-tuning is `train_round` under its own plan."""
    plan, model = built()
    own = finetuning_plan(plan, SHORT)
    network = build_network(plan.model, plan.task)
    load_tensors(network, model)
    optimiser = None
    for round_ in (1, 2, 3):
        outcome = train_round(
            network, PATIENTS, own, round_=round_, site="A", optimiser_state=optimiser
        )
        optimiser = outcome.optimiser_state
    assert digest_of(tuned("full", plan, model)[0]) == digest_of(state_tensors(network))


def test_the_best_of_all_looks_is_kept_and_the_start_is_one_of_them() -> None:
    plan, model = built(optimiser={"learning_rate": 0.01})
    states = list(finetune(plan, model, PATIENTS, STOPPING, SHORT, site="A"))
    assert len(states) == looks(plan, SHORT) == 4
    last = states[-1]
    assert digest_of(last.best) == digest_of(states[last.best_check].model)
    assert last.scores[last.best_check] == max(last.scores)
    wild = SHORT.model_copy(update={"learning_rate": 50.0})
    start = next(finetune(plan, model, PATIENTS, STOPPING, wild, site="A"))
    good = State(start.model, {}, start.best, (1.0,))
    *_, lost = finetune(plan, model, PATIENTS, STOPPING, wild, site="A", start=good)
    assert lost.best_check == 0
    assert digest_of(finetuned_model(plan, model, wild, lost)) == digest_of(model)


def test_it_stops_after_as_many_looks_without_a_better_one() -> None:
    plan, model = built()
    settings = SHORT.model_copy(update={"steps": 100, "patience": 2})
    start = State(model, {}, model, (1.0,))
    states = list(finetune(plan, model, PATIENTS, STOPPING, settings, site="A", start=start))
    assert [state.checks for state in states] == [1, 2]
    assert has_stopped(states[-1], settings) and not has_stopped(states[0], settings)


def test_fine_tuning_helps_a_model_that_was_not_trained_here() -> None:
    plan, model = built()
    settings = Finetuning(steps=120, check_every=20, learning_rate=0.02, patience=6)
    *_, last = finetune(plan, model, PATIENTS, STOPPING, settings, site="A")
    assert max(last.scores) > last.scores[0] + 0.3


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_killed_after_any_look_it_ends_with_the_same_bits(kind: Kind, tmp_path: Path) -> None:
    plan, model = built()
    settings = SHORT.model_copy(update={"kind": kind})

    class Kill(Exception):  # noqa: N818
        """Stands for a kill right after the file was written."""

    def run(folder: str, stop: int | None = None) -> Any:
        def told(state: State) -> None:
            if state.checks == stop:
                raise Kill

        return finetune_to_the_end(
            plan, model, PATIENTS, STOPPING, settings,
            site="A", kept=tmp_path / folder, data="d", progress=told,
        )  # fmt: skip

    whole = run("whole")
    for stop in range(3):
        with pytest.raises(Kill):
            run(f"killed-{stop}", stop)
        again = run(f"killed-{stop}")
        assert digest_of(again.model) == digest_of(whole.model)
        assert again.scores == whole.scores and again.steps == whole.steps == 6
    assert (tmp_path / "killed-1").read_bytes() == (tmp_path / "whole").read_bytes()
    assert digest_of(run("whole").model) == digest_of(whole.model)


def test_what_was_kept_of_another_recipe_is_refused(tmp_path: Path) -> None:
    plan, model = built()
    kept = tmp_path / "kept"

    def run(patients: Any, data: str, settings: Finetuning, site: str = "A") -> Any:
        return finetune_to_the_end(
            plan, model, patients, STOPPING, settings, site=site, kept=kept, data=data
        )

    run(PATIENTS, "d", SHORT)
    fewer = {name: PATIENTS[name] for name in ("p0", "p1")}
    other = SHORT.model_copy(update={"seed": 1})
    for attempt in ((fewer, "d", SHORT), (PATIENTS, "e", SHORT), (PATIENTS, "d", other)):
        with pytest.raises(DataError, match="another fine-tuning"):
            run(*attempt)
    with pytest.raises(DataError, match="another fine-tuning"):
        run(PATIENTS, "d", SHORT, "B")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(DataError, match="another fine-tuning"):
        run(PATIENTS, "d", SHORT)


def test_adapters_of_the_study_stay_part_of_its_network() -> None:
    """Whatever is fine-tuned, the result is of the study's own network."""
    plain, model = built()
    adapters = Adapters(rank=1)
    training = plain.training.model_copy(update={"trainable": "adapters"})
    plan = plain.model_copy(
        update={"model": plain.model.model_copy(update={"adapters": adapters}),
                "training": training, "initial": None}
    )  # fmt: skip
    record, fresh = initial_model(plan)
    plan = plan.model_copy(update={"initial": record})
    start = readapted(model, plain.model, plan.model, plan.task, fresh)
    for kind in ("full", "adapters", "norms"):
        after, _ = tuned(kind, plan, start)  # type: ignore[arg-type]
        load_tensors(build_network(plan.model, plan.task), after)
        assert changed(start, after)


def cohort(**patients: str) -> Cohort:
    """A cohort of patients by split, each with one labelled case; `*` marks one without a label."""
    cases = tuple(
        Case(
            name=name,
            patient=name,
            site="A",
            split=split.rstrip("*"),  # type: ignore[arg-type]
            images=(Path(name),),
            label=None if split.endswith("*") else Path(name),
        )
        for name, split in patients.items()
    )
    return Cohort("A", cases)


def test_val_tells_when_to_stop_where_there_is_a_test_split() -> None:
    found = divided(cohort(a="train", b="train", c="val", d="test"), seed=1)
    assert found.training.patients == ("a", "b")
    assert (found.stopping.patients, found.final) == (("c",), "test")


def test_without_a_test_split_val_is_kept_for_the_final_measurement() -> None:
    names = {f"t{i:02d}": "train" for i in range(10)}
    whole = cohort(**names, v="val", u="test*")
    found = divided(whole, seed=1)
    assert found.final == "val" and len(found.stopping.patients) == 2
    assert set(found.stopping.patients) | set(found.training.patients) == set(names)
    assert not set(found.stopping.patients) & set(found.training.patients)
    assert found == divided(whole, seed=1)
    assert len({divided(whole, seed=seed).stopping.patients for seed in range(8)}) > 2
    forced = divided(cohort(**names, v="val", w="test"), seed=1, final="val")
    assert forced.final == "val" and "v" not in forced.stopping.patients


def test_a_patients_cases_are_never_divided() -> None:
    cases = tuple(
        Case(f"{p}{i}", p, "A", "train", (Path(f"{p}{i}"),), Path("x"))
        for p in "abc"
        for i in range(3)
    )
    found = divided(Cohort("A", cases), seed=0)
    assert len(found.stopping.cases) == 3 and len(set(found.stopping.patients)) == 1


@pytest.mark.parametrize(
    ("patients", "words"),
    [
        ({"a": "train", "b": "train", "v": "val"}, "at least 3 .* there are 2"),
        ({"a": "train", "v": "val", "t": "test"}, "at least 2 .* there is 1"),
        ({"a": "train*", "b": "train*", "c": "train*"}, "there are none"),
    ],
)
def test_too_few_patients_are_refused_with_how_many_are_needed(
    patients: dict[str, str], words: str
) -> None:
    with pytest.raises(TooFewError, match=words):
        divided(cohort(**patients), seed=0)


def test_a_fine_tuned_model_says_that_it_stays_and_starts_no_study(tmp_path: Path) -> None:
    plan, model = built()
    settings = SHORT.model_copy(update={"steps": 2})
    done = finetune_to_the_end(
        plan, model, PATIENTS, STOPPING, settings, site="A", kept=tmp_path / "k", data="d"
    )
    save_model(tmp_path / "shared", plan, model, arm="federated", rounds=5)
    shared, _ = load_model(tmp_path / "shared")
    assert not shared.stays
    save_finetuned(tmp_path / "own", plan, done, rounds=5, released=shared.model_digest)
    header, _ = load_model(tmp_path / "own")
    assert (header.arm, header.released) == ("finetuned", digest_of(model)) and header.stays
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
    path = tmp_path / "study.yaml"
    path.write_bytes(plan.canonical_bytes)
    with pytest.raises(PlanError, match="without a guarantee"):
        build(path, tmp_path / "own")
    assert build(path, tmp_path / "shared").built.digest == digest_of(model)


def test_a_model_that_one_hospital_trained_alone_starts_no_study_either(tmp_path: Path) -> None:
    plan, model = built()
    for arm, stays in (("local", True), ("pooled", False)):
        save_model(tmp_path / arm, plan, model, arm=arm, rounds=5)
        assert load_model(tmp_path / arm)[0].stays is stays
    path = tmp_path / "study.yaml"
    path.write_bytes(plan.canonical_bytes)
    with pytest.raises(PlanError, match="without a guarantee"):
        build(path, tmp_path / "local")


def test_a_fine_tuned_model_keeps_no_guarantee_of_its_plan(tmp_path: Path) -> None:
    plan = private_plan()
    for arm, private in (("federated", True), ("personal", True), ("finetuned", False)):
        save_model(tmp_path / arm, plan, {}, arm=arm, rounds=3, released="b" * 64)
        header, _ = load_model(tmp_path / arm)
        assert header.private is private and header.stays is not private
    with pytest.raises(ValueError, match="names the shared one"):
        save_model(tmp_path / "x", plan, {}, arm="finetuned", rounds=3)


def test_labels_that_nobody_drew_do_not_tell_when_to_stop() -> None:
    """A stopping patient who is annotated with nothing that the plan has cannot be measured."""
    plan, model = built()
    bare = case_of(1)
    others = replace(bare, annotated=())
    with pytest.raises(DataError, match="measure against"):
        next(finetune(plan, model, PATIENTS, {"q": [others]}, SHORT, site="A"))
    both = {"q": [bare], "r": [others]}
    alone = next(finetune(plan, model, PATIENTS, {"q": [bare]}, SHORT, site="A"))
    assert next(finetune(plan, model, PATIENTS, both, SHORT, site="A")).scores == alone.scores


def test_a_patient_without_a_label_to_measure_is_refused() -> None:
    plan, model = built()
    bare = case_of(1)
    empty = PreparedCase(bare.image, None, bare.affine_ras, bare.spacing_mm)
    with pytest.raises(DataError, match="measure against"):
        next(finetune(plan, model, PATIENTS, {"q": [empty]}, SHORT, site="A"))
