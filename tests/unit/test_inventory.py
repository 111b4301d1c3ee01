"""Models in use at a hospital: accepted on a validation, recorded, superseded, never mistaken."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from small_hospitals import (
    STUDY,
    Hospital,
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    text,
)
from typer.testing import CliRunner, Result
from validation_results import make_validation

from fedseg.arrays import digest_of
from fedseg.chain import Chain
from fedseg.errors import DataError, TrustError
from fedseg.evaluation.validation import Check
from fedseg.modelfile import load_model, save_model
from sites import cli
from sites.acceptance import opinion_of
from sites.inventory import Register, model_in_use, read_register, register_path

FILE = f"{STUDY}.safetensors"


def run(site: Hospital, *words: object) -> Result:
    """A command at a site; what it raises is raised."""
    line = [*map(str, words), "--site", str(site.folder.path)]
    result = CliRunner(mix_stderr=False).invoke(
        cli.app, line, env={"COLUMNS": "300", "NO_COLOR": "1"}
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def listed(site: Hospital) -> dict[str, dict[str, Any]]:
    """What `models --json` says, by file."""
    value = json.loads(run(site, "models", "--json").stdout)
    return {each["file"]: each for each in value["models"]}


def put(site: Hospital, name: str = FILE, factor: float = 1.0, **header: Any) -> str:
    """A model file of the study in models/; its digest."""
    plan, model = site.consortium.plan, site.consortium.model
    changed = {key: np.asarray(array * np.float32(factor)) for key, array in model.items()}
    said = {"arm": "federated", "rounds": 3} | header
    save_model(site.folder.models / name, plan, changed, **said)
    return digest_of(changed)


def validated(site: Hospital, name: str, *models: str, when: str = "1", **changes: Any) -> Path:
    """A validation of these models; by default go for the first, with every threshold met."""
    names = ("finetuned", "global")[: len(models)]
    made = make_validation(names=names, count=12, created=f"2026-06-0{when}T00:00:00+00:00")
    candidates = tuple(
        candidate.model_copy(update={"model_digest": model})
        for candidate, model in zip(made.candidates, models, strict=True)
    )
    verdict = made.verdict.model_copy(
        update={"decision": "go", "recommended": names[0]} | changes.pop("verdict", {})
    )
    made = made.model_copy(update={"candidates": candidates, "verdict": verdict} | changes)
    path = site.folder.path / "validations" / name / "validation.json"
    path.parent.mkdir(parents=True)
    path.write_text(made.model_dump_json())
    digest, chain = hashlib.sha256(path.read_bytes()).hexdigest(), site.folder.audit
    facts = {"name": name, "validation": digest, "models": list(models)}
    Chain(chain, site.signing, lambda: text(site.now)).append("validated", **facts)
    return path


class TestAccept:
    def test_a_validated_model_comes_into_use(self, site: Hospital) -> None:
        model = put(site)
        validated(site, "june", model)
        said = run(site, "accept", STUDY, "--reason", "good at the worst cases").stdout
        assert f"{FILE} ({model[:12]}) is in use for {STUDY}" in said
        path, decision = model_in_use(site.folder, STUDY)
        assert path == site.folder.models / FILE and decision.model == model
        (entry,) = site.audited("model_accepted")
        assert entry.facts["model"] == model and entry.facts["verdict"] == "go"
        assert entry.facts["reason"] == "good at the worst cases"
        assert stat.S_IMODE(register_path(site.folder).stat().st_mode) == 0o600
        shown = listed(site)[FILE]
        assert (shown["state"], shown["since"]) == ("in use", decision.at)
        assert shown["plan"] == site.consortium.plan.digest
        assert shown["validation"]["verdict"] == "go"

    def test_without_a_validation_it_takes_an_override_that_the_audit_names(
        self, site: Hospital
    ) -> None:
        put(site)
        with pytest.raises(DataError, match="no validation here measured"):
            run(site, "accept", STUDY, "--reason", "in a hurry")
        assert not register_path(site.folder).exists() and not site.audited("model_accepted")
        said = run(site, "accept", STUDY, "--override", "--reason", "pilot").stdout
        assert "no validation speaks for it" in said
        (entry,) = site.audited("model_accepted_by_override")
        assert entry.facts["override"] is True and entry.facts["verdict"] is None
        assert "no validation spoke for it" in run(site, "models").stdout

    def test_a_no_go_takes_an_override_too(self, site: Hospital) -> None:
        model = put(site)
        validated(site, "june", model, verdict={"decision": "no-go"})
        with pytest.raises(DataError, match="june says no-go"):
            run(site, "accept", STUDY, "--reason", "still")
        run(site, "accept", STUDY, "--override", "--reason", "still")
        (entry,) = site.audited("model_accepted_by_override")
        assert entry.facts["verdict"] == "no-go"

    def test_an_override_that_nothing_asks_for_is_refused(self, site: Hospital) -> None:
        validated(site, "june", put(site))
        with pytest.raises(DataError, match="--override is not needed"):
            run(site, "accept", STUDY, "--override", "--reason", "to be safe")

    def test_no_decision_leaves_it_to_whoever_decides(self, site: Hospital) -> None:
        validated(site, "june", put(site), verdict={"decision": "undecided", "recommended": None})
        run(site, "accept", STUDY, "--reason", "few patients, but none failed")
        assert site.audited("model_accepted")[0].facts["verdict"] == "undecided"

    def test_a_validation_of_other_tensors_does_not_count(self, site: Hospital) -> None:
        validated(site, "june", put(site))
        put(site, factor=1.5)
        with pytest.raises(DataError, match="no validation here measured"):
            run(site, "accept", STUDY, "--reason", "was good once")

    def test_the_newest_validation_counts(self, site: Hospital) -> None:
        model = put(site)
        validated(site, "b", model, when="1")
        validated(site, "a", model, when="2", verdict={"decision": "no-go"})
        found = opinion_of(site.folder, model)
        assert found is not None and (found.name, found.verdict) == ("a", "no-go")

    def test_another_than_the_recommended_one_is_judged_by_its_own_thresholds(
        self, site: Hospital
    ) -> None:
        """`global` is not recommended; what of it is broken is its own."""
        first, second = put(site, "own.safetensors", 1.1), put(site)
        path = validated(site, "june", first, second)
        found = opinion_of(site.folder, second)
        assert found is not None and (found.verdict, found.recommended) == ("go", "finetuned")
        value = json.loads(path.read_text())
        for check in value["verdict"]["checks"]:
            if check["candidate"] == "global":
                check["met"] = "broken"
        path.write_text(json.dumps(value))
        found = opinion_of(site.folder, second)
        assert found is not None and found.verdict == "no-go"

    def test_who_broke_a_threshold_is_no_go_where_another_is_undecided(
        self, site: Hospital
    ) -> None:
        """The verdict is of the recommended one, and the threshold is the hospital's."""
        first, second = put(site, "own.safetensors", 1.1), put(site)
        said = {"asked": 0.5, "found": 0.1, "met": "broken", "words": "the lowest Dice is 0.100"}
        check = Check(candidate="global", threshold="worst_case_dice_at_least", **said)
        verdict = {"decision": "undecided", "checks": (check,)}
        validated(site, "june", first, second, verdict=verdict)
        with pytest.raises(DataError, match="june says no-go"):
            run(site, "accept", STUDY, "--reason", "x")
        run(site, "accept", "own", "--reason", "few patients, but none failed")

    def test_a_no_go_that_was_put_away_still_counts(self, site: Hospital) -> None:
        model = put(site)
        validated(site, "may", model, when="1")
        newest = validated(site, "june", model, when="2", verdict={"decision": "no-go"})
        shutil.rmtree(newest.parent)
        with pytest.raises(TrustError, match=r"not the newest validation .* which is june"):
            run(site, "accept", STUDY, "--reason", "x")
        assert not register_path(site.folder).exists()

    def test_accepting_another_supersedes(self, site: Hospital) -> None:
        first = put(site)
        second = put(site, "own.safetensors", 1.1, arm="finetuned", released=first)
        validated(site, "june", second, first)
        run(site, "accept", STUDY, "--reason", "first")
        said = run(site, "accept", "own", "--reason", "second").stdout
        assert f"supersedes {FILE} ({first[:12]})" in said
        assert model_in_use(site.folder, None)[1].model == second
        states = {name: each["state"] for name, each in listed(site).items()}
        assert states == {FILE: "superseded", "own.safetensors": "in use"}

    def test_only_models_of_this_site_are_accepted(self, site: Hospital, tmp_path: Path) -> None:
        put(site)
        elsewhere = shutil.move(site.folder.models / FILE, tmp_path / "model.safetensors")
        with pytest.raises(DataError, match="not in this site's models"):
            run(site, "accept", elsewhere, "--override", "--reason", "x")
        with pytest.raises(DataError, match="no model 'lung'"):
            run(site, "accept", "lung", "--override", "--reason", "x")

    def test_a_damaged_validation_is_refused(self, site: Hospital) -> None:
        path = validated(site, "june", put(site))
        path.write_text("{}")
        with pytest.raises(DataError, match="damaged or of another version"):
            run(site, "accept", STUDY, "--reason", "x")

    def test_a_validation_that_the_audit_does_not_know_is_refused(self, site: Hospital) -> None:
        """A no-go that somebody made a go."""
        path = validated(site, "june", put(site), verdict={"decision": "no-go"})
        path.write_text(path.read_text().replace('"decision":"no-go"', '"decision":"go"'))
        with pytest.raises(TrustError, match="edited since"):
            run(site, "accept", STUDY, "--reason", "x")
        assert not register_path(site.folder).exists()


