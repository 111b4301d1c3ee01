"""The doctor at a hospital that has joined a study, with real servers that are ill in real ways."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from small_cases import save
from small_studies import NOW, founded
from typer.testing import CliRunner

from coordinator.folder import StudyFolder
from coordinator.office.enrolment import register
from fedseg.plan import load_plan
from fedseg.security.certificates import Pair, make_ca, make_server_certificate
from fedseg.security.keys import SigningKey
from sites.checkup import house, machine, network, proxies, studies
from sites.checkup.network import Peer
from sites.checkup.verdict import Verdict
from sites.cli import app
from sites.cohort import choose_cohort
from sites.decision import approve
from sites.doctor import Half, examine
from sites.enrolment import join, open_offer
from sites.folder import SiteFolder
from sites.founding import found
from sites.keyring import open_signing_key
from sites.notes import write_note

REAL_NOW = datetime.now(UTC)
STUDY = "tiny"


def now() -> datetime:
    return NOW


def clock() -> datetime:
    return datetime.now(UTC)


class _Coordinator(BaseHTTPRequestHandler):
    """Refuses everything, as the proxy does, and says what time it is there."""

    def do_GET(self) -> None:
        self.send_response_only(404)
        said = datetime.now(UTC) + self.server.skew  # type: ignore[attr-defined]
        self.send_header("Date", format_datetime(said, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def coordinator(pair: Pair, folder: Path, *, skew: timedelta = timedelta(0)) -> Iterator[int]:
    """A TLS server on loopback; gives its port."""
    key, certificate = folder / "server.key", folder / "server.crt"
    key.write_bytes(pair.key)
    certificate.write_bytes(pair.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: socket.socket, address: object) -> None:  # type: ignore[override]
            with suppress(OSError), context.wrap_socket(request, server_side=True) as tls:
                super().finish_request(tls, address)  # type: ignore[arg-type]

    with Server(("127.0.0.1", 0), _Coordinator) as server:
        server.skew = skew  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def ca() -> Pair:
    return make_ca("the consortium", REAL_NOW - timedelta(days=900))


def issued(ca: Pair, at: datetime = REAL_NOW, *, host: str = "127.0.0.1") -> Pair:
    return make_server_certificate(ca.key, ca.certificate, host, at)


def reached(ca: Pair, port: int) -> dict[str, Verdict]:
    found = network.reach(Peer(STUDY, "127.0.0.1", port, ca.certificate), clock)
    return {verdict.subject.partition(" (")[0]: verdict for verdict in found}


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiteFolder, StudyFolder]:
    """A hospital that has joined a study and approved its plan; tests leave it as it was."""
    root = tmp_path_factory.mktemp("doctor")
    study, key = founded(root / "study")
    site = SiteFolder(root / "site")
    found(site, "hospital_a", "2026-05-03T12:00:00+00:00")
    bundle = register(study, site.request.read_bytes(), key, NOW)
    own = open_signing_key(site)
    join(site, open_offer(site, bundle), own)
    site.policy.write_text("privacy_none: true\n")
    _approve(site, _patients(root / "data"), own)
    return site, study


def _patients(data: Path) -> Path:
    """Three that differ."""
    for seed, name in enumerate(("case_one", "case_two", "case_three")):
        rng = np.random.default_rng(seed)
        shape = (12, 12, 12)
        save(data / "images" / f"{name}.nii.gz", rng.normal(100, 20, shape).astype(np.float32))
        parts = np.zeros(shape, dtype=np.uint8)
        parts[2 : 6 + seed, 2:6, 2:6], parts[8:10, 7:10, 7:10] = 1, 2
        save(data / "labels" / f"{name}.nii.gz", parts)
    return data


def _approve(site: SiteFolder, data: Path, key: SigningKey) -> None:
    """Say yes to the plan with these data."""
    chosen = choose_cohort("hospital_a", load_plan(site.plan(STUDY)), data)
    said = {"any_later_sites": False, "by": "me", "now": lambda: "2026-05-03T12:30:00+00:00"}
    approve(site, STUDY, chosen.record, key, **said)


def named(found: list[Verdict]) -> dict[str, Verdict]:
    return {verdict.subject: verdict for verdict in found}


def test_a_healthy_site_has_nothing_that_fails(
    joined: tuple[SiteFolder, StudyFolder], tmp_path: Path
) -> None:
    site, study = joined
    real = make_server_certificate(
        study.ca_key.read_bytes(), study.ca_certificate.read_bytes(), "127.0.0.1", REAL_NOW
    )
    before = site.link_of(STUDY)
    with coordinator(real, tmp_path) as port:
        write_note(site.link(STUDY), before.model_copy(update={"address": f"127.0.0.1:{port}"}))
        try:
            found = list(examine(site, Half.BOTH, now=now))
        finally:
            write_note(site.link(STUDY), before)
    # The clock of this test stands still at the study's founding; the coordinator's does not.
    broken = {v.subject: v.says for v in found if v.condition == "fail"}
    assert set(broken) <= {f"Clock ({STUDY})"}
    assert {f"TLS ({STUDY})", f"Data ({STUDY})", "Identity keys", "Disk"} <= set(named(found))


def test_a_certificate_of_the_pinned_authority_is_well(ca: Pair, tmp_path: Path) -> None:
    with coordinator(issued(ca), tmp_path) as port:
        found = reached(ca, port)
    assert {v.condition for v in found.values()} == {"ok"}
    assert set(found) == {"TLS", "Certificates", "Clock"}


def test_an_intercepting_authority_is_named(ca: Pair, tmp_path: Path) -> None:
    gateway = make_ca("Clinic Web Gateway", REAL_NOW)
    with coordinator(issued(gateway), tmp_path) as port:
        found = reached(ca, port)
    assert found["TLS"].condition == "fail"
    assert "CN=Clinic Web Gateway" in found["TLS"].says
    assert "TLS inspection" in found["TLS"].remedy


def test_an_authority_that_borrows_the_name_is_not_the_pinned_one(ca: Pair, tmp_path: Path) -> None:
    impostor = make_ca("the consortium", REAL_NOW)
    with coordinator(issued(impostor), tmp_path) as port:
        found = reached(ca, port)
    assert found["TLS"].condition == "fail"
    assert "another key signed" in found["TLS"].says


def test_an_expired_certificate_is_told_from_a_foreign_one(ca: Pair, tmp_path: Path) -> None:
    with coordinator(issued(ca, REAL_NOW - timedelta(days=500)), tmp_path) as port:
        found = reached(ca, port)
    assert found["TLS"].condition == "fail"
    assert "ended on" in found["TLS"].says
    assert "renew" in found["TLS"].remedy
    assert found["Clock"].condition == "ok"


def test_a_certificate_that_ends_soon_is_said(ca: Pair, tmp_path: Path) -> None:
    with coordinator(issued(ca, REAL_NOW - timedelta(days=380)), tmp_path) as port:
        found = reached(ca, port)
    assert found["Certificates"].condition == "warning"
    assert "in 16 days" in found["Certificates"].says or "in 17 days" in found["Certificates"].says


def test_another_host_in_the_certificate_is_named(ca: Pair, tmp_path: Path) -> None:
    with coordinator(issued(ca, host="other.example.org"), tmp_path) as port:
        found = reached(ca, port)
    assert found["TLS"].condition == "fail"
    assert "other.example.org" in found["TLS"].says


@pytest.mark.parametrize(
    ("minutes", "condition", "word"),
    [(-10, "fail", "ahead of"), (2, "warning", "behind"), (0.1, "ok", "behind")],
)
def test_a_clock_that_is_off_is_seen(
    minutes: float, condition: str, word: str, ca: Pair, tmp_path: Path
) -> None:
    with coordinator(issued(ca), tmp_path, skew=timedelta(minutes=minutes)) as port:
        found = reached(ca, port)
    assert found["Clock"].condition == condition
    assert word in found["Clock"].says


def test_a_closed_port_and_one_without_tls_are_told_apart(ca: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=_speak_plainly, args=(listener,))
        thread.start()
        spoken = reached(ca, port)
        thread.join()
    closed = reached(ca, port)
    assert "not with TLS" in spoken["TLS"].says
    assert "refuses" in closed["TLS"].says
    assert closed["TLS"].condition == spoken["TLS"].condition == "fail"


def _speak_plainly(listener: socket.socket) -> None:
    """Answer once without TLS."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        connection.recv(65536)


