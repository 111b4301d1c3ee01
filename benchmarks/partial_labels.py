"""Five hospitals of which none annotates every label, against the same five annotating all.

Needs Task04 of the Medical Segmentation Decathlon as NIfTI with a table (subject, site, split,
patient), or another folder of that task. Arms, with equal seeds, patients, steps and starts:

- `all`: every hospital annotates every label;
- `partial`: hospital i does not annotate label i, i + 5, ... (counted around), and says so;
- `background`: the same labels are missing, and nobody says so: they are taught as background.

Every arm is measured on all labels at all hospitals, with the whole truth, on each image's own
grid; missing labels are missing in training alone. A person's Dice is averaged over its images.
Each arm of every seed is stored when it is done, and resumed by stages when it was stopped.

    python benchmarks/partial_labels.py --data DIR --seeds 1
    python benchmarks/partial_labels.py --data DIR --only all,partial --rounds 50 --json
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from arms import POINT, every_arm, markdown, names_of, note, parser_of, show

from coordinator.rounds.events import Event, StageClosed
from fedseg.evaluation.statistics import paired_difference
from fedseg.imaging.cases import Cohort
from fedseg.imaging.manifests import read_manifest
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan, parse_plan
from fedseg.planfile import example
from fedseg.simulation.federation import Federation
from fedseg.simulation.partial import withheld
from fedseg.simulation.running import run_federation
from fedseg.simulation.scoring import Scorer, released
from fedseg.task import Task

ARMS = ("all", "partial", "background")
AIM_POINTS = -2.0


def main() -> None:
    """Run the wanted arms and print the table."""
    options = _options()
    results = every_arm(options, run, dice=lambda result: result["dice"])
    show(options, results, summarise(results), table)


def _options() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "partial_labels")
    parser.add_argument("--data", type=Path, required=True, help="folder with images, labels, CSV")
    parser.add_argument("--table", default="sites.csv", help="which CSV (sites.csv)")
    parser.add_argument("--only", type=names_of(ARMS), default=list(ARMS), help="arms, by comma")
    parser.add_argument("--rounds", type=int, default=25, help="25")
    parser.add_argument("--steps", type=int, default=20, help="of each hospital in a round (20)")
    return parser.parse_args()


def run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, and measure it on everything that is drawn."""
    plan = plan_of(options, seed)
    record, tensors = initial_model(plan)
    plan = plan.model_copy(update={"initial": record})
    manifest = read_manifest(options.data, plan.task, table=options.table)
    whole = tuple(manifest.cohort(site) for site in manifest.sites)
    lost = missing(plan.task, manifest.sites)
    study = Federation(
        plan=plan,
        initial=tensors,
        cohorts=cohorts_of(arm, whole, plan.task, lost),
        folder=options.out / f"{arm}-seed{seed}",
        cache=options.out / "cache",
    )

    def tell(event: Event) -> None:
        if isinstance(event, StageClosed) and event.record.stage == "train":
            loss = statistics.fmean(a.loss or 0 for a in event.record.answers)
            note(f"  {arm} seed {seed} round {event.record.round} loss {loss:.4f}")

    finished = run_federation(study, resume=True, observe=tell)
    scorer = Scorer(replace(study, cohorts=whole), "val")
    model = released(finished.state, plan)
    patients = [score for cohort in whole for score in scorer(model, cohort.site)]
    return {
        "arm": arm,
        "seed": seed,
        "rounds": options.rounds,
        "steps": options.rounds * options.steps * len(whole),
        "cpu_s": finished.cpu_s,
        "missing": [f"{site}:{label}" for site, label in lost] if arm != "all" else [],
        "dice": {
            name: statistics.fmean(v for p in patients if (v := p.dice[name]) is not None)
            for name in plan.task.labels
        },
        "patients": [
            p.model_dump(mode="json", include={"site", "patient", "dice"}) for p in patients
        ],
    }


