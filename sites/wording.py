"""Numbers in the words of a plan that is explained: how often, how large, how long."""

from __future__ import annotations


def listed(names: list[str]) -> str:
    """Words in a row."""
    shown = names[:12]
    if len(names) > len(shown):
        return f"{', '.join(shown)} and {len(names) - len(shown)} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def times(numbers: tuple[float, ...]) -> str:
    """Numbers with a cross between."""
    return " x ".join(f"{n:g}" for n in numbers)


def times_said(number: int) -> str:
    """How often."""
    return "Once" if number == 1 else f"{number} times"


def size(size: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, factor in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.0f} seconds"
