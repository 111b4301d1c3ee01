"""Five hospitals on real hippocampus MR: pooled, local-only, FedAvg and FedProx.

Needs Task04 of the Medical Segmentation Decathlon as NIfTI with a table (subject, site, split,
patient). Settings were chosen with --inner, on an inner split of the training patients; `val` is
for the final figures. Every arm of every seed is stored when it is done and resumed when it was
stopped.

    python benchmarks/hippocampus.py --data DIR --seeds 1,2,3
    python benchmarks/hippocampus.py --data DIR --seeds 1 --only pooled,fedavg --inner
    python benchmarks/hippocampus.py --data DIR --json

Compute is CPU seconds of training (thread time at the sites), evaluation not counted.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arms import POINT, every_arm, held_back, markdown, names_of, note, parser_of, show

from coordinator.rounds.events import Event, StageClosed
from fedseg.imaging.manifests import read_manifest
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan, parse_plan
from fedseg.planfile import example
from fedseg.result import StageRecord, weighted_mean
from fedseg.simulation.baselines import alone, pooled
from fedseg.simulation.federation import Federation
from fedseg.simulation.running import Finished, run_federation
from fedseg.simulation.scoring import Scorer, released

ARMS = ("pooled", "local", "fedavg", "fedprox")
POOLED_STEPS = 3200
PROXIMAL_MU = 0.001


def main() -> None:
    """Run the wanted arms and print the tables."""
    options = _options()
    results = every_arm(options, _run)
    show(options, results, summarise(results), table)


def _options() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "hippocampus", seeds=(1, 2, 3))
    parser.add_argument("--data", type=Path, required=True, help="folder with images, labels, CSV")
    parser.add_argument("--table", default="sites.csv", help="which CSV (sites.csv)")
    parser.add_argument("--only", type=names_of(ARMS), default=list(ARMS), help="arms, by comma")
    parser.add_argument("--inner", action="store_true", help="measure on an inner split of train")
    parser.add_argument("--rounds", type=int, help="fewer rounds, for a quick look")
    parser.add_argument("--steps", type=int, help="fewer steps a round, for a quick look")
    options = parser.parse_args()
    options.out = options.out / ("inner" if options.inner else "val")
    return options


def _run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed and measure it at every hospital."""
    plan = plan_of(arm, seed, options.rounds, options.steps)
    record, tensors = initial_model(plan)
    plan = plan.model_copy(update={"initial": record})
    manifest = read_manifest(options.data, plan.task, table=options.table)
    if options.inner:
        manifest = held_back(manifest, 0)
    whole = Federation(
        plan=plan,
        initial=tensors,
        cohorts=tuple(manifest.cohort(site) for site in manifest.sites),
        folder=options.out / f"{arm}-seed{seed}",
        cache=options.out.parent / "cache",
    )
    curve: list[dict[str, float]] = []
    scorer = Scorer(whole, "val")
    if arm == "local":
        studies = [
            alone(whole, cohort, whole.folder / cohort.site, plan.training.steps_per_round)
            for cohort in whole.cohorts
        ]
    elif arm == "pooled":
        single = pooled(whole, whole.folder, plan.training.steps_per_round)
        rounds = plan.evaluation.every_rounds
        evaluation = single.plan.evaluation.model_copy(update={"every_rounds": rounds})
        studies = [replace(single, plan=single.plan.model_copy(update={"evaluation": evaluation}))]
    else:
        studies = [whole]
    finished = [_train(study, arm) for study in studies]
    patients = []
    for index, cohort in enumerate(whole.cohorts):
        state = finished[index if arm == "local" else 0].state
        patients += scorer(released(state, plan), cohort.site)
    if arm != "local":
        curve = _curve(finished[0])
    dice = [p.mean_dice for p in patients if p.mean_dice is not None]
    hospitals = {
        c.site: statistics.fmean(p.mean_dice for p in patients if p.site == c.site)
        for c in whole.cohorts
    }
    return {
        "arm": arm,
        "seed": seed,
        "mean_dice": statistics.fmean(dice),
        "hospitals": hospitals,
        "worst": min(hospitals.values()),
        "patients": [p.model_dump(mode="json") for p in patients],
        "steps": sum(a.steps for f in finished for s in f.state.history for a in s.answers),
        "cpu_s": sum(f.cpu_s for f in finished),
        "curve": curve,
        "plan": plan.model_dump(mode="json", exclude={"initial"}),
    }


