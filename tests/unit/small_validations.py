"""Patients under a candidate as a validation has them, made of a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedseg.evaluation.observations import Failure, LabelScores, PatientValidation

EMPTY = Failure(label="head", kind="empty", reason="no head was predicted")


def patient(name: str, dice: float | None, candidate: str = "global", **changes: Any):  # type: ignore[no-untyped-def]
    """One patient with one label, 10 ml in truth."""
    label = {"dice": dice, "hd95_mm": 2.0, "nsd": 0.9, "volume_ml": 10.0, "predicted_ml": 11.0}
    scores = LabelScores.model_validate(label | changes.pop("label", {}))
    fields: dict[str, Any] = {
        "candidate": candidate,
        "patient": name,
        "cases": 1,
        "labels": {"head": scores},
        "dice": scores.dice,
        "hd95_mm": scores.hd95_mm,
        "nsd": scores.nsd,
        "calibration_error": 0.1,
        "seconds": 0.5,
    }
    return PatientValidation.model_validate(fields | changes)


def patients(candidate: str, dice: Sequence[float | None], **changes: Any) -> list[Any]:
    """Patients P0, P1, ... with these Dice."""
    return [patient(f"P{i}", d, candidate, **changes) for i, d in enumerate(dice)]
