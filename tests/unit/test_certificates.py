"""The CA's certificates are accepted by a real TLS client, and by no client of another CA."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedseg.errors import DataError, TrustError
from fedseg.security.certificates import (
    CA_DAYS,
    SERVER_DAYS,
    Pair,
    check_issued,
    expiry,
    hosts_of,
    make_ca,
    make_server_certificate,
)

NOW = datetime.now(UTC).replace(microsecond=0)
HOSTS = ["fedseg.example.org", "127.0.0.1", "::1"]
CA = make_ca("tiny study", NOW)
SERVER = make_server_certificate(*CA, HOSTS, NOW)


def handshake(folder: Path, ca: bytes, server: Pair, host: str) -> None:
    """A TLS handshake in memory, as strict as the ssl module can be."""
    (folder / "server.key").write_bytes(server.key)
    (folder / "server.crt").write_bytes(server.certificate)
    offered = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offered.load_cert_chain(folder / "server.crt", folder / "server.key")
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    trusting.load_verify_locations(cadata=ca.decode())
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(down, up, server_hostname=host)
    listening = offered.wrap_bio(up, down, server_side=True)
    waiting = {client, listening}
    while waiting:
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("host", HOSTS)
def test_a_strict_client_accepts_every_host(tmp_path: Path, host: str) -> None:
    handshake(tmp_path, CA.certificate, SERVER, host)


def test_another_ca_another_name_or_a_past_date_is_refused(tmp_path: Path) -> None:
    other = make_ca("tiny study", NOW)
    old = NOW - timedelta(days=500)
    expired = make_server_certificate(*make_ca("tiny study", old), HOSTS, old)
    expired_ca = make_ca("old", old)
    expired = make_server_certificate(*expired_ca, HOSTS, old)
    for ca, server, host in (
        (other.certificate, SERVER, HOSTS[0]),
        (CA.certificate, SERVER, "other.example.org"),
        (CA.certificate, SERVER, "127.0.0.2"),
        (expired_ca.certificate, expired, HOSTS[0]),
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(tmp_path, ca, server, host)


def test_a_server_cannot_issue(tmp_path: Path) -> None:
    forged = make_server_certificate(*SERVER, "evil.example.org", NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, CA.certificate, forged, "evil.example.org")


def test_dates_and_hosts() -> None:
    assert expiry(CA.certificate) == NOW + timedelta(days=CA_DAYS)
    assert expiry(SERVER.certificate) == NOW + timedelta(days=SERVER_DAYS)
    assert hosts_of(SERVER.certificate) == tuple(HOSTS)
    assert hosts_of(CA.certificate) == ()
    late = NOW + timedelta(days=CA_DAYS - 10)
    assert expiry(make_server_certificate(*CA, "a", late).certificate) == expiry(CA.certificate)
    with pytest.raises(DataError, match="expired"):
        make_server_certificate(*CA, "a", NOW + timedelta(days=CA_DAYS))


def test_a_site_with_a_slow_clock_accepts_a_new_certificate() -> None:
    found = x509.load_pem_x509_certificate(SERVER.certificate)
    assert found.not_valid_before_utc == NOW - timedelta(hours=1)


def test_who_issued_shows() -> None:
    check_issued(SERVER.certificate, CA.certificate)
    with pytest.raises(TrustError, match="not issued"):
        check_issued(SERVER.certificate, make_ca("tiny study", NOW).certificate)
    with pytest.raises(TrustError, match="not issued"):
        check_issued(SERVER.certificate, make_ca("another", NOW).certificate)


def test_a_locked_ca_needs_its_passphrase() -> None:
    ca = make_ca("tiny", NOW, b"correct horse")
    assert b"PRIVATE KEY" not in ca.key
    server = make_server_certificate(*ca, "a", NOW, passphrase=b"correct horse")
    check_issued(server.certificate, ca.certificate)
    load_pem_private_key(server.key, None)  # nginx starts unattended
    for passphrase in (None, b"wrong"):
        with pytest.raises(TrustError, match="passphrase"):
            make_server_certificate(*ca, "a", NOW, passphrase=passphrase)


@pytest.mark.parametrize("host", ["", "a b", "a:443", "*.org", "-a", "é.org", "a" * 64, "a\nb"])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(DataError, match="neither a DNS name nor an IP"):
        make_server_certificate(*CA, host, NOW)


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        make_server_certificate(*CA, [], NOW)
    with pytest.raises(TrustError, match="together"):
        make_server_certificate(SERVER.key, CA.certificate, "a", NOW)
    with pytest.raises(TrustError, match="damaged"):
        make_server_certificate(b"garbage", CA.certificate, "a", NOW)
    with pytest.raises(TrustError, match="not a PEM certificate"):
        expiry(b"garbage")
