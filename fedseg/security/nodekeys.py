"""The key by which Flower knows a relay: an EC key in Flower's own format.

Flower wants a NIST curve (P-384 as in its documentation), the private half as an OpenSSH file
without a passphrase, the public half as one OpenSSH line. It opens the connection to the SuperLink
and nothing else: it signs no update and opens no message.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedseg.errors import TrustError
from fedseg.security.secretfile import read_secret, write_secret

MAX_LINE = 1024


def make_node_key(path: Path) -> str:
    """Make a node key and write its private half, mode 0600.

    Returns:
        The public half as one OpenSSH line, without a line end.

    Raises:
        DataError: there is a file already.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return _line(key.public_key())


def public_line(path: Path) -> str:
    """The public half of a stored node key.

    Raises:
        TrustError: missing, damaged, another kind of key, or a mode wider than 0600.
    """
    data = read_secret(path)
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm):
        raise TrustError(f"{path.name} is not an OpenSSH key without a passphrase") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{path.name} is not an EC key, which Flower asks for")
    return _line(key.public_key())


def check_public_line(line: str) -> str:
    """The line itself, if Flower would register it and it is spelt as Flower spells it.

    Raises:
        TrustError: not the public half of an EC key, or with a comment or an odd spelling.
    """
    try:
        key = load_ssh_public_key(line.encode("ascii")) if len(line) <= MAX_LINE else None
    except (ValueError, NotImplementedError, UnsupportedAlgorithm):  # a compressed point, say
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or _line(key) != line:
        raise TrustError("the node key is not a plain OpenSSH line of a NIST EC key")
    return line


def _line(key: ec.EllipticCurvePublicKey) -> str:
    """The OpenSSH line of a public key."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
