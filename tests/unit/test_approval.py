"""What a hospital reads before it decides, and what its yes and no do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_parties import Party
from small_sites import Member, allow, data_of, member
from typer.testing import CliRunner, Result

from fedseg.chain import verify_chain
from fedseg.errors import DataError, PrivacyError, TrustError
from fedseg.imaging.cohorts import usable_cohorts
from fedseg.imaging.manifests import read_manifest
from fedseg.plan import StudyPlan
from sites import cli
from sites.approval import approved
from sites.cohort import choose_cohort, load_cohort, load_record
from sites.decision import situation_of
from sites.explain import explain

B, C = Party("hospital_b"), Party("hospital_c")
NAMES = ("c1", "c2", "c3", "c4", "c5", "c6")


def run(*args: object) -> Result:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def one(tmp_path: Path) -> Member:
    """A hospital that has joined, and whose policy allows training without a guarantee."""
    found = member(tmp_path)
    found.join(B)
    allow(found.folder)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return data_of(tmp_path / "data", *NAMES)


def approve(one: Member, *args: object) -> str:
    return run("plan", "approve", "tiny", "--site", one.folder.path, *args).stdout


def last(one: Member) -> dict[str, object]:
    entry = verify_chain(one.folder.audit, one.key.public)[-1]
    return {"event": entry.event, **entry.facts}


def spoken(one: Member) -> str:
    sections = explain(situation_of(one.folder, "tiny"))
    return " ".join(line for section in sections for line in section.lines)


class TestShow:
    def test_it_says_what_a_lawyer_asks(self, one: Member) -> None:
        shown = run("plan", "show", "tiny", "--site", one.folder.path).stdout
        for words in (
            "Not approved: nothing is trained and nothing leaves.",
            "anterior and posterior in MR images (T1w)",
            "3 times, once a round: an update",
            "at most 6 different updates (2 a round)",
            "NO privacy guarantee",
            "reconstruct images",
            B.identity.fingerprint,
            one.identity.fingerprint,
            "hospital_a (this hospital)",
            one.consortium.plan.digest,
            "privacy_none: a study may train without a privacy guarantee",
            "2099-05-03",
        ):
            assert words in shown, words

    def test_bytes_and_times_are_those_of_the_plan(self, one: Member) -> None:
        plan = one.consortium.plan
        text = spoken(one)
        assert plan.built.nbytes == 36
        assert "36 bytes; with it" in text  # one update
        assert "about 108 bytes leave (at most 216 bytes)" in text  # 3 rounds, 2 attempts each
        assert "about 216 bytes come in" in text  # 3 rounds, 2 evaluations, the final model
        assert "2 times: the quality" in text  # every 2 rounds and at the end
        assert "at most 60 seconds" in text

    def test_it_names_what_the_policy_forbids(self, one: Member) -> None:
        allow(one.folder, privacy_none="false", largest_rounds=2)
        text = spoken(one)
        assert "Forbidden by this hospital's policy: privacy_none, largest_rounds." in text
        assert "largest_rounds: at most 2 rounds. FORBIDS THIS: the plan asks for 3." in text

    def test_two_hospitals_are_told_that_each_sees_the_other(self, one: Member) -> None:
        assert "the other one can work out your updates exactly" in spoken(one)
        one.join(B, C, version=2)
        assert "work out your updates" not in spoken(one)

    def test_json_has_the_same_words(self, one: Member) -> None:
        site = ("--site", one.folder.path)
        value = json.loads(run("plan", "show", "tiny", *site, "--json").stdout)
        assert " ".join(line for lines in value.values() for line in lines) == spoken(one)

    def test_neither_help_nor_show_brings_torch_or_a_reader(self, one: Member) -> None:
        heavy = "{'torch', 'monai', 'nibabel', 'pydicom', 'flwr'} & set(sys.modules)"
        for args in (["--help"], ["plan", "approve", "--help"], ["plan", "show", "tiny"]):
            code = (
                "import sys; from sites.cli import app\n"
                f"try: app({args})\n"
                "except SystemExit as end: assert end.code == 0\n"
                f"print('HEAVY', {heavy})"
            )
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "FEDSEG_SITE": str(one.folder.path)},
                capture_output=True,
                text=True,
                check=True,
            )
            assert done.stdout.splitlines()[-1] == "HEAVY set()"


class TestApprove:
    def test_an_approval_names_plan_list_and_cohort(self, one: Member, data: Path) -> None:
        assert approved(one.folder, "tiny") is None
        shown = approve(one, "--data", data, "--by", "Dr. Weber")
        assert "6 patients are used (4 train, 2 val)" in shown
        approval = approved(one.folder, "tiny")
        assert approval is not None
        assert approval.plan == one.consortium.plan.digest
        assert approval.roll == one.consortium.roll(one.identity, B).digest
        assert (approval.by, approval.any_later_sites) == ("Dr. Weber", False)
        record = load_record(one.folder, "tiny", one.consortium.plan)
        assert approval.cohort == record.digest
        assert (record.patients, record.left_out) == ({"train": 4, "val": 2, "test": 0}, 0)
        assert last(one)["event"] == "plan_approved" and last(one)["by"] == "Dr. Weber"
        assert "Approved on" in spoken(one) and "4 patients to train on" in spoken(one)
        assert "Only 2 of your patients are held back" in spoken(one)

    @pytest.mark.parametrize(
        ("rule", "value"),
        [("privacy_none", "false"), ("largest_rounds", 1), ("smallest_cohort", 5)],
    )
    def test_a_policy_forbids_with_its_rule(
        self, one: Member, data: Path, rule: str, value: object
    ) -> None:
        allow(one.folder, **{rule: value})
        with pytest.raises(PrivacyError, match=rule):
            approve(one, "--data", data)
        assert approved(one.folder, "tiny") is None
        refused = last(one)
        assert (refused["event"], refused["code"]) == ("plan_refused", "policy")
        assert rule in str(refused["reason"])

    def test_what_cannot_be_used_is_counted(self, one: Member, data: Path) -> None:
        (data / "labels" / "c1.nii.gz").unlink()
        (data / "images" / "c2.nii.gz").write_bytes(b"no image")
        shown = approve(one, "--data", data)
        assert "2 patients are left out whole; 2 images cannot be used, 0 could not" in shown
        hint = shown.partition("fedseg-site ")[2].splitlines()[0]
        checked = run(*hint.split()).stdout  # what it says to type finds what it counted
        assert "2 errors" in checked
        assert "P-c" not in shown
        assert load_record(one.folder, "tiny", one.consortium.plan).left_out == 2

    def test_data_without_a_usable_patient_are_refused(self, one: Member, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no rows"):
            approve(one, "--data", data_of(tmp_path / "none"))
        lonely = data_of(tmp_path / "val", "c1")
        (lonely / "sites.csv").write_text("subject,site,split,patient\nc1,hospital_a,val,P\n")
        with pytest.raises(DataError, match="no patient of this site can be trained on"):
            approve(one, "--data", lonely)
        assert approved(one.folder, "tiny") is None

    def test_a_new_list_of_sites_waits_for_approval(self, one: Member, data: Path) -> None:
        approve(one, "--data", data)
        assert one.join(B, C, version=2) == ("hospital_c",)
        assert "NEW since your approval" in spoken(one)
        assert C.identity.fingerprint in spoken(one)
        assert one.folder.offered_roll("tiny").exists()
        shown = approve(one)  # the same data
        assert "with the new sites hospital_c" in shown
        approval = approved(one.folder, "tiny")
        new = one.consortium.roll(one.identity, B, C, version=2)
        assert approval is not None and approval.roll == new.digest
        assert not one.folder.offered_roll("tiny").exists()
        assert json.loads(one.folder.roll("tiny").read_bytes())["roll"]["version"] == 2

    def test_later_sites_may_be_accepted_beforehand(self, one: Member, data: Path) -> None:
        approve(one, "--data", data, "--any-later-sites")
        assert one.join(B, C, version=2) == ()
        assert "need no approval of yours" in spoken(one)

    def test_a_site_that_left_needs_no_approval(self, one: Member, data: Path) -> None:
        one.join(B, C, version=2)
        approve(one, "--data", data)
        assert one.join(B, version=3) == ()
        assert not one.folder.offered_roll("tiny").exists()

    def test_the_first_approval_needs_data(self, one: Member) -> None:
        with pytest.raises(DataError, match="--data DIR"):
            approve(one)

    def test_an_expired_list_is_not_approved(self, tmp_path: Path, data: Path) -> None:
        one = member(tmp_path)
        allow(one.folder)
        past = one.consortium.roll(one.identity, valid_until="2026-05-04T12:00:00+00:00")
        bundle = one.consortium.bundle(tmp_path / "b.json", past)
        run("join", bundle, "--site", one.folder.path, "--yes")
        with pytest.raises(TrustError, match="expired"):
            approve(one, "--data", data)


class TestRefuse:
    def test_a_no_takes_a_yes_back(self, one: Member, data: Path) -> None:
        approve(one, "--data", data)
        site = ("--site", one.folder.path)
        shown = run("plan", "refuse", "tiny", "--reason", "no consent", *site).stdout
        assert "took back" in shown and approved(one.folder, "tiny") is None
        assert (last(one)["event"], last(one)["reason"]) == ("plan_refused", "no consent")
        with pytest.raises(DataError, match="no data are approved"):
            load_cohort(one.folder, "tiny", one.consortium.plan)


def test_leaving_says_that_the_notes_of_whom_it_trained_on_stay(one: Member, data: Path) -> None:
    approve(one, "--data", data)
    shown = run("leave", "tiny", "--yes", "--site", one.folder.path).stdout
    assert "trainer/trained (whom models were trained on, as keyed hashes)" in shown
    assert list(one.folder.trained.iterdir())


class TestCohort:
    def test_it_is_the_one_that_a_simulation_trains_on(self, one: Member, tmp_path: Path) -> None:
        """Cases are judged beside those of other hospitals in the folder, errors included."""
        plan = one.consortium.plan
        data = data_of(tmp_path / "all", *NAMES, "d1", "d2", "d3")
        rows = (data / "sites.csv").read_text().replace("d1,hospital_a", "d1,hospital_b")
        (data / "sites.csv").write_text(rows.replace("d2,hospital_a", "d2,hospital_b"))
        shutil.copy(data / "images" / "d1.nii.gz", data / "images" / "c1.nii.gz")  # two patients
        (data / "labels" / "c4.nii.gz").write_bytes(b"broken")
        chosen = choose_cohort("hospital_a", plan, data)
        manifest = read_manifest(data, plan.task, seed=plan.training.seed)
        simulated, _ = usable_cohorts(manifest, plan.task)
        assert chosen.cohort == simulated["hospital_a"].cohort
        assert chosen.record.left_out == simulated["hospital_a"].left_out == 2
        approve(one, "--data", data)
        assert load_cohort(one.folder, "tiny", plan) == chosen.cohort

    def test_data_that_name_no_site_are_the_hospitals_own(
        self, one: Member, tmp_path: Path
    ) -> None:
        data = data_of(tmp_path / "bare", *NAMES, table=False)
        approve(one, "--data", data)
        cohort = load_cohort(one.folder, "tiny", one.consortium.plan)
        assert cohort.site == "hospital_a" and {c.site for c in cohort.cases} == {"hospital_a"}

    def test_data_of_another_name_are_taken_when_that_is_said(
        self, one: Member, tmp_path: Path
    ) -> None:
        data = data_of(tmp_path / "named", *NAMES, site="north")
        with pytest.raises(DataError, match=r"north.*--row"):
            approve(one, "--data", data)
        approve(one, "--data", data, "--row", "north")
        assert load_cohort(one.folder, "tiny", one.consortium.plan).site == "hospital_a"

    def test_cases_that_were_added_play_no_part(self, one: Member, data: Path) -> None:
        approve(one, "--data", data)
        before = load_cohort(one.folder, "tiny", one.consortium.plan)
        table = (data / "sites.csv").read_text()
        data_of(data, "x7")
        (data / "sites.csv").write_text(table + "x7,hospital_a,train,P-x7\n")
        assert load_cohort(one.folder, "tiny", one.consortium.plan) == before

    @pytest.mark.parametrize("change", ["voxel", "label", "row", "split", "patient", "gone"])
    def test_data_that_changed_since_are_refused(
        self, one: Member, data: Path, change: str
    ) -> None:
        plan: StudyPlan = one.consortium.plan
        approve(one, "--data", data)
        load_cohort(one.folder, "tiny", plan)
        table = data / "sites.csv"
        image = data / "images" / "c1.nii.gz"
        if change == "voxel":
            shutil.copy(data / "images" / "c2.nii.gz", image)
        elif change == "label":
            shutil.copy(data / "labels" / "c2.nii.gz", data / "labels" / "c1.nii.gz")
        elif change == "row":
            table.write_text(table.read_text().replace("c1,hospital_a,train,P-c1\n", ""))
        elif change == "split":
            table.write_text(table.read_text().replace("c1,hospital_a,train", "c1,hospital_a,val"))
        elif change == "patient":
            table.write_text(table.read_text().replace("P-c1", "P-c9"))
        else:
            image.unlink()
        with pytest.raises(DataError, match="again") as caught:
            load_cohort(one.folder, "tiny", plan)
        assert str(data) not in str(caught.value) and "c1" not in str(caught.value)

    def test_another_plan_has_no_cohort(self, one: Member, data: Path) -> None:
        approve(one, "--data", data)
        other = one.consortium.plan.model_copy(update={"study": "tiny2"})
        with pytest.raises(DataError, match="no data are approved"):
            load_cohort(one.folder, "tiny", other)
