"""Ten strategies on real hippocampus MR, beside pooled and local-only: which serves the weakest?

Needs Task04 of the Medical Segmentation Decathlon as NIfTI with a table (subject, site, split,
patient): `sites.csv` are five unlike hospitals, `sites_iid.csv` the control with the persons
shuffled. Settings are chosen with --inner, on every fifth training person; `val` is for the final
figures. Every arm of every seed is stored when it is done and resumed when it was stopped.

    python benchmarks/strategies.py --data DIR --inner                     # the grid, one seed
    python benchmarks/strategies.py --data DIR --only fedavg,fedbn --seeds 1,2,3
    python benchmarks/strategies.py --data DIR --table sites_iid.csv --json
    python benchmarks/strategies.py --list                                 # arms and settings

A point is 0.01 Dice. `worst` is the mean Dice of the hospital that has the lowest. `rounds` and
`MB` are what it took, all hospitals together, until the curve of the federation's own evaluation
first reached 99 % of its last value; `-` for arms that send nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hippocampus import inner_split

from coordinator.rounds.events import Event, StageClosed
from fedseg.durable import write_atomically
from fedseg.imaging.manifests import read_manifest
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan, parse_plan
from fedseg.planfile import example
from fedseg.result import PatientScores, StageRecord, mean_of, weighted_mean
from fedseg.simulation.baselines import alone, pooled
from fedseg.simulation.federation import Federation, Finished, run_federation
from fedseg.simulation.scoring import Scorer, released, used_at

BASELINES = ("pooled", "local")
POINT, NEAR = 0.01, 0.99
SGD = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "state": "reset"}

# Settings of the section `aggregation`; `sgd` is the learning rate of a site's plain SGD.
ARMS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox-0.001": {"strategy": "fedprox", "proximal_mu": 0.001},
    "fedprox-0.01": {"strategy": "fedprox", "proximal_mu": 0.01},
    "fedavgm-0.5": {"strategy": "fedavgm", "server_momentum": 0.5},
    "fedavgm-0.9": {
        "strategy": "fedavgm", "server_momentum": 0.9, "server_learning_rate": 0.3,
    },
    "fedadam-0.003": {"strategy": "fedadam", "server_learning_rate": 0.003},
    "fedadam-0.01": {"strategy": "fedadam", "server_learning_rate": 0.01},
    "fedyogi-0.003": {"strategy": "fedyogi", "server_learning_rate": 0.003},
    "fedyogi-0.01": {"strategy": "fedyogi", "server_learning_rate": 0.01},
    "fedadagrad-0.03": {"strategy": "fedadagrad", "server_learning_rate": 0.03},
    "fedavg-sgd": {"sgd": 0.1},
    "scaffold-0.1": {"strategy": "scaffold", "sgd": 0.1},
    "scaffold-0.3": {"strategy": "scaffold", "sgd": 0.3},
    "fedbn": {"strategy": "fedbn"},
    "fedper": {"strategy": "fedper"},
    "ditto-0.1": {"strategy": "ditto", "ditto_lambda": 0.1},
    "ditto-1": {"strategy": "ditto", "ditto_lambda": 1.0},
}  # fmt: skip


def main() -> None:
    """Run the wanted arms and print the table."""
    options = _options()
    if options.list:
        print("\n".join(f"{name}: {json.dumps(ARMS.get(name, {}))}" for name in _all()))
        return
    wanted = [(seed, arm) for seed in options.seeds for arm in options.only]
    for number, (seed, arm) in enumerate(wanted, 1):
        path = options.out / f"{arm}-seed{seed}.json"
        if not path.exists():
            write_atomically(path, json.dumps(_run(options, arm, seed), indent=1).encode())
        _note(f"[{number}/{len(wanted)}] {arm} seed {seed}: Dice {_load(path)['dice']:.4f}")
    results = [_load(options.out / f"{arm}-seed{seed}.json") for seed, arm in wanted]
    rows = summarise(results)
    print(json.dumps({"rows": rows, "runs": results}, indent=1) if options.json else table(rows))


def _options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with images, labels, CSV")
    parser.add_argument("--table", default="sites.csv", help="which CSV (sites.csv)")
    parser.add_argument("--out", type=Path, default=Path("results/strategies"))
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[1])
    parser.add_argument("--only", type=_arms, default=_all(), help="arms, by comma")
    parser.add_argument("--inner", action="store_true", help="measure on an inner split of train")
    parser.add_argument("--rounds", type=int, help="another number of rounds than the example's")
    parser.add_argument("--steps", type=int, help="another number of steps a round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", action="store_true", help="the arms and their settings")
    options = parser.parse_args()
    if options.data is None and not options.list:
        parser.error("--data DIR is needed")
    split = "inner" if options.inner else "val"
    options.cache = options.out / "cache"
    options.out = options.out / f"{Path(options.table).stem}-{split}"
    return options


def _all() -> list[str]:
    """Every arm."""
    return [*BASELINES, *ARMS]


def _arms(text: str) -> list[str]:
    """Names of arms, checked."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(_all())):
        raise argparse.ArgumentTypeError(f"no such arm: {', '.join(unknown)}; see --list")
    return names


