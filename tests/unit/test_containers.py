"""Containers and services as written: what they name exists, what they promise is there.

No engine runs here. The files are parsed, commands go through the real command lines, paths are
held against the folders' own, ports against the settings' own, and systemd reads its units itself.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from small_studies import NOW, founded
from typer.main import get_command

from coordinator.cli import app as coordinator_app
from coordinator.dashboard.notices import notices
from coordinator.dashboard.reading import Reader
from coordinator.folder import Settings, StudyFolder
from sites.cli import app as site_app
from sites.folder import SiteFolder

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = ("coordinator/Dockerfile", "sites/Dockerfile")
UNITS = sorted(
    path.relative_to(ROOT).as_posix()
    for side in ("sites", "coordinator")
    for path in (ROOT / side / "systemd").glob("*.service")
)
PROGRAMS = {"fedseg-site": site_app, "fedseg-coordinator": coordinator_app}
LOCKS = {"relay": "", "coordinator": "coordinator", "trainer": "site"}
HEAVY = {"torch", "monai", "nibabel", "pydicom", "highdicom", "scipy", "matplotlib", "ray"}
VARIABLE = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")
PLAIN_SERVICES = sorted(set(SERVICES) - {"site-admin"})


def filled(text: str) -> str:
    """A value with its variables' defaults."""
    return VARIABLE.sub(lambda match: match[2], str(text))


def parsed(program: str, *arguments: str) -> click.Context:
    """A command line as the program itself takes it; it is parsed and not run."""
    command: click.Command = get_command(PROGRAMS[program])
    context, rest = click.Context(command, info_name=program), list(arguments)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, (program, arguments)
        command, parent = found, context
        context = click.Context(command, info_name=name, parent=parent)
    return command.make_context(context.info_name, rest, parent=context.parent)


def paths_of(folder: SiteFolder | StudyFolder) -> set[str]:
    """Every path that a folder has as a property, relative to it."""
    found = (getattr(folder, name) for name in dir(type(folder)) if _is_property(folder, name))
    paths = [path for path in found if isinstance(path, Path)]
    return {path.relative_to(folder.path).as_posix() for path in paths}


def _is_property(folder: object, name: str) -> bool:
    return isinstance(getattr(type(folder), name, None), property) and name != "record"


SITE_PATHS = paths_of(SiteFolder(Path("/site")))
STUDY_PATHS = paths_of(StudyFolder("/study"))


class Step(NamedTuple):
    """One instruction of a Dockerfile, in its stage."""

    stage: str
    word: str
    rest: str


def steps(path: str) -> Iterator[Step]:
    """The instructions of a Dockerfile."""
    stage = ""
    lines = (line for line in (ROOT / path).read_text().splitlines() if not line.startswith("#"))
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.split(" AS ")[1]
        yield Step(stage, word, rest.strip())


def bases(path: str) -> dict[str, str]:
    """Stage -> what it is built from."""
    return {s.stage: s.rest.split(" AS ")[0] for s in steps(path) if s.word == "FROM"}


def last(path: str, stage: str, word: str) -> str:
    """The last instruction of a kind in a stage, or in those that it is built from."""
    found = [s.rest for s in steps(path) if s.stage == stage and s.word == word]
    if found:
        return found[-1]
    base = bases(path).get(stage, "")
    return last(path, base, word) if base in bases(path) else ""


