"""Somebody wants to be enrolled who should not be, or has changed the study's files."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import built_plan
from small_studies import NOW, Hospital, founded, hospital
from typer.testing import CliRunner

from coordinator.cli import app
from coordinator.folder import StudyFolder
from coordinator.office.enrolment import register, renew, revoke
from coordinator.office.key import public_key
from coordinator.office.registry import current_roll
from fedseg.chain import verify_chain
from fedseg.durable import write_atomically
from fedseg.errors import DataError, FedsegError, TrustError
from fedseg.security.documents import stamp
from fedseg.security.identity import make_request, open_request, sign_roll
from fedseg.security.keys import SigningKey


@pytest.fixture
def study(tmp_path: Path) -> tuple[StudyFolder, SigningKey]:
    """A study with one hospital."""
    folder, key = founded(tmp_path / "study")
    register(folder, hospital("hospital_a", tmp_path).request, key, NOW)
    return folder, key


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, StudyFolder, SigningKey]:
    """One good request, and a study without sites."""
    place = tmp_path_factory.mktemp("shared")
    folder, key = founded(place / "study")
    return hospital("hospital_b", place).request, folder, key


def _state(folder: StudyFolder) -> dict[str, bytes]:
    """Every file but the lock, which holds nothing."""
    return {
        str(path): path.read_bytes()
        for path in folder.path.rglob("*")
        if path.is_file() and path != folder.registry_lock
    }


def _canonical(value: dict[str, Any]) -> bytes:
    """The one encoding that is signed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _changed(request: bytes, **fields: Any) -> bytes:
    """A request with other fields, and the signature that it had."""
    value = json.loads(request)
    value["identity"].update({k: v for k, v in fields.items() if k != "created"})
    value.update({k: v for k, v in fields.items() if k == "created"})
    return _canonical(value)


def _refused(study: tuple[StudyFolder, SigningKey], request: bytes, words: str = "request") -> None:
    """Refused, and the study's folder is as it was."""
    folder, key = study
    before = _state(folder)
    with pytest.raises(TrustError, match=words):
        register(folder, request, key, NOW)
    assert _state(folder) == before