class TestReject:
    def test_rejecting_what_is_in_use_leaves_none(self, site: Hospital) -> None:
        validated(site, "june", put(site))
        run(site, "accept", STUDY, "--reason", "good")
        said = run(site, "reject", STUDY, "--reason", "misses small lesions").stdout
        assert f"no model of {STUDY} is in use any more" in said
        with pytest.raises(DataError, match=f"no model of {STUDY} is in use"):
            model_in_use(site.folder, STUDY)
        assert listed(site)[FILE]["state"] == "rejected"
        assert site.audited("model_rejected")[0].facts["reason"] == "misses small lesions"

    def test_rejecting_another_leaves_the_one_in_use(self, site: Hospital) -> None:
        model = put(site)
        put(site, "own.safetensors", 1.1)
        validated(site, "june", model)
        run(site, "accept", STUDY, "--reason", "good")
        run(site, "reject", "own", "--reason", "worse")
        assert model_in_use(site.folder, STUDY)[1].model == model

    def test_a_reason_is_needed(self, site: Hospital) -> None:
        put(site)
        with pytest.raises(DataError, match="--reason"):
            run(site, "reject", STUDY, "--reason", " ")


class TestTrust:
    @pytest.fixture
    def using(self, site: Hospital) -> Hospital:
        """A hospital with a model in use."""
        validated(site, "june", put(site))
        run(site, "accept", STUDY, "--reason", "good")
        return site

    def test_a_file_that_changed_is_refused(self, using: Hospital) -> None:
        put(using, factor=1.5)
        with pytest.raises(TrustError, match="changed since it was accepted"):
            model_in_use(using.folder, STUDY)
        assert listed(using)[FILE]["state"] == "changed since it was accepted"

    def test_a_file_that_is_gone_is_said(self, using: Hospital) -> None:
        (using.folder.models / FILE).unlink()
        with pytest.raises(DataError, match="is gone"):
            model_in_use(using.folder, STUDY)
        assert "gone" in run(using, "models").stdout

    def test_a_damaged_file_is_listed_as_such(self, using: Hospital) -> None:
        (using.folder.models / "x.safetensors").write_bytes(b"no model")
        assert listed(using)["x.safetensors"]["state"] == "damaged"

    def test_an_edited_register_is_refused(self, using: Hospital) -> None:
        other = put(using, "own.safetensors", 1.1)
        path = register_path(using.folder)
        text_ = path.read_text()
        path.write_text(text_.replace(read_register(using.folder).decisions[0].model, other))
        for act in (read_register, lambda folder: model_in_use(folder, STUDY)):
            with pytest.raises(TrustError, match="edited since"):
                act(using.folder)

    def test_a_decision_that_the_audit_does_not_know_is_refused(self, using: Hospital) -> None:
        """The key signs the register, but nothing entered the audit."""
        register = read_register(using.folder)
        more = register.decisions[0].model_copy(update={"reason": "another"})
        forged = Register(site=register.site, decisions=(*register.decisions, more))
        path = register_path(using.folder)
        path.write_text(forged.signed(using.signing).model_dump_json())
        with pytest.raises(TrustError, match="the audit does not"):
            run(using, "models")

    def test_an_older_register_that_is_put_back_shows_in_the_list(self, using: Hospital) -> None:
        older = register_path(using.folder).read_bytes()
        run(using, "reject", STUDY, "--reason", "bad")
        register_path(using.folder).write_bytes(older)
        assert "1 decisions that the list lacks" in run(using, "models").stdout

    def test_after_a_changed_audit_nothing_is_decided(self, using: Hospital) -> None:
        lines = using.folder.audit.read_text().splitlines()
        using.folder.audit.write_text("\n".join([*lines[:-1], lines[-1].replace("good", "bad")]))
        before = register_path(using.folder).read_bytes()
        with pytest.raises(TrustError):
            run(using, "reject", STUDY, "--reason", "x")
        assert register_path(using.folder).read_bytes() == before