def plan_of(options: argparse.Namespace, seed: int) -> StudyPlan:
    """The example plan, shortened; measured once, at the end."""
    plan = parse_plan(example("mr-3d").encode())
    schedule = plan.training.schedule
    warmup = min(schedule.warmup_rounds, options.rounds - 1)
    schedule = schedule.model_copy(update={"warmup_rounds": warmup})
    changed = {
        "training": plan.training.model_copy(
            update={"seed": seed, "steps_per_round": options.steps, "schedule": schedule}
        ),
        "aggregation": plan.aggregation.model_copy(update={"rounds": options.rounds}),
        "evaluation": plan.evaluation.model_copy(update={"every_rounds": options.rounds}),
    }
    return StudyPlan.model_validate(plan.model_copy(update=changed).model_dump(mode="json"))


def missing(task: Task, sites: tuple[str, ...]) -> list[tuple[str, str]]:
    """(site, label): one label a hospital, counted around; no hospital has all of them."""
    labels = list(task.labels)
    return [(site, labels[i % len(labels)]) for i, site in enumerate(sites)]


def cohorts_of(
    arm: str, whole: tuple[Cohort, ...], task: Task, lost: list[tuple[str, str]]
) -> tuple[Cohort, ...]:
    """What the hospitals train on in an arm."""
    if arm == "all":
        return whole
    if arm == "partial":
        return withheld(whole, task, lost)
    gone = dict(lost)
    return tuple(_as_background(cohort, gone[cohort.site], task) for cohort in whole)


def _as_background(cohort: Cohort, label: str, task: Task) -> Cohort:
    """A cohort in which one label is background, and nothing says that it is not annotated."""
    pairs = dict(cohort.label_map) or {value: value for value in task.labels.values()}
    gone = task.labels[label]
    mapped = {value: 0 if study == gone else study for value, study in pairs.items()}
    return replace(cohort, label_map=tuple(sorted(mapped.items())))


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Per arm and label: Dice, and the difference to `all` in points, paired over patients."""
    best = {r["seed"]: r for r in results if r["arm"] == "all"}
    summary: dict[str, Any] = {}
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        rows = {}
        for label in runs[0]["dice"]:
            row: dict[str, Any] = {"dice": statistics.fmean(r["dice"][label] for r in runs)}
            if arm != "all" and all(r["seed"] in best for r in runs):
                own = _by_patient(runs, label)
                ref = _by_patient([best[r["seed"]] for r in runs], label)
                names = sorted(own.keys() & ref.keys())
                difference = paired_difference([own[n] for n in names], [ref[n] for n in names])
                row["points"], row["low"], row["high"] = (
                    None if value is None else value / POINT for value in difference
                )
                row["reached"] = row["points"] >= AIM_POINTS
            rows[label] = row
        summary[arm] = {
            "labels": rows,
            "seeds": [r["seed"] for r in runs],
            "steps": runs[0]["steps"],
            "cpu_s": statistics.fmean(r["cpu_s"] for r in runs),
        }
    return summary


def _by_patient(runs: list[dict[str, Any]], label: str) -> dict[str, float]:
    """Each patient's Dice of one label, mean over seeds."""
    found: dict[str, list[float]] = {}
    for result in runs:
        for patient in result["patients"]:
            if (dice := patient["dice"][label]) is not None:
                found.setdefault(f"{patient['site']} {patient['patient']}", []).append(dice)
    return {name: statistics.fmean(values) for name, values in found.items()}


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    head = ("arm", "label", "Dice", "to all, points (95 %)", "steps", "CPU s")
    rows = []
    for arm, row in summary.items():
        for label, own in row["labels"].items():
            points = "-"
            if "points" in own:
                points = f"{own['points']:+.2f}"
                if own["low"] is not None:
                    points += f" ({own['low']:+.2f} to {own['high']:+.2f})"
            spent = (str(row["steps"]), f"{row['cpu_s']:.0f}")
            rows.append((arm, label, f"{own['dice']:.4f}", points, *spent))
    return markdown(head, rows)


if __name__ == "__main__":
    main()
