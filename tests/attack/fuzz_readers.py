"""Every reader of bytes that come from elsewhere, and genuine documents that it opens."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_parties import LATER, STUDY, Party, answer_envelope, task_envelope
from small_plans import answer, body_of, built_plan, tiny_model
from small_sites import Consortium, member
from small_studies import founded

from coordinator.folder import load_settings
from coordinator.progress.document import load_progress
from coordinator.progress.keeper import ProgressKeeper
from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.rounds import first_state
from fedseg.arrays import digest_of
from fedseg.chain import Chain, verify_chain
from fedseg.modelfile import load_model
from fedseg.plan import parse_plan
from fedseg.security.certificates import expiry
from fedseg.security.envelope import open_bytes, read_header
from fedseg.security.identity import make_request, open_bundle, open_request, open_roll, sign_roll
from fedseg.security.keys import SealingKey, VerifyKey
from fedseg.updates import TaskHeader, open_answer, open_task, seal_task, task_digest
from sites.folder import Link
from sites.notes import read_note
from sites.policy import TEMPLATE, load_policy


@dataclass(frozen=True)
class Reader:
    """Something that reads bytes from elsewhere.

    Attributes:
        genuine: documents that it opens.
        trusted: whatever it opens must be one of the genuine ones: a signature or a digest says so.
        prefix: what follows a genuine document is not looked at.
        slow: it reads what people write, and a tenth of the inputs is enough.
    """

    opens: Callable[[bytes], Any]
    genuine: Sequence[bytes]
    trusted: bool = True
    slow: bool = False
    prefix: bool = False


def all_readers(folder: Path) -> dict[str, Reader]:
    """By name; what is a file in reality is read from one below the folder."""
    return {**_messages(), **_documents(folder), **_files(folder)}


def _messages() -> dict[str, Reader]:
    """Envelopes, and the tasks and answers inside."""
    site, coordinator, plan = Party("hospital_a"), Party("coordinator"), built_plan()
    task_header = TaskHeader(
        study=plan.study, plan=plan.digest, round=1, stage="train", attempt=1,
        model=digest_of(tiny_model()),
    )  # fmt: skip
    train = seal_task(task_header, tiny_model())
    enlist = seal_task(
        task_header.model_copy(update={"stage": "enlist", "round": 0, "model": None})
    )
    about = task_digest(train)
    delta = answer(about, "hospital_a", body_of("train"), tiny_model(1))
    tasks = [task_envelope(plain, coordinator, site) for plain in (train, enlist)]
    answers = [answer_envelope(delta, site, coordinator)]

    def opens_task(data: bytes) -> Any:
        expected = {"kind": "task", "study": STUDY, "signer": coordinator.signing.public}
        return open_bytes(
            data, recipient="hospital_a", key=site.receiving, max_bytes=10**6, **expected
        )

    def opens_answer(data: bytes) -> Any:
        expected = {"kind": "answer", "study": STUDY, "signer": site.signing.public}
        return open_bytes(
            data, recipient="coordinator", key=coordinator.receiving, max_bytes=10**6, **expected
        )

    def opens_delta(data: bytes) -> Any:
        return open_answer(data, plan, task=about, stage="train", site="hospital_a")

    return {
        "envelope of a task": Reader(opens_task, tasks),
        "envelope of an answer": Reader(opens_answer, answers),
        "unverified header": Reader(
            lambda data: read_header(io.BytesIO(data), max_bytes=10**6),
            tasks + answers,
            False,
            prefix=True,
        ),
        "task": Reader(lambda data: open_task(data, plan), [train, enlist], False),
        "answer": Reader(opens_delta, [delta], False),
        "sealing key": Reader(
            lambda data: SealingKey.from_text(data.decode("latin-1")),
            [site.identity.sealing.encode()],
            False,
        ),
        "verify key": Reader(
            lambda data: VerifyKey.from_text(data.decode("latin-1")),
            [site.identity.signing.encode()],
            False,
        ),
    }


def _documents(folder: Path) -> dict[str, Reader]:
    """What consortium and hospitals send each other as files."""
    consortium, hospital = Consortium(), member(folder)
    roll = consortium.roll(hospital.identity, Party("hospital_b"), valid_until=LATER)
    signed = sign_roll(roll, consortium.key).canonical_bytes
    bundle = consortium.bundle(folder / "bundle.json", roll)
    asked = make_request(hospital.identity, hospital.key, "2026-05-03T12:00:00+00:00")
    brought = bundle.read_bytes()

    def opens_bundle(data: bytes) -> Any:
        found = open_bundle(data, hospital.identity)
        assert found.study_key == consortium.key.public.text  # or its fingerprint would show
        return found

    return {
        "request": Reader(open_request, [asked]),
        "roll": Reader(lambda data: open_roll(data, consortium.key.public, STUDY), [signed]),
        "bundle": Reader(opens_bundle, [brought]),
        "plan": Reader(parse_plan, [consortium.plan.canonical_bytes], False, True),
        "certificate": Reader(expiry, [json.loads(brought)["ca"].encode()], False, prefix=True),
    }


def _files(folder: Path) -> dict[str, Reader]:
    """What lies in the folders of both sides, and may come back from a backup or be edited."""
    study, key = founded(folder / "study")
    plan = built_plan()
    save_state(study.checkpoint, plan, first_state(plan, load_model(study.initial)[1]))
    ProgressKeeper(
        study.progress, plan, first_state(plan, tiny_model()), sites=("hospital_a",)
    ).say("running")
    link = Link(study="tiny", address="a.example:443", trainer="unix:run/trainer.sock", port=20000)
    log = folder / "chain" / "audit.jsonl"
    chain = Chain(log, key, lambda: "2026-05-03T12:00:00+00:00")
    for number in range(4):
        chain.append("refused", code="task", round=number)

    def from_file(name: str, reads: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        path = folder / name

        def opens(data: bytes) -> Any:
            path.write_bytes(data)
            return reads(path)

        return opens

    def verified(data: bytes) -> Any:
        log.write_bytes(data)
        return verify_chain(log, key.public)

    def head_verified(data: bytes) -> Any:
        log.write_bytes(lines)
        log.with_suffix(".head").write_bytes(data)
        try:
            return verify_chain(log, key.public)
        finally:
            log.with_suffix(".head").write_bytes(head)

    lines, head = log.read_bytes(), log.with_suffix(".head").read_bytes()
    return {
        "audit": Reader(verified, [lines]),
        "audit head": Reader(head_verified, [head]),
        "link": Reader(
            from_file("link.json", lambda path: read_note(path, Link)),
            [link.model_dump_json(indent=1).encode()],
            False,
        ),
        "policy": Reader(from_file("policy.yaml", load_policy), [TEMPLATE.encode()], False, True),
        "settings": Reader(
            from_file("study.json", load_settings), [study.settings_file.read_bytes()], False
        ),
        "progress": Reader(
            from_file("progress.json", load_progress), [study.progress.read_bytes()], False
        ),
        "model": Reader(
            from_file("model.safetensors", load_model), [study.initial.read_bytes()], False
        ),
        "checkpoint": Reader(
            from_file("checkpoint.safetensors", lambda path: load_state(path, plan)),
            [study.checkpoint.read_bytes()],
            False,
        ),
    }
