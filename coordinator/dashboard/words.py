"""A study's state in the words of people: sentences, codes, amounts.

A reader of the page may be a physician, a study nurse or hospital IT; none of them knows a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from coordinator.progress.document import Progress
from coordinator.progress.tally import OpenStage, SiteProgress

WITHHELD = "withheld"
STAGES = {
    "enlist": "Signing in",
    "train": "Training",
    "evaluate": "Measuring",
    "own": "Own models",
    "release": "Release",
}
_DOING = {
    "train": "hospitals are training",
    "evaluate": "hospitals are measuring the model",
}
# What happened, and who should do what.
CODES = {
    "offline": ("Was not on line", "Its IT should look at `fedseg-site status`."),
    "unavailable": ("Lost the connection while working", "It is asked again when it is back."),
    "timeout": ("Did not answer in time", "Is the machine busy or asleep?"),
    "expired": ("Did not answer in time", "Is the machine busy or asleep?"),
    "crashed": ("Its relay ended while working", "The hospital's relay log has the cause."),
    "failed": ("Could not finish its work", "The hospital's audit log has the reason."),
    "data": ("Its data could not be used", "`fedseg-site check` names the cases."),
    "plan": ("Has not approved this plan", "`fedseg-site plan show`, then approve or refuse."),
    "roster": ("Has not approved the new list of hospitals", "`fedseg-site plan approve` again."),
    "task": ("Did not accept the task", "The hospital's audit log has the reason."),
    "not_finite": ("Training gave numbers without a value", "Is the learning rate too high?"),
    "lost": ("Its own model is not kept any more", "The study goes on without measuring it."),
    "joined": ("Let its own model go before others joined", "The study goes on without it."),
    "overflow": ("Its update is too large to be added up", "Is the learning rate too high?"),
    "malformed": ("Sent something that is no answer", "Do both sides run the same version?"),
    "stale": ("Answered an earlier task", "It is left out; nothing is counted twice."),
    "site": ("Is not who it says it is", "Was it revoked, or do two machines share its keys?"),
    "stage": ("Answered another question", "Do both sides run the same version?"),
    "signature": ("Its signature does not hold", "Nothing of it was counted. Whose machine is it?"),
}


def code_words(code: str) -> tuple[str, str]:
    """What a failure's code means, and what to do; an unknown code speaks for itself."""
    return CODES.get(code, (code.replace("_", " ").capitalize(), ""))


def headline(progress: Progress) -> str:
    """Where the study stands, in one line."""
    total = progress.rounds
    if progress.phase == "finished":
        return "The study is finished"
    if progress.phase == "failed":
        return f"The study stopped after {progress.rounds_closed} of {total} rounds"
    if progress.phase == "paused":
        return f"Paused after {progress.rounds_closed} of {total} rounds"
    if progress.open is None:
        return "Waiting for the hospitals" if not progress.stages else "Between two stages"
    return stage_line(progress.open, total)


def stage_line(stage: OpenStage, total: int) -> str:
    """What the hospitals are doing."""
    if stage.stage == "enlist":
        return "Hospitals are signing in"
    if stage.stage == "release":
        return "The final model is on its way to the hospitals"
    if stage.owner is not None:
        return f"Hospitals are measuring {stage.owner}’s own model"
    return f"Round {stage.round} of {total}: {_DOING.get(stage.stage, stage.stage)}"


def answered_line(stage: OpenStage) -> str:
    """Who has answered and who is waited for."""
    done = len(stage.answered)
    total = max(stage.nodes, done + len(stage.waiting_for) + len(stage.failures))
    said = f"{done} of {count(total, 'hospital')} {'has' if total == 1 else 'have'} answered."
    if stage.waiting_for:
        said += f" Waiting for {listed(stage.waiting_for)}."
    return said


def listed(names: Sequence[str], most: int = 4) -> str:
    """`a`, `a and b`, `a, b and 5 others`."""
    shown = list(names[:most]) if len(names) <= most else [*names[: most - 1]]
    rest = len(names) - len(shown)
    if rest:
        return f"{', '.join(shown)} and {rest} others"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def count(amount: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def patients(site: SiteProgress, progress: Progress) -> str:
    """How many patients a hospital trains with; one that answered and did not tell withholds it."""
    if site.patients is not None:
        return f"{site.patients}"
    return WITHHELD if "counts" in progress.withheld or site.answers else "–"


def labels(site: SiteProgress) -> str:
    """Which of the study's labels a hospital annotates, as it said when it enlisted."""
    if site.labels is not None:
        return ", ".join(site.labels)
    return "all" if site.answers else "–"


def dice(site: SiteProgress, progress: Progress) -> str:
    """A hospital's newest Dice; one that measured and did not tell withholds it."""
    if site.dice:
        return number(site.dice[-1].value)
    measured = any(s.stage == "evaluate" and site.name in s.answered for s in progress.stages)
    return WITHHELD if "metrics" in progress.withheld or measured else "–"


def mean(value: float | None, kind: str, progress: Progress) -> str:
    """A mean over hospitals, of `losses` or `metrics`."""
    return WITHHELD if value is None and kind in progress.withheld else number(value)


def amount(size: int) -> str:
    """Bytes as people read them: 950 B, 1.2 MB."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as people read them: 0.4 s, 12 s, 3 min, 2 h 5 min, 4 d 2 h."""
    if seconds is None:
        return "–"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def moment(iso: str | None) -> str:
    """A time as it stands on the page when no script runs: 3 Mar 14:05:09 UTC."""
    if iso is None:
        return "–"
    time = datetime.fromisoformat(iso)
    return f"{time.day} {time:%b %H:%M:%S} UTC"


def spans(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as `1–3, 7`."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and parts[-1][-1] == n - 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ", ".join("–".join(str(end) for end in dict.fromkeys(part)) for part in parts)
