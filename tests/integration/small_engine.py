"""The services of docker-compose.yml as processes, where no container engine is: users and walls.

Each gets what the file says and nothing else: a root file system of its own, read-only, with the
interpreter and this checkout in it; its volumes, owned as the Dockerfile makes them; its user and
groups; no capability; no new privileges; processes of its own; and the network that it is given.
What an engine adds beyond that (seccomp, cgroups) is not there. Needs root.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TOOLS = ("unshare", "setpriv", "ip", "pivot_root", "mount", "umount", "install", "sysctl")
VARIABLE = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")
DEVICES = ("null", "zero", "random", "urandom")


def impossible() -> str | None:
    """Why services cannot be kept apart here, or None where they can."""
    if os.geteuid() != 0:
        return "only root can make other users' processes and namespaces"
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--net", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True,
        check=False,
    )
    return None if tried.returncode == 0 else "namespaces are not permitted"


class Engine:
    """Runs services of the compose file.

    Args:
        folder: for volumes, images and secrets.
        settings: values of the compose file's variables.
        networks: service -> network namespace; services without one have no network.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, str], networks: Mapping[str, str]
    ) -> None:
        self._folder, self._settings, self._networks = folder, settings, networks
        text = VARIABLE.sub(
            lambda match: settings.get(match[1], match[2]),
            (ROOT / "docker-compose.yml").read_text(),
        )
        self._file: dict[str, Any] = yaml.safe_load(text)

    def volume(self, name: str) -> Path:
        """Where a volume lies on this machine."""
        return self._folder / "volumes" / name

    def secret(self, name: str, content: str, owner: int) -> None:
        """Write the file that a secret comes from."""
        path = self._folder / name
        path.write_text(content)
        path.chmod(0o400)
        os.chown(path, owner, owner)

    def run(
        self, service: str, *arguments: str, mounts: Mapping[str, Path] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose run --rm SERVICE ARGUMENTS`, to its end."""
        return subprocess.run(
            self.command(service, arguments, mounts or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def start(self, service: str, log: Path) -> subprocess.Popen[bytes]:
        """`docker compose up SERVICE`."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self.command(service, self._file["services"][service]["command"], {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @staticmethod
    def stop(process: subprocess.Popen[bytes]) -> None:
        """`docker compose kill`: with the first process of a service its others end too."""
        first = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in first:
            os.kill(int(pid), signal.SIGKILL)
        process.kill()
        process.wait()

    def command(
        self,
        service: str,
        arguments: Sequence[str],
        mounts: Mapping[str, Path],
        program: str | None = None,
    ) -> list[str]:
        """What starts a service's walls and, in them, its program.

        Args:
            mounts: path in the service -> a folder that it sees besides its volumes, read-only.
            program: instead of the image's own.
        """
        told = self._file["services"][service]
        image = self._image(told["build"])
        run = shlex.join([*_as_user(told), *self._environment(told, program, arguments)])
        script = "\n".join([*self._walls(told, image, mounts), f"exec {run}"])
        network = self._networks.get(service)
        enter = ["ip", "netns", "exec", network] if network else ["unshare", "--net"]
        apart = ["unshare", "--mount", "--pid", "--fork", "--ipc", "--uts"]
        return [*enter, *apart, "sh", "-euc", script]

    def _walls(self, told: dict[str, Any], image: Path, mounts: Mapping[str, Path]) -> list[str]:
        """The file system of a service, step by step."""
        new = self._folder / "root"
        new.mkdir(exist_ok=True)
        steps = [f"mount --make-rprivate / && mount -t tmpfs -o mode=0755 none {new} && cd {new}"]
        steps.append("mkdir -p proc dev tmp run opt etc .old")
        steps += [f"ln -s usr/{name} {name}" for name in ("bin", "lib", "lib64", "sbin")]
        for path in (Path("/usr"), Path(sys.base_prefix), ROOT):
            steps += _bind(path, path, read_only=True)
        steps.append(f"ln -s {sys.prefix} opt/fedseg && cp -a {image}/. .")
        for name, path in mounts.items():
            steps += _bind(path, Path(name), read_only=True)
        for mount in sorted(told["volumes"], key=lambda mount: mount["target"].count("/")):
            source = self._source(mount, image)
            steps += _bind(source, Path(mount["target"]), read_only="read_only" in mount)
        for secret in told.get("secrets", ()):
            source = self._folder / self._file["secrets"][secret]["file"]
            steps += _bind(source, Path("/run/secrets") / secret, read_only=True)
        for tmpfs in told["tmpfs"]:
            target, _, options = tmpfs.partition(":")
            steps.append(f"mkdir -p .{target} && mount -t tmpfs -o {options} none .{target}")
        steps.append("mount -t proc none proc")
        steps += [f"touch dev/{name} && mount --bind /dev/{name} dev/{name}" for name in DEVICES]
        steps.append(f"mount -o remount,ro {new}")
        steps.append("ip link set lo up 2>/dev/null || true")
        return [*steps, "pivot_root . .old", "cd /", "umount -l .old", "cd /tmp"]

    def _source(self, mount: dict[str, Any], image: Path) -> Path:
        """What is mounted; a new volume begins as the image has it."""
        if mount["type"] == "bind":
            return Path(mount["source"])
        place = self.volume(mount["source"])
        subpath = mount.get("volume", {}).get("subpath")
        if not place.exists():
            assert subpath is None, "a part of a volume is there once the whole was used"
            place.parent.mkdir(exist_ok=True)
            shutil.copytree(image / mount["target"].lstrip("/"), place)
            for path in (place, *place.rglob("*")):
                twin = image / mount["target"].lstrip("/") / path.relative_to(place)
                os.chown(path, twin.stat().st_uid, twin.stat().st_gid)
        return place / subpath if subpath else place

    def _image(self, build: dict[str, str]) -> Path:
        """The folders and users of an image, made as its Dockerfile says."""
        image = self._folder / f"image-{build['target']}"
        if image.exists():
            return image
        text = _dockerfile(build)
        (image / "etc").mkdir(parents=True)
        for line in re.findall(r"install -d [^&\n]*", text):
            words = [f"{image}{w}" if w.startswith("/") else w for w in shlex.split(line)]
            subprocess.run(words, check=True)
        groups = re.findall(r"groupadd --gid (\d+) (\S+)", text)
        users = re.findall(r"useradd --uid (\d+) --gid (\d+) .*?(\S+) *(?:&&|\n)", text)
        etc = image / "etc"
        members = re.findall(r"useradd .*?--groups (\S+) .*?(\S+) *(?:&&|\n)", text)
        lines = [f"{n}:x:{g}:{','.join(u for m, u in members if m == n)}\n" for g, n in groups]
        (etc / "group").write_text("root:x:0:\n" + "".join(lines))
        (etc / "passwd").write_text(
            "root:x:0:0::/tmp:/bin/sh\n"
            + "".join(f"{n}:x:{u}:{g}::/tmp:/usr/sbin/nologin\n" for u, g, n in users)
        )
        (etc / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        shutil.copy("/etc/ld.so.cache", etc)
        return image

    def _environment(
        self, told: dict[str, Any], program: str | None, arguments: Sequence[str]
    ) -> list[str]:
        """The program, and all that its environment holds."""
        text = _dockerfile(told["build"])
        pairs = [pair for line in re.findall(r"(?m)^ENV (.*)$", text) for pair in shlex.split(line)]
        pairs += [f"{name}={value}" for name, value in told.get("environment", {}).items()]
        pairs.append("OMP_NUM_THREADS=1")
        entry = re.findall(r'(?m)^ENTRYPOINT \["(.*)"\]$', text)[0]
        return ["env", "-i", *pairs, program or entry, *map(str, arguments)]


def _dockerfile(build: dict[str, str]) -> str:
    """A Dockerfile up to the end of a stage, each instruction on one line."""
    text = (ROOT / build["dockerfile"]).read_text().replace("\\\n", " ")
    stages = re.split(r"(?m)^(?=FROM )", text)
    names = [stage.split("\n")[0].rpartition(" AS ")[2].strip() for stage in stages]
    return "".join(stages[: names.index(build["target"]) + 1])


def _bind(source: Path, target: Path, *, read_only: bool) -> list[str]:
    """Show a file or folder in the new root."""
    place = f".{target}"
    made = f"mkdir -p {place}" if source.is_dir() else f"mkdir -p .{target.parent} && touch {place}"
    steps = [f"{made} && mount --bind {source} {place}"]
    return [*steps, f"mount -o remount,bind,ro {place}"] if read_only else steps


def _as_user(told: dict[str, Any]) -> list[str]:
    """Become the service's user, with its groups and without capabilities."""
    user, group = told["user"].split(":")
    groups = ",".join(told.get("group_add", ()))
    kept = "".join(f",+{name.lower()}" for name in told.get("cap_add", ()))
    return [
        "setpriv",
        *(f"--reuid={user}", f"--regid={group}"),
        f"--groups={groups}" if groups else "--clear-groups",
        *(f"--bounding-set=-all{kept}", "--inh-caps=-all", "--no-new-privs"),
    ]
