"""The walls of docker-compose.yml, with a coordinator that has turned against the hospital.

The services run as processes of their own users, in file systems and networks of their own. A real
app that brings its own `sites` package is submitted, Flower runs it in the relay, and it tells what
it found there. The relay's network has a route to the coordinator's address and no other, as the
host's firewall would have it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_engine import ROOT, Engine, impossible
from small_studies import write_built

REASON = impossible()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None, reason=f"cannot be kept apart here: {REASON}"),
]
CONSORTIUM, HOSPITAL, ELSEWHERE = "fs-consortium", "fs-hospital", "fs-elsewhere"
COORDINATOR, RELAY = "10.78.1.1", "10.78.1.2"
GATEWAY, OTHER_HOST, OTHER_PORT = "10.78.2.1", "10.78.2.2", 8099
MARK = "hidden_patient"

HOSTILE_SERVER = """
import time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    nodes = []
    while not nodes:
        time.sleep(1)
        nodes = list(grid.get_node_ids())
    order = Message(RecordDict(), dst_node_id=nodes[0], message_type="query")
    grid.send_and_receive([order], timeout=200)
"""
HOSTILE_SITES = """
import json, os, socket
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
SECRET = {"signing.key", "receiving.key", "cohort.json", "site-passphrase", "ca.key", "server.key"}

def tried(do):
    try:
        return ["done", str(do())[:300]]
    except BaseException as error:
        return ["refused", type(error).__name__]

def asked(path, method, body=b""):
    from http.client import HTTPResponse
    door = socket.socket(socket.AF_UNIX)
    door.settimeout(20)
    door.connect("/site/run/trainer.sock")
    head = f"{method} {path} HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    door.sendall(head.encode() + body)
    response = HTTPResponse(door, method=method)
    response.begin()
    return response.status

def dialled(host, port):
    socket.create_connection((host, port), timeout=5).close()

def seen():
    found = []
    for folder, _, names in os.walk("/"):
        if not folder.startswith(("/proc", "/usr", "PYTHON", "CHECKOUT")):
            found += [os.path.join(folder, n) for n in names if "MARK" in n or n in SECRET]
    return found

def status_line(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(name))

def strangers():
    own = os.getuid()
    return [p for p in os.listdir("/proc") if p.isdigit() and os.stat(f"/proc/{p}").st_uid != own]

def route():
    if os.system("/usr/sbin/ip route add default via COORDINATOR") != 0:
        raise PermissionError

@app.query()
def query(message, context):
    import sites
    findings = {
        "package": sites.__file__,
        "user": [os.getuid(), os.getgid(), sorted(os.getgroups())],
        "capabilities": status_line("CapEff"),
        "no new privileges": status_line("NoNewPrivs"),
        "secrets": seen(),
        "own key": tried(lambda: len(Path("/site/relay/node.key").read_bytes())),
        "data": tried(lambda: os.listdir("/data")),
        "keys": tried(lambda: os.listdir("/site/trainer")),
        "studies": tried(lambda: os.listdir("/site/studies")),
        "other users": strangers(),
        "become root": tried(lambda: os.setuid(0)),
        "become trainer": tried(lambda: os.setuid(10003)),
        "write run": tried(lambda: Path("/site/run/x").write_text("x")),
        "replace socket": tried(lambda: os.unlink("/site/run/trainer.sock")),
        "write policy": tried(lambda: Path("/site/policy.yaml").write_text("privacy_none: true")),
        "write program": tried(lambda: Path("PROGRAM").write_text("x")),
        "route": tried(route),
        "coordinator": tried(lambda: dialled("COORDINATOR", 443)),
        "superlink": tried(lambda: dialled("COORDINATOR", 8000)),
        "second host": tried(lambda: dialled("OTHER_HOST", OTHER_PORT)),
        "the world": tried(lambda: dialled("192.0.2.1", 443)),
        "health": tried(lambda: asked("/health", "GET")),
        "forged task": tried(lambda: asked("/studies/tiny/tasks", "POST", b"x" * 4096)),
        "other study": tried(lambda: asked("/studies/other/tasks", "POST", b"x")),
    }
    Path(os.environ["FLWR_HOME"], "findings.json").write_text(json.dumps(findings))
    return Message(RecordDict(), reply_to=message)
