"""What a guarantee for every patient costs in Dice: five hospitals of real hippocampus MR.

The unit is the patient. The study starts from a model that was pre-trained on phantoms by domain
randomisation, and trains a small part of it: one full-batch step a round at each hospital, each
patient's gradient clipped once, every hospital's own noise, plain averages by the server. Beside it
the initial model as it is (zero-shot), the same part trained without a guarantee, and all
parameters trained without a guarantee on everybody's patients in one place.

All settings were chosen on the hospitals that `fedseg phantoms` makes, as if they were private, and
stood fixed before the private patients were looked at:

    fedseg phantoms rehearsal --patients 26 --seed 77
    python benchmarks/private_hippocampus.py --data rehearsal --out results/rehearsal ...

Needs Task04 of the Medical Segmentation Decathlon as NIfTI with a table (subject, site, split,
patient). Every arm of every seed is stored when it is done, and resumed when it was stopped.

    python benchmarks/private_hippocampus.py --data DIR --seeds 1,2,3
    python benchmarks/private_hippocampus.py --data DIR --only zero,private-8-1e-3 --json

The noise of an arm is seeded, so that the table can be made again: these models are NOT private.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from arms import every_arm, markdown, names_of, note, parser_of, rounds_told, show

from fedseg.arrays import Arrays, digest_of
from fedseg.evaluation.evaluate import labelled
from fedseg.imaging.manifests import read_manifest
from fedseg.learning.pretraining import phantom_patients, pretrain, pretraining_plan
from fedseg.modelfile import load_model, save_model
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan, parse_plan
from fedseg.planfile import example
from fedseg.privacy.schedule import calibrated
from fedseg.simulation.baselines import pooled
from fedseg.simulation.federation import Federation
from fedseg.simulation.running import run_federation
from fedseg.simulation.scoring import Scorer, released

EPSILONS, DELTAS = (8, 3, 1), ("1e-3", "1e-5")
PRIVATE = tuple(f"private-{e}-{d}" for d in DELTAS for e in EPSILONS)
ARMS = ("zero", "same-part", "pooled", *PRIVATE)
RESAMPLES = 9_999

CHANNELS = [16, 32, 64, 128]
PRETRAINING = {"steps": 3000, "phantoms": 600, "seed": 1}
SETTINGS: dict[str, Any] = {
    "trainable": "norms",
    "clip_norm": 0.15,
    "momentum": 0.9,
    "patches": 1,
}
ROUNDS = {8: 24, 3: 16, 1: 16}
LEARNING_RATE = {8: 2.0, 3: 1.0, 1: 0.3}  # weaker noise bears longer steps, and more of them
PART_ROUNDS, PART_STEPS = 20, 20
POOLED_ROUNDS, POOLED_STEPS = 20, 80
PLAIN_LEARNING_RATE = 0.005
EXPECTED_PATIENTS = 21  # a fifth of the persons that the table lists for training


def main() -> None:
    """Run the wanted arms and print the table."""
    options = _options()
    results = every_arm(options, _run, name=_name)
    show(options, results, summarise(results), table)


def _options() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "private_hippocampus", seeds=(1, 2, 3))
    parser.add_argument("--data", type=Path, required=True, help="folder with images, labels, CSV")
    parser.add_argument("--only", type=names_of(ARMS), default=list(ARMS), help="arms, by comma")
    parser.add_argument("--start", type=Path, help="another initial model, from `fedseg pretrain`")
    for name, value in SETTINGS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help="for rehearsals"
        )
    parser.add_argument("--rounds", type=int, help="for rehearsals")
    parser.add_argument("--learning-rate", type=float, help="for rehearsals")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def _name(arm: str, seed: int) -> str:
    """Of the file with an arm's figures; the initial model knows no seed."""
    return "zero" if arm == "zero" else f"{arm}-seed{seed}"


