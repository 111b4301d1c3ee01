"""Founding a site, joining and leaving studies, and what a later bundle may change."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from small_parties import NOW, Party
from small_plans import built_plan
from small_sites import CA, Member, member
from typer.testing import CliRunner, Result

from fedseg.chain import verify_chain
from fedseg.errors import DataError, StorageError, TrustError
from fedseg.security.certificates import make_ca
from fedseg.security.identity import open_request, open_roll
from fedseg.security.keys import is_encrypted, load_receiving_key
from fedseg.security.nodekeys import public_line
from fedseg.shell import PASSPHRASE_FILE
from sites import cli, enrolment
from sites.enrolment import leave, open_offer, pinned_bundle
from sites.folder import SiteFolder
from sites.founding import found
from sites.keyring import open_signing_key, own_identity

B, C = Party("hospital_b"), Party("hospital_c")


def run(*args: object, given: str = "") -> Result:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], input=given)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def events(one: Member) -> list[str]:
    return [entry.event for entry in verify_chain(one.folder.audit, one.key.public)]


def accepted(one: Member) -> int:
    data = one.folder.roll("tiny").read_bytes()
    return open_roll(data, one.consortium.key.public, "tiny").roll.version


class TestInit:
    def test_the_request_names_the_keys_that_lie_in_the_folder(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        request = open_request(one.folder.request.read_bytes())
        assert request.identity == one.identity == own_identity(one.folder)
        receiving = load_receiving_key(one.folder.receiving_key)
        assert request.identity.sealing == receiving.public.text
        assert request.identity.node == public_line(one.folder.node_key)
        assert one.folder.node_public.read_text().strip() == request.identity.node
        for key in (one.folder.signing_key, one.folder.receiving_key, one.folder.node_key):
            secret = key.read_bytes()
            assert secret not in one.folder.request.read_bytes()
        assert events(one) == ["initialised"]

    def test_a_site_is_made_once(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        before = one.folder.signing_key.read_bytes()
        with pytest.raises(DataError, match="already"):
            found(one.folder, "hospital_z", NOW)
        one.folder.site.unlink()
        with pytest.raises(DataError, match="not finished"):
            found(one.folder, "hospital_a", NOW)
        assert one.folder.signing_key.read_bytes() == before

    def test_volumes_that_are_mounted_already_are_used(self, tmp_path: Path) -> None:
        for name in ("relay", "trainer", "lost+found"):
            (tmp_path / "site" / name).mkdir(parents=True)
        assert member(tmp_path).folder.record.name == "hospital_a"

    @pytest.mark.parametrize("name", ["", "a b", "../a", "coordinator", "Coordinator", "x" * 65])
    def test_a_name_that_cannot_be_one_leaves_no_folder(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match="a site is named"):
            found(SiteFolder(tmp_path / "site"), name, NOW)
        assert not (tmp_path / "site").exists()

    def test_an_init_that_a_full_disk_stopped_is_no_site(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_args: object) -> str:
            raise StorageError("no room")

        monkeypatch.setattr("sites.founding.make_node_key", full)
        with pytest.raises(StorageError):
            member(tmp_path)
        with pytest.raises(DataError, match="no site folder"):
            SiteFolder(tmp_path / "site").record  # noqa: B018

    def test_a_passphrase_comes_from_a_file_and_encrypts_both_keys(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_text("correct horse\n")
        monkeypatch.setenv(PASSPHRASE_FILE, str(secret))
        site = tmp_path / "site"
        shown = run("init", site, "--name", "hospital_a", "--passphrase").stdout
        folder = SiteFolder(site)
        assert own_identity(folder).fingerprint in shown
        assert is_encrypted(folder.signing_key) and is_encrypted(folder.receiving_key)
        assert open_signing_key(folder).public.text == own_identity(folder).signing
        monkeypatch.delenv(PASSPHRASE_FILE)
        with pytest.raises(TrustError, match="passphrase"):
            open_signing_key(folder)

    def test_a_passphrase_that_nobody_can_give_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="--passphrase"):
            run("init", tmp_path / "site", "--name", "hospital_a", "--passphrase")


class TestJoin:
    def test_joining_pins_the_study_and_tells_the_relay_where_to_go(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        bundle = one.bundle(B)
        with pytest.raises(DataError, match="has not joined"):
            pinned_bundle(one.folder, "tiny")
        shown = run("join", bundle, "--site", one.folder.path, "--yes").stdout
        pinned = pinned_bundle(one.folder, "tiny")
        assert pinned.fingerprint in shown and one.identity.fingerprint in shown
        assert one.folder.bundle("tiny").read_bytes() == bundle.read_bytes()
        assert one.folder.plan("tiny").read_bytes() == one.consortium.plan.canonical_bytes
        assert one.folder.ca("tiny").read_bytes() == CA
        link = one.folder.link_of("tiny")
        assert (link.address, link.trainer) == (
            "fl.example.org:443",
            f"unix:{one.folder.socket}",
        )
        assert one.folder.joined == one.folder.linked == ("tiny",)
        assert events(one) == ["initialised", "joined"]

    def test_nothing_is_pinned_unless_the_fingerprints_were_compared(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        with pytest.raises(TrustError, match="was not joined"):
            run("join", one.bundle(B), "--site", one.folder.path, given="n\n")
        assert one.folder.joined == () and not one.folder.relay_of("tiny").exists()
        assert (
            "Are they the same?"
            in run("join", one.bundle(B), "--site", one.folder.path, given="y\n").stdout
        )
        assert one.folder.joined == ("tiny",)

    def test_a_join_that_was_cut_off_is_no_join_and_is_mended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = member(tmp_path)
        monkeypatch.setattr(enrolment, "record", lambda *_a, **_k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.join(B)
        assert one.folder.joined == ()
        monkeypatch.undo()
        one.join(B)
        assert one.folder.joined == ("tiny",)

    def test_a_renewed_bundle_brings_another_address_ca_and_list(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        one.join(B)
        port = one.folder.link_of("tiny").port
        other = make_ca("tiny", datetime.now(UTC)).certificate
        new = one.bundle(B, C, version=2, address="new.example.org:8443", ca=other)
        offer = open_offer(one.folder, new)
        assert offer.to_compare and len(offer.changes) == 3
        run("join", new, "--site", one.folder.path, "--yes")
        link = one.folder.link_of("tiny")
        assert (link.address, link.port) == ("new.example.org:8443", port)
        assert one.folder.ca("tiny").read_bytes() == other
        assert accepted(one) == 2 and not one.folder.offered_roll("tiny").exists()

    def test_the_same_bundle_again_mends_what_is_missing(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        one.join(B)
        one.folder.ca("tiny").unlink()
        offer = open_offer(one.folder, one.folder.bundle("tiny"))
        assert not offer.to_compare and offer.changes == ()
        one.join(B)
        assert one.folder.ca("tiny").exists()

    def test_several_studies_have_their_own_folders_and_ports(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        one.join(B)
        other = Member(one.folder, one.identity, one.key)
        other.consortium.plan = built_plan(study="other")
        other.consortium.bundle(
            tmp_path / "other.json", other.consortium.roll(one.identity, study="other")
        )
        run("join", tmp_path / "other.json", "--site", one.folder.path, "--yes")
        assert one.folder.joined == ("other", "tiny")
        assert one.folder.link_of("other").port != one.folder.link_of("tiny").port


class TestLeave:
    def test_leaving_deletes_what_serves_and_keeps_audit_and_model(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        one.join(B)
        one.folder.model("tiny").write_bytes(b"model")
        shown = run("leave", "tiny", "--site", one.folder.path, "--yes").stdout
        assert "studies/tiny/" in shown and "relay/tiny/" in shown and "models/tiny" in shown
        assert one.folder.joined == one.folder.linked == ()
        assert one.folder.model("tiny").exists()
        assert events(one) == ["initialised", "joined", "left"]

    def test_a_leave_that_was_cut_off_serves_nothing_and_can_be_finished(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = member(tmp_path)
        one.join(B)

        def stuck(_path: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(enrolment.shutil, "rmtree", stuck)
        with pytest.raises(StorageError, match="no longer served"):
            leave(one.folder, "tiny", one.key)
        assert one.folder.joined == ()
        monkeypatch.undo()
        assert leave(one.folder, "tiny", one.key) == ("studies/tiny/", "relay/tiny/")

    def test_only_what_was_joined_can_be_left(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        with pytest.raises(DataError, match="has not joined"):
            leave(one.folder, "tiny", one.key)
        assert events(one) == ["initialised"]


def test_studies_are_listed_with_what_expires_soon(tmp_path: Path) -> None:
    one = member(tmp_path)
    site = ("--site", one.folder.path)
    assert "no study joined yet" in run("studies", *site).stdout
    soon = (datetime.now(UTC) + timedelta(days=29)).isoformat(timespec="seconds")
    roll = one.consortium.roll(one.identity, B, valid_until=soon)
    run("join", one.consortium.bundle(tmp_path / "b.json", roll), *site, "--yes")
    (found,) = json.loads(run("studies", *site, "--json").stdout)
    assert (found["study"], found["approved"], found["sites"]) == ("tiny", "no", 2)
    assert "the list of sites expires" in found["warnings"][0]
    assert "ask the consortium" in run("studies", *site).stdout.replace("\n", " ")


class TestAudit:
    def test_show_and_verify(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        one.join(B)
        site = ("--site", one.folder.path)
        assert "joined" in run("audit", "show", *site).stdout
        only = run("audit", "show", *site, "--study", "tiny", "--json").stdout
        assert [json.loads(line)["event"] for line in only.splitlines()] == ["joined"]
        assert "2 entries" in run("audit", "verify", *site).stdout

    def test_verify_finds_what_was_changed(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        one.join(B)
        whole = one.folder.audit.read_text()
        for changed in (
            whole.replace('"joined"', '"left"'),
            "\n".join(reversed(whole.splitlines())) + "\n",
            whole.splitlines()[0] + "\n",
            whole.splitlines()[1] + "\n",
        ):
            one.folder.audit.write_text(changed)
            with pytest.raises(TrustError, match="audit"):
                run("audit", "verify", "--site", one.folder.path)

    def test_a_restored_backup_is_a_declared_act(self, tmp_path: Path) -> None:
        one = member(tmp_path)
        site = ("--site", one.folder.path)
        run("backup", "restored", "--note", "disk replaced", *site)
        assert events(one) == ["initialised", "restored"]
        with pytest.raises(DataError, match="--note"):
            run("backup", "restored", "--note", " ", *site)


def test_a_command_outside_a_site_says_so(tmp_path: Path) -> None:
    for args in (("studies",), ("plan", "show", "tiny"), ("audit", "verify"), ("leave", "tiny")):
        with pytest.raises(DataError, match="no site folder"):
            run(*args, "--site", tmp_path)


def test_the_folder_may_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = member(tmp_path)
    monkeypatch.setenv("FEDSEG_SITE", str(one.folder.path))
    assert "no study" in run("studies").stdout


def test_predict_uses_no_model_that_nobody_accepted(tmp_path: Path) -> None:
    one = member(tmp_path)
    one.folder.model("liver").write_bytes(b"")
    args = ("predict", "lung", tmp_path / "x.nii", "--out", tmp_path, "--site", one.folder.path)
    with pytest.raises(DataError, match=r"no model of lung is in use at this site"):
        run(*args)
