"""One real federation for every test that attacks one, started once in a process of pytest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from besieged import Besieged, besiege


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    """The federation, paused after its first round of training."""
    yield from besiege(tmp_path_factory.mktemp("fed"))
