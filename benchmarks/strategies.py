"""Ten strategies on real hippocampus MR, beside pooled, local-only and fine-tuned: who is served?

Needs Task04 of the Medical Segmentation Decathlon as NIfTI with a table (subject, site, split,
patient): `sites.csv` are five unlike hospitals, `sites_iid.csv` the control with the persons
shuffled. Settings are chosen on part 0, every fifth training person; `val` is for the final
figures, and parts 1 to 4, the other training persons, give a hospital enough of them to tell two
models apart. Every arm of every seed is stored when it is done and resumed when it was stopped.
ARM+KIND is ARM fine-tuned at each hospital afterwards.

    python benchmarks/strategies.py --data DIR --on 0 --rounds 25            # the grid, one seed
    python benchmarks/strategies.py --data DIR --only fedavg,fedavg+norms --seeds 1,2,3
    python benchmarks/strategies.py --data DIR --only local,fedavg,fedavg+norms --on 1,2,3,4
    python benchmarks/strategies.py --data DIR --table sites_iid.csv --json
    python benchmarks/strategies.py --list                                   # arms and settings

A point is 0.01 Dice. `worst` is the mean Dice of the hospital that has the lowest. `rounds` and
`MB` are what training took, all hospitals together and both ways, until the curve of the
federation's own evaluation first reached 99 % of its last value (the arm's own, so that a worse arm
is not slower for it); `-` for arms that send nothing, and for fine-tuned ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arms import FOLDS, POINT, held_back, markdown, names_of, note, parser_of, stored

from coordinator.rounds.events import Event, StageClosed
from fedseg.evaluation.comparisons import MARGIN
from fedseg.evaluation.estimates import estimate
from fedseg.evaluation.evidence import Estimate
from fedseg.imaging.cases import Manifest
from fedseg.imaging.manifests import read_manifest
from fedseg.learning.finetune import KINDS
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan, parse_plan
from fedseg.planfile import example
from fedseg.result import PatientScores, StageRecord, mean_of, weighted_mean
from fedseg.simulation.baselines import alone, pooled
from fedseg.simulation.federation import Federation
from fedseg.simulation.finetuning import SIMULATED, OwnModels, finetune_everywhere
from fedseg.simulation.running import Finished, run_federation
from fedseg.simulation.scoring import Scorer, released, used_at

BASELINES = ("pooled", "local")
PARTS = ("val", *map(str, range(FOLDS)))
NEAR = 0.99
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
    "fedadam-0.03": {"strategy": "fedadam", "server_learning_rate": 0.03},
    "fedadam-0.1": {"strategy": "fedadam", "server_learning_rate": 0.1},
    "fedyogi-0.003": {"strategy": "fedyogi", "server_learning_rate": 0.003},
    "fedyogi-0.01": {"strategy": "fedyogi", "server_learning_rate": 0.01},
    "fedyogi-0.03": {"strategy": "fedyogi", "server_learning_rate": 0.03},
    "fedyogi-0.1": {"strategy": "fedyogi", "server_learning_rate": 0.1},
    "fedadagrad-0.03": {"strategy": "fedadagrad", "server_learning_rate": 0.03},
    "fedadagrad-0.1": {"strategy": "fedadagrad", "server_learning_rate": 0.1},
    "fedavg-sgd": {"sgd": 0.1},
    "fedavg-sgd-0.3": {"sgd": 0.3},
    "scaffold-0.1": {"strategy": "scaffold", "sgd": 0.1},
    "scaffold-0.3": {"strategy": "scaffold", "sgd": 0.3},
    "scaffold-1": {"strategy": "scaffold", "sgd": 1.0},
    "fedbn": {"strategy": "fedbn"},
    "fedper": {"strategy": "fedper"},
    "ditto-0.1": {"strategy": "ditto", "ditto_lambda": 0.1},
    "ditto-1": {"strategy": "ditto", "ditto_lambda": 1.0},
}  # fmt: skip


ALL = (*BASELINES, *ARMS)
TUNED = tuple(f"{arm}+{kind}" for arm in ARMS for kind in KINDS)


@dataclass(frozen=True)
class Run:
    """One arm with one seed, measured on one part of the persons."""

    options: argparse.Namespace
    arm: str
    seed: int
    part: str

    @property
    def strategy(self) -> str:
        """The arm without its fine-tuning."""
        return self.arm.partition("+")[0]

    @property
    def kind(self) -> str:
        """Of fine-tuning; empty without."""
        return self.arm.partition("+")[2]

    def place(self, arm: str) -> Path:
        """Where an arm of the same seed, part and length is kept."""
        parts = [Path(self.options.table).stem, self.part]
        lengths = {"rounds": self.options.rounds, "steps": self.options.steps}
        parts += [f"{number}{of}" for of, number in lengths.items() if number is not None]
        return Path(self.options.out / "-".join(parts) / f"{arm}-seed{self.seed}")


def main() -> None:
    """Run the wanted arms and print the tables."""
    options = _options()
    if options.list:
        print("\n".join(f"{name}: {json.dumps(ARMS.get(name, {}))}" for name in ALL))
        return
    runs = [Run(options, a, s, p) for s in options.seeds for p in options.on for a in options.only]
    results = []
    for number, run in enumerate(runs, 1):
        path = run.place(run.arm).with_name(run.place(run.arm).name + ".json")
        results.append(stored(path, partial(_result, run)) | {"part": run.part})
        dice = results[-1]["dice"]
        note(f"[{number}/{len(runs)}] {run.arm} seed {run.seed} on {run.part}: Dice {dice:.4f}")
    rows, pairs = summarise(results), list(compared(results))
    if options.json:
        print(json.dumps({"rows": rows, "pairs": pairs, "runs": results}, indent=1))
        return
    print(table(rows))
    if pairs:
        print("\n" + pairs_table(pairs))


def _options() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "strategies")
    parser.add_argument("--data", type=Path, help="folder with images, labels, CSV")
    parser.add_argument("--table", default="sites.csv", help="which CSV (sites.csv)")
    parser.add_argument("--only", type=names_of(ALL + TUNED), default=list(ALL), help="arms")
    parser.add_argument("--on", type=names_of(PARTS), default=["val"], help="val, or 0 to 4")
    parser.add_argument("--rounds", type=int, help="another number of rounds than the example's")
    parser.add_argument("--steps", type=int, help="another number of steps a round")
    parser.add_argument("--list", action="store_true", help="the arms and their settings")
    options = parser.parse_args()
    if options.data is None and not options.list:
        parser.error("--data DIR is needed")
    return options


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


def _result(run: Run) -> dict[str, Any]:
    """Train one arm with one seed and measure it at every hospital."""
    options, arm = run.options, run.strategy
    plan = plan_of(arm, run.seed, options.rounds, options.steps)
    record, tensors = initial_model(plan)
    manifest: Manifest = read_manifest(options.data, plan.task, table=options.table)
    manifest = manifest if run.part == "val" else held_back(manifest, int(run.part))
    whole = Federation(
        plan=plan.model_copy(update={"initial": record}),
        initial=tensors,
        cohorts=tuple(manifest.cohort(site) for site in manifest.sites),
        folder=run.place(arm),
        cache=options.out / "cache",
    )
    finished = [_train(study, arm) for study in _studies(whole, arm)]
    own = _finetuned(whole, finished[0], run) if run.kind else None
    scorer, patients = Scorer(whole, "val"), []
    for index, cohort in enumerate(whole.cohorts):
        model = released(finished[index if arm == "local" else 0].state, whole.plan)
        model = model if arm in BASELINES else used_at(whole, cohort.site, model)
        if own is not None and cohort.site in own.tuned:
            model = own.tuned[cohort.site].model
        patients += scorer(model, cohort.site)
    sends_nothing = own is not None or arm in BASELINES
    return {
        "arm": run.arm,
        "seed": run.seed,
        **measured([patient.model_dump(mode="json") for patient in patients]),
        "near": None if sends_nothing else reached(finished[0].state.history),
        "cpu_s": sum(study.cpu_s for study in finished) + (0.0 if own is None else own.cpu_s),
        "gains": {} if own is None else {site: t.gain for site, t in own.tuned.items()},
        "patients": [patient.model_dump(mode="json") for patient in patients],
        "plan": plan.model_dump(mode="json"),
    }


def _finetuned(whole: Federation, finished: Finished, run: Run) -> OwnModels:
    """Every hospital's own model, begun from what it uses when the study is over."""
    final = released(finished.state, whole.plan)
    return finetune_everywhere(
        whole,
        lambda site: used_at(whole, site, final),
        SIMULATED.model_copy(update={"kind": run.kind}),
        final="val",
        folder=run.place(run.arm),
        say=lambda text: note(f"  {run.arm}: {text}"),
    )


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
            note(f"  {arm} round {event.record.round}: Dice {_dice_of(event.record):.4f}")

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