def _run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed and measure it at every hospital."""
    start = _initial(options)
    plan = plan_of(options, arm, seed, start)
    manifest = read_manifest(options.data, plan.task)
    cohorts = tuple(labelled(manifest.cohort(site)) for site in manifest.sites)
    whole = Federation(
        plan=plan,
        initial=start,
        cohorts=cohorts,
        folder=options.out / f"{arm}-seed{seed}",
        cache=options.out / "cache",
        noise_seed=seed,
    )
    model, spent = dict(start), 0.0
    if arm != "zero":
        study = pooled(whole, whole.folder, POOLED_STEPS) if arm == "pooled" else whole
        finished = run_federation(study, resume=True, observe=rounds_told(arm, 8))
        model, spent = released(finished.state, finished.plan), finished.cpu_s
    scorer = Scorer(whole, "val")
    patients = [p for cohort in cohorts for p in scorer(model, cohort.site)]
    return {
        "arm": arm,
        "seed": seed,
        "mean_dice": statistics.fmean(p.mean_dice for p in patients if p.mean_dice is not None),
        "patients": {p.patient: p.mean_dice for p in patients},
        "training_patients": sum(len(c.split("train").patients) for c in cohorts),
        "trained_parameters": trained_parameters(plan),
        "noise_multiplier": plan.calibrated.training if plan.calibrated else None,
        "cpu_s": spent,
        "plan": plan.model_dump(mode="json", exclude={"initial"}),
    }


def _initial(options: argparse.Namespace) -> dict[str, Any]:
    """The model that every arm starts from; pre-trained on phantoms where it is not there yet."""
    path = options.start or options.out / "start.safetensors"
    if not path.exists():
        study = _study(options, 1)
        seed = PRETRAINING["seed"]
        own = pretraining_plan(study, steps=PRETRAINING["steps"], seed=seed)
        patients = phantom_patients(own.task, seed, range(PRETRAINING["phantoms"]))
        for state in pretrain(own, patients):
            if state.chunks % 10 == 0:
                note(f"  pre-training: {state.chunks} of {own.aggregation.rounds}")
        save_model(path, own, state.model, arm="pretrained", rounds=state.chunks)
    return load_model(path)[1]


def _study(options: argparse.Namespace, seed: int) -> StudyPlan:
    """The example plan with this benchmark's network."""
    values = parse_plan(example("mr-3d").encode()).model_dump(mode="json")
    values["model"]["options"]["channels"] = CHANNELS
    values["training"]["seed"] = seed
    values["training"]["optimiser"]["learning_rate"] = PLAIN_LEARNING_RATE
    values["evaluation"] |= {"metrics": ["dice"]}
    values["aggregation"]["rounds"] = POOLED_ROUNDS
    values["evaluation"]["every_rounds"] = POOLED_ROUNDS
    return StudyPlan.model_validate(values)


def plan_of(options: argparse.Namespace, arm: str, seed: int, start: Arrays) -> StudyPlan:
    """The plan of one arm, built."""
    values = _study(options, seed).model_dump(mode="json")
    training, aggregation = values["training"], values["aggregation"]
    if arm in ("same-part", *PRIVATE):
        training["trainable"] = options.trainable
    if arm == "same-part":
        training["steps_per_round"] = PART_STEPS
        aggregation["rounds"] = values["evaluation"]["every_rounds"] = PART_ROUNDS
    if arm in PRIVATE:
        _, epsilon, delta = arm.split("-", 2)
        _make_private(values, options, int(epsilon), float(delta))
    plan = StudyPlan.model_validate(values)
    record = initial_model(plan)[0].model_copy(update={"digest": digest_of(start)})
    return plan.model_copy(update={"initial": record, "calibrated": calibrated(plan)})


