"""run/progress.json: where a study stands, for whoever looks: `status`, the dashboard, a script.

Its keeper writes it after every event. It tells what can be told and decides nothing: a study goes
on from its checkpoint. It holds no patient, path or key. Times are ISO 8601 in UTC.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from coordinator.progress.tally import OpenStage, SiteProgress, StageProgress
from fedseg.aggregation.rounds import Position
from fedseg.errors import TrustError
from fedseg.frozen import Frozen
from fedseg.plan import StudyPlan

MAX_BYTES = 256_000_000
Phase = Literal["waiting", "running", "paused", "failed", "finished"]


class Checkpoint(Frozen):
    """The stored state that a restart goes on from. `model`: digest of the model in it."""

    at: str
    model: str
    round: int


class Progress(Frozen):
    """The document. `left_s` is an estimate at the time `updated`, None where there is no basis.

    Attributes:
        rounds_closed: rounds all of whose stages are over.
        guarantee: what the plan promises to patients, in one line; empty where an older version
            wrote the document.
        private: whether that is a guarantee at all.
        withheld: which numbers no hospital sends: of `counts`, `losses` and `metrics`.
        note: a sentence about the phase, such as why a study failed.
        suspicions: sites whose updates stand out, and why; see `fedseg.aggregation.suspicions`.
        open: the stage that is running, None between stages and at the end.
    """

    format: Literal["fedseg-progress/1"] = "fedseg-progress/1"
    study: str
    plan: str
    rounds: int
    rounds_closed: int
    minimum_sites: int
    attempts: int
    guarantee: str = ""
    private: bool = False
    withheld: tuple[str, ...] = ()
    started: str
    updated: str
    phase: Phase
    note: str = ""
    open: OpenStage | None = None
    sites: tuple[SiteProgress, ...] = ()
    stages: tuple[StageProgress, ...] = ()
    checkpoint: Checkpoint | None = None
    left_s: float | None = None
    suspicions: dict[str, tuple[str, ...]] = {}

    @property
    def finished(self) -> bool:
        """Is the last stage over?"""
        return self.phase == "finished"

    def site(self, name: str) -> SiteProgress | None:
        """One site by name."""
        return next((site for site in self.sites if site.name == name), None)


def load_progress(path: Path) -> Progress | None:
    """Read the document; None where no study has run yet.

    Raises:
        TrustError: it is no progress document of this version.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TrustError(f"{path.name} is larger than any progress document: remove it")
        return Progress.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"cannot read {path.name}: {error.strerror}") from None
    except ValidationError as error:
        what = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise TrustError(
            f"{path.name} is no progress document of this version ({what}): remove it, "
            "the coordinator writes it again"
        ) from None


def rounds_closed(position: Position | None, plan: StudyPlan) -> int:
    """How many rounds are wholly over when this stage comes next."""
    if position is None or position.stage in ("own", "release"):
        return plan.aggregation.rounds
    return max(0, position.round - 1)