class TestRequests:
    @pytest.mark.parametrize("field", ["name", "signing", "sealing", "node", "created"])
    def test_a_forged_request(
        self, field: str, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        """Anything changed after it was signed: the attacker's own keys under a hospital's name."""
        good, mine = hospital("hospital_b", tmp_path), hospital("attacker", tmp_path)
        other = "2026-05-04T12:00:00+00:00"
        value = other if field == "created" else getattr(mine.identity, field)
        _refused(study, _changed(good.request, **{field: value}), "signature")

    def test_a_request_signed_by_another_key(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        """Nobody can ask in the name of a key that they do not hold."""
        good, mine = hospital("hospital_b", tmp_path), hospital("attacker", tmp_path)
        with pytest.raises(ValueError, match="signed by the key that it names"):
            make_request(good.identity, mine.key, stamp(NOW))
        forged = json.loads(good.request)
        forged["signature"] = json.loads(mine.request)["signature"]
        _refused(study, _canonical(forged), "signature")

    def test_another_kind_of_signed_document(self, study: tuple[StudyFolder, SigningKey]) -> None:
        folder, _ = study
        for path in (folder.registry, folder.bundle("hospital_a"), folder.audit):
            _refused(study, path.read_bytes())

    def test_an_oversized_request_is_not_read(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        folder, _ = study
        _refused(study, hospital("hospital_b", tmp_path).request + b" " * 100_000, "at most")
        huge = tmp_path / "huge"
        with huge.open("wb") as file:
            file.truncate(1 << 40)  # sparse; read whole, it would end this process
        ran = CliRunner().invoke(app, ["enrol", str(huge), "--yes", "--study", str(folder.path)])
        assert isinstance(ran.exception, TrustError)

    @pytest.mark.parametrize(
        "name", ["coordinator", "Coordinator", "../../x", "a/b", "", ".hidden", "x" * 65, "a\n"]
    )
    def test_a_name_that_is_none(
        self, name: str, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        """Signed by its own key, as a site would that runs other software."""
        site = hospital("hospital_b", tmp_path)
        value = json.loads(site.request)
        value["identity"]["name"] = name
        del value["signature"]
        signature = site.key.sign("request", _canonical(value))
        value["signature"] = base64.b64encode(signature).decode()
        _refused(study, _canonical(value), "identity")

    @settings(max_examples=150)
    @given(data=st.data())
    def test_no_changed_byte_is_enrolled(
        self, data: st.DataObject, shared: tuple[bytes, StudyFolder, SigningKey]
    ) -> None:
        request, folder, key = shared
        body = request.rstrip()
        place = data.draw(st.integers(0, len(body) - 1))
        byte = data.draw(st.integers(0, 255).filter(lambda b: b != body[place]))
        with pytest.raises(TrustError):
            register(folder, body[:place] + bytes([byte]) + body[place + 1 :], key, NOW)
        assert current_roll(folder).roll.version == 1

    @settings(max_examples=100)
    @given(noise=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
    def test_noise_is_refused(self, noise: bytes) -> None:
        with pytest.raises(TrustError):
            open_request(noise)


class TestClashes:
    def _enrolled(self, study: tuple[StudyFolder, SigningKey]) -> dict[str, str]:
        identity = current_roll(study[0]).roll.site("hospital_a")
        assert identity is not None
        return {"signing": identity.signing, "sealing": identity.sealing, "node": identity.node}

    def test_another_identity_under_an_enrolled_name(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        """Both fingerprints are said, and the remedy."""
        impostor = hospital("hospital_a", tmp_path)
        digits = impostor.identity.fingerprint
        _refused(study, impostor.request, rf"{digits}.*revoke hospital_a --reason")

    @pytest.mark.parametrize("kind", ["sealing", "node"])
    def test_one_new_key_under_an_enrolled_name(
        self, kind: str, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        """Also signed by the enrolled site: whoever has its key gets no second one by itself."""
        folder, key = study
        site = hospital("hospital_b", tmp_path)
        register(folder, site.request, key, NOW)
        new = getattr(hospital("x", tmp_path).identity, kind)
        changed = Hospital(site.identity.model_copy(update={kind: new}), site.key)
        _refused(study, changed.request, "revoke hospital_b")

    def test_a_name_that_only_looks_different(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        _refused(study, hospital("Hospital_A", tmp_path).request, "capital letters")

    @pytest.mark.parametrize("kind", ["sealing", "node"])
    def test_a_key_of_another_site(
        self, kind: str, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        """With another's node key, Flower would take one site for the other."""
        taken = hospital("hospital_b", tmp_path, **{kind: self._enrolled(study)[kind]})
        _refused(study, taken.request, "key of hospital_a")

    def test_a_site_under_a_second_name(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        folder, key = study
        site = hospital("hospital_b", tmp_path)
        register(folder, site.request, key, NOW)
        twice = Hospital(site.identity.model_copy(update={"name": "hospital_c"}), site.key)
        _refused(study, twice.request, "key of hospital_b")

    def test_a_revoked_key_under_any_name(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        folder, key = study
        site = hospital("hospital_b", tmp_path)
        register(folder, site.request, key, NOW)
        revoke(folder, "hospital_b", "left the consortium", key, NOW)
        _refused(study, site.request, "revoked")
        fresh = hospital("hospital_z", tmp_path)
        again = Hospital(
            fresh.identity.model_copy(update={"signing": site.identity.signing}), site.key
        )
        _refused(study, again.request, "revoked")


class TestFiles:
    """Somebody could write in the study's folder, but does not hold the study key."""

    def _stopped(self, study: tuple[StudyFolder, SigningKey], words: str) -> None:
        """Nothing is signed any more, and nothing is written."""
        folder, key = study
        before = _state(folder)
        for change in (
            lambda: register(folder, hospital("new", folder.path.parent).request, key, NOW),
            lambda: renew(folder, key, NOW),
            lambda: revoke(folder, "hospital_a", "why", key, NOW),
        ):
            with pytest.raises(FedsegError, match=words):
                change()
        assert _state(folder) == before

    def test_an_edited_registry(self, study: tuple[StudyFolder, SigningKey]) -> None:
        folder, _ = study
        data = folder.registry.read_bytes()
        folder.registry.write_bytes(data.replace(b"hospital_a", b"hospital_x"))
        with pytest.raises(TrustError, match="signature"):
            current_roll(folder)
        self._stopped(study, "signature")

    def test_a_registry_signed_by_another_key(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        folder, _ = study
        roll = current_roll(folder).roll
        mine = hospital("attacker", tmp_path).identity
        forged = roll.model_copy(update={"sites": (mine, *roll.sites), "version": 9})
        write_atomically(folder.registry, sign_roll(forged, SigningKey.generate()).canonical_bytes)
        with pytest.raises(TrustError, match="signature"):
            current_roll(folder)
        self._stopped(study, "signature")

    def test_a_registry_and_a_public_key_of_the_attacker(
        self, study: tuple[StudyFolder, SigningKey]
    ) -> None:
        """Commands that sign verify with the private key that they hold, not with the file."""
        folder, _ = study
        key = SigningKey.generate()
        signed = sign_roll(current_roll(folder).roll, key)
        write_atomically(folder.registry, signed.canonical_bytes)
        folder.study_public.write_text(key.public.text)
        self._stopped(study, "signature")

    def test_an_older_registry_brings_no_revoked_site_back(
        self, study: tuple[StudyFolder, SigningKey]
    ) -> None:
        folder, key = study
        old = folder.registry.read_bytes()
        revoke(folder, "hospital_a", "key lost", key, NOW)
        folder.registry.write_bytes(old)
        self._stopped(study, r"version 2 of the roll.*version 3.*backup restored")

    def test_a_registry_of_another_study_of_the_same_key(
        self, study: tuple[StudyFolder, SigningKey]
    ) -> None:
        folder, key = study
        other = current_roll(folder).roll.model_copy(update={"study": "other"})
        write_atomically(folder.registry, sign_roll(other, key).canonical_bytes)
        self._stopped(study, "'other'")

    @pytest.mark.parametrize("size", [0, 10, 5 * 1024 * 1024])
    def test_a_registry_that_is_none(
        self, size: int, study: tuple[StudyFolder, SigningKey]
    ) -> None:
        study[0].registry.write_bytes(b"[" * size)
        self._stopped(study, "roll")

    def test_another_plan_is_never_signed(self, study: tuple[StudyFolder, SigningKey]) -> None:
        folder, _ = study
        folder.plan_file.write_bytes(built_plan(aggregation__rounds=99).canonical_bytes)
        self._stopped(study, "plan.json")

    def test_another_authority_is_never_signed(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        """Or every site would trust the attacker's certificates."""
        folder, _ = study
        other, _ = founded(tmp_path / "other")
        shutil.copy(other.ca_certificate, folder.ca_certificate)
        shutil.copy(other.ca_key, folder.ca_key)
        self._stopped(study, "ca.crt")

    @pytest.mark.parametrize("how", ["edited", "cut", "headless", "gone"])
    def test_a_changed_audit(self, how: str, study: tuple[StudyFolder, SigningKey]) -> None:
        folder, _ = study
        lines = folder.audit.read_bytes().splitlines(keepends=True)
        if how == "edited":
            folder.audit.write_bytes(lines[0].replace(b"tiny", b"tony") + lines[1])
        elif how == "cut":
            folder.audit.write_bytes(lines[0])
        elif how == "headless":
            folder.audit.with_suffix(".head").unlink()
        else:
            folder.audit.unlink()
        ran = CliRunner().invoke(app, ["audit", "verify", "--study", str(folder.path)])
        assert isinstance(ran.exception, TrustError)
        self._stopped(study, "audit")

    def test_a_key_that_others_may_read_is_not_used(
        self, study: tuple[StudyFolder, SigningKey]
    ) -> None:
        folder, _ = study
        folder.study_key.chmod(0o640)
        ran = CliRunner().invoke(app, ["renew", "--study", str(folder.path)])
        assert isinstance(ran.exception, TrustError)
        assert "0600" in str(ran.exception)

    @pytest.mark.parametrize("missing", ["plan_file", "ca_certificate", "study_public", "registry"])
    def test_a_missing_file_is_one_message(
        self, missing: str, study: tuple[StudyFolder, SigningKey]
    ) -> None:
        folder, key = study
        path: Path = getattr(folder, missing)
        path.unlink()
        with pytest.raises(FedsegError, match=path.name):
            renew(folder, key, NOW)

    def test_the_audit_names_every_change(
        self, study: tuple[StudyFolder, SigningKey], tmp_path: Path
    ) -> None:
        folder, key = study
        site = hospital("hospital_b", tmp_path)
        register(folder, site.request, key, NOW)
        with pytest.raises(DataError):
            revoke(folder, "hospital_c", "why", key, NOW)
        entry = verify_chain(folder.audit, public_key(folder))[-1]
        assert entry.facts["fingerprint"] == site.identity.fingerprint
        assert entry.facts["roll"] == current_roll(folder).roll.digest
