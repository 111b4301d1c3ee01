"""The numbers of a validation on a narrow terminal: names and intervals wrap, nothing is cut."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console
from validation_results import make_validation

from sites.commands.validation import _numbers

LONG = "finetuned (lung-finetuned-norms-2026-05-03-second-try)"


def printed(names: tuple[str, ...], width: int) -> str:
    """The table as a terminal of this width has it."""
    result = make_validation(names=("finetuned", "global", "local"))
    summaries = tuple(
        each.model_copy(update={"candidate": name})
        for each, name in zip(result.summaries, names, strict=True)
    )
    text = io.StringIO()
    console = Console(file=text, width=width, soft_wrap=True)
    console.print(_numbers(result.model_copy(update={"summaries": summaries})), soft_wrap=False)
    return text.getvalue()


def letters(text: str) -> Counter[str]:
    """Every character but white space and rules."""
    return Counter(text) - Counter(dict.fromkeys(" \n\u2500", 10**9))


@pytest.mark.parametrize("width", [50, 80, 120])
def test_nothing_is_cut(width: int) -> None:
    names = (LONG, "global", "local [not a tag]")
    text = printed(names, width)
    assert max(map(len, text.splitlines())) <= width
    assert letters(text) == letters(printed(names, 400))
    assert LONG in printed(names, 400) and "local [not a tag]" in printed(names, 400)


def test_three_models_with_short_names_need_no_more_than_80_columns() -> None:
    lines = printed(("finetuned", "global", "local"), 80).splitlines()
    assert lines[0].split() == ["finetuned", "global", "local"]
    assert [line.split()[0] for line in lines[2:] if line[0] != " "] == [
        *("patients", "Dice", "worst", "HD95", "NSD", "failed", "ECE")
    ]