def unit(path: str) -> dict[str, list[str]]:
    """The settings of a unit, each with its values in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in (ROOT / path).read_text().splitlines():
        if "=" in line and not line.startswith(("#", ";", "[")):
            name, _, value = line.partition("=")
            found[name.strip()].append(value.strip())
    return found


# Compose


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_closed_in(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "pid", "ipc", "devices", "userns_mode"} & set(service)
    assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])
    assert service["pids_limit"] > 0
    if name == "site-admin":
        assert service["network_mode"] == "none"
        assert set(service["cap_add"]) == {"SETUID", "SETGID", "DAC_OVERRIDE"}
        assert "restart" in service and "site" not in service["profiles"]
        return
    assert "cap_add" not in service
    assert int(service["user"].split(":")[0]) > 0
    assert service["healthcheck"]["test"]


@pytest.mark.parametrize("name", SERVICES)
def test_the_command_of_a_service_and_its_health_check_exist(name: str) -> None:
    service = SERVICES[name]
    dockerfile, stage = service["build"]["dockerfile"], service["build"]["target"]
    (program,) = ast.literal_eval(last(dockerfile, stage, "ENTRYPOINT"))
    parsed(program, *map(filled, service["command"]))
    check = service["healthcheck"].get("test")
    if check is None:
        assert service["healthcheck"] == {"disable": True}
    elif check[1] == "python":
        compile(filled(check[3]), name, "exec")
    else:
        parsed(check[1], *check[2:])


def test_no_service_has_data_and_a_network() -> None:
    for name, service in SERVICES.items():
        whole = {m["source"] for m in service["volumes"] if "subpath" not in m.get("volume", {})}
        holds_data = bool({"site", "${FEDSEG_DATA:-./data}"} & whole)
        assert holds_data == (service.get("network_mode") == "none"), name
        assert not (holds_data and service.get("networks")), name
    for name in ("relay", "proxy", "dashboard"):
        assert "secrets" not in SERVICES[name]
        assert not any(mount["type"] == "bind" for mount in SERVICES[name]["volumes"])


def test_the_relay_sees_its_own_folder_the_door_and_nothing_secret() -> None:
    mounts = {mount["target"]: mount for mount in SERVICES["relay"]["volumes"]}
    assert set(mounts) == {"/site/relay", "/site/run", "/site/site.json", "/site/request.json"}
    assert all(mounts[path]["read_only"] for path in mounts if path != "/site/relay")
    assert not any(m["source"] == "relay" for m in SERVICES["trainer"]["volumes"])


def test_the_proxy_sees_no_secret_but_the_servers_key() -> None:
    seen = {m["volume"]["subpath"] for m in SERVICES["proxy"]["volumes"]}
    assert seen == {"study.json", "tls", "ca/ca.crt", "logs"}
    (config,) = (m for m in SERVICES["proxy"]["tmpfs"] if m.startswith("/study/"))
    uid = SERVICES["proxy"]["user"].split(":")[0]
    assert config.startswith("/study/proxy:") and f"uid={uid}" in config


def test_the_page_sees_no_secret_but_the_servers_key_and_misses_nothing(tmp_path: Path) -> None:
    whole = founded(tmp_path / "study")[0].path
    seen = {m["volume"]["subpath"] for m in SERVICES["dashboard"]["volumes"]}
    for name in seen:
        (tmp_path / "page" / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copyfile
        copy(whole / name, tmp_path / "page" / name)
    page = StudyFolder(tmp_path / "page")
    assert not (page.study_key.exists() or page.ca_key.exists() or page.outbox.exists())
    progress, situation = Reader(page, now=lambda: NOW).read()
    assert notices(progress, situation) == ()


def test_every_path_in_a_study_or_a_site_is_one_of_its_folder() -> None:
    known = {"/site": SITE_PATHS, "/study": STUDY_PATHS}
    for service in SERVICES.values():
        for mount in service["volumes"]:
            root = "/" + mount["target"].split("/")[1]
            inner = mount["target"].removeprefix(root).lstrip("/")
            assert root in {*known, "/data"}
            assert not inner or inner in known[root], mount
            if subpath := mount.get("volume", {}).get("subpath"):
                assert subpath == inner


def test_every_volume_secret_network_and_service_that_is_named_is_there() -> None:
    used: dict[str, set[str]] = defaultdict(set)
    for service in SERVICES.values():
        used["volumes"] |= {m["source"] for m in service["volumes"] if m["type"] == "volume"}
        used["secrets"] |= set(service.get("secrets", ()))
        used["networks"] |= set(service.get("networks", ()))
        for name in service.get("depends_on", ()):
            assert set(service["profiles"]) & set(SERVICES[name]["profiles"]) or name in SERVICES
        mode = service.get("network_mode", "")
        assert not mode.startswith("service:") or mode.removeprefix("service:") in SERVICES
        for secret in service.get("secrets", ()):
            assert service["environment"]["FEDSEG_PASSPHRASE_FILE"] == f"/run/secrets/{secret}"
    for kind, names in used.items():
        assert names == set(COMPOSE[kind]), kind
    assert {value["file"].split("/")[1] for value in COMPOSE["secrets"].values()} == {"secrets"}
    assert "secrets/" in (ROOT / ".gitignore").read_text().split()


def test_ports_agree_with_the_settings() -> None:
    default = {name: field.default for name, field in Settings.model_fields.items()}
    coordinator, proxy = SERVICES["coordinator"], SERVICES["proxy"]
    public, page = map(filled, coordinator["ports"])
    assert public == f"{default['port']}:{default['port']}"
    assert str(default["superlink_port"]) in coordinator["healthcheck"]["test"][3]
    assert str(default["port"]) in filled(proxy["healthcheck"]["test"][3])
    command = SERVICES["dashboard"]["command"]
    assert page == "127.0.0.1:{0}:{0}".format(command[command.index("--port") + 1])


def test_every_variable_is_explained_and_has_a_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    header = " ".join(line for line in text.splitlines() if line.startswith("#"))
    used = set(re.findall(r"\$\{([A-Z_]+)", text))
    assert used == {match[0] for match in VARIABLE.findall(text)}
    assert all(f"{name} (" in header for name in used)


def test_every_environment_variable_is_read_by_somebody() -> None:
    import flwr

    ours = [p.read_text() for side in ("fedseg", "sites", "coordinator") for p in _python(side)]
    flowers = [p.read_text() for p in Path(flwr.__file__).parent.glob("common/*.py")]
    flowers += [p.read_text() for p in Path(flwr.__file__).parent.glob("supercore/*.py")]
    named = {name for service in SERVICES.values() for name in service.get("environment", {})}
    for path in DOCKERFILES:
        for step in steps(path):
            if step.word == "ENV":
                named |= {pair.partition("=")[0] for pair in shlex.split(step.rest)}
    for path in UNITS:
        pairs = " ".join(unit(path)["Environment"]).split()
        named |= {pair.partition("=")[0] for pair in pairs}
    known = {"PATH", "HOME", "PYTHONUNBUFFERED"}
    for name in named - known:
        sources = flowers if name.startswith("FLWR_") else ours
        assert any(f'"{name}"' in source for source in sources), name


def _python(side: str) -> Iterator[Path]:
    return (ROOT / side).rglob("*.py")


def test_the_commands_that_the_compose_file_tells_people_are_real() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    header = "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    told = [
        shlex.split(line)
        for line in header.replace("\\\n", " ").splitlines()
        if line.startswith("docker compose ")
    ]
    assert len(told) > 10
    for words in told:
        rest = words[2:]
        while rest[:1] == ["--profile"]:
            assert any(rest[1] in service["profiles"] for service in SERVICES.values())
            rest = rest[2:]
        if rest[0] == "exec":
            parsed(*rest[2:])
        elif rest[0] == "run":
            name = next(word for word in rest[1:] if word in SERVICES)
            build = SERVICES[name]["build"]
            (program,) = ast.literal_eval(last(build["dockerfile"], build["target"], "ENTRYPOINT"))
            parsed(program, *rest[rest.index(name) + 1 :])
        else:
            assert rest[0] in {"build", "up", "restart"}


def test_compose_itself_reads_the_file() -> None:
    docker = shutil.which("docker")
    asked = [docker or "false", "compose", "version"]
    if subprocess.run(asked, capture_output=True, check=False).returncode != 0:
        pytest.skip("no docker compose here: the file was checked by our own parser only")
    command = [str(docker), "compose", "--profile", "*", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


# Images


@pytest.mark.parametrize("path", DOCKERFILES)
def test_everything_that_an_image_copies_is_there_and_not_ignored(path: str) -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    for step in steps(path):
        if step.word != "COPY":
            continue
        *sources, _target = step.rest.split()
        if sources[0].startswith("--from="):
            assert sources.pop(0).removeprefix("--from=") in bases(path)
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in allowed, source


@pytest.mark.parametrize("path", DOCKERFILES)
def test_nothing_is_installed_without_a_hash(path: str) -> None:
    text = " ; ".join(step.rest for step in steps(path) if step.word == "RUN")
    installs = [part for part in re.split(r"&&|;", text) if re.search(r"pip (install|wheel)", part)]
    assert len(installs) >= 4
    for part in installs:
        pinned = "--require-hashes" in part and "--only-binary=:all:" in part
        assert pinned or "--no-index" in part, part
    assert not re.search(r"https?://", (ROOT / path).read_text())


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_of_a_stage_whose_user_folders_and_command_agree(name: str) -> None:
    service = SERVICES[name]
    path, stage = service["build"]["dockerfile"], service["build"]["target"]
    assert stage in bases(path)
    assert service["build"]["context"] == "."
    if name != "site-admin":
        assert last(path, stage, "USER") == service["user"]
    (program,) = ast.literal_eval(last(path, stage, "ENTRYPOINT"))
    if default := last(path, stage, "CMD"):
        parsed(program, *ast.literal_eval(default))
    for group in service.get("group_add", ()):
        assert f"groupadd --gid {group} fedseg" in _runs(path)


def test_new_volumes_belong_to_those_who_write_to_them() -> None:
    owners = {
        folder: (owner, group)
        for line in re.findall(r"install -d [^&]*", _runs("sites/Dockerfile"))
        for owner, group in re.findall(r"-o (\d+) -g (\d+)", line)
        for folder in line.split()
        if folder.startswith("/site/")
    }
    relay, trainer = SERVICES["relay"]["user"], SERVICES["trainer"]["user"]
    assert ":".join(owners.pop("/site/relay")) == relay
    shared = SERVICES["relay"]["group_add"]
    assert owners.pop("/site/run") == (trainer.split(":")[0], shared[0])
    assert SERVICES["trainer"]["group_add"] == shared
    assert {":".join(pair) for pair in owners.values()} == {trainer}
    own = ("trainer", "studies", "cache", "models", "validations", "logs")
    assert set(owners) == {f"/site/{name}" for name in own}


def _runs(path: str) -> str:
    return " && ".join(step.rest for step in steps(path) if step.word == "RUN")


# Locks


@pytest.mark.parametrize("lock", ["build", *LOCKS])
def test_every_requirement_of_a_lock_has_a_hash_and_no_host(lock: str) -> None:
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    assert not re.search(r"https?:|--(extra-)?index-url|--find-links|@ ", text)
    assert "/" not in re.sub(r"(?m)^#.*$", "", text)
    for entry in _entries(text):
        requirement = Requirement(entry.partition(" --hash")[0])
        assert str(requirement.specifier).startswith("==")
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_what_pyproject_asks_for(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"].get(LOCKS[lock], ())]
    locked = _locked(lock)
    for requirement in map(Requirement, wanted):
        versions = locked.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement.name} is not in locks/{lock}.txt: make locks"
        assert all(requirement.specifier.contains(v) for v in versions), (
            f"make locks ({requirement})"
        )
    if lock != "trainer":
        assert not HEAVY & set(locked)


def test_the_lock_of_the_build_is_what_the_build_system_asks_for() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in map(Requirement, wanted):
        (version,) = _locked("build")[requirement.name]
        assert requirement.specifier.contains(version)


def _entries(text: str) -> list[str]:
    """The entries of a lock, one string each."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


