"""Bundles and files that somebody changed: each is refused, and nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_parties import Party
from small_plans import built_plan
from small_sites import Consortium, Member, allow, data_of, member

from fedseg.chain import verify_chain
from fedseg.errors import DataError, FedsegError, TrustError
from fedseg.security.documents import signable, to_text
from fedseg.security.identity import Bundle, make_bundle, open_bundle, sign_roll
from fedseg.security.keys import SigningKey
from sites.approval import Approval, CohortRecord, approved
from sites.cohort import choose_cohort, load_cohort
from sites.decision import approve, lists_of, situation_of
from sites.enrolment import join, open_offer, pinned_bundle
from sites.notes import read_note, write_note

B, C = Party("hospital_b"), Party("hospital_c")
NAMES = ("scan_one", "scan_two", "scan_three", "scan_four")


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file and write it in canonical form."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value, sort_keys=True, separators=(",", ":")))


@pytest.fixture
def one(tmp_path: Path) -> Member:
    """A hospital that has joined and approved, and trains on four cases."""
    found = member(tmp_path)
    allow(found.folder)
    found.join(B)
    yes(found, tmp_path)
    return found


def yes(one: Member, tmp_path: Path, *, any_later_sites: bool = False) -> Approval:
    data = data_of(tmp_path / "data", *NAMES)
    chosen = choose_cohort("hospital_a", one.consortium.plan, data).record
    return approve(one.folder, "tiny", chosen, one.key, any_later_sites=any_later_sites, by="tests")


def everything(one: Member) -> dict[str, bytes]:
    """Every file of a site but its audit."""
    return {
        str(path.relative_to(one.folder.path)): path.read_bytes()
        for path in one.folder.path.rglob("*")
        if path.is_file() and not path.name.startswith("audit.")
    }


class TestBundles:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("address", "evil.example.org:443"),
            ("ca", "-----BEGIN CERTIFICATE-----\n"),
            ("site", "hospital_b"),
            ("study", "other"),
            pytest.param("study_key", SigningKey.generate().public.text, id="study_key"),
            ("flower", "1.0"),
            ("issued", "2030-01-01T00:00:00+00:00"),
        ],
    )
    def test_a_bundle_that_was_changed_on_its_way(
        self, tmp_path: Path, field: str, value: str
    ) -> None:
        one = member(tmp_path)
        bundle, before = one.bundle(B), everything(one)
        edited(bundle, lambda v: v.update({field: value}))
        with pytest.raises(TrustError):
            open_offer(one.folder, bundle)
        assert everything(one) == before

    def test_a_bundle_for_another_hospital(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        with pytest.raises(TrustError, match="is for 'hospital_b'"):
            open_offer(one.folder, one.bundle(B, site="hospital_b"))

    def test_a_bundle_that_has_this_name_with_the_keys_of_another(self, tmp_path: Path) -> None:
        one, impostor = member(tmp_path), Party("hospital_a")
        roll = one.consortium.roll(impostor, B)
        bundle = one.consortium.bundle(tmp_path / "b.json", roll)
        with pytest.raises(TrustError, match="has not this site's keys"):
            open_offer(one.folder, bundle)

    def test_a_bundle_of_the_same_study_under_another_key(self, one: Member) -> None:
        before = everything(one)
        thief = Consortium()
        bundle = thief.bundle(
            one.folder.path.with_name("thief.json"), thief.roll(one.identity, B, version=9)
        )
        with pytest.raises(TrustError, match=r"another study key.*fedseg-site leave tiny"):
            open_offer(one.folder, bundle)
        assert everything(one) == before

    def test_a_bundle_with_another_plan(self, one: Member) -> None:
        other = built_plan(aggregation__rounds=100)
        with pytest.raises(TrustError, match="another plan"):
            open_offer(one.folder, one.bundle(B, version=2, plan=other))

    def test_the_roll_of_another_key_in_a_good_bundle(self, tmp_path: Path) -> None:
        one, other = member(tmp_path), Consortium()
        roll = sign_roll(other.roll(one.identity, B), other.key)
        bundle = one.consortium.bundle(tmp_path / "b.json", roll.roll, roll=roll)
        with pytest.raises(TrustError):
            open_offer(one.folder, bundle)

    @pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"{" * 10_000, b"9" * 10**7])
    def test_what_is_no_bundle(self, tmp_path: Path, data: bytes) -> None:
        one = member(tmp_path)
        (tmp_path / "bundle.json").write_bytes(data)
        with pytest.raises(TrustError):
            open_offer(one.folder, tmp_path / "bundle.json")

    def test_a_study_whose_name_is_a_path(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        bundle = one.bundle(B)

        def renamed(value: dict[str, Any]) -> None:
            value["study"] = "../../evil"

        edited(bundle, renamed)
        with pytest.raises(TrustError):
            open_offer(one.folder, bundle)


class TestRolls:
    def test_a_list_that_was_rolled_back(self, one: Member) -> None:
        one.join(B, C, version=2)
        yes(one, one.folder.path.parent)
        with pytest.raises(TrustError, match="never goes back"):
            one.join(B, version=1)
        with pytest.raises(TrustError, match="never goes back"):
            one.join(B, version=2)
        accepted = lists_of(one.folder, pinned_bundle(one.folder, "tiny")).accepted
        assert accepted.roll.version == 2 and accepted.roll.site("hospital_c")

    def test_a_site_that_was_slipped_in_is_not_accepted(self, one: Member) -> None:
        approval = approved(one.folder, "tiny")
        one.join(B, C, version=2)
        lists = lists_of(one.folder, pinned_bundle(one.folder, "tiny"))
        assert lists.accepted.roll.site("hospital_c") is None
        assert lists.added == ("hospital_c",)
        assert approved(one.folder, "tiny") == approval

    def test_another_key_under_an_approved_name_is_a_new_site(self, one: Member) -> None:
        assert one.join(Party("hospital_b"), version=2) == ("hospital_b",)
        accepted = lists_of(one.folder, pinned_bundle(one.folder, "tiny")).accepted
        assert accepted.roll.site("hospital_b") == B.identity

    @pytest.mark.parametrize("name", ["roll", "offered_roll"])
    def test_a_list_that_was_edited_on_disk(self, one: Member, name: str) -> None:
        one.join(B, C, version=2)
        path: Path = getattr(one.folder, name)("tiny")
        edited(path, lambda v: v["roll"].update(version=3))
        with pytest.raises(TrustError, match="signature"):
            situation_of(one.folder, "tiny")


class TestFilesOnDisk:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("plan", "0" * 64),
            ("roll", "0" * 64),
            ("any_later_sites", True),
            ("cohort", "0" * 64),
            ("by", "somebody else"),
            ("when", "2030-01-01T00:00:00+00:00"),
            ("study", "other"),
            ("site", "hospital_b"),
            ("signature", "A" * 86 + "=="),
        ],
    )
    def test_an_approval_that_was_edited(self, one: Member, field: str, value: object) -> None:
        edited(one.folder.approval("tiny"), lambda v: v.update({field: value}))
        with pytest.raises(TrustError, match="was edited"):
            approved(one.folder, "tiny")
        with pytest.raises(TrustError):
            load_cohort(one.folder, "tiny", one.consortium.plan)

    def test_an_approval_that_another_key_signed(self, one: Member) -> None:
        approval = approved(one.folder, "tiny")
        assert approval is not None
        forged = approval.model_copy(update={"any_later_sites": True})
        write_note(one.folder.approval("tiny"), forged.signed(SigningKey.generate()))
        with pytest.raises(TrustError, match="was not written by"):
            approved(one.folder, "tiny")

    def test_a_signature_of_this_site_for_something_else(self, one: Member) -> None:
        approval = approved(one.folder, "tiny")
        assert approval is not None
        other = to_text(one.key.sign("request", signable(approval)))
        borrowed = approval.model_copy(update={"signature": other})
        write_note(one.folder.approval("tiny"), borrowed)
        with pytest.raises(TrustError):
            approved(one.folder, "tiny")

    def test_an_approval_of_one_study_laid_into_another(self, one: Member) -> None:
        write_note(one.folder.approval("other"), one.folder.approval("tiny").read_bytes())
        with pytest.raises(TrustError):
            approved(one.folder, "other")

    def test_a_plan_that_was_not_approved_has_no_data(self, one: Member) -> None:
        other = built_plan(aggregation__rounds=50)
        assert other.digest != one.consortium.plan.digest
        with pytest.raises(DataError, match="no data are approved for this plan"):
            load_cohort(one.folder, "tiny", other)

    def test_a_cohort_that_was_edited(self, one: Member, tmp_path: Path) -> None:
        record = read_note(one.folder.cohort("tiny"), CohortRecord)
        elsewhere = record.model_copy(update={"data": str(tmp_path)})
        write_note(one.folder.cohort("tiny"), elsewhere)
        with pytest.raises(TrustError, match="not the one that was approved"):
            load_cohort(one.folder, "tiny", one.consortium.plan)

    @pytest.mark.parametrize("garbage", [b"", b"{}", b"null", b"\xff\xfe", b"[" * 100_000])
    @pytest.mark.parametrize("name", ["approval", "cohort", "roll", "bundle"])
    def test_garbage_in_any_file_is_an_error_that_people_can_read(
        self, one: Member, name: str, garbage: bytes
    ) -> None:
        getattr(one.folder, name)("tiny").write_bytes(garbage)
        with pytest.raises(FedsegError):
            situation_of(one.folder, "tiny")

    def test_a_bundle_that_was_exchanged_for_that_of_another_key(self, one: Member) -> None:
        """Keys cannot protect a file from its own user, but the rest no longer fits."""
        thief = Consortium()
        data = make_bundle(
            thief.key,
            site="hospital_a",
            address="evil.example.org:443",
            ca=pinned_bundle(one.folder, "tiny").ca.encode(),
            plan=thief.plan,
            roll=sign_roll(thief.roll(one.identity), thief.key),
            flower="1.41.0",
            issued="2026-05-03T12:00:00+00:00",
        )
        one.folder.bundle("tiny").write_bytes(data)
        bundle: Bundle = open_bundle(data, one.identity)
        assert bundle.study == "tiny"
        with pytest.raises(TrustError):
            situation_of(one.folder, "tiny")

    def test_a_request_that_was_exchanged(self, one: Member, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        other = member(tmp_path / "other")
        one.folder.request.write_bytes(other.folder.request.read_bytes())
        with pytest.raises(TrustError):
            approved(one.folder, "tiny")
        with pytest.raises(TrustError):
            open_offer(one.folder, one.bundle(B, version=2))


def test_nothing_is_pinned_where_the_audit_was_changed(tmp_path: Path) -> None:
    one = member(tmp_path)
    one.folder.audit.write_bytes(b"")
    with pytest.raises(TrustError, match="tail is missing"):
        join(one.folder, open_offer(one.folder, one.bundle(B)), one.key)
    assert one.folder.joined == ()


def test_nothing_in_the_audit_names_a_patient_or_a_path(one: Member) -> None:
    text = one.folder.audit.read_text()
    assert verify_chain(one.folder.audit, one.key.public)
    assert not any(name in text for name in (*NAMES, "P-", str(one.folder.path.parent)))
