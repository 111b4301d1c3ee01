"""Federated learning of medical image segmentation across hospitals.

Nothing heavy is imported here. `fedseg.simulate` and `fedseg.StudyPlan` are found on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {"simulate": "fedseg.simulation", "StudyPlan": "fedseg.plan", "load_plan": "fedseg.plan"}
__all__ = ["StudyPlan", "__version__", "load_plan", "simulate"]


def __getattr__(name: str) -> Any:
    """Import a public name from its home module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedseg' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