def _locked(lock: str) -> dict[str, set[str]]:
    """Package -> the versions that a lock has of it, for one Python or another."""
    found: dict[str, set[str]] = defaultdict(set)
    for entry in _entries((ROOT / "locks" / f"{lock}.txt").read_text()):
        requirement = Requirement(entry.partition(" --hash")[0])
        (only,) = requirement.specifier
        found[canonicalize_name(requirement.name)].add(only.version)
    return found


# Services of systemd


HARDENED = {
    "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes", "PrivateDevices": "yes",
    "NoNewPrivileges": "yes", "RestrictSUIDSGID": "yes", "RestrictNamespaces": "yes",
    "LockPersonality": "yes", "ProtectProc": "invisible", "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes", "ProtectKernelLogs": "yes", "ProtectControlGroups": "yes",
    "ProtectClock": "yes", "SystemCallArchitectures": "native", "UMask": "0077",
}  # fmt: skip


@pytest.mark.parametrize("path", UNITS)
def test_a_unit_is_closed_in(path: str) -> None:
    found = unit(path)
    assert {name: found[name][-1] for name in HARDENED} == HARDENED
    stoppable = "fedseg-coordinator@" in path  # by its own `stop`, which must not be undone
    assert found["Restart"] == ["on-failure" if stoppable else "always"]
    bounding = "CAP_NET_BIND_SERVICE" if "proxy" in path else ""
    assert found["CapabilityBoundingSet"] == [bounding]
    assert "@system-service" in found["SystemCallFilter"]
    assert found["User"][0] not in {"root", "0"}


