"""Two of ten hospitals poison: what FedAvg loses, and what a robust rule loses.

Ten hospitals: each hospital of a data folder is divided into two by patient until there are ten (or
phantoms of ten hospitals, where no folder is given). Two of them attack in every round. Every arm
has the same start, plan, patients and equal weights, and is measured on the held-back patients of
all ten hospitals with true labels. Loss is against `clean-mean`, FedAvg without an attack.

The attacks are those of `fedseg simulate --fault SITE:ATTACK` (fedseg/simulation/attacks.py);
`alie` knows the honest updates of its two colluders, and nobody else's.

`RULE` was chosen on phantoms before it met real data: the one whose largest loss over the four
attacks was smallest. Every arm of every seed is stored when it is done, and resumed when it was
stopped. `named` counts whom the coordinator's detector names in the end: liars, honest sites.

    python benchmarks/poisoning.py --data DIR --seeds 1,2,3
    python benchmarks/poisoning.py --rules mean,median,trimmed_mean,multi_krum --rounds 16 --steps 6
    python benchmarks/poisoning.py --data DIR --only clean-mean,alie-mean --json
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from arms import POINT, every_arm, markdown, names_of, parser_of, rounds_told, show

from fedseg.aggregation.suspicions import suspicions
from fedseg.evaluation.evaluate import labelled
from fedseg.imaging.cases import Cohort
from fedseg.imaging.manifests import read_manifest
from fedseg.imaging.phantoms import phantom_task, write_phantoms
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan, parse_plan
from fedseg.planfile import example
from fedseg.result import StageRecord
from fedseg.simulation.attacks import ATTACKS
from fedseg.simulation.federation import Federation
from fedseg.simulation.rehearsal import Fault
from fedseg.simulation.running import run_federation
from fedseg.simulation.scoring import Scorer, released

HOSPITALS, LIARS = 10, 2
LIARS_AT = (1, 6)  # which ones, counted from 0 by name
RULES: dict[str, dict[str, Any]] = {
    "mean": {"rule": "mean"},
    "median": {"rule": "median"},
    "trimmed_mean": {"rule": "trimmed_mean", "trim": LIARS},
    "multi_krum": {"rule": "multi_krum", "byzantine": LIARS},
}
RULE = "multi_krum"
ATTACKED = ("clean", *ATTACKS)
ARMS = tuple(f"{attack}-{rule}" for attack in ATTACKED for rule in RULES)
CHANNELS = [16, 32, 64]
ROUNDS, STEPS, LEARNING_RATE = 30, 8, 0.01
PHANTOM_SEED, PHANTOM_PATIENTS = 5, 12


def main() -> None:
    """Run the wanted arms and print the table."""
    options = _options()
    results = every_arm(options, _run)
    show(options, results, summarise(results), table)


def _options() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "poisoning")
    parser.add_argument("--data", type=Path, help="folder with images, labels, CSV; else phantoms")
    parser.add_argument("--rules", type=names_of(RULES), default=["mean", RULE], help="by comma")
    parser.add_argument("--only", type=names_of(ARMS), help="arms ATTACK-RULE, by comma")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--patients", type=int, default=PHANTOM_PATIENTS, help="of a phantom site")
    options = parser.parse_args()
    options.only = options.only or [f"{a}-{r}" for r in options.rules for a in ATTACKED]
    options.out = options.out / ("phantoms" if options.data is None else options.data.name)
    return options


def _run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed and measure it at every hospital."""
    attack, rule = arm.split("-")
    plan = plan_of(rule, seed, options.rounds, options.steps, phantoms=options.data is None)
    record, tensors = initial_model(plan)
    plan = plan.model_copy(update={"initial": record})
    cohorts = ten_hospitals(_cohorts(options, plan))
    liars = [cohorts[place].site for place in LIARS_AT]
    faults = (Fault.model_validate({"site": site, "kind": attack}) for site in liars)
    whole = Federation(
        plan=plan,
        initial=tensors,
        cohorts=cohorts,
        folder=options.out / f"{arm}-seed{seed}",
        cache=options.out / "cache",
        faults=() if attack == "clean" else tuple(faults),
    )
    finished = run_federation(whole, resume=True, observe=rounds_told(arm, 10))
    scorer, model = Scorer(whole, "val"), released(finished.state, plan)
    patients = [p for cohort in cohorts for p in scorer(model, cohort.site)]
    hospitals = {
        cohort.site: statistics.fmean(known)
        for cohort in cohorts
        if (known := [p.mean_dice for p in patients if p.site == cohort.site])
    }
    return {
        "arm": arm,
        "seed": seed,
        "mean_dice": statistics.fmean(p.mean_dice for p in patients),
        "hospitals": hospitals,
        "worst": min(hospitals.values()),
        "patients": len(patients),
        "liars": [] if attack == "clean" else liars,
        "stages": [s.model_dump(mode="json") for s in finished.state.history if s.stage == "train"],
        "cpu_s": finished.cpu_s,
        "plan": plan.model_dump(mode="json", exclude={"initial"}),
    }