def measured(patients: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over all patients and by hospital."""
    scores = [PatientScores.model_validate(patient) for patient in patients]
    sites = sorted({patient.site for patient in scores})
    dice = {site: _mean(p.mean_dice for p in scores if p.site == site) for site in sites}
    hd95 = {site: _mean(mean_of(p.hd95_mm) for p in scores if p.site == site) for site in sites}
    return {
        "dice": _mean(patient.mean_dice for patient in scores),
        "hd95_mm": _mean(mean_of(patient.hd95_mm) for patient in scores),
        "dice_by_hospital": dice,
        "hd95_mm_by_hospital": hd95,
        "worst_dice": min(dice.values()),
        "worst_hd95_mm": max(hd95.values()),
    }


def _mean(values: Iterable[float | None]) -> float:
    """Mean of the values there are."""
    return statistics.fmean(value for value in values if value is not None)


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm: means and deviations over the seeds, the parts joined, best first."""
    joined = {
        (r["arm"], r["seed"]): measured(
            [
                p
                for o in results
                if (o["arm"], o["seed"]) == (r["arm"], r["seed"])
                for p in o["patients"]
            ]
        )
        for r in results
    }
    rows = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        seeds = {seed: found for (name, seed), found in joined.items() if name == arm}
        dice = [found["dice"] for found in seeds.values()]
        gaps = [
            found["dice"] - joined["pooled", seed]["dice"]
            for seed, found in seeds.items()
            if ("pooled", seed) in joined
        ]
        near = [r["near"] for r in runs if r["near"]]
        rows.append(
            {
                "arm": arm,
                "seeds": list(seeds),
                "dice": statistics.fmean(dice),
                "dice_sd": statistics.stdev(dice) if len(dice) > 1 else None,
                "points_to_pooled": statistics.fmean(gaps) / POINT if gaps else None,
                "rounds": statistics.fmean(n["rounds"] for n in near) if near else None,
                "mb": statistics.fmean(n["mb"] for n in near) if near else None,
                "cpu_s": statistics.fmean(r["cpu_s"] for r in runs),
            }
            | {
                key: statistics.fmean(found[key] for found in seeds.values())
                for key in ("worst_dice", "hd95_mm", "worst_hd95_mm")
            }
        )
    return sorted(rows, key=lambda row: -row["dice"])


def compared(results: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Every arm against local-only, and fine-tuned against what it was begun from, by hospital.

    A person's Dice is the mean over the seeds; differences are paired over persons.
    """
    arms = dict.fromkeys(r["arm"] for r in results)
    pairs = [(arm, base) for arm in arms if (base := arm.partition("+")[0]) != arm and base in arms]
    pairs += [(arm, "local") for arm in arms if arm not in BASELINES and "local" in arms]
    for a, b in pairs:
        ours, theirs = _persons(results, a), _persons(results, b)
        sites = sorted({site for site, _ in ours})
        for site in ("all", *sites):
            both = [key for key in ours if key in theirs and site in ("all", key[0])]
            found = [ours[key] - theirs[key] for key in both]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            difference = estimate(found)
            yield {
                "a": a,
                "b": b,
                "site": site,
                "persons": len(found),
                "mean": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "standardised": statistics.fmean(found) / spread if spread else None,
                "said": "equal" if not any(found) else said_of(difference),
            }


def said_of(difference: Estimate) -> str:
    """What an interval lets one say of the first of two arms; not adjusted for their number."""
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > -MARGIN:
        return "not worse"
    return "worse" if difference.high < 0 else "undecided"


def _persons(results: Sequence[dict[str, Any]], arm: str) -> dict[tuple[str, str], float]:
    """(site, person) -> mean Dice over the seeds."""
    seen: dict[tuple[str, str], list[float]] = {}
    for run in results:
        for patient in map(PatientScores.model_validate, run["patients"]):
            if run["arm"] == arm and patient.mean_dice is not None:
                seen.setdefault((patient.site, patient.patient), []).append(patient.mean_dice)
    return {key: statistics.fmean(values) for key, values in seen.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    head = (
        "arm", "Dice (sd)", "to pooled, points", "worst hospital", "HD95, mm", "worst, mm",
        "rounds to 99 %", "MB to 99 %", "CPU s",
    )  # fmt: skip
    return markdown(head, map(_cells, rows))


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the summary."""
    deviation = "" if row["dice_sd"] is None else f" ({row['dice_sd']:.4f})"
    gap = row["points_to_pooled"]
    return [
        row["arm"],
        f"{row['dice']:.4f}{deviation}",
        "-" if gap is None else f"{gap:+.2f}",
        f"{row['worst_dice']:.4f}",
        f"{row['hd95_mm']:.2f}",
        f"{row['worst_hd95_mm']:.2f}",
        *("-" if row[key] is None else f"{row[key]:.0f}" for key in ("rounds", "mb")),
        f"{row['cpu_s']:.0f}",
    ]


def pairs_table(pairs: Sequence[dict[str, Any]]) -> str:
    """The comparisons as a Markdown table, in points."""
    head = ("arm", "against", "hospital", "persons", "points (95 %)", "mean / sd", "said")
    return markdown(head, map(_pair, pairs))


def _pair(pair: dict[str, Any]) -> list[str]:
    """A row of the comparisons."""
    ends = [pair["low"], pair["high"]]
    interval = "" if None in ends else f" ({ends[0] / POINT:+.2f} to {ends[1] / POINT:+.2f})"
    size = pair["standardised"]
    return [
        pair["a"],
        pair["b"],
        pair["site"],
        str(pair["persons"]),
        f"{pair['mean'] / POINT:+.2f}{interval}",
        "-" if size is None else f"{size:+.2f}",
        pair["said"],
    ]


if __name__ == "__main__":
    main()