@pytest.mark.parametrize("path", UNITS)
def test_the_command_of_a_unit_exists(path: str) -> None:
    (command,) = unit(path)["ExecStart"]
    program, *arguments = shlex.split(command.replace("%i", "lung"))
    assert Path(program).parent == Path("/opt/fedseg/bin")
    parsed(Path(program).name, *arguments)


def test_the_halves_of_a_site_have_two_users_and_two_worlds() -> None:
    trainer, relay = unit("sites/systemd/fedseg-trainer.service"), _relay_unit()
    assert (trainer["User"], relay["User"]) == (["fedseg-trainer"], ["fedseg-relay"])
    assert trainer["PrivateNetwork"] == ["yes"]
    assert trainer["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert trainer["IPAddressDeny"] == relay["IPAddressDeny"] == ["any"]
    assert "IPAddressAllow" not in trainer
    assert relay["IPAddressAllow"] == ["localhost"]
    hidden = set(" ".join(relay["InaccessiblePaths"]).split())
    for name in ("trainer", "studies", "cache", "models"):
        assert f"/var/lib/fedseg/{name}" in hidden
    assert "-/var/lib/fedseg/validations" in hidden  # sites made before have none
    assert relay["ReadWritePaths"] == ["/var/lib/fedseg/relay"]
    assert trainer["InaccessiblePaths"] == ["/var/lib/fedseg/relay"]
    extra = unit("sites/systemd/fedseg-relay@.service.d/coordinator.conf")
    assert set(extra) == {"IPAddressAllow"}


def _relay_unit() -> dict[str, list[str]]:
    return unit("sites/systemd/fedseg-relay@.service")


def test_the_users_and_folders_of_units_are_made() -> None:
    made = {"users": set[str](), "paths": dict[str, str]()}
    for side, name in (("sites", "fedseg-site"), ("coordinator", "fedseg-coordinator")):
        folder = ROOT / side / "systemd"
        for line in _lines(folder / f"{name}.sysusers.conf"):
            made["users"].add(line.split()[1])  # type: ignore[union-attr]
        for line in _lines(folder / f"{name}.tmpfiles.conf"):
            _, path, mode, *_ = line.split()
            made["paths"][path] = mode  # type: ignore[index]
    for path in UNITS:
        found = unit(path)
        names = {*found["User"], *found["Group"], *found["SupplementaryGroups"]}
        assert names <= made["users"]  # type: ignore[operator]
        listed = " ".join([*found["ReadWritePaths"], *found["InaccessiblePaths"]])
        for named in listed.split():
            _known(named.lstrip("-"), set(made["paths"]))
    assert made["paths"]["/var/lib/fedseg/trainer"] == "0700"  # type: ignore[index]


def _known(path: str, made: set[str]) -> None:
    """A path of a unit is made beforehand, is one of a study's folder, or is the machine's."""
    inner = path.removeprefix("/var/lib/fedseg-coordinator/%i")
    if inner != path:
        assert not inner or inner.lstrip("/") in STUDY_PATHS, path
    elif path.startswith("/var/lib/fedseg"):
        assert path in made, path
    else:
        assert path in {"/srv", "/mnt", "/media", "/data", "/etc/fedseg"}, path


def _lines(path: Path) -> list[str]:
    """What a file says, without its comments."""
    return [x for x in path.read_text().splitlines() if x.strip() and not x.startswith("#")]


@pytest.mark.parametrize("path", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(path: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here: units were read by our own parser only")
    copy = tmp_path / Path(path).name
    text = (ROOT / path).read_text().replace("/opt/fedseg/bin/fedseg", "/usr/bin/env fedseg")
    copy.write_text(text)
    verify = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    wrong = [line for line in verify.stderr.splitlines() if copy.stem.rstrip("@") in line]
    assert not wrong
    secure = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", "--no-pager", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert secure.returncode == 0, secure.stdout[-300:]