def test_a_name_that_nobody_knows_is_said(ca: Pair) -> None:
    found = network.resolve(Peer(STUDY, "coordinator.invalid", 443, ca.certificate))
    assert found.condition == "fail"
    assert "/etc/hosts" in found.remedy


def test_a_web_proxy_is_asked_for_the_tunnel_and_its_password_is_not_shown(
    ca: Pair, tmp_path: Path
) -> None:
    with (
        coordinator(issued(ca), tmp_path) as port,
        socket.create_server(("127.0.0.1", 0)) as proxy,
    ):
        asked: list[bytes] = []
        thread = threading.Thread(target=_tunnel, args=(proxy, port, asked))
        thread.start()
        url = f"http://me:secret@127.0.0.1:{proxy.getsockname()[1]}"
        found = proxies.proxy_for("127.0.0.1", {"HTTPS_PROXY": url, "NO_PROXY": "localhost"})
        assert found is not None
        shown = proxies.settings(STUDY, "127.0.0.1", found)
        peer = Peer(STUDY, "127.0.0.1", port, ca.certificate, found)
        conditions = {verdict.condition for verdict in network.reach(peer, clock)}
        thread.join()
    assert conditions == {"ok"}
    assert asked[0].startswith(f"CONNECT 127.0.0.1:{port} ".encode())
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0" in asked[0]
    assert "secret" not in shown.says