def plan_of(arm: str, seed: int, rounds: int | None = None, steps: int | None = None) -> StudyPlan:
    """The example plan with an arm's settings, not built."""
    values = parse_plan(example("mr-3d").encode()).model_dump(mode="json")
    aggregation = dict(ARMS.get(arm, {}))
    values["training"]["seed"] = seed
    values["training"]["steps_per_round"] = steps or values["training"]["steps_per_round"]
    if "sgd" in aggregation:
        values["training"]["optimiser"] = SGD | {"learning_rate": aggregation.pop("sgd")}
    kept = ("minimum_sites", "round_timeout_s", "attempts", "weighting")
    aggregation |= {field: values["aggregation"][field] for field in kept}
    values["aggregation"] = aggregation | {"rounds": rounds or values["aggregation"]["rounds"]}
    values["training"]["schedule"]["warmup_rounds"] = min(
        values["training"]["schedule"]["warmup_rounds"], values["aggregation"]["rounds"] / 4
    )
    values["evaluation"] |= {"metrics": ["dice", "hd95"]}
    return StudyPlan.model_validate(values)


def _run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed and measure it at every hospital."""
    plan = plan_of(arm, seed, options.rounds, options.steps)
    record, tensors = initial_model(plan)
    manifest = read_manifest(options.data, plan.task, table=options.table)
    manifest = inner_split(manifest) if options.inner else manifest
    whole = Federation(
        plan=plan.model_copy(update={"initial": record}),
        initial=tensors,
        cohorts=tuple(manifest.cohort(site) for site in manifest.sites),
        folder=options.out / f"{arm}-seed{seed}",
        cache=options.cache,
    )
    finished = [_train(study, arm) for study in _studies(whole, arm)]
    scorer, patients = Scorer(whole, "val"), []
    for index, cohort in enumerate(whole.cohorts):
        state = finished[index if arm == "local" else 0].state
        model = released(state, whole.plan)
        model = model if arm in BASELINES else used_at(whole, cohort.site, model)
        patients += scorer(model, cohort.site)
    history = finished[0].state.history
    return {
        "arm": arm,
        "seed": seed,
        **_measured(patients),
        "near": None if arm in BASELINES else reached(history),
        "cpu_s": sum(study.cpu_s for study in finished),
        "patients": [patient.model_dump(mode="json") for patient in patients],
        "plan": plan.model_dump(mode="json"),
    }


def _studies(whole: Federation, arm: str) -> list[Federation]:
    """The federation, or what a baseline trains in its place."""
    steps = whole.plan.training.steps_per_round
    if arm == "local":
        return [alone(whole, c, whole.folder / c.site, steps) for c in whole.cohorts]
    if arm == "pooled":
        return [pooled(whole, whole.folder / "pooled", steps * len(whole.cohorts))]
    return [whole]


def _train(study: Federation, arm: str) -> Finished:
    """Run one study to its end, telling of each evaluation."""

    def tell(event: Event) -> None:
        if isinstance(event, StageClosed) and event.record.stage == "evaluate":
            _note(f"  {arm} round {event.record.round}: Dice {_dice_of(event.record):.4f}")

    return run_federation(study, resume=True, observe=tell)


def _dice_of(record: StageRecord) -> float:
    """Mean Dice over the patients of all hospitals, as the federation itself saw it."""
    found = weighted_mean((answer.mean_dice, answer.patients) for answer in record.answers)
    return 0.0 if found is None else found


def reached(history: Sequence[StageRecord]) -> dict[str, Any]:
    """Rounds and megabytes until the evaluated Dice first came to 99 % of its last value."""
    curve, moved = [], 0
    for record in history:
        if record.stage == "train":
            moved += record.bytes_down + record.bytes_up
        if record.stage == "evaluate":
            curve.append((record.round, moved / 1e6, _dice_of(record)))
    goal = NEAR * curve[-1][2]
    rounds, megabytes, _ = next(point for point in curve if point[2] >= goal)
    return {"rounds": rounds, "mb": megabytes, "curve": curve}


def _measured(patients: Sequence[PatientScores]) -> dict[str, Any]:
    """Means over all patients and by hospital."""
    sites = sorted({patient.site for patient in patients})
    dice = {site: _mean([p.mean_dice for p in patients if p.site == site]) for site in sites}
    hd95 = {site: _mean([mean_of(p.hd95_mm) for p in patients if p.site == site]) for site in sites}
    return {
        "dice": _mean([patient.mean_dice for patient in patients]),
        "hd95_mm": _mean([mean_of(patient.hd95_mm) for patient in patients]),
        "dice_by_hospital": dice,
        "hd95_mm_by_hospital": hd95,
        "worst_dice": min(dice.values()),
        "worst_hd95_mm": max(hd95.values()),
    }


def _mean(values: Sequence[float | None]) -> float:
    """Mean of the values there are."""
    return statistics.fmean(value for value in values if value is not None)


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm: means and deviations over the seeds, best first."""
    rows = []
    pooled_dice = {r["seed"]: r["dice"] for r in results if r["arm"] == "pooled"}
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        dice = [r["dice"] for r in runs]
        gaps = [r["dice"] - pooled_dice[r["seed"]] for r in runs if r["seed"] in pooled_dice]
        near = [r["near"] for r in runs if r["near"]]
        rows.append(
            {
                "arm": arm,
                "seeds": [r["seed"] for r in runs],
                "dice": statistics.fmean(dice),
                "dice_sd": statistics.stdev(dice) if len(dice) > 1 else None,
                "points_to_pooled": statistics.fmean(gaps) / POINT if gaps else None,
                "worst_dice": statistics.fmean(r["worst_dice"] for r in runs),
                "hd95_mm": statistics.fmean(r["hd95_mm"] for r in runs),
                "worst_hd95_mm": statistics.fmean(r["worst_hd95_mm"] for r in runs),
                "rounds": statistics.fmean(n["rounds"] for n in near) if near else None,
                "mb": statistics.fmean(n["mb"] for n in near) if near else None,
                "cpu_s": statistics.fmean(r["cpu_s"] for r in runs),
            }
        )
    return sorted(rows, key=lambda row: -row["dice"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| arm | Dice (sd) | to pooled, points | worst hospital | HD95, mm | worst, mm "
        "| rounds to 99 % | MB to 99 % | CPU s |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        deviation = "" if row["dice_sd"] is None else f" ({row['dice_sd']:.4f})"
        gap = "-" if row["points_to_pooled"] is None else f"{row['points_to_pooled']:+.2f}"
        near = "- | -" if row["rounds"] is None else f"{row['rounds']:.0f} | {row['mb']:.0f}"
        lines.append(
            f"| {row['arm']} | {row['dice']:.4f}{deviation} | {gap} | {row['worst_dice']:.4f} | "
            f"{row['hd95_mm']:.2f} | {row['worst_hd95_mm']:.2f} | {near} | {row['cpu_s']:.0f} |"
        )
    return "\n".join(lines)


def _load(path: Path) -> dict[str, Any]:
    """A stored arm."""
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _note(text: str) -> None:
    """Progress, on the error stream."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
