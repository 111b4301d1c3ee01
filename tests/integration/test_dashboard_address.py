"""The dashboard on an address that others can reach: TLS and a token, in a network of its own."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

import pytest

from fedseg.errors import TrustError

ADDRESS = "10.77.0.1"
SETUP = f"ip link set lo up && ip addr add {ADDRESS}/32 dev lo"
APART = ("unshare", "--map-root-user", "--net")


def _can_be_apart() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    tried = subprocess.run([*APART, "sh", "-c", SETUP], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.skipif(not _can_be_apart(), reason="needs unshare, ip, and leave to use them")
def test_others_need_tls_and_the_token(tmp_path: Path) -> None:
    from small_studies import founded  # the visitor below runs this file without the tests' path

    folder, _ = founded(tmp_path / "study")
    inside = [*APART, "sh", "-c", f'{SETUP} && exec "$@"', "sh", sys.executable, __file__]
    done = subprocess.run(
        [*inside, str(folder.path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    token = (folder.run / "dashboard.token").read_text().strip()
    assert token not in done.stdout + done.stderr


def visit(study: Path) -> None:
    """What a visitor from elsewhere meets; runs inside the network of its own."""
    program = str(Path(sys.executable).with_name("fedseg-coordinator"))
    command = [program, "dashboard", "--study", str(study), "--host", "0.0.0.0", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"https://0\.0\.0\.0:(\d+)/", process.stdout.readline())
        assert found and "token" in process.stdout.readline()
        try:
            _look(study, int(found.group(1)))
        finally:
            process.terminate()


def _look(study: Path, port: int) -> None:
    trust = ssl.create_default_context(cafile=study / "ca" / "ca.crt")
    trust.check_hostname = False  # the certificate is for the study's host, not for this address
    token = (study / "run" / "dashboard.token").read_text().strip()

    def ask(path: str, **headers: str) -> tuple[int, str]:
        connection = HTTPSConnection(ADDRESS, port, context=trust, timeout=20)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode() + str(answer.headers)

    status, said = ask("/")
    assert status == 303 and "/login" in said
    assert ask("/progress.json")[0] == 401
    assert ask("/progress.json", Authorization="Bearer " + "x" * 43)[0] == 401
    assert ask("/progress.json", Authorization=f"Bearer {token}")[0] == 200
    plain = HTTPConnection(ADDRESS, port, timeout=20)
    try:
        plain.request("GET", "/", headers={"Authorization": f"Bearer {token}"})
        plain.getresponse()
    except (HTTPException, OSError):
        return
    raise TrustError("the page was served without TLS")


if __name__ == "__main__":
    visit(Path(sys.argv[1]))
