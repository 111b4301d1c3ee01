"""A site's own record of what it did, one JSON object a line. It stays at the site."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Appends entries; a line that a crash cut short is passed over by `read`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **facts: Any) -> None:
        """Append one entry. Facts name no patient."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, **facts}, sort_keys=True) + "\n"
        with self._path.open("ab+") as stream:
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else "\n" + line
            stream.write(line.encode())

    def read(self, event: str) -> list[dict[str, Any]]:
        """Every whole entry of one kind, oldest first."""
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("event") == event:
                found.append(entry)
        return found
