"""Fixtures of the tests of single modules."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_ledgers import created, registered, study

from fedseg.privacy.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """With one study, nothing spent."""
    found = created(tmp_path)
    registered(found, study())
    return found
