"""Founding, enrolling, revoking and renewing: folder, roll, bundles and audit."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from small_plans import built_plan, tiny_model
from small_studies import NOW, founded, hospital, write_built
from typer.testing import CliRunner, Result

from coordinator.cli import app
from coordinator.folder import StudyFolder, new_settings, open_study
from coordinator.office.audit import enrolled_at
from coordinator.office.enrolment import declare_restored, register, renew, revoke
from coordinator.office.expiry import valid_until, warnings
from coordinator.office.founding import ROLL_DAYS, found, study_fingerprint
from coordinator.office.key import public_key
from coordinator.office.registry import current_roll
from fedseg.arrays import digest_of
from fedseg.chain import verify_chain
from fedseg.errors import DataError, FedsegError, PlanError, StorageError, TrustError
from fedseg.initial import initial_path
from fedseg.modelfile import load_model, save_model
from fedseg.security.certificates import check_issued, expiry, hosts_of
from fedseg.security.documents import stamp
from fedseg.security.identity import open_bundle
from fedseg.security.keys import is_encrypted, load_signing_key
from fedseg.shell import PASSPHRASE_FILE

LATER = NOW + timedelta(days=300)


def _modes(folder: StudyFolder) -> dict[str, int]:
    return {
        str(path.relative_to(folder.path)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.path.rglob("*")
    }


def _events(folder: StudyFolder) -> list[str]:
    return [entry.event for entry in verify_chain(folder.audit, public_key(folder))]


class TestFounding:
    def test_a_study_has_its_plan_its_model_and_a_roll_without_sites(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        plan = built_plan()
        assert open_study(folder.path).settings().address == "fl.example.org:443"
        assert folder.plan() == plan
        assert folder.plan_file.read_bytes() == plan.canonical_bytes
        header, model = load_model(folder.initial)
        assert header.plan_digest == plan.digest
        assert digest_of(model) == plan.built.digest
        roll = current_roll(folder).roll
        assert (roll.study, roll.version, roll.sites, roll.revoked) == ("tiny", 1, (), ())
        assert roll.expires == NOW + timedelta(days=ROLL_DAYS)
        assert public_key(folder) == key.public
        (entry,) = verify_chain(folder.audit, key.public)
        assert entry.event == "initialised"
        assert entry.facts["plan"] == plan.digest
        assert entry.facts["roll"] == roll.digest

    def test_the_certificate_is_for_the_host_and_for_loopback(self, tmp_path: Path) -> None:
        folder, _ = founded(tmp_path / "study")
        certificate = folder.server_certificate.read_bytes()
        check_issued(certificate, folder.ca_certificate.read_bytes())
        assert hosts_of(certificate) == ("fl.example.org", "localhost", "127.0.0.1")

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
    def test_private_keys_are_for_their_owner_alone(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            folder, key = founded(tmp_path / "study")
            renew(folder, key, NOW)
        finally:
            os.umask(before)
        modes = _modes(folder)
        assert {modes[name] for name in ("keys/study.key", "ca/ca.key", "tls/server.key")} == {
            0o600
        }
        closed = ("keys", "ca", "tls", "bundles", "rounds", "run", "logs")
        assert {modes[name] for name in closed} == {0o700}
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700

    def test_nothing_secret_lies_outside_the_three_folders(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        register(folder, hospital("a", tmp_path).request, key, NOW)
        secrets = [json.loads(folder.study_key.read_bytes())["secret"].encode()]
        for pem in (folder.ca_key, folder.server_key):
            secrets.append(pem.read_bytes().splitlines()[1])
        for path in folder.path.rglob("*"):
            if path.is_file() and path not in (folder.study_key, folder.ca_key, folder.server_key):
                assert not any(secret in path.read_bytes() for secret in secrets), path

    def test_a_passphrase_locks_the_study_and_the_authority(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study", passphrase=b"correct horse")
        assert is_encrypted(folder.study_key)
        assert is_encrypted(folder.ca_key)
        assert not is_encrypted(folder.server_key)
        for wrong in (None, b"other"):
            with pytest.raises(TrustError, match="passphrase"):
                load_signing_key(folder.study_key, wrong)
            with pytest.raises(TrustError, match="passphrase"):
                renew(folder, key, NOW, wrong)
        assert current_roll(folder).roll.version == 1
        renew(folder, key, NOW, b"correct horse")
        assert current_roll(folder).roll.version == 2

    def test_a_folder_with_anything_in_it_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        place = tmp_path / "study"
        place.mkdir()
        (place / "notes").write_text("mine")
        with pytest.raises(DataError, match="not empty"):
            founded(place)
        assert [path.name for path in place.iterdir()] == ["notes"]
        founded(tmp_path / "other")
        before = (tmp_path / "other" / "keys" / "study.key").read_bytes()
        with pytest.raises(DataError, match="not empty"):
            founded(tmp_path / "other")
        assert (tmp_path / "other" / "keys" / "study.key").read_bytes() == before

    def test_a_folder_that_cannot_be_made_is_one_message(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        plan = write_built(tmp_path / "plan.json")
        settings = new_settings(study="tiny", host="localhost", created=stamp(NOW))
        for place in (tmp_path / "file", tmp_path / "file" / "study"):
            with pytest.raises(DataError, match="cannot make the folder"):
                found(StudyFolder(place), plan, settings, now=NOW)

    @pytest.mark.parametrize("was_there", [True, False])
    def test_a_failure_in_the_middle_leaves_nothing(self, tmp_path: Path, was_there: bool) -> None:
        """An empty passphrase is refused when the keys are written, after plan and model."""
        place = tmp_path / "study"
        if was_there:
            place.mkdir()
        with pytest.raises(ValueError, match="empty passphrase"):
            founded(place, passphrase=b"")
        assert place.exists() == was_there
        assert not was_there or not list(place.iterdir())
        founded(place)

    def test_a_founding_that_was_killed_is_no_study(self, tmp_path: Path) -> None:
        folder, _ = founded(tmp_path / "study")
        draft = folder.path / ".draft"
        draft.mkdir()
        folder.settings_file.rename(draft / "study.json")  # as it stands before the last step
        with pytest.raises(DataError, match="no study folder"):
            open_study(folder.path)
        with pytest.raises(DataError, match=r"cut off.*delete"):
            founded(folder.path)

    def test_a_plan_that_was_not_built_founds_nothing(self, tmp_path: Path) -> None:
        settings = new_settings(study="tiny", host="localhost", created=stamp(NOW))
        plan = tmp_path / "plan.json"
        plan.write_bytes(built_plan().model_copy(update={"initial": None}).canonical_bytes)
        with pytest.raises(PlanError, match="fedseg plan build"):
            found(StudyFolder(tmp_path / "study"), plan, settings, now=NOW)
        write_built(plan)
        save_model(initial_path(plan), built_plan(), tiny_model(1), arm="initial", rounds=0)
        with pytest.raises(PlanError, match="not the model that the plan names"):
            found(StudyFolder(tmp_path / "study"), plan, settings, now=NOW)
        initial_path(plan).unlink()
        with pytest.raises(PlanError, match="must lie beside"):
            found(StudyFolder(tmp_path / "study"), plan, settings, now=NOW)
        assert not (tmp_path / "study").exists()


class TestEnrolment:
    def test_a_site_gets_a_bundle_that_opens_at_that_site_alone(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        a, b = hospital("hospital_a", tmp_path), hospital("hospital_b", tmp_path)
        path = register(folder, a.request, key, NOW)
        assert path == folder.bundle("hospital_a")
        bundle = open_bundle(path.read_bytes(), a.identity)
        assert bundle.plan == built_plan()
        assert bundle.address == "fl.example.org:443"
        assert bundle.ca.encode() == folder.ca_certificate.read_bytes()
        assert bundle.roll == current_roll(folder)
        assert bundle.fingerprint == study_fingerprint(folder)
        with pytest.raises(TrustError, match="hospital_b"):
            open_bundle(path.read_bytes(), b.identity)

    def test_a_late_joiner_raises_the_version_and_is_in_every_bundle(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        b, a = hospital("hospital_b", tmp_path), hospital("hospital_a", tmp_path)
        register(folder, b.request, key, NOW)
        before = current_roll(folder).roll
        register(folder, a.request, key, LATER)
        after = current_roll(folder).roll
        assert (before.version, after.version) == (2, 3)
        assert [site.name for site in after.sites] == ["hospital_a", "hospital_b"]
        assert after.added_since(before) == ("hospital_a",)
        assert after.expires == LATER + timedelta(days=ROLL_DAYS)
        for one in (a, b):
            bundle = open_bundle(folder.bundle(one.identity.name).read_bytes(), one.identity)
            assert bundle.roll.roll == after
        assert enrolled_at(folder) == {"hospital_a": stamp(LATER), "hospital_b": stamp(NOW)}

    def test_nobody_is_lost_where_several_people_enrol_at_once(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        requests = [hospital(f"hospital_{n}", tmp_path).request for n in range(6)]
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda request: register(folder, request, key, NOW), requests))
        roll = current_roll(folder).roll
        assert (roll.version, len(roll.sites)) == (7, 6)
        assert _events(folder) == ["initialised", *["enrolled"] * 6]

    def test_the_same_request_again_renews_the_bundle_and_nothing_else(
        self, tmp_path: Path
    ) -> None:
        folder, key = founded(tmp_path / "study")
        a = hospital("hospital_a", tmp_path)
        path = register(folder, a.request, key, NOW)
        roll = current_roll(folder)
        path.unlink()
        register(folder, a.request, key, LATER)
        assert current_roll(folder) == roll
        assert open_bundle(path.read_bytes(), a.identity).issued == stamp(LATER)
        assert _events(folder) == ["initialised", "enrolled", "renewed"]

    def test_a_revoked_site_is_gone_and_its_name_is_free_for_new_keys(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        a, b = hospital("hospital_a", tmp_path), hospital("hospital_b", tmp_path)
        for one in (a, b):
            register(folder, one.request, key, NOW)
        revoke(folder, "hospital_a", "key lost", key, LATER)
        roll = current_roll(folder).roll
        assert roll.version == 4
        assert roll.site("hospital_a") is None
        assert [(gone.name, gone.signing) for gone in roll.revoked] == [
            ("hospital_a", a.identity.signing)
        ]
        assert [path.name for path in folder.bundles.iterdir()] == ["hospital_b.json"]
        entry = verify_chain(folder.audit, key.public)[-1]
        assert (entry.event, entry.facts["site"], entry.facts["reason"]) == (
            "revoked",
            "hospital_a",
            "key lost",
        )
        with pytest.raises(TrustError, match=r"were revoked.*fedseg-site init"):
            register(folder, a.request, key, LATER)
        new = hospital("hospital_a", tmp_path)
        register(folder, new.request, key, LATER)
        assert current_roll(folder).roll.site("hospital_a") == new.identity

    def test_who_is_not_enrolled_cannot_be_revoked(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        with pytest.raises(DataError, match="none yet"):
            revoke(folder, "hospital_a", "why", key, NOW)
        for reason in ("", " ", "two\nlines", "x" * 501):
            with pytest.raises(DataError, match="say why"):
                revoke(folder, "hospital_a", reason, key, NOW)
        assert _events(folder) == ["initialised"]

    def test_renewal_gives_new_dates_and_keeps_who_takes_part(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        a = hospital("hospital_a", tmp_path)
        register(folder, a.request, key, NOW)
        certificate, authority = (
            folder.server_certificate.read_bytes(),
            folder.ca_certificate.read_bytes(),
        )
        renew(folder, key, LATER)
        assert folder.server_certificate.read_bytes() != certificate
        assert expiry(folder.server_certificate.read_bytes()) == LATER + timedelta(days=397)
        check_issued(folder.server_certificate.read_bytes(), folder.ca_certificate.read_bytes())
        assert valid_until(folder) == LATER + timedelta(days=ROLL_DAYS)
        assert current_roll(folder).roll.sites == (a.identity,)
        bundle = open_bundle(folder.bundle("hospital_a").read_bytes(), a.identity)
        assert bundle.roll == current_roll(folder)
        assert folder.ca_certificate.read_bytes() == authority

    def test_what_a_failure_cut_off_is_mended_by_the_next_command(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        a, b = hospital("hospital_a", tmp_path), hospital("hospital_b", tmp_path)
        register(folder, a.request, key, NOW)
        folder.bundle("hospital_b").mkdir()  # in the way of the bundle, after the registry
        with pytest.raises(StorageError):
            register(folder, b.request, key, NOW)
        assert _events(folder) == ["initialised", "enrolled"]
        folder.bundle("hospital_b").rmdir()
        register(folder, b.request, key, NOW)
        roll = current_roll(folder).roll
        assert (roll.version, len(roll.sites)) == (3, 2)
        for one in (a, b):
            open_bundle(folder.bundle(one.identity.name).read_bytes(), one.identity)
        entries = verify_chain(folder.audit, key.public)
        assert [e.event for e in entries] == ["initialised", "enrolled", "renewed", "renewed"]
        assert entries[2].facts["reason"] == "after a crash"
        assert entries[2].facts["sites"] == ["hospital_a", "hospital_b"]

    def test_a_declared_restore_goes_above_every_version_that_was_out(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        backup = folder.registry.read_bytes()
        register(folder, hospital("hospital_a", tmp_path).request, key, NOW)
        folder.registry.write_bytes(backup)
        with pytest.raises(TrustError, match="backup restored"):
            renew(folder, key, NOW)
        assert declare_restored(folder, "disk failed", 0, key, NOW) == 3
        assert declare_restored(folder, "whole folder restored", 17, key, NOW) == 18
        assert _events(folder)[-2:] == ["restored", "restored"]
        renew(folder, key, NOW)
        assert current_roll(folder).roll.version == 19


class TestWarnings:
    def test_all_is_quiet_until_thirty_days_before(self, tmp_path: Path) -> None:
        folder, _ = founded(tmp_path / "study")
        end = NOW + timedelta(days=397)
        assert warnings(folder, NOW) == ()
        assert warnings(folder, end - timedelta(days=30)) == ()
        soon = warnings(folder, end - timedelta(days=29, hours=12))
        assert len(soon) == 2
        assert all("in 29 days: run `fedseg-coordinator renew`" in line for line in soon)
        assert all("ended on 2027-06-04" in line for line in warnings(folder, end))

    def test_renewal_ends_the_warnings(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        late = NOW + timedelta(days=380)
        assert len(warnings(folder, late)) == 2
        renew(folder, key, late)
        assert warnings(folder, late) == ()

    def test_the_authority_cannot_be_renewed_and_says_so(self, tmp_path: Path) -> None:
        folder, _ = founded(tmp_path / "study")
        lines = warnings(folder, NOW + timedelta(days=3640))
        assert "certificate authority ends" in lines[-1]
        assert "join again" in lines[-1]


class TestCommands:
    def _run(self, *arguments: object, say: str = "") -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=say)

    def _refused(self, result: Result) -> str:
        assert result.exit_code == 1
        assert isinstance(result.exception, FedsegError)
        return str(result.exception)

    def test_from_a_plan_to_a_revoked_site(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = write_built(tmp_path / "plan.json")
        study = tmp_path / "study"
        made = self._run("init", study, "--host", "localhost", "--plan", plan, "--port", 8443)
        assert made.exit_code == 0, made.output
        folder = open_study(study)
        assert study_fingerprint(folder) in made.output
        assert "localhost:8443" in made.output

        a = hospital("hospital_a", tmp_path)
        request = tmp_path / "request.json"
        request.write_bytes(a.request)
        enrol = ("enrol", request, "--study", study)
        no = self._refused(self._run(*enrol, say="n\n"))
        assert "not enrolled" in no
        assert current_roll(folder).roll.version == 1
        yes = self._run(*enrol, say="y\n")
        assert yes.exit_code == 0
        assert a.identity.fingerprint in yes.output
        assert str(folder.bundle("hospital_a")) in yes.output
        again = self._run(*enrol)
        assert again.exit_code == 0
        assert "was enrolled already" in again.output

        monkeypatch.setenv("FEDSEG_STUDY", str(study))
        listed = self._run("sites")
        assert a.identity.fingerprint in listed.output
        assert "version 2" in listed.output
        assert self._run("renew").exit_code == 0
        assert self._run("revoke", "hospital_a", "--reason", "key lost").exit_code == 0
        assert "revoked" in self._run("sites").output
        assert self._run("backup", "restored", "--reason", "backup", "--above", 9).exit_code == 0
        assert "version 10" in self._run("sites").output
        shown = self._run("audit", "show").output.splitlines()
        words = ["initialised", "enrolled", "renewed", "renewed", "revoked", "restored"]
        assert [line.split()[2] for line in shown] == words
        assert "reason=key lost" in self._run("audit", "show", "--last", 2).output.splitlines()[0]
        entry = json.loads(self._run("audit", "show", "--last", 1, "--json").output)
        assert (entry["n"], entry["event"]) == (6, "restored")
        assert "the audit holds: 6 entries" in self._run("audit", "verify").output

    def test_a_passphrase_comes_from_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = write_built(tmp_path / "plan.json")
        init = ("--host", "localhost", "--plan", plan, "--passphrase")
        assert "no terminal" in self._refused(self._run("init", tmp_path / "study", *init))
        secret = tmp_path / "secret"
        secret.write_text("correct horse\n")
        monkeypatch.setenv(PASSPHRASE_FILE, str(secret))
        assert self._run("init", tmp_path / "study", *init).exit_code == 0
        assert is_encrypted(tmp_path / "study" / "keys" / "study.key")
        assert self._run("renew", "--study", tmp_path / "study").exit_code == 0
        secret.write_text("wrong\n")
        refused = self._refused(self._run("renew", "--study", tmp_path / "study"))
        assert "passphrase" in refused
        assert "wrong" not in refused.replace("is wrong", "")
        monkeypatch.delenv(PASSPHRASE_FILE)
        refused = self._refused(self._run("renew", "--study", tmp_path / "study"))
        assert PASSPHRASE_FILE in refused

    def test_every_command_needs_a_study(self, tmp_path: Path) -> None:
        (tmp_path / "request").write_bytes(hospital("a", tmp_path).request)
        for command in (
            ("enrol", tmp_path / "request", "--yes"),
            ("revoke", "a", "--reason", "why"),
            ("renew",),
            ("sites",),
            ("audit", "show"),
            ("audit", "verify"),
            ("backup", "restored", "--reason", "why"),
        ):
            found = self._refused(self._run(*command, "--study", tmp_path))
            assert "no study folder" in found
        assert not (tmp_path / "run").exists()

    def test_what_ends_soon_is_said_beside_the_list(self, tmp_path: Path) -> None:
        folder, key = founded(tmp_path / "study")
        long_ago = NOW - timedelta(days=5000)
        renew(folder, key, long_ago)
        listed = self._run("sites", "--study", folder.path)
        assert listed.exit_code == 0
        assert "warning: the server's certificate ended on" in listed.output
        assert "warning: the roll of sites ended on" in listed.output
