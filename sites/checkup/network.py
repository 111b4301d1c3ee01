"""The way to the coordinator: its name, its port, its certificate, its clock.

One TLS handshake against the pinned authority answers most of it, and one harmless request brings
the Date header. Where the handshake fails, a second one without any check asks who answered: only
to name who it was, nothing that came over it is believed.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from cryptography import x509

from fedseg.errors import TrustError
from fedseg.security.certificates import EXPIRY_NOTICE, check_issued, expiry, hosts_of
from sites.checkup.proxies import ProxyRefusedError, WebProxy, proxy_for
from sites.checkup.verdict import Verdict, fail, plain, warn, well

PATIENCE_S = 10.0
SKEW_NOTICED_S = 30.0
SKEW_REFUSED_S = 240.0  # Flower takes a node's signature for 300 s
_EXPIRED, _NOT_YET, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64
_REQUEST = b"GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"

Now = Callable[[], datetime]


@dataclass(frozen=True)
class Peer:
    """Where a study's coordinator should be.

    Attributes:
        study: its name, which tells verdicts of several studies apart.
        host: name or address, an IPv6 address without brackets.
        ca: the pinned authority, PEM.
        proxy: the web proxy on the way, if any.
    """

    study: str
    host: str
    port: int
    ca: bytes
    proxy: WebProxy | None = None

    @classmethod
    def of(cls, study: str, address: str, ca: Path, environment: Mapping[str, str]) -> Peer:
        """The peer of a link, its authority's file, and the environment of its relay."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        return cls(study, host, int(port), ca.read_bytes(), proxy_for(host, environment))

    @property
    def address(self) -> str:
        """As people write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Contact:
    """What came of a handshake.

    Attributes:
        certificate: of who answered, PEM.
        ahead_s: by how much the clock here is ahead of theirs; None where they did not say.
    """

    certificate: bytes
    ahead_s: float | None


def resolve(peer: Peer) -> Verdict:
    """Whether the coordinator's name leads to an address."""
    subject = f"Name resolution ({peer.study})"
    if _is_address(peer.host):
        return well(subject, f"not needed: {peer.host} is an address")
    if peer.proxy is not None:
        return well(subject, f"not needed: the proxy {peer.proxy.shown} finds {peer.host}")
    try:
        found = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return fail(
            subject,
            f"{peer.host} has no address here ({error.strerror})",
            "ask the network department for a name server that knows it, or put its address into "
            "/etc/hosts",
        )
    addresses = sorted({str(entry[4][0]) for entry in found})
    return well(subject, f"{peer.host} is {', '.join(addresses[:4])}")


def reach(peer: Peer, now: Now) -> list[Verdict]:
    """TLS with the pinned authority, how long the certificates last, and the two clocks."""
    subject = f"TLS ({peer.study})"
    try:
        contact = _contact(peer, _pinned(peer), now)
    except ssl.SSLCertVerificationError as error:
        return _mistrusted(peer, error, now)
    except ssl.SSLError:
        return [
            fail(
                subject,
                f"something answers at {peer.address}, but not with TLS",
                "a web proxy or captive portal is in the way, or the port is another one: compare "
                "the address with the consortium, then ask the network department",
            )
        ]
    except OSError as error:
        return [_unreachable(peer, error)]
    issued = f"{peer.address} has a certificate of the pinned authority"
    return [well(subject, issued), lasting(peer, contact.certificate, now), _clock(peer, contact)]


def lasting(peer: Peer, certificate: bytes | None, now: Now) -> Verdict:
    """How long the coordinator's certificate and its authority last."""
    subject = f"Certificates ({peer.study})"
    ends = {"the consortium's certificate authority": expiry(peer.ca)}
    if certificate is not None:
        ends["the coordinator's certificate"] = expiry(certificate)
    what, end = min(ends.items(), key=lambda entry: entry[1])
    left, remedy = end - now(), "remind the consortium: `fedseg-coordinator renew`"
    if what.endswith("authority"):
        remedy = "remind the consortium: a new authority needs a new bundle at every site"
    if left <= timedelta(0):
        return fail(subject, f"{what} ended on {end:%Y-%m-%d}", remedy)
    if left < EXPIRY_NOTICE:
        return warn(subject, f"{what} ends on {end:%Y-%m-%d}, in {left.days} days", remedy)
    return well(subject, f"{what} is the first to end, on {end:%Y-%m-%d}")


def _contact(peer: Peer, context: ssl.SSLContext, now: Now) -> Contact:
    """Shake hands and ask for the time."""
    with _dialled(peer) as raw, context.wrap_socket(raw, server_hostname=peer.host) as tls:
        certificate = ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"").encode()
        return Contact(certificate, _ahead(peer, tls, now))


def _dialled(peer: Peer) -> socket.socket:
    """A connection to the coordinator, by the way that the relay takes."""
    if peer.proxy is not None:
        return peer.proxy.tunnel(peer.address, PATIENCE_S)
    return socket.create_connection((peer.host, peer.port), timeout=PATIENCE_S)


def _ahead(peer: Peer, tls: ssl.SSLSocket, now: Now) -> float | None:
    """Seconds that the clock here is ahead, from the Date of an answer."""
    before = now()
    try:
        tls.sendall(_REQUEST % peer.address.encode("ascii"))
        response = HTTPResponse(tls, method="GET")
        response.begin()
        theirs = parsedate_to_datetime(response.headers["Date"])
    except (OSError, HTTPException, TypeError, ValueError):
        return None
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=UTC)
    after = now()
    ours = before + (after - before) / 2
    return (ours - theirs).total_seconds() - 0.5  # the header is cut to the second


