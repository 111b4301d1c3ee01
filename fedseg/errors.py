"""What can go wrong, by who must act.

A message says what was expected, what came and what to do. It never holds a patient identifier,
a path of patient data, a header or a voxel: errors travel further than data may.
"""

from __future__ import annotations


def printable(untrusted: object) -> str:
    """Text of somebody else's choice, cut and in printable ASCII, so that any log can hold it."""
    return ascii(str(untrusted))[1:-1][:80]


class FedsegError(Exception):
    """Base of every error that a user of fedseg is meant to read."""


class PlanError(FedsegError):
    """The study plan is wrong or does not fit: its author must change it."""


class DataError(FedsegError):
    """A cohort, image, label or manifest is not usable: the site must mend its data."""


class TrustError(FedsegError):
    """A message, model or file is not what it claims to be: nobody should go on with it."""


class PrivacyError(FedsegError):
    """A guarantee or a policy would be broken: the work is refused."""


class RoundError(FedsegError):
    """A round cannot be finished: too few sites, an answer that does not fit, a full disk."""


class UntaughtLabelError(RoundError):
    """No hospital that takes part annotates some of the plan's labels: nobody could teach them.

    Attributes:
        labels: their names, in the plan's order.
    """

    def __init__(self, labels: tuple[str, ...], annotated: dict[str, tuple[str, ...]]) -> None:
        said = "; ".join(f"{site}: {', '.join(own)}" for site, own in sorted(annotated.items()))
        super().__init__(
            f"no hospital that enlisted annotates {', '.join(labels)} ({said}): a hospital may "
            "come late only where others annotate what it does. Nothing was trained: have one that "
            "does on line, with the plan approved, and start the study again; or take the label "
            "out of the plan"
        )
        self.labels = labels


class StorageError(RoundError):
    """A file could not be written; the one before it is untouched."""


class NotFiniteError(RoundError):
    """Training gave NaN or infinity."""


class MissingExtraError(FedsegError):
    """A part of fedseg was asked for whose packages are not installed."""

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(
            f"this command needs the package {module!r}, which is not installed; "
            f"install it with: pip install 'fedseg[{extra}]'"
        )
