"""One real federation for every test that attacks one, started once in a process of pytest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from besieged import Besieged


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    """The federation, paused after its first round of training."""
    from besieged import besiege

    from coordinator.running.proxy import ProxyError, find_nginx

    try:
        find_nginx()
    except ProxyError as error:
        pytest.skip(str(error))
    yield from besiege(tmp_path_factory.mktemp("fed"))