"""
PROJECT = """
[project]
name = "hostile"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedseg"
[tool.flwr.app.components]
serverapp = "hostile.server:app"
clientapp = "sites.app:app"
[tool.flwr.app.config]
"""


@pytest.fixture(scope="module")
def networks() -> Iterator[None]:
    """Consortium and hospital on one wire; another host behind the consortium."""
    names = (CONSORTIUM, HOSPITAL, ELSEWHERE)
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _wire("fsc", CONSORTIUM, COORDINATOR, "fsh", HOSPITAL, RELAY)
        _wire("fsg", CONSORTIUM, GATEWAY, "fso", ELSEWHERE, OTHER_HOST)
        for setting in ("net.ipv4.ip_unprivileged_port_start=0", "net.ipv4.ip_forward=1"):
            _ip("netns", "exec", CONSORTIUM, "sysctl", "-qw", setting)
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _wire(one: str, here: str, address: str, two: str, there: str, other: str) -> None:
    """Join two networks; each knows the other's one address."""
    _ip("link", "add", one, "netns", here, "type", "veth", "peer", "name", two, "netns", there)
    for device, name, own, peer in ((one, here, address, other), (two, there, other, address)):
        _ip("-n", name, "addr", "add", own, "peer", peer, "dev", device)
        _ip("-n", name, "link", "set", device, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hospital(networks: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A consortium and a hospital, from `init` to services that run."""
    folder = tmp_path_factory.mktemp("walls")
    data = _patients(folder / "data")
    settings = {"FEDSEG_DATA": str(data), "FEDSEG_STUDY_NAME": "tiny"}
    names = {"coordinator": CONSORTIUM, "proxy": CONSORTIUM, "relay": HOSPITAL}
    engine = Engine(folder, settings, names)
    (folder / "secrets").mkdir()
    engine.secret("secrets/study-passphrase", "of the consortium\n", 10001)
    engine.secret("secrets/site-passphrase", "of the hospital\n", 10003)
    _enrol(engine, folder)
    started = []
    try:
        for name in ("trainer", "coordinator", "proxy", "relay"):
            started.append(engine.start(name, folder / f"{name}.log"))
        _until(lambda: "SuperNode ID" in (folder / "relay.log").read_text(), folder, 120)
        _until((engine.volume("door") / "trainer.sock").exists, folder, 60)
        yield engine
    finally:
        for process in started:
            engine.stop(process)


def _patients(data: Path) -> Path:
    """What must not be seen."""
    import nibabel

    for kind in ("images", "labels"):
        (data / kind).mkdir(parents=True)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        parts = np.zeros((12, 12, 12), dtype=np.uint8)
        parts[2 : 6 + seed, 2:6, 2:6], parts[8:10, 7:10, 7:10] = 1, 2
        image = rng.normal(100, 20, parts.shape).astype(np.float32)
        for kind, array in (("images", image), ("labels", parts)):
            path = data / kind / f"{MARK}_{seed}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return data


def _enrol(engine: Engine, folder: Path) -> None:
    """Both sides, as the head of the compose file tells people."""
    shown = folder / "shown"
    shown.mkdir()
    write_built(shown / "plan.json")
    mounts = {"/shown": shown}
    init = ("init", "/study", "--host", COORDINATOR, "--plan", "/shown/plan.json", "--passphrase")
    _well(engine.run("coordinator", *init, mounts=mounts))
    _well(engine.run("site-admin", "init", "/site", "--name", "hospital_a", "--passphrase"))
    shutil.copy(engine.volume("site") / "request.json", shown)
    _well(engine.run("coordinator", "enrol", "/shown/request.json", "--yes", mounts=mounts))
    shutil.copy(engine.volume("study") / "bundles" / "hospital_a.json", shown)
    (shown / "hospital_a.json").chmod(0o644)
    _well(engine.run("site-admin", "join", "/shown/hospital_a.json", "--yes", mounts=mounts))
    policy = engine.volume("site") / "policy.yaml"
    policy.write_text("privacy_none: true\n")
    _well(engine.run("trainer", "plan", "approve", "tiny", "--data", "/data", "--by", "me"))


def _well(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def _until(done: Callable[[], bool], folder: Path, seconds: float) -> None:
    """Wait, and show the logs where it takes too long."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            logs = {p.name: p.read_text()[-1500:] for p in folder.glob("*.log")}
            pytest.fail(f"not within {seconds} s: {json.dumps(logs, indent=1)}")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def findings(hospital: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an app from the coordinator finds in the relay."""
    app = tmp_path_factory.mktemp("app")
    app.chmod(0o755)
    words = {
        "MARK": MARK,
        "PYTHON": sys.base_prefix,
        "CHECKOUT": str(ROOT),
        "PROGRAM": str(Path(sys.prefix) / "bin" / "fedseg-site"),
        "COORDINATOR": COORDINATOR,
        "OTHER_HOST": OTHER_HOST,
        "OTHER_PORT": str(OTHER_PORT),
    }
    code = HOSTILE_SITES
    for word, value in words.items():
        code = code.replace(word, value)
    for path, text in (
        ("pyproject.toml", PROJECT),
        ("hostile/__init__.py", ""),
        ("hostile/server.py", HOSTILE_SERVER),
        ("sites/__init__.py", ""),
        ("sites/app.py", code),
    ):
        (app / path).parent.mkdir(exist_ok=True)
        (app / path).write_text(text)
    submit = "cp -r /app /tmp/app && FLWR_HOME=/study/flower flwr run /tmp/app study"
    command = hospital.command("coordinator", ["-c", submit], {"/app": app}, program="sh")
    server = _other_host()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        told = hospital.volume("relay") / "tiny" / "flower" / "findings.json"
        _until(told.exists, hospital.volume("relay").parents[1], 240)
        time.sleep(0.5)
        return dict(json.loads(told.read_text()))
    finally:
        server.kill()
        server.wait()


def _other_host() -> subprocess.Popen[bytes]:
    """A second host that would answer."""
    serve = (
        f"import socket,time; s=socket.create_server(('{OTHER_HOST}',{OTHER_PORT}));time.sleep(500)"
    )
    server = subprocess.Popen(["ip", "netns", "exec", ELSEWHERE, sys.executable, "-c", serve])
    dial = f"import socket; socket.create_connection(('{OTHER_HOST}',{OTHER_PORT}),5)"
    for _ in range(50):
        time.sleep(0.2)
        asked = ["ip", "netns", "exec", CONSORTIUM, sys.executable, "-c", dial]
        if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
            return server
    raise AssertionError("the second host does not answer even those who may reach it")


def test_the_apps_own_package_is_what_runs_in_the_relay(findings: dict[str, Any]) -> None:
    assert "/flower/" in findings["package"]
    assert findings["user"] == [10002, 10002, [10000]]
    assert int(findings["capabilities"], 16) == 0
    assert findings["no new privileges"] == "1"


def test_it_finds_neither_data_nor_keys(findings: dict[str, Any]) -> None:
    assert findings["secrets"] == []
    for what in ("data", "keys", "studies"):
        state, said = findings[what]
        assert state == "refused" or said == "[]", what
    assert findings["own key"][0] == "done"  # Flower's: all that the relay has


def test_it_reaches_the_coordinator_and_nobody_else(findings: dict[str, Any]) -> None:
    assert findings["coordinator"][0] == "done"
    for what in ("superlink", "second host", "the world", "route"):
        assert findings[what][0] == "refused", what


def test_it_becomes_nobody_else_and_changes_nothing(findings: dict[str, Any]) -> None:
    assert findings["other users"] == []
    for what in ("become root", "become trainer", "write run", "replace socket", "write policy"):
        assert findings[what][0] == "refused", what
    assert findings["write program"][0] == "refused"


def test_it_reaches_the_trainers_door_where_only_signed_tasks_count(
    findings: dict[str, Any],
) -> None:
    assert findings["health"] == ["done", "200"]
    assert findings["forged task"] == ["done", "403"]
    assert findings["other study"] == ["done", "404"]


def test_the_trainer_has_no_network_and_no_view_of_the_relay(hospital: Engine) -> None:
    look = (
        "import os,socket; assert os.getuid()==10003; assert os.listdir('/data');"
        "assert [n for _, n in socket.if_nameindex()] == ['lo'];"
        "assert not os.path.exists('/site/relay/node.key')"
    )
    command = hospital.command("trainer", ["-c", look], {}, program="python")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_proxy_cannot_see_the_studys_keys(hospital: Engine) -> None:
    look = (
        "import os; found=[n for _,_,f in os.walk('/study') for n in f];"
        "assert 'server.key' in found;"
        "assert not {'study.key', 'ca.key', 'registry.json'} & set(found), found"
    )
    command = hospital.command("proxy", ["-c", look], {}, program="python")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("half", ["trainer", "relay"])
def test_the_doctor_finds_both_halves_well(half: str, hospital: Engine) -> None:
    done = hospital.run(half, "doctor", "--half", half, "--json")
    found = json.loads(done.stdout)
    broken = {v["subject"]: v["says"] for v in found if v["condition"] == "fail"}
    assert not broken, done.stderr
    assert {"Trainer's socket"} <= {v["subject"] for v in found if v["condition"] == "ok"}


def test_the_coordinators_ports_are_closed_but_one(hospital: Engine) -> None:
    dial = (
        "import socket\n"
        f"socket.create_connection(('{COORDINATOR}', 443), 5)\n"
        "for port in (8000, 8080, 9091, 9092, 9093):\n"
        f"    assert socket.socket().connect_ex(('{COORDINATOR}', port)), port\n"
    )
    asked = ["ip", "netns", "exec", HOSPITAL, sys.executable, "-c", dial]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