def plan_of(rule: str, seed: int, rounds: int, steps: int, *, phantoms: bool) -> StudyPlan:
    """The example plan with this benchmark's network, rule and length."""
    values = parse_plan(example("mr-3d").encode()).model_dump(mode="json")
    if phantoms:
        values["task"] = phantom_task("MR").model_dump(mode="json")
    values["model"]["options"]["channels"] = CHANNELS
    values["training"] |= {"seed": seed, "steps_per_round": steps}
    values["training"]["optimiser"]["learning_rate"] = LEARNING_RATE
    values["aggregation"] |= {
        "rounds": rounds,
        "weighting": "uniform",
        "minimum_sites": HOSPITALS,
        "combine": RULES[rule],
    }
    values["evaluation"] |= {"metrics": ["dice"], "every_rounds": rounds}
    return StudyPlan.model_validate(values)


def _cohorts(options: argparse.Namespace, plan: StudyPlan) -> list[Cohort]:
    """The hospitals of the data folder, or of phantoms that are made once."""
    folder = options.data
    if folder is None:
        folder = options.out / "data"
        if not (folder / "sites.csv").exists():
            patients = [options.patients] * HOSPITALS
            write_phantoms(folder, sites=HOSPITALS, patients_per_site=patients, seed=PHANTOM_SEED)
    manifest = read_manifest(folder, plan.task)
    return [labelled(manifest.cohort(site)) for site in manifest.sites]


def ten_hospitals(cohorts: list[Cohort]) -> tuple[Cohort, ...]:
    """Divide the largest hospitals into two, by patient and split alike, until there are ten."""
    while len(cohorts) < HOSPITALS:
        largest = max(cohorts, key=lambda cohort: len(cohort.patients))
        cohorts = [cohort for cohort in cohorts if cohort is not largest] + _halves(largest)
    return tuple(sorted(cohorts, key=lambda cohort: cohort.site))


def _halves(cohort: Cohort) -> list[Cohort]:
    """Every second patient of each split here, the others there."""
    second = {p for s in ("train", "val", "test") for p in cohort.split(s).patients[1::2]}
    parts = []
    for name, here in (("1", False), ("2", True)):
        site = cohort.site + name
        cases = (case for case in cohort.cases if (case.patient in second) == here)
        moved = tuple(replace(case, site=site) for case in cases)
        parts.append(replace(cohort, site=site, cases=moved))
    return parts


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By arm, means over seeds: Dice, loss against the clean mean, the worst hospital."""
    clean = {r["seed"]: r for r in results if r["arm"] == "clean-mean"}
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        dice = [r["mean_dice"] for r in runs]
        losses = [
            (clean[r["seed"]]["mean_dice"] - r["mean_dice"]) / POINT
            for r in runs
            if r["seed"] in clean
        ]
        found[arm] = {
            "seeds": [r["seed"] for r in runs],
            "mean_dice": statistics.fmean(dice),
            "deviation": statistics.stdev(dice) if len(dice) > 1 else None,
            "loss_points": statistics.fmean(losses) if losses else None,
            "largest_loss_points": max(losses) if losses else None,
            "worst_hospital": statistics.fmean(r["worst"] for r in runs),
            "named": [len(_named(r) & set(r["liars"])) for r in runs],
            "named_honest": [len(_named(r) - set(r["liars"])) for r in runs],
            "patients": runs[0]["patients"],
            "cpu_s": statistics.fmean(r["cpu_s"] for r in runs),
        }
    return found


def _named(run: dict[str, Any]) -> set[str]:
    """The hospitals that the detector names at the end of a run."""
    return set(suspicions(StageRecord.model_validate(stage) for stage in run["stages"]))


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    head = (
        "attack", "rule", "Dice, mean (sd)", "loss, points (largest)", "worst hospital",
        "named: liars, honest", "CPU s",
    )  # fmt: skip
    return markdown(head, (_cells(arm, row) for arm, row in summary.items()))


def _cells(arm: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    deviation = "" if row["deviation"] is None else f" ({row['deviation']:.4f})"
    loss = "-"
    if row["loss_points"] is not None:
        loss = f"{row['loss_points']:+.2f} ({row['largest_loss_points']:+.2f})"
    dice = f"{row['mean_dice']:.4f}{deviation}"
    named = f"{_listed(row['named'])}, {_listed(row['named_honest'])}"
    worst, spent = f"{row['worst_hospital']:.4f}", f"{row['cpu_s']:.0f}"
    return [*arm.split("-"), dice, loss, worst, named, spent]


def _listed(counts: list[int]) -> str:
    """One count a seed, or one for all where they are equal."""
    return "/".join(map(str, dict.fromkeys(counts) if len(set(counts)) == 1 else counts))


if __name__ == "__main__":
    main()
