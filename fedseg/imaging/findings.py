"""What is wrong with one case, said so that a hospital can mend it.

A finding names the case and is shown inside the hospital only. The reader of a single case knows
no names: it raises `CaseError`, whose text may travel, and `quality` adds the case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedseg.errors import DataError

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One problem of one case, or of the whole folder where `case` is "".

    Attributes:
        case: the case's name; "" where the finding is about the cohort.
        severity: an error keeps the case out of training; a warning asks for a look.
        code: a short stable word, for example "label-missing".
        problem: what is wrong, with the numbers that show it.
        remedy: what to do about it.
    """

    case: str
    severity: Severity
    code: str
    problem: str
    remedy: str


class CaseError(DataError):
    """A case cannot be used. The message holds neither a name nor a path.

    Attributes:
        code: the code of the finding that this becomes.
        problem: what is wrong.
        remedy: what to do.
    """

    def __init__(self, code: str, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.code = code
        self.problem = problem
        self.remedy = remedy

    def of(self, case: str) -> Finding:
        """The finding for a case of this name."""
        return Finding(case, "error", self.code, self.problem, self.remedy)
