"""What the documents tell people to type, set, open or read exists.

Commands are parsed by the programs themselves and not run; files and tests are looked up in the
repository; environment variables, audit events and units are looked for where they are read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command

from coordinator.cli import app as coordinator_app
from fedseg.cli import app as fedseg_app
from sites.cli import app as site_app

ROOT = Path(__file__).parents[2]
PROGRAMS = {"fedseg": fedseg_app, "fedseg-site": site_app, "fedseg-coordinator": coordinator_app}
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", *DOCS]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
INDENTED = re.compile(r"^ {4}(.+)$", re.MULTILINE)
NAMED = re.compile(
    r"(?<![\w./-])(?:\S*/bin/)?(fedseg(?:-site|-coordinator)?) ([a-z][a-z-]*(?=[\s`,;.)]|$)[^`\n]*)"
)
FILE = re.compile(
    r"`((?:docs|tests|fedseg|sites|coordinator|benchmarks|locks)/[\w./@-]*\.(?:py|md|json|txt|yaml))`"
)
LINK = re.compile(r"\]\(([^)#:]+)(#[\w-]+)?\)")
TEST = re.compile(r"`(test_\w+)`")
UNIT = re.compile(r"(?:sites|coordinator)/systemd/[\w@.*-]+")
VARIABLE = re.compile(r"\bFEDSEG_[A-Z_]+\b")
MACHINE = re.compile(r"(?:^|[\s`(=\"])/(?:work|tmp|home|root)/")


def text_of(page: str) -> str:
    """A page with the lines that a backslash continues in one."""
    return re.sub(r"\\\n\s*", "", (ROOT / page).read_text(encoding="utf-8"))


def commands_of(page: str) -> Iterator[tuple[str, str]]:
    """Program and the rest of the line, wherever one of ours is named with a command."""
    text = text_of(page)
    plain = FENCE.sub("", text)
    code = [*FENCE.findall(text), *INDENTED.findall(plain)]
    spans = [" ".join(span.split()) for span in SPAN.findall(plain)]
    for line in [*"\n".join(code).splitlines(), *spans]:
        for match in NAMED.finditer(line.replace("|", " ; ")):
            yield match[1], match[2]


def walked(program: str, words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The command that the words lead to and what is left of them; None where it is no command."""
    command: click.Command = get_command(PROGRAMS[program])
    while isinstance(command, click.Group):
        if not words or words[0] not in command.commands:
            return None
        command, words = command.commands[words[0]], words[1:]
    return command, words


def words_of(rest: str) -> list[str]:
    """The words of a command line up to a comment, a pipe or the end of a sentence."""
    rest = re.split(r"\s#|;|&&|\s>|\s\(|,\s", rest)[0]
    try:
        return shlex.split(rest)
    except ValueError:
        return rest.split()


SPELT = [(page, program, rest) for page in PAGES for program, rest in commands_of(page)]
GROUPS = {("fedseg-site", "audit"), ("fedseg-site", "plan"), ("fedseg", "plan")}


def test_the_documents_name_commands() -> None:
    assert {program for _, program, _ in SPELT} == set(PROGRAMS)
    assert len(SPELT) > 60


@pytest.mark.parametrize(("page", "program", "rest"), SPELT)
def test_a_command_and_its_options_exist(page: str, program: str, rest: str) -> None:
    words = words_of(rest.rstrip(".:"))
    found = walked(program, words)
    assert found is not None or (program, words[0]) in GROUPS, f"{page}: {program} {rest}"
    if found is None:
        return
    command, left = found
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    for word in left:
        if word.startswith("-") and len(word) > 1:
            assert word.partition("=")[0] in {*known, "--help"}, f"{page}: {program} {rest}"


@pytest.mark.parametrize("page", PAGES)
def test_files_links_and_tests_exist(page: str) -> None:
    text = text_of(page)
    for name in FILE.findall(text):
        assert (ROOT / name).exists(), name
    for name in UNIT.findall(text):
        assert list(ROOT.glob(name)), name
    for name, anchor in LINK.findall(text):
        target = (ROOT / page).parent / name
        assert target.exists(), name
        assert not anchor or anchor[1:] in anchors(target), anchor
    for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
        assert anchor in anchors(ROOT / page), anchor
    every_test = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    for name in TEST.findall(text):
        assert f"def {name}(" in every_test, name


def anchors(page: Path) -> set[str]:
    """What headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_environment_variables_are_read_by_somebody(page: str) -> None:
    readers = [*(ROOT / "docker-compose.yml",), *(ROOT / "fedseg").rglob("*.py")]
    readers += [*(ROOT / "sites").rglob("*.py"), *(ROOT / "coordinator").rglob("*.py")]
    code = "\n".join(path.read_text() for path in readers)
    for name in VARIABLE.findall(text_of(page)):
        assert name in code, name


@pytest.mark.parametrize("page", PAGES)
def test_no_folder_of_one_machine_is_in_the_documents(page: str) -> None:
    assert not MACHINE.search(text_of(page))


def test_events_that_the_threat_model_names_are_written() -> None:
    rooms = ("sites", "coordinator", "fedseg/privacy/ledger")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    code = "\n".join(path.read_text() for path in sources)
    table = (ROOT / "docs/threat-model.md").read_text().partition("## What each attack meets")[2]
    rows = [row.split("|") for row in table.partition("\n## ")[0].splitlines() if "|" in row]
    events = {event for row in rows[2:] for event in re.findall(r"`([a-z_]+)`", row[3])}
    assert events
    for event in events:
        assert f'"{event}"' in code, event
