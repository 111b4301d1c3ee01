"""What leaves a hospital: of a fixed length, and an entry of the audit each.

Real gates on phantoms, with private plans.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from small_departures import STUDY, bytes_of, egress, listed, size_of
from small_hospitals import Hospital
from small_private_sites import (
    fixture_data,  # noqa: F401
    fixture_founded,  # noqa: F401
    fixture_site,  # noqa: F401
    private_hospital,
)

from fedseg.container import peek
from fedseg.errors import StorageError
from fedseg.security.keys import ReceivingKey
from fedseg.updates import AnswerHeader
from sites.journal import Journal


class TestLength:
    def test_a_private_answers_length_tells_nothing_of_the_patients(
        self, site: Hospital, data: Path, tmp_path: Path
    ) -> None:
        """Several draws; patients who cannot be read; patients whose images are not finite."""
        sizes, lost = {}, {}
        for name in ("healthy", "unreadable", "not finite"):
            own = tmp_path / name
            shutil.copytree(data, own)
            there = private_hospital(tmp_path / f"site {name}", own, rate=0.75)
            gate = there.gate()
            enlisted = size_of(there.ask(there.task("enlist", 0), gate))
            for image in sorted((own / "images").iterdir()):
                spoil(image, name)
            trained = [
                size_of(there.ask(there.task("train", round_), gate)) for round_ in (1, 2, 3)
            ]
            assert {e.facts["type"] for e in there.audited("egress")} == {"enlist", "train"}
            sizes[name] = (enlisted, *trained)
            rounds = Journal(there.folder.work(STUDY) / "journal.jsonl").read("trained")
            lost[name] = sum(int(str(entry["lost"])) for entry in rounds)
        assert len(set(sizes.values())) == 1
        assert len(set(sizes["healthy"][1:])) == 1
        assert lost["healthy"] == 0 < min(lost["unreadable"], lost["not finite"])

    def test_an_answer_of_another_length_does_not_leave(
        self, site: Hospital, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fedseg.updates import seal_answer

        monkeypatch.setattr("sites.trainer.seal_answer", lambda h, d, _plan: seal_answer(h, d))
        assert site.code(site.ask(site.task())) == "plan"
        assert "length" in str(site.audited("refused")[-1].facts["reason"])
        assert [e.facts["type"] for e in site.audited("egress")] == ["refused"]


class TestHead:
    def test_a_whole_folder_that_was_put_back_is_found_out(
        self, site: Hospital, tmp_path: Path
    ) -> None:
        """Ledger, audit, keys and answers together: nothing inside disagrees with anything."""
        heads = [head_after(site, 1)]
        older = tmp_path / "backup"
        shutil.copytree(site.folder.path, older)
        heads.append(head_after(site, 2, heads[0]))
        shutil.rmtree(site.folder.path)
        shutil.copytree(older, site.folder.path)
        for stage, round_ in (("train", 3), ("enlist", 0), ("train", 3)):
            plain = site.consortium.plain(stage, round_, heads={site.own.name: heads[1]})
            assert site.code(site.ask(site.task(plain=plain))) == "task"
            assert "put back to an older" in str(site.audited("refused")[-1].facts["reason"])
        assert site.trained == 1, "that of the first round, before the backup"
        assert head_after(site, 2, heads[0]) is not None, "the state of the backup is still known"

    def test_heads_tell_nothing(self, site: Hospital) -> None:
        head = head_after(site, 1)
        assert head is not None
        assert head.encode() not in site.folder.ledger.read_bytes()
        rows = [str(entry.facts["hash"]) for entry in site.audited("ledger_row")]
        assert rows and head not in rows


class TestList:
    def test_before_anything_left_the_list_is_empty(self, site: Hospital) -> None:
        assert listed(site.folder) == []
        assert "0 messages left" in egress(site.folder, "list").stdout

    def test_every_message_is_there_with_all_that_it_said(self, site: Hospital) -> None:
        gate = site.gate()
        envelope = site.task("train", 1)
        sent = [
            site.ask(site.task("enlist", 0), gate),
            site.ask(envelope, gate),
            site.ask(envelope, gate),
            site.ask(site.task(reply_to=ReceivingKey.generate().public), gate),
            site.ask(site.task(plan="0" * 64), gate),
            site.ask(site.task("train", 2), gate),
        ]
        found = listed(site.folder)
        assert [each["digest"] for each in found] == [
            hashlib.sha256(bytes_of(answer)).hexdigest() for answer in sent
        ]
        assert [each["bytes"] for each in found] == [size_of(answer) for answer in sent]
        assert [each["repeated"] for each in found] == [False, False, True, True, False, False]
        assert [each["type"] for each in found] == ["enlist", *["train"] * 3, "refused", "train"]
        assert [each["paid"] for each in found] == [False, True, False, False, False, True]
        plan = site.consortium.plan
        trained = found[1]
        assert (trained["tensors"], trained["tensor_bytes"]) == (
            len(plan.built.tensors),
            plan.built.nbytes,
        )
        assert (trained["noise_multiplier"], trained["rate"], trained["steps"]) == (
            plan.noise.training,
            1.0,
            1,
        )
        assert plan.private and 0 < trained["epsilon"] < plan.private.epsilon
        assert {each["content"] for each in found[1:4]} == {trained["content"]}
        assert found[3]["key"] != found[2]["key"]
        said = peek(site.consortium.read(sent[1], site.own), AnswerHeader, max_bytes=10**8)
        fields = dict(field.partition("=")[::2] for field in trained["fields"])
        assert fields.pop("head") == json.dumps(said.head)
        assert fields == {
            "format": '"fedseg-answer/1"',
            "task": json.dumps(said.task),
            "site": '"hospital_a"',
            "body.kind": '"train"',
            "body.patients": "null",
            "body.steps": "1",
            "body.loss": "null",
            "body.consent": "null",
        }

    def test_words_for_people(self, site: Hospital) -> None:
        gate, envelope = site.gate(), site.task()
        for task in (envelope, envelope, site.task(plan="0" * 64)):
            site.ask(task, gate)
        shown = egress(site.folder, "list").stdout
        assert "train, round 1 train, repeated" in shown and "paid before" in shown
        assert "refused (plan), round 1 train" in shown and "fl.test:443" in shown
        assert re.search(r"tiny: in all epsilon [\d.]+ at delta 1e-05 for each patient", shown)
        number = listed(site.folder)[0]["number"]
        one = egress(site.folder, "show", number).stdout
        assert "body.patients=null" in one and "noise multiplier" in one
        assert json.loads(egress(site.folder, "show", number, "--json").stdout)["number"] == number
        assert len(listed(site.folder, "--last", 1)) == 1
        assert listed(site.folder, "--study", "lung") == []
        with pytest.raises(Exception, match="egress list"):
            egress(site.folder, "show", 1)

    def test_a_list_that_somebody_cut_is_not_shown(self, site: Hospital) -> None:
        site.ask(site.task())
        lines = site.folder.audit.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if b'"event":"egress"' not in line]
        assert len(kept) == len(lines) - 1
        site.folder.audit.write_bytes(b"".join(kept))
        with pytest.raises(Exception, match="tail is missing"):
            egress(site.folder, "list")

    def test_nothing_leaves_where_it_cannot_be_recorded(
        self, site: Hospital, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, path = site.gate(), site.folder.path / "envelope"
        path.write_bytes(site.task())
        ready = gate.prepare(path, 0.0)

        def full(*_: object, **__: object) -> None:
            raise StorageError("the disk is full")

        monkeypatch.setattr("fedseg.chain.Chain.append", full)
        with pytest.raises(StorageError):
            gate.release(ready)


def head_after(site: Hospital, round_: int, before: str | None = None) -> str | None:
    """The head that a round's answer carries, for a task that acknowledges the one before."""
    heads = {site.own.name: before} if before else {}
    plain = site.consortium.plain("train", round_, heads=heads)
    said = site.said(site.ask(site.task(plain=plain)))
    assert said.body.kind == "train"
    return said.head


def spoil(image: Path, how: str) -> None:
    """Make an image unreadable, or its values not finite."""
    import nibabel
    import numpy as np

    if how == "unreadable":
        image.write_bytes(b"no image")
    elif how == "not finite":
        loaded = nibabel.load(image)
        values = np.full(loaded.shape, np.nan, np.float32)
        nibabel.save(nibabel.Nifti1Image(values, loaded.affine), image)
