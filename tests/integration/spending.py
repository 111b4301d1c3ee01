"""A process that spends from a ledger until it is stopped or the budget is; for the tests.

    python spending.py FOLDER NAME TASKS

Reserves TASKS tasks named NAME-0, NAME-1, ..., "trains", seals an answer of random bytes to a file
of the task's name, commits its digest, then "sends" it: appends it to FOLDER/sent-NAME. What was
answered before is sent again as it is stored. It begins once FOLDER/go is there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path

from small_ledgers import LIMITS, STEP, digest, reopened

from fedseg.errors import PrivacyError


def main(folder: Path, name: str, tasks: int) -> None:
    """Work through all tasks; print how many were paid for."""
    ledger = reopened(folder)
    print("ready", flush=True)
    while not (folder / "go").exists():
        time.sleep(0.005)
    paid = 0
    for number in range(tasks):
        task = f"{name}-{number}"
        try:
            found = ledger.reserve(digest(task), "liver", "train", STEP, LIMITS)
        except PrivacyError:
            continue
        paid += 1
        place = folder / f"answer-{task}"
        if found.answer is None:
            draft = place.with_suffix(".draft")
            draft.write_bytes(os.urandom(32))
            draft.replace(place)
            ledger.commit(digest(task), hashlib.sha256(place.read_bytes()).hexdigest())
        with (folder / f"sent-{name}").open("a") as log:
            log.write(f"{task} {place.read_bytes().hex()}\n")
    print(paid, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