def _tunnel(listener: socket.socket, port: int, asked: list[bytes]) -> None:
    """Be a web proxy once."""
    client, _ = listener.accept()
    with client, socket.create_connection(("127.0.0.1", port)) as server:
        asked.append(client.recv(65536))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        back = threading.Thread(target=_pump, args=(server, client))
        back.start()
        _pump(client, server)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Carry bytes one way until they end."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def test_a_proxy_that_refuses_is_named(ca: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_refuse, args=(listener,))
        thread.start()
        proxy = proxies.WebProxy("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
        peer = Peer(STUDY, "fl.example.org", 443, ca.certificate, proxy)
        (found,) = network.reach(peer, clock)
        thread.join()
    assert "407" in found.says
    assert "CONNECT fl.example.org:443" in found.remedy


def _refuse(listener: socket.socket) -> None:
    """Refuse one tunnel."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 407 Authentication Required\r\nContent-Length: 0\r\n\r\n")


def test_no_proxy_spares_the_coordinator() -> None:
    outside = {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost,.example.org"}
    assert proxies.proxy_for("fl.example.org", outside) is None
    assert proxies.proxy_for("fl.example.com", outside) is not None


def test_modes_that_are_too_wide_come_with_the_command_that_mends_them(tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "site")
    found(site, "hospital_a", "2026-05-03T12:00:00+00:00")
    assert house.owners_and_modes(site).condition == "warning"  # one user for both halves
    site.signing_key.chmod(0o640)
    site.trainer.chmod(0o755)
    site.policy.chmod(0o666)
    verdict = house.owners_and_modes(site)
    assert verdict.condition == "fail"
    assert "chmod 700 trainer" in verdict.remedy
    assert "chmod 600 trainer/signing.key" in verdict.remedy
    assert "chmod 644 policy.yaml" in verdict.remedy
    (keys,) = [v for v in examine(site, Half.TRAINER, now) if v.subject == "Identity keys"]
    assert keys.condition == "fail"


def test_keys_of_another_folder_are_noticed(tmp_path: Path) -> None:
    one, two = SiteFolder(tmp_path / "one"), SiteFolder(tmp_path / "two")
    for site in (one, two):
        found(site, "hospital_a", "2026-05-03T12:00:00+00:00")
    one.node_key.write_bytes(two.node_key.read_bytes())
    one.receiving_key.write_bytes(two.receiving_key.read_bytes())
    assert house.node_key(one).condition == "fail"
    assert house.trainer_keys(one).condition == "fail"
    assert house.trainer_keys(two).condition == "ok"


def test_a_socket_for_all_users_is_refused(tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "s")
    found(site, "hospital_a", "2026-05-03T12:00:00+00:00")
    assert house.door(site).condition == "warning"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(site.socket))
        site.socket.chmod(0o666)
        assert "every user" in house.door(site).says
        site.socket.chmod(0o600)
        listener.close()
        assert "cannot be reached" in house.door(site).says


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders to another user")
def test_a_relay_of_another_user_must_be_let_in(tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "s")
    found(site, "hospital_a", "2026-05-03T12:00:00+00:00")
    os.chown(site.relay, 45678, 45678)
    assert house.owners_and_modes(site).condition == "ok"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(site.socket))
        site.socket.chmod(0o600)
        assert "may not use it" in house.door(site).says
        os.chown(site.socket, -1, 45678)
        site.socket.chmod(0o660)
        assert "may not use it" not in house.door(site).says


def test_the_approved_data_are_read_again_and_what_changed_is_not_repeated(
    joined: tuple[SiteFolder, StudyFolder],
) -> None:
    site, _ = joined
    sizes: dict[str, int] = {}
    assert studies.data(site, STUDY, sizes).condition == "ok"
    assert sizes[STUDY] > 0
    path = next(site.path.parent.joinpath("data", "images").iterdir())
    kept = path.read_bytes()
    path.write_bytes(kept + b"\0")
    try:
        verdict = studies.data(site, STUDY, {})
    finally:
        path.write_bytes(kept)
    assert verdict.condition == "fail"
    said = verdict.says + verdict.remedy
    assert "case_" not in said
    assert str(path.parent) not in said


def test_policy_approval_and_dates_of_a_study(joined: tuple[SiteFolder, StudyFolder]) -> None:
    site, _ = joined
    assert studies.permission(site, STUDY).condition == "ok"
    for rule in ("privacy_none: false\n", "privacy_none: true\nsmallest_cohort: 1000\n"):
        site.policy.write_text(rule)
        try:
            assert studies.permission(site, STUDY).condition == "fail"
        finally:
            site.policy.write_text("privacy_none: true\n")
    assert studies.flower(site, STUDY).condition == "ok"
    assert studies.roll(site, STUDY, now).condition == "ok"
    soon = studies.roll(site, STUDY, lambda: NOW + timedelta(days=380))
    late = studies.roll(site, STUDY, lambda: NOW + timedelta(days=400))
    assert (soon.condition, late.condition) == ("warning", "fail")


def test_packages_are_held_against_what_this_version_needs() -> None:
    assert machine.python_and_packages("site").condition == "ok"
    assert machine.python_and_packages("").condition == "ok"


def test_a_disk_that_is_too_small_is_said(joined: tuple[SiteFolder, StudyFolder]) -> None:
    site, _ = joined
    assert machine.disk(site, {STUDY: 1000}).condition == "ok"
    assert machine.disk(site, {STUDY: 10**15}).condition == "fail"


def test_the_command_prints_json_and_ends_with_1_where_something_fails(tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "site")
    found(site, "hospital_a", "2026-05-03T12:00:00+00:00")
    asked = ["doctor", "--half", "relay", "--site", str(site.path)]
    well = CliRunner().invoke(app, [*asked, "--json"])
    assert well.exit_code == 0, well.output
    assert {"subject", "condition", "says", "remedy"} == set(json.loads(well.stdout)[0])
    site.node_key.chmod(0o644)
    ill = CliRunner().invoke(app, asked)
    assert ill.exit_code == 1
    assert "chmod 600" in " ".join(ill.stdout.split())
    assert "BEGIN" not in ill.stdout
