"""A private study that its coordinator tried again, restarted or restored: no hospital is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

from small_hospitals import Hospital, approved
from small_private_sites import (
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    ledger_of,
)
from typer.testing import CliRunner

from fedseg.container import unpack
from fedseg.updates import AnswerHeader
from sites import cli


def asked(site: Hospital, attempt: int, head: str | None) -> tuple[str | None, bytes | str]:
    """A round's attempt by a coordinator that has seen a head: the new head, and the delta."""
    heads = {} if head is None else {site.own.name: head}
    plain = site.consortium.plain("train", 1, attempt=attempt, heads=heads)
    answer = site.ask(site.task(plain=plain))
    if (header := site.said(answer)).body.kind == "refused":
        return None, header.body.code
    read = site.consortium.read(answer, site.own)
    _, delta = unpack(read, AnswerHeader, max_bytes=10**8, schema=None)
    return header.head, b"".join(delta[name].tobytes() for name in sorted(delta))


def test_attempts_that_a_restarted_coordinator_makes_again_get_the_stored_answer(
    site: Hospital,
) -> None:
    most = site.consortium.plan.aggregation.attempts
    head: str | None = None
    answers = []
    for attempt in [*range(1, most + 1), *range(1, most + 1)]:  # others failed; then started again
        head, delta = asked(site, attempt, head)
        answers.append(delta)
    assert len(set(answers)) == 1, answers
    assert len(ledger_of(site).book.debits) == site.trained == 1


def test_a_hospital_that_declared_that_it_was_put_back_hears_the_studys_end(
    site: Hospital, data: Path, tmp_path: Path
) -> None:
    """The coordinator has seen a head that is nowhere any more; whatever was done is paid for."""
    backup = tmp_path / "backup"
    shutil.copytree(site.folder.path, backup)
    heads = {site.own.name: asked(site, 1, None)[0]}
    shutil.rmtree(site.folder.path)
    shutil.copytree(backup, site.folder.path)
    rounds = site.consortium.plan.aggregation.rounds

    def says(stage: str, round_: int) -> str:
        plain = site.consortium.plain(stage, round_, heads=heads)
        body = site.said(site.ask(site.task(plain=plain))).body
        return body.code if body.kind == "refused" else body.kind

    stages = [("enlist", 0), ("train", 1), ("train", 2), ("release", rounds)]
    assert [says(*each) for each in stages] == ["task"] * 4
    words = ["ledger", "restore", "--whole-folder", "--reason", "Sunday"]
    place = ["--site", str(site.folder.path)]
    assert CliRunner().invoke(cli.app, [*words, *place]).exit_code == 0
    approved(site.folder, site.consortium, data)
    assert [says(*each) for each in stages] == ["enlist", "plan", "plan", "release"]
    assert site.trained == 0 and site.folder.model("tiny").exists()
