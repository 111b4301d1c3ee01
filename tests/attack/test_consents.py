"""A hospital's own model leaves by its own consent alone, and others measure nothing without it.

Real gates: keys, envelopes, policies and trainers on phantoms; the coordinator is the attacker.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_hospitals
import small_private_sites
from small_hospitals import NAME, NOW, Consortium, Hospital, joined, phantoms, text
from small_hospitals import approved as approve_data
from small_parties import Party
from typer.testing import CliRunner

from fedseg.aggregation.ownmodels import own_model
from fedseg.arrays import digest_of
from fedseg.container import peek, unpack
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.privacy.schedule import calibrated
from fedseg.security.consent import Consent
from fedseg.security.documents import UNSIGNED
from fedseg.updates import AnswerHeader, Evaluated, Trained
from sites import cli
from sites.decision import situation_of
from sites.departures import departures
from sites.explain import explain
from sites.folder import SiteFolder
from sites.founding import found
from sites.policy import load_policy, rules

OTHER = Party("hospital_b")
ROUNDS = 3
OPEN = "privacy_none: true\nown_model_unprotected: true\n"
PROTECTED = "own_model_guaranteed: true\nmetrics: suppressed\n"


def plan_of(private: bool = False, own_models: bool = True) -> tuple[StudyPlan, dict[str, Any]]:
    """A plan on phantoms that measures own models, and its initial model."""
    values = copy.deepcopy(small_hospitals.PLAN_VALUES)
    values["evaluation"]["own_models"] = own_models
    if private:
        values["training"] |= {"gradient_clip_norm": None, "mixed_precision": False}
        values["aggregation"] |= {"weighting": "uniform"}
        outputs = {"metrics": "suppressed", "suppress_below": 5}
        values["privacy"] = small_private_sites.PRIVACY | {"outputs": outputs}
    plan = StudyPlan.model_validate(values)
    record, model = initial_model(plan)
    return plan.model_copy(update={"initial": record, "calibrated": calibrated(plan)}), dict(model)


def hospital_of(path: Path, data: Path, policy: str, **changes: bool) -> Hospital:
    """A hospital that has approved such a plan together with hospital_b."""
    consortium, folder = Consortium(*plan_of(**changes)), SiteFolder(path)
    own = found(folder, NAME, text(NOW))
    folder.policy.write_text(policy)
    roll = consortium.roll(own, OTHER.identity)
    joined(folder, consortium, roll)
    approve_data(folder, consortium, data)
    return Hospital(folder, consortium, roll, own)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("phantoms"), patients=6)


@pytest.fixture(scope="module")
def founded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hospital]:
    folder = tmp_path_factory.mktemp("founded")
    return {
        "open": hospital_of(folder / "open", data, OPEN),
        "closed": hospital_of(folder / "closed", data, "privacy_none: true\n"),
        "without": hospital_of(folder / "without", data, OPEN, own_models=False),
        "private": hospital_of(folder / "private", data, PROTECTED, private=True),
    }


def copied(whole: Hospital, path: Path) -> Hospital:
    """A hospital that has answered nothing yet."""
    folder = SiteFolder(path)
    shutil.copytree(whole.folder.path, folder.path)
    return Hospital(folder, whole.consortium, whole.roll, whole.own)


@pytest.fixture
def site(founded: dict[str, Hospital], tmp_path: Path) -> Hospital:
    return copied(founded["open"], tmp_path / "site")


def consent(at: Hospital, tensors: dict[str, Any], **changes: Any) -> Consent:
    """hospital_b's consent, signed by it, some fields changed before that."""
    plan = at.consortium.plan
    fields = {"study": plan.study, "plan": plan.digest, "site": OTHER.name}
    given = Consent.model_validate(fields | {"model": digest_of(tensors)} | changes)
    return given.signed(OTHER.signing)


def own_task(site: Hospital, given: Consent | None, round_: int = ROUNDS, **changes: Any) -> bytes:
    """A task to measure an own model, before it is sealed."""
    return site.consortium.plain("own", round_, consent=given, **changes)


def trained_last(site: Hospital) -> tuple[Trained, dict[str, Any], Any]:
    """What the site answers to the last round: body, update, and the answer as it left."""
    answer = site.ask(site.task("train", ROUNDS))
    plain = site.consortium.read(answer, site.own)
    header, delta = unpack(plain, AnswerHeader, max_bytes=10**8, schema=None)
    assert isinstance(header.body, Trained), header.body
    return header.body, delta, answer


def allow(site: Hospital, policy: str) -> None:
    site.folder.policy.write_text(policy)