def _make_private(
    values: dict[str, Any], options: argparse.Namespace, epsilon: int, delta: float
) -> None:
    """The guarantee, and one full-batch step of plain SGD a round."""
    rounds = options.rounds or ROUNDS[epsilon]
    values["training"] |= {
        "optimiser": {
            "name": "sgd",
            "learning_rate": options.learning_rate or LEARNING_RATE[epsilon],
            "momentum": 0.0,
            "weight_decay": 0.0,
            "state": "reset",
        },
        "schedule": {"name": "cosine", "warmup_rounds": 0},
        "steps_per_round": 1,
        "gradient_clip_norm": None,
    }
    values["aggregation"] |= {
        "rounds": rounds,
        "weighting": "uniform",
        "strategy": "fedavgm" if options.momentum else "fedavg",
        "server_momentum": options.momentum,
    }
    values["evaluation"]["every_rounds"] = rounds
    values["privacy"] = {
        "guarantee": "local",
        "epsilon": epsilon,
        "delta": delta,
        "clip_norm": options.clip_norm,
        "expected_patients": EXPECTED_PATIENTS,
        "patches_per_patient": options.patches,
    }


def trained_parameters(plan: StudyPlan) -> int:
    """How many parameters a plan trains."""
    from fedseg.models.parts import freeze
    from fedseg.models.zoo import build_network

    network = build_network(plan.model, plan.task)
    return sum(network.get_parameter(n).numel() for n in freeze(network, plan.training.trainable))


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By arm: Dice over patients and seeds, the gain over zero-shot and the share recovered.

    A patient's Dice is the mean over seeds; patients are resampled. The share is (arm - zero-shot)
    over (reference - zero-shot), the references being the same part trained without a guarantee,
    and everything.
    """
    arms = {r["arm"]: [o for o in results if o["arm"] == r["arm"]] for r in results}
    names = sorted(results[0]["patients"])
    dice = {
        arm: np.mean([[run["patients"][name] for name in names] for run in runs], axis=0)
        for arm, runs in arms.items()
    }
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    found: dict[str, Any] = {}
    for arm, runs in arms.items():
        means = [run["mean_dice"] for run in runs]
        row: dict[str, Any] = {
            "seeds": len(runs),
            "mean_dice": float(dice[arm].mean()),
            "deviation": statistics.stdev(means) if len(set(means)) > 1 else None,
            "noise_multiplier": runs[0]["noise_multiplier"],
            "trained_parameters": runs[0]["trained_parameters"],
            "training_patients": runs[0]["training_patients"],
            "cpu_s": statistics.fmean(run["cpu_s"] for run in runs),
        }
        if "zero" in dice:
            gain = dice[arm] - dice["zero"]
            row["gain"] = _with_interval(gain.mean(), gain[drawn].mean(1))
            for reference in ("same-part", "pooled"):
                if reference in dice:
                    whole = dice[reference] - dice["zero"]
                    shares = gain[drawn].mean(1) / whole[drawn].mean(1)
                    row[f"of_{reference}"] = _with_interval(gain.mean() / whole.mean(), shares)
        found[arm] = row
    return found


def _with_interval(value: float, resampled: Any) -> list[float]:
    """A value with the ends of its 95 % percentile interval over patients."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return [float(value), float(low), float(high)]


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    head = (
        "arm", "trained", "noise", "Dice, mean (sd)", "over zero-shot, points",
        "of the same part's gain", "of pooled's gain", "CPU s",
    )  # fmt: skip
    return markdown(head, (_cells(arm, row) for arm, row in summary.items()))


def _cells(arm: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    deviation = "" if row["deviation"] is None else f" ({row['deviation']:.4f})"
    plain = arm == "zero"
    return [
        arm,
        "0" if plain else f"{row['trained_parameters']}",
        "-" if row["noise_multiplier"] is None else f"{row['noise_multiplier']:.2f}",
        f"{row['mean_dice']:.4f}{deviation}",
        "-" if plain else _shown(row.get("gain"), 100, 1),
        "-" if plain else _shown(row.get("of_same-part"), 1, 2),
        "-" if plain else _shown(row.get("of_pooled"), 1, 2),
        f"{row['cpu_s']:.0f}",
    ]


def _shown(value: list[float] | None, factor: float, digits: int) -> str:
    """A value with its interval."""
    if value is None:
        return "-"
    mean, low, high = (f"{part * factor:.{digits}f}" for part in value)
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
