"""One private site with a ledger, a tiny network and phantom patients; and a child to kill.

The child works through a study's tasks as a coordinator asks for them: each task twice, so that a
repeated one is among them. What leaves is written to a file outside the site before the next task.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from small_ledgers import KEY, SECRET, now

from fedseg.arrays import Arrays, digest_of
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from fedseg.privacy.ledger import AuditWitness, Ledger, Limits
from fedseg.privacy.ledger.entries import Registered
from fedseg.privacy.schedule import allowed
from fedseg.updates import TaskHeader, seal_task
from sites.spending import Account
from sites.trainer import Trainer

LIMITS = Limits(study_epsilon=1e4, study_delta=0.1, total_epsilon=1e5, total_delta=0.1)
Task = tuple[str, bytes]


def ledger_of(folder: Path) -> Ledger:
    """The site's ledger, made where there is none."""
    witness = AuditWitness(folder / "audit.jsonl", KEY, now)
    path = folder / "ledger.sqlite"
    if witness.seen():
        return Ledger.open(path, SECRET, witness, now)
    return Ledger.create(path, SECRET, witness, now, LIMITS)


def register(ledger: Ledger, plan: StudyPlan, cohort: Cohort) -> None:
    """Put a study into the ledger."""
    train, val = (
        tuple(ledger.key_of(p) for p in cohort.split(use).patients) for use in ("train", "val")
    )
    event = Registered(
        study=plan.study, plan=plan.digest, train=train, val=val, schedule=allowed(plan)
    )
    ledger.register(event, LIMITS, epsilon=LIMITS.study_epsilon, delta=LIMITS.study_delta)


def account_of(ledger: Ledger, plan: StudyPlan, folder: Path) -> Account:
    """What the trainer draws on."""
    return Account(ledger, plan, folder / "answers", lambda: LIMITS)


def trainer_of(
    folder: Path, plan: StudyPlan, cohort: Cohort, account: Account | None, **options: Any
) -> Trainer:
    """The site's trainer; prepared cases lie beside the site."""
    cache = CaseCache(folder.parent / "cache", plan.task)
    return Trainer(
        plan, cohort, cache, folder, models=folder / "models", account=account, **options
    )


def task(plan: StudyPlan, stage: str, round_: int, model: Arrays, **more: Any) -> bytes:
    """A task as a coordinator sends it."""
    header = TaskHeader.model_validate(
        {"study": plan.study, "plan": plan.digest, "round": round_, "stage": stage, "attempt": 1,
         "model": digest_of(model)} | more
    )  # fmt: skip
    return seal_task(header, model)


def tasks_of(plan: StudyPlan) -> list[Task]:
    """All the tasks of a study; models do not follow the answers, which the site cannot tell."""
    start = initial_model(plan)[1]
    found = []
    for round_ in range(1, plan.aggregation.rounds + 1):
        shift = np.float32(round_ / 100)
        model = {name: np.add(array, shift, dtype=np.float32) for name, array in start.items()}
        found += [(f"{round_} {s}", task(plan, s, round_, model)) for s in ("train", "evaluate")]
    return [*found, (f"{round_} release", task(plan, "release", round_, start))]


def spend(folder: Path, make: Callable[[], Trainer], tasks: list[Task]) -> None:
    """Answer the tasks that were not sent twice yet; `sent` is the network."""
    sent = folder.parent / "sent"
    trainer = make()
    told = sent.read_text().splitlines() if sent.exists() else []
    for name, data in tasks:
        times = sum(line.startswith(f"{name}:") for line in told)
        for _ in range(times, 2):
            answer = hashlib.sha256(_content(trainer.handle(data))).hexdigest()
            with sent.open("a") as file:
                file.write(f"{name}:{answer}\n")


def _content(answer: bytes) -> bytes:
    """An answer's body and delta; the ledger's head in it moves on."""
    from fedseg.container import pack, unpack
    from fedseg.updates import AnswerHeader

    header, delta = unpack(answer, AnswerHeader, max_bytes=len(answer), schema=None)
    assert header.body.kind != "refused", header.body
    return pack(header.body, delta)


PHASES = {
    "debit and commit": ("ledger/store.py", "ledger/witness.py", "fedseg/chain.py"),
    "train": ("learning/private.py", "evaluation/private.py", "sites/trainer.py"),
    "store": ("sites/spending.py", "sites/state.py", "sites/journal.py", "fedseg/durable.py"),
    "leave": ("private_sites.py",),
}
_PASSED_OVER = {"verify_chain", "_of", "_one", "_usable", "_content", "trace", "_die_before"}


def killed_child(
    folder: Path,
    make: Callable[[], Trainer],
    tasks: list[Task],
    phase: str | None,
    point: float,
) -> bool:
    """Run `spend` in a child that is killed; whether it was, or came to its end first.

    Args:
        phase: which code it dies in, before its point-th line; None to die after so many seconds.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if phase is not None:
                _die_before(int(point), PHASES[phase])
            spend(folder, make, tasks)
            status = 0
        except BaseException:
            sys.settrace(None)
            (folder.parent / "error").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    if phase is None:
        time.sleep(point)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, (folder.parent / "error").read_text()
    return False


def _die_before(point: int, files: tuple[str, ...]) -> None:
    """Kill this process before the point-th line that it runs of these files."""
    left = [point]

    def trace(frame: Any, event: str, _: object) -> Any:
        code = frame.f_code
        if not code.co_filename.endswith(files) or code.co_name in _PASSED_OVER:
            return None
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