class TestOwner:
    def test_it_lets_go_the_model_that_it_sent_and_signs_that(self, site: Hospital) -> None:
        body, delta, _ = trained_last(site)
        assert body.consent is not None
        body.consent.require_signed(site.signing.public)
        assert body.consent.model == digest_of(own_model(site.consortium.model, delta))
        (entry,) = [e for e in departures(site.audited("egress")) if e.facts["type"] == "train"]
        assert f'body.consent.model="{body.consent.model}"' in entry.facts["fields"]
        said = CliRunner().invoke(
            cli.app, ["egress", "list", "--site", str(site.folder.path)], env={"COLUMNS": "240"}
        )
        assert "lets own model go" in " ".join(said.stdout.split())

    def test_without_its_policys_word_it_trains_and_consents_to_nothing(
        self, founded: dict[str, Hospital], tmp_path: Path
    ) -> None:
        site = copied(founded["closed"], tmp_path / "site")
        assert trained_last(site)[0].consent is None
        assert site.said(site.ask(site.task("release", ROUNDS))).body.kind == "release"

    def test_a_word_for_guaranteed_models_is_none_for_others(self, site: Hospital) -> None:
        allow(site, "privacy_none: true\nown_model_guaranteed: true\n")
        assert trained_last(site)[0].consent is None

    def test_earlier_rounds_and_other_plans_bring_no_consent(
        self, site: Hospital, founded: dict[str, Hospital], tmp_path: Path
    ) -> None:
        body = site.said(site.ask(site.task("train", 1))).body
        assert isinstance(body, Trained) and body.consent is None
        without = copied(founded["without"], tmp_path / "without")
        assert trained_last(without)[0].consent is None

    def test_a_word_that_is_taken_back_lets_no_stored_consent_out_again(
        self, site: Hospital
    ) -> None:
        task = site.task("train", ROUNDS)
        assert isinstance(site.said(site.ask(task)).body, Trained)
        allow(site, "privacy_none: true\n")
        assert site.code(site.ask(task)) == "plan"
        assert "own model" in str(site.audited("refused")[-1].facts["reason"])
        assert site.trained == 1

    def test_a_hospital_reads_what_it_would_let_go_before_it_approves(
        self, site: Hospital, founded: dict[str, Hospital]
    ) -> None:
        for whole, says in ((site, "they get it"), (founded["closed"], "is not passed on")):
            told = situation_of(whole.folder, "tiny")
            page = " ".join(line for section in explain(told) for line in section.lines)
            assert "own_model_unprotected: true" in page and says in page
            assert not [r for r in told.rules if r.broken]
        plain = situation_of(founded["without"].folder, "tiny")
        page = " ".join(line for section in explain(plain) for line in section.lines)
        assert "own_model" not in page


class TestMeasurer:
    def test_it_measures_what_the_owner_let_go_and_both_names_are_in_its_audit(
        self, site: Hospital
    ) -> None:
        given = consent(site, dict(site.consortium.model))
        body = site.said(site.ask(site.task(plain=own_task(site, given)))).body
        assert isinstance(body, Evaluated) and body.scores["dice"]
        (came,) = site.audited("task_received")
        (left,) = site.audited("egress")
        assert came.facts["owner"] == left.facts["owner"] == OTHER.name
        assert site.trained == 0

    @pytest.mark.parametrize(
        "attack",
        ["unsigned", "by the coordinator", "by another", "another model", "another plan",
         "another study", "not on the list", "none", "an earlier round", "as the shared one"],
    )  # fmt: skip
    def test_what_the_owner_did_not_let_go_is_not_measured(
        self, site: Hospital, attack: str
    ) -> None:
        model = dict(site.consortium.model)
        good = consent(site, model)
        stranger = Party("hospital_c")
        named = consent(site, model, site="hospital_c")
        tasks = {
            "unsigned": lambda: own_task(site, good.model_copy(update={"signature": UNSIGNED})),
            "by the coordinator": lambda: own_task(site, good.signed(site.consortium.key)),
            "by another": lambda: own_task(site, good.signed(stranger.signing)),
            "another model": lambda: own_task(site, consent(site, model, model="1" * 64)),
            "another plan": lambda: own_task(site, consent(site, model, plan="1" * 64)),
            "another study": lambda: own_task(site, consent(site, model, study="other")),
            "not on the list": lambda: own_task(site, named.signed(stranger.signing)),
            "none": lambda: own_task(site, None),
            "an earlier round": lambda: own_task(site, good, round_=2),
            "as the shared one": lambda: site.consortium.plain("evaluate", 2, consent=good),
        }
        assert site.code(site.ask(site.task(plain=tasks[attack]()))) == "task"
        assert not site.audited("task_received")

    def test_the_model_cannot_be_exchanged_under_the_owners_name(self, site: Hospital) -> None:
        model = dict(site.consortium.model)
        other = {name: array + 1 for name, array in model.items()}
        task = site.consortium.plain("own", ROUNDS, other, consent=consent(site, model))
        assert site.code(site.ask(site.task(plain=task))) == "task"

    def test_a_plan_without_own_models_measures_none(
        self, founded: dict[str, Hospital], tmp_path: Path
    ) -> None:
        site = copied(founded["without"], tmp_path / "site")
        given = consent(site, dict(site.consortium.model))
        assert site.code(site.ask(site.task(plain=own_task(site, given)))) == "task"
        assert "does not say" in str(site.audited("refused")[-1].facts["reason"])

    def test_ever_other_models_of_one_owner_end_with_the_plans_attempts(
        self, site: Hospital
    ) -> None:
        gate = site.gate()
        codes = []
        for step in range(site.consortium.plan.aggregation.attempts + 1):
            model = {name: array + step for name, array in site.consortium.model.items()}
            task = site.consortium.plain("own", ROUNDS, model, consent=consent(site, model))
            body = site.said(site.ask(site.task(plain=task), gate)).body
            codes.append(body.kind)
        assert codes == ["evaluate"] * (len(codes) - 1) + ["refused"]

    def test_its_own_rule_for_metrics_holds_for_own_models_too(self, site: Hospital) -> None:
        allow(site, OPEN + "metrics: none\n")
        given = consent(site, dict(site.consortium.model))
        assert site.code(site.ask(site.task(plain=own_task(site, given)))) == "plan"


