"""Keys sign in one context, open what was sealed for them, and rest where nobody else reads."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedseg.errors import DataError, TrustError
from fedseg.security.keys import (
    ReceivingKey,
    SealingKey,
    SigningKey,
    VerifyKey,
    fingerprint,
    is_encrypted,
    load_receiving_key,
    load_signing_key,
    save_key,
)
from fedseg.security.nodekeys import check_public_line, make_node_key, public_line
from fedseg.security.secretfile import lock, unlock, write_secret

SIGNER, RECEIVER = SigningKey.generate(), ReceivingKey.generate()
OPENER = b"correct horse"


def test_the_public_half_is_that_of_rfc_8032() -> None:
    secret = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert SigningKey(bytes.fromhex(secret)).public.raw.hex() == public


def test_a_signature_is_ed25519_over_prefix_context_and_data() -> None:
    signature = SIGNER.sign("roll", b"data")
    key = ed25519.Ed25519PublicKey.from_public_bytes(SIGNER.public.raw)
    key.verify(signature, b"fedseg:roll\0data")
    SIGNER.public.verify("roll", b"data", signature)


@pytest.mark.parametrize(
    ("context", "data", "signature"),
    [
        ("bundle", b"data", SIGNER.sign("roll", b"data")),
        ("roll", b"dat4", SIGNER.sign("roll", b"data")),
        ("roll", b"data", SigningKey.generate().sign("roll", b"data")),
        ("roll", b"data", SIGNER.sign("roll", b"data")[:-1]),
        ("roll", b"data", b""),
    ],
    ids=["context", "content", "key", "short", "empty"],  # values differ from process to process
)
def test_another_context_content_key_or_length_is_refused(
    context: str, data: bytes, signature: bytes
) -> None:
    with pytest.raises(TrustError, match=f"the signature of the {context}"):
        SIGNER.public.verify(context, data, signature)


@pytest.mark.parametrize("context", ["", "a\0b"])
def test_a_context_cannot_run_into_the_data(context: str) -> None:
    with pytest.raises(ValueError, match="context"):
        SIGNER.sign(context, b"data")


def test_a_secret_opens_for_its_key_and_info_alone() -> None:
    blob = RECEIVER.public.wrap(b"s" * 32, b"info")
    assert RECEIVER.unwrap(blob, b"info") == b"s" * 32
    assert RECEIVER.public.wrap(b"s" * 32, b"info") != blob
    attempts = [(RECEIVER, blob, b"other"), (ReceivingKey.generate(), blob, b"info")]
    attempts += [(RECEIVER, blob[:-1], b"info"), (RECEIVER, b"", b"info")]
    for key, data, info in attempts:
        with pytest.raises(TrustError, match="does not open"):
            key.unwrap(data, info)


def test_either_half_of_the_hybrid_key_alone_opens_nothing() -> None:
    other = ReceivingKey.generate()
    blob = RECEIVER.public.wrap(b"s" * 32, b"")
    for mixed in (
        RECEIVER._secret[:64] + other._secret[64:],
        other._secret[:64] + RECEIVER._secret[64:],
    ):
        with pytest.raises(TrustError):
            ReceivingKey(mixed).unwrap(blob, b"")


@pytest.mark.parametrize("kind", [VerifyKey, SealingKey])
@pytest.mark.parametrize("change", ["", "no base64!", "AAAA", " {}", "{}\n", "{}A==="])
def test_a_public_key_has_one_spelling(kind: type, change: str) -> None:
    own = SIGNER.public if kind is VerifyKey else RECEIVER.public
    assert kind.from_text(own.text) == own
    with pytest.raises(TrustError):
        kind.from_text(change.format(own.text))


def test_a_sealing_key_outside_ml_kem_is_refused() -> None:
    beyond = b"\xff" * 1184 + RECEIVER.public.raw[1184:]
    with pytest.raises(TrustError, match="FIPS 203"):
        SealingKey.from_text(base64.b64encode(beyond).decode())


def test_a_sealing_key_of_low_order_seals_nothing() -> None:
    weak = SealingKey.from_text(base64.b64encode(RECEIVER.public.raw[:1184] + bytes(32)).decode())
    with pytest.raises(TrustError):
        weak.wrap(b"s" * 32, b"")


@pytest.mark.parametrize("passphrase", [None, OPENER])
def test_keys_come_back_from_disk(tmp_path: Path, passphrase: bytes | None) -> None:
    signing, receiving = tmp_path / "keys" / "signing.key", tmp_path / "keys" / "receiving.key"
    save_key(signing, SIGNER, passphrase)
    save_key(receiving, RECEIVER, passphrase)
    assert load_signing_key(signing, passphrase).public == SIGNER.public
    assert load_receiving_key(receiving, passphrase).public == RECEIVER.public
    assert is_encrypted(signing) is is_encrypted(receiving) is (passphrase is not None)
    assert {oct(path.stat().st_mode & 0o777) for path in (signing, receiving)} == {"0o600"}
    assert oct(signing.parent.stat().st_mode & 0o777) == "0o700"
    assert {path.name for path in signing.parent.iterdir()} == {"signing.key", "receiving.key"}


def test_a_mode_is_0600_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        save_key(tmp_path / "a.key", SIGNER)
        make_node_key(tmp_path / "node.key")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_passphrase_is_needed_and_must_be_right(tmp_path: Path) -> None:
    save_key(tmp_path / "a.key", SIGNER, OPENER)
    with pytest.raises(TrustError, match="FEDSEG_PASSPHRASE_FILE"):
        load_signing_key(tmp_path / "a.key")
    with pytest.raises(TrustError, match="wrong"):
        load_signing_key(tmp_path / "a.key", b"incorrect horse")
    with pytest.raises(ValueError, match="empty"):
        save_key(tmp_path / "b.key", SIGNER, b"")
    assert not (tmp_path / "b.key").exists()


def test_a_locked_key_shows_nothing_and_never_twice_the_same() -> None:
    secret = b"-----secret-----" * 4
    first, second = lock(secret, OPENER), lock(secret, OPENER)
    assert first != second
    assert secret not in first
    assert base64.b64encode(secret)[:16] not in first
    assert unlock(first, OPENER) == unlock(second, OPENER) == unlock(secret, None) == secret


@pytest.mark.parametrize("where", ["salt", "sealed"])
def test_a_damaged_locked_key_is_refused(where: str) -> None:
    data = lock(b"secret", OPENER)
    at = data.index(where.encode()) + len(where) + 4
    damaged = data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :]
    with pytest.raises(TrustError):
        unlock(damaged, OPENER)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    save_key(path, SIGNER)
    with pytest.raises(DataError, match="not overwritten"):
        save_key(path, SigningKey.generate())
    with pytest.raises(DataError, match="not overwritten"):
        make_node_key(path)
    assert load_signing_key(path).public == SIGNER.public
    write_secret(path, b"new", replace=True)
    assert path.read_bytes() == b"new"
    assert [found.name for found in tmp_path.iterdir()] == ["a.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o700, 0o666])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.key"
    save_key(path, SIGNER)
    path.chmod(mode)
    with pytest.raises(TrustError, match="expected 0600"):
        load_signing_key(path)
    path.chmod(0o400)
    assert load_signing_key(path).public == SIGNER.public


def test_a_missing_damaged_or_other_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="cannot read"):
        load_signing_key(tmp_path / "none.key")
    save_key(tmp_path / "r.key", RECEIVER)
    with pytest.raises(TrustError, match="is a receiving key, a signing key was expected"):
        load_signing_key(tmp_path / "r.key")
    for number, data in enumerate([b"", b"garbage", b"{}", b"x" * 70_000]):
        write_secret(tmp_path / f"{number}.key", data)
        with pytest.raises(TrustError):
            load_receiving_key(tmp_path / f"{number}.key")


def test_no_message_and_no_printed_key_shows_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    save_key(path, SIGNER)
    data = path.read_bytes()
    secret = base64.b64encode(SIGNER._secret)
    assert secret in data
    path.write_bytes(data.replace(b"signing", b"sinning"))
    with pytest.raises(TrustError) as caught:
        load_signing_key(path)
    for text in (str(caught.value), repr(SIGNER), repr(RECEIVER)):
        assert secret.decode()[:8] not in text
        assert str(tmp_path) not in text


def test_a_fingerprint_is_eight_groups_that_depend_on_every_part() -> None:
    shown = fingerprint("a", b"b")
    assert [len(group) for group in shown.split(" ")] == [5] * 8
    assert shown.replace(" ", "").isdigit()
    others = [("a",), ("ab",), ("a", "b", ""), ("", "ab"), ("b", "a")]
    assert len({shown, *(fingerprint(*other) for other in others)}) == 6
    assert fingerprint(b"a", "b") == shown


def test_flower_reads_the_node_key(tmp_path: Path) -> None:
    """As flower-supernode and `flwr supernode register` do."""
    from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

    line = make_node_key(tmp_path / "node.key")
    private = load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    public = load_ssh_public_key(line.encode())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert uses_nist_ec_curve(public)
    assert private.public_key() == public
    assert public_line(tmp_path / "node.key") == check_public_line(line) == line
    assert line.startswith("ecdsa-sha2-nistp384 ")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_openssh_reads_the_node_key(tmp_path: Path) -> None:
    line = make_node_key(tmp_path / "node.key")
    command = ["ssh-keygen", "-y", "-f", str(tmp_path / "node.key")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == line


def test_other_node_keys_are_refused(tmp_path: Path) -> None:
    line = make_node_key(tmp_path / "node.key")
    edwards = ed25519.Ed25519PrivateKey.generate()
    formats = (Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write_secret(tmp_path / "edwards.key", edwards.private_bytes(*formats))
    write_secret(tmp_path / "garbage.key", b"garbage")
    protected = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )
    write_secret(tmp_path / "protected.key", protected)
    for name in ("edwards", "garbage", "protected"):
        with pytest.raises(TrustError):
            public_line(tmp_path / f"{name}.key")
    for bad in ("", "garbage", line + " comment", line[:-4], line + "\n", "é" + line, line * 20):
        with pytest.raises(TrustError, match="node key"):
            check_public_line(bad)