class TestPredict:
    @pytest.fixture
    def image(self, data: Path) -> Path:
        return next(iter(sorted((data / "images").glob("*.nii.gz"))))

    def test_it_uses_what_is_accepted_and_the_mask_says_so(
        self, site: Hospital, image: Path, tmp_path: Path
    ) -> None:
        put(site)
        own = put(site, "own.safetensors", 1.1, arm="finetuned", released="a" * 64)
        validated(site, "june", own)
        run(site, "accept", "own", "--reason", "good")
        for number, words in enumerate(((STUDY, image), (image,))):
            out = tmp_path / f"masks-{number}"
            ran = run(site, "predict", *words, "--out", out)
            assert "own.safetensors" in ran.stderr and "stays here" in ran.stderr
            (mask,) = out.iterdir()
            note = bytes(nibabel.load(mask).header["descrip"].item()).decode()  # type: ignore[attr-defined]
            assert note == f"fedseg {own}"

    def test_nothing_accepted_is_no_model(
        self, site: Hospital, image: Path, tmp_path: Path
    ) -> None:
        put(site)
        for words in ((STUDY, image), (image,)):
            with pytest.raises(DataError, match="is in use at this site"):
                run(site, "predict", *words, "--out", tmp_path / "masks")
        ran = run(site, "predict", site.folder.models / FILE, image, "--out", tmp_path / "masks")
        assert "not in use here" in ran.stderr and len(list((tmp_path / "masks").iterdir())) == 1

    def test_what_is_neither_a_model_nor_an_image_is_said(
        self, site: Hospital, image: Path, tmp_path: Path
    ) -> None:
        put(site)
        out = ("--out", tmp_path / "masks")
        with pytest.raises(DataError, match="at least one image"):
            run(site, "predict", STUDY, *out)
        with pytest.raises(DataError, match="neither a study"):
            run(site, "predict", tmp_path / "none.nii.gz", *out)
        with pytest.raises(DataError, match="no model of lung is in use"):
            run(site, "predict", "lung", image, *out)


def test_chain_and_register_agree_after_many_decisions(site: Hospital) -> None:
    models = [put(site, f"m{i}.safetensors", 1 + i / 10) for i in range(3)]
    for number, model in enumerate(models):
        validated(site, f"v{number}", model)
        run(site, "accept", f"m{number}", "--reason", "same words")
    run(site, "reject", "m2", "--reason", "same words")
    run(site, "accept", "m0", "--reason", "same words")
    assert run(site, "models").exit_code == 0
    assert model_in_use(site.folder, STUDY)[1].model == models[0]
    Chain(site.folder.audit, site.signing, lambda: text(site.now)).append("noted")
    assert listed(site)["m1.safetensors"]["state"] == "superseded"
    assert load_model(site.folder.models / "m0.safetensors")[0].model_digest == models[0]