def _clock(peer: Peer, contact: Contact) -> Verdict:
    """The two clocks."""
    subject = f"Clock ({peer.study})"
    if contact.ahead_s is None:
        return warn(
            subject,
            "the coordinator's answer had no time in it, so the clocks were not compared",
            "look whether this machine's clock is kept by NTP: timedatectl",
        )
    off = abs(contact.ahead_s)
    says = f"{off:.0f} s {'ahead of' if contact.ahead_s > 0 else 'behind'} the coordinator's"
    remedy = "set this machine's clock by NTP (timedatectl set-ntp true); if it is right, tell the "
    remedy += "consortium that theirs is wrong"
    if off > SKEW_REFUSED_S:
        return fail(subject, f"{says}; beyond 300 s Flower refuses this site", remedy)
    if off > SKEW_NOTICED_S:
        return warn(subject, says, remedy)
    return well(subject, says)


def _mistrusted(peer: Peer, error: ssl.SSLCertVerificationError, now: Now) -> list[Verdict]:
    """Why a certificate was refused, from the certificate itself."""
    subject = f"TLS ({peer.study})"
    try:
        contact = _contact(peer, _unchecked(), now)
    except (OSError, ValueError):
        return [fail(subject, f"refused: {plain(error.verify_message)}", "run this again")]
    try:
        check_issued(contact.certificate, peer.ca)
    except TrustError:
        return [_foreign(peer, contact.certificate)]
    verdict = _ours_but(peer, error, contact.certificate)
    return [verdict, _clock(peer, contact)]


def _ours_but(peer: Peer, error: ssl.SSLCertVerificationError, certificate: bytes) -> Verdict:
    """A certificate of the consortium that cannot be accepted all the same."""
    subject = f"TLS ({peer.study})"
    if error.verify_code == _EXPIRED:
        return fail(
            subject,
            f"the coordinator's certificate ended on {expiry(certificate):%Y-%m-%d}, by this "
            "machine's clock",
            "if the clock below is right, ask the consortium to run `fedseg-coordinator renew`",
        )
    if error.verify_code == _NOT_YET:
        return fail(
            subject,
            "the coordinator's certificate is not valid yet, by this machine's clock",
            "set this machine's clock by NTP (timedatectl set-ntp true)",
        )
    if error.verify_code in {_OTHER_NAME, _OTHER_ADDRESS}:
        names = ", ".join(plain(name) for name in hosts_of(certificate)[:5]) or "no host"
        return fail(
            subject,
            f"the coordinator's certificate is for {names}, but it is dialled as {peer.host}",
            "ask the consortium for a bundle with the right address, or for a certificate that "
            "has this one",
        )
    return fail(
        subject,
        f"the coordinator's certificate is refused: {plain(error.verify_message)}",
        "send this line to the consortium",
    )


def _foreign(peer: Peer, certificate: bytes) -> Verdict:
    """A certificate that the consortium did not issue."""
    subject = f"TLS ({peer.study})"
    theirs = x509.load_pem_x509_certificate(certificate).issuer
    own = x509.load_pem_x509_certificate(peer.ca).subject
    name = plain(theirs.rfc4514_string(), 120) or "nobody"
    if theirs == own:
        return fail(
            subject,
            f"the certificate names the authority '{name}' as its issuer, but another key signed "
            "it: the consortium made a new authority, or somebody poses as the coordinator",
            "call the consortium; if they have a new authority, ask for a new bundle and join it",
        )
    return fail(
        subject,
        f"the certificate that came was issued by '{name}', not by the consortium: TLS is "
        "intercepted on the way, or this is another server",
        f"ask the network department to exempt {peer.address} from TLS inspection; fedseg accepts "
        "no authority but the consortium's",
    )


def _unreachable(peer: Peer, error: OSError) -> Verdict:
    """Nobody answers."""
    subject = f"TLS ({peer.study})"
    if isinstance(error, ProxyRefusedError):
        return fail(
            subject,
            str(error),
            f"ask the network department to let CONNECT {peer.address} pass that proxy, or to "
            f"allow it directly and name {peer.host} in NO_PROXY",
        )
    if peer.proxy is not None:
        return fail(
            subject,
            f"the proxy {peer.proxy.shown} cannot be reached, or it cuts the connection",
            f"see whether {peer.proxy.name} names the right proxy",
        )
    if isinstance(error, socket.gaierror):
        return fail(subject, f"{peer.host} has no address", "mend the name resolution first")
    if isinstance(error, ConnectionRefusedError):
        return fail(
            subject,
            f"{peer.address} refuses the connection: nothing listens there",
            "ask the consortium whether the coordinator runs and whether the address is right",
        )
    if isinstance(error, ConnectionResetError):
        says = f"the connection to {peer.address} is cut during the handshake"
    elif isinstance(error, TimeoutError):
        says = f"{peer.address} does not answer within {PATIENCE_S:.0f} s"
    else:
        says = f"{peer.address} cannot be reached ({error.strerror or type(error).__name__})"
    return fail(
        subject,
        says,
        f"ask the network department to allow this machine outgoing TCP to {peer.address}, "
        "without inspection; nothing has to come in",
    )


def _pinned(peer: Peer) -> ssl.SSLContext:
    """TLS as the relay does it: the pinned authority and no other."""
    return ssl.create_default_context(cadata=peer.ca.decode("ascii"))


def _unchecked() -> ssl.SSLContext:
    """TLS with whoever answers; to see who it is, and for nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _is_address(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
