"""What one check found: well, not quite well, or broken; and then what to do.

A verdict is read by people who did not write fedseg and is pasted into tickets: it names no
patient, no case and no path of data. Text that came from outside (a certificate's issuer) is
spelled in plain characters and cut short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Condition = Literal["ok", "warning", "fail"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    Attributes:
        subject: what was looked at, in a few words.
        condition: only `fail` stops a study; a warning will, or may.
        says: what was found.
        remedy: what to do; empty where all is well.
    """

    subject: str
    condition: Condition
    says: str
    remedy: str = ""


def well(subject: str, says: str) -> Verdict:
    """Nothing to do."""
    return Verdict(subject, "ok", says)


def warn(subject: str, says: str, remedy: str) -> Verdict:
    """A study runs, but somebody should act."""
    return Verdict(subject, "warning", says, remedy)


def fail(subject: str, says: str, remedy: str) -> Verdict:
    """No study runs before somebody acts."""
    return Verdict(subject, "fail", says, remedy)


def plain(text: str, longest: int = 80) -> str:
    """Text from outside, harmless on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)[:longest]
