"""What the benchmarks of training share: arms that are stored when done, and Markdown tables.

An arm is one way to train, run once for each seed. Its result is a JSON file; what was stopped is
gone on with, and what is done is only read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.rounds.events import Event, StageClosed
from fedseg.durable import write_atomically
from fedseg.imaging.cases import Case, Manifest

POINT = 0.01
FOLDS = 5


def numbers(text: str) -> list[int]:
    """1,2,3 of the command line."""
    return [int(part) for part in text.split(",")]


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads A,B,C of the command line, where each is one of those known."""
    allowed = list(known)

    def names(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := sorted(set(wanted) - set(allowed)):
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; known: {', '.join(allowed)}"
            )
        return wanted

    return names


def parser_of(
    description: str | None, out: str, *, seeds: Sequence[int] = (1,)
) -> argparse.ArgumentParser:
    """A parser with what all of them take: --out, --seeds, --json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results") / out, help=f"results/{out}")
    parser.add_argument("--seeds", type=numbers, default=list(seeds), help="seeds, by comma")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    return parser


def stored(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result that lies at a path; it is made and put there where there is none."""
    if not path.exists():
        write_atomically(path, json.dumps(run(), indent=1).encode())
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def every_arm(
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace, str, int], dict[str, Any]],
    dice: Callable[[dict[str, Any]], Any] = lambda result: f"{result['mean_dice']:.4f}",
    name: Callable[[str, int], str] = "{}-seed{}".format,
) -> list[dict[str, Any]]:
    """The results of --only and --seeds under --out, seed by seed; what is missing is run.

    Args:
        dice: what is told of a result.
        name: of the file of an arm and seed, without its ending.
    """
    results = []
    for seed in options.seeds:
        for arm in options.only:
            path = options.out / f"{name(arm, seed)}.json"
            results.append(stored(path, partial(run, options, arm, seed)))
            note(f"{arm} seed {seed}: Dice {dice(results[-1])}")
    return results


def show(
    options: argparse.Namespace,
    results: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Print the table, or with --json the summary and all results."""
    whole = {"summary": summary, "arms": results}
    print(json.dumps(whole, indent=1) if options.json else table(summary))


def rounds_told(arm: str, every: int) -> Callable[[Event], None]:
    """An observer of a study that tells of every so many rounds of training."""

    def tell(event: Event) -> None:
        if not isinstance(event, StageClosed) or event.record.stage != "train":
            return
        if event.record.round % every == 0:
            note(f"  {arm} round {event.record.round}")

    return tell


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def note(text: str) -> None:
    """Progress, on the error stream."""
    print(text, file=sys.stderr, flush=True)


def held_back(manifest: Manifest, fold: int) -> Manifest:
    """Every fifth training patient of a site becomes `val`; the true `val` is left out.

    Args:
        fold: 0 to 4; each training patient is held back in exactly one of them.
    """
    cases: list[Case] = []
    for site in manifest.sites:
        train = manifest.cohort(site).split("train")
        names = list(train.patients)
        np.random.default_rng(1).shuffle(names)
        mine = set(names[fold::FOLDS])
        cases += [
            replace(case, split="val" if case.patient in mine else "train") for case in train.cases
        ]
    return replace(manifest, cases=tuple(cases))