def plan_of(arm: str, seed: int, rounds: int | None, steps: int | None) -> StudyPlan:
    """The example plan with what belongs to the arm."""
    plan = parse_plan(example("mr-3d").encode())
    training, aggregation = plan.training, plan.aggregation
    if rounds:
        aggregation = aggregation.model_copy(update={"rounds": rounds})
    if arm == "fedprox":
        aggregation = aggregation.model_copy(
            update={"strategy": "fedprox", "proximal_mu": PROXIMAL_MU}
        )
    per_round = training.steps_per_round
    if arm == "pooled":
        per_round = POOLED_STEPS // plan.aggregation.rounds
    training = training.model_copy(update={"seed": seed, "steps_per_round": steps or per_round})
    changed = {"training": training, "aggregation": aggregation}
    return StudyPlan.model_validate(plan.model_copy(update=changed).model_dump(mode="json"))


def _train(study: Federation, arm: str) -> Finished:
    """Run one study to its end, telling of each evaluation."""

    def tell(event: Event) -> None:
        if isinstance(event, StageClosed) and event.record.stage == "evaluate":
            note(f"  {arm} round {event.record.round}: Dice {_dice_of(event.record):.4f}")

    return run_federation(study, resume=True, observe=tell)


def _curve(finished: Finished) -> list[dict[str, float]]:
    """Mean Dice over patients against the share of the arm's compute spent, at each evaluation."""
    steps, total, points = 0, 0, []
    for stage in finished.state.history:
        steps += sum(answer.steps for answer in stage.answers)
        total = max(total, steps)
        if stage.stage == "evaluate":
            points.append({"steps": steps, "dice": _dice_of(stage)})
    return [p | {"cpu_s": finished.cpu_s * p["steps"] / total} for p in points]


def _dice_of(stage: StageRecord) -> float:
    """Mean Dice over the patients of all hospitals."""
    found = weighted_mean((answer.mean_dice, answer.patients) for answer in stage.answers)
    assert found is not None
    return found


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over seeds, the gap to pooled, and the compute to come near it."""
    arms: dict[str, Any] = {}
    pooled_runs = {r["seed"]: r for r in results if r["arm"] == "pooled"}
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        dice = [r["mean_dice"] for r in runs]
        gaps = [
            (r["mean_dice"] - pooled_runs[r["seed"]]["mean_dice"]) / POINT
            for r in runs
            if r["seed"] in pooled_runs
        ]
        arms[arm] = {
            "seeds": [r["seed"] for r in runs],
            "mean_dice": statistics.fmean(dice),
            "deviation": statistics.stdev(dice) if len(dice) > 1 else None,
            "worst_hospital": statistics.fmean(r["worst"] for r in runs),
            "hospitals": {
                site: statistics.fmean(r["hospitals"][site] for r in runs)
                for site in runs[0]["hospitals"]
            },
            "steps": runs[0]["steps"],
            "cpu_s": statistics.fmean(r["cpu_s"] for r in runs),
            "points_to_pooled": statistics.fmean(gaps) if gaps else None,
            "compute_to_pooled": (
                statistics.fmean(r["cpu_s"] / pooled_runs[r["seed"]]["cpu_s"] for r in runs)
                if len(gaps) == len(runs)
                else None
            ),
            "compute_to_near_pooled": _mean_or_none(
                [_near_pooled(r, pooled_runs.get(r["seed"])) for r in runs]
            ),
        }
    return arms


def _near_pooled(run: dict[str, Any], best: dict[str, Any] | None) -> float | None:
    """Steps until the curve first reaches pooled minus half a point, as a share of pooled's."""
    if best is None or not run["curve"]:
        return None
    goal = best["curve"][-1]["dice"] - 0.5 * POINT
    reached = [point["steps"] for point in run["curve"] if point["dice"] >= goal]
    return reached[0] / best["steps"] if reached else float("inf")


def _mean_or_none(values: list[float | None]) -> float | None:
    """Mean where every value is there; None too where one was never reached."""
    known = [v for v in values if v is not None and np.isfinite(v)]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    sites = list(next(iter(summary.values()))["hospitals"])
    head = (
        "arm", "Dice, mean (sd)", "to pooled, points", "worst hospital",
        *(site.removeprefix("hospital_") for site in sites),
        "steps", "CPU s", "compute / pooled", "to reach pooled - 0.5",
    )  # fmt: skip
    return markdown(head, (_cells(arm, row) for arm, row in summary.items()))


def _cells(arm: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    deviation = "" if row["deviation"] is None else f" ({row['deviation']:.4f})"
    return [
        arm,
        f"{row['mean_dice']:.4f}{deviation}",
        _signed(row["points_to_pooled"]),
        f"{row['worst_hospital']:.4f}",
        *(f"{dice:.3f}" for dice in row["hospitals"].values()),
        f"{row['steps']}",
        f"{row['cpu_s']:.0f}",
        _times(row["compute_to_pooled"]),
        _times(row["compute_to_near_pooled"]),
    ]


def _signed(value: float | None) -> str:
    """A difference in points."""
    return "-" if value is None else f"{value:+.2f}"


def _times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f}x"


if __name__ == "__main__":
    main()
