"""The consortium's small CA, and the server certificate by which sites know the coordinator.

One root (P-384, ten years) signs server certificates (P-256, 397 days) and nothing below them.
Sites pin the root with the bundle and no public CA counts, so whoever intercepts TLS shows. What
passes inside is sealed anyway; TLS keeps Flower's own words private.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedseg.errors import DataError, TrustError
from fedseg.security.secretfile import lock, unlock

CA_DAYS = 3650
SERVER_DAYS = 397
EXPIRY_NOTICE = timedelta(days=30)  # how long before the end people are told
_BACKDATED = timedelta(hours=1)  # clocks of hospitals are not all right
_HOST = re.compile(r"^(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*$")


class Pair(NamedTuple):
    """A private key and its certificate, PEM; the key is locked where a passphrase was given."""

    key: bytes
    certificate: bytes


def make_ca(name: str, now: datetime, passphrase: bytes | None = None) -> Pair:
    """Make a root that signs server certificates.

    Args:
        name: what people see in the certificate, such as the study's name; 64 characters at most.
        now: aware, from when it is valid.
        passphrase: locks the key (see `fedseg.security.secretfile`), which nginx never reads.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, subject, key.public_key(), now, now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return Pair(lock(_pem(key), passphrase), certificate.public_bytes(Encoding.PEM))


def make_server_certificate(
    ca_key: bytes,
    ca_certificate: bytes,
    hosts: str | Sequence[str],
    now: datetime,
    days: int = SERVER_DAYS,
    passphrase: bytes | None = None,
) -> Pair:
    """Make a key and a certificate for the names and addresses that sites dial.

    Args:
        ca_key: PEM, or locked PEM.
        ca_certificate: PEM.
        hosts: DNS names and IP addresses.
        now: aware, from when it is valid.
        days: for how long, and never longer than the CA.
        passphrase: of the CA's key. The server's own key has none: nginx starts unattended.

    Raises:
        TrustError: the CA's key does not open, or is not the certificate's.
        DataError: a host is neither a name nor an address, or the CA has expired.
    """
    issuer = _certificate(ca_certificate)
    ca = _private(unlock(ca_key, passphrase, "the CA's key"))
    if ca.public_key() != issuer.public_key():
        raise TrustError("the CA's key and certificate do not belong together")
    if issuer.not_valid_after_utc <= now:
        raise DataError("the CA has expired: sites need a new bundle with a new one")
    names = [_san(host) for host in ([hosts] if isinstance(hosts, str) else hosts)]
    if not names:
        raise DataError("a server certificate needs at least one name or address")
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedseg coordinator")])
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())
    certificate = (
        _builder(subject, issuer.subject, key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca, hashes.SHA384())
    )
    return Pair(_pem(key), certificate.public_bytes(Encoding.PEM))


def expiry(certificate: bytes) -> datetime:
    """Until when a PEM certificate is valid, aware, in UTC.

    Raises:
        TrustError: not a certificate.
    """
    return _certificate(certificate).not_valid_after_utc


def hosts_of(certificate: bytes) -> tuple[str, ...]:
    """The names and addresses that a PEM certificate is for.

    Raises:
        TrustError: not a certificate.
    """
    found = _certificate(certificate).extensions
    try:
        names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def check_issued(certificate: bytes, ca_certificate: bytes) -> None:
    """Accept a PEM certificate as this CA's or raise; its dates and names are not looked at.

    Raises:
        TrustError: not a certificate, or by another CA.
    """
    try:
        _certificate(certificate).verify_directly_issued_by(_certificate(ca_certificate))
    except (InvalidSignature, ValueError, TypeError):
        raise TrustError("the certificate was not issued by the consortium's CA") from None


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    """What both kinds of certificate have."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    """A CA signs certificates; a server signs handshakes."""
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _san(host: str) -> x509.GeneralName:
    """A host as certificates name it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > 253 or not _HOST.match(host):
            raise DataError(
                f"{ascii(host)[:80]} is neither a DNS name nor an IP address; give the host alone, "
                "without a port"
            ) from None
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PKCS8."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """A private EC key from PEM."""
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError("the CA's key is damaged or is not an EC key")
    return key


def _certificate(pem: bytes) -> x509.Certificate:
    """A certificate from PEM."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise TrustError("what came is not a PEM certificate") from None