class TestGuarantee:
    def test_the_ledger_is_charged_for_the_update_and_for_nothing_more(
        self, founded: dict[str, Hospital], tmp_path: Path
    ) -> None:
        site = copied(founded["private"], tmp_path / "site")
        body, delta, _ = trained_last(site)
        assert body.consent is not None and body.patients is None
        assert body.consent.model == digest_of(own_model(site.consortium.model, delta))
        given = consent(site, dict(site.consortium.model))
        said = site.said(site.ask(site.task(plain=own_task(site, given))))
        assert isinstance(said.body, Evaluated)
        dice = said.body.scores["dice"]
        assert set(dice.values()) == {None}  # two held-back patients, the plan suppresses below 5
        assert len(small_private_sites.ledger_of(site).book.debits) == 1
        paid = [e.mechanism is not None for e in departures(site.audited("egress"))]
        assert paid == [True, False]

    def test_an_answer_tells_by_its_length_nothing_of_the_consent(
        self, founded: dict[str, Hospital], tmp_path: Path
    ) -> None:
        sizes = set()
        for name, policy in (("with", PROTECTED), ("not", "metrics: suppressed\n")):
            site = copied(founded["private"], tmp_path / name)
            allow(site, policy)
            body, _, answer = trained_last(site)
            assert (body.consent is not None) == (name == "with")
            sizes.add(answer.stat().st_size)
        assert len(sizes) == 1

    def test_a_word_for_models_without_a_guarantee_is_none_for_this_one(
        self, founded: dict[str, Hospital], tmp_path: Path
    ) -> None:
        site = copied(founded["private"], tmp_path / "site")
        allow(site, "own_model_unprotected: true\nmetrics: suppressed\n")
        (rule,) = [
            r
            for r in rules(load_policy(site.folder.policy), site.consortium.plan, 4)
            if r.name.startswith("own_model")
        ]
        assert rule.name == "own_model_guaranteed" and "not passed on" in rule.says
        assert trained_last(site)[0].consent is None


class TestHeld:
    def test_a_word_that_is_taken_back_while_the_answer_is_held_lets_no_consent_out(
        self, founded: dict[str, Hospital], tmp_path: Path
    ) -> None:
        site = copied(founded["private"], tmp_path / "site")
        gate, envelope = site.gate(), tmp_path / "envelope"
        envelope.write_bytes(site.task("train", ROUNDS))
        ready = gate.prepare(envelope, 0.0)
        allow(site, "metrics: suppressed\n")
        assert site.code(gate.release(ready)) == "plan"
        assert "own model" in str(site.audited("refused")[-1].facts["reason"])
        (left,) = departures(site.audited("egress"))
        assert "consent" not in str(left.facts["fields"])


def test_a_task_and_its_answer_name_the_owner_in_a_slot_of_its_own(site: Hospital) -> None:
    given = consent(site, dict(site.consortium.model))
    first = site.ask(site.task(plain=own_task(site, given)))
    again = site.ask(site.task(plain=own_task(site, given)))
    assert peek(site.consortium.read(first, site.own), AnswerHeader, max_bytes=10**8) == peek(
        site.consortium.read(again, site.own), AnswerHeader, max_bytes=10**8
    )
    assert len(site.audited("repeated")) == 1
    names = {path.name for path in site.folder.answers("tiny").iterdir() if path.is_dir()}
    assert names == {f"{ROUNDS:06d}-own-hospital_b"}
