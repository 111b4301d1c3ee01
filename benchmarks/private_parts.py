"""Which part of a network is worth training under a guarantee: norms, head or low-rank adapters.

Five hospitals of phantoms, the start, schedule and noise of `private_hippocampus.py` at epsilon 8
and delta 1e-5, one seed. Every part is given the same few learning rates, for the best one differs;
that choice costs nothing, since phantoms are nobody's. Real patients are not looked at. With
`--arm same-part` there is no noise, and the learning rate is the benchmark's own.

    fedseg phantoms rehearsal --patients 26 --seed 77
    python benchmarks/private_parts.py --data rehearsal --start results/start.safetensors

The noise is seeded, so that the table can be made again: these models are NOT private.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import private_hippocampus as study
from arms import markdown, note, stored

from fedseg.arrays import Arrays, digest_of
from fedseg.evaluation.evaluate import labelled
from fedseg.imaging.manifests import read_manifest
from fedseg.modelfile import load_model
from fedseg.models.zoo import initial_model, readapted
from fedseg.plan import StudyPlan
from fedseg.simulation.federation import Federation
from fedseg.simulation.running import run_federation
from fedseg.simulation.scoring import Scorer, released

PARTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "norms": ("norms", None),
    "norms+head": ("norms+head", None),
    "adapters, rank 4": ("adapters", {"rank": 4}),
    "adapters, rank 4, down frozen": ("adapters", {"rank": 4, "down": "frozen"}),
    "norms+adapters, rank 4, down frozen": ("norms+adapters", {"rank": 4, "down": "frozen"}),
    "norms+adapters, rank 1, down frozen": ("norms+adapters", {"rank": 1, "down": "frozen"}),
}


def main() -> None:
    """Train each part at each learning rate and print what it reaches."""
    options = _options()
    rows = []
    for name in options.parts.split(";"):
        for rate in options.rates:
            folder = options.out / f"{options.arm}-{list(PARTS).index(name)}-{rate:g}"
            path = folder.with_name(folder.name + ".json")
            found = stored(path, partial(_run, options, name, rate, folder))
            took = f"{found['wall_s']:.0f}"
            rows.append((name, str(found["trained"]), f"{rate:g}", f"{found['dice']:.4f}", took))
            note(", ".join(rows[-1]))
    print(markdown(("part", "trained", "learning rate", "mean Dice", "s"), rows))


def _run(options: argparse.Namespace, name: str, rate: float, folder: Path) -> dict[str, Any]:
    """Train one part at one learning rate."""
    options.learning_rate = rate
    start = load_model(options.start)[1]
    plan, model = adapted(study.plan_of(options, options.arm, 1, start), start, *PARTS[name])
    began = time.perf_counter()
    dice = measured(plan, model, options.data, folder)
    took = time.perf_counter() - began
    return {"trained": study.trained_parameters(plan), "dice": dice, "wall_s": took}


def adapted(
    plan: StudyPlan, start: Arrays, trainable: str, adapters: dict[str, Any] | None
) -> tuple[StudyPlan, Arrays]:
    """The plan with another part, and the start that it then has."""
    values = plan.model_dump(mode="json", exclude={"initial"})
    values["training"]["trainable"] = trainable
    values["model"]["adapters"] = adapters
    changed = StudyPlan.model_validate(values)
    record, fresh = initial_model(changed)
    model = start
    if adapters:
        model = readapted(start, plan.model, changed.model, plan.task, fresh)
    return changed.model_copy(
        update={"initial": record.model_copy(update={"digest": digest_of(model)})}
    ), model


def measured(plan: StudyPlan, start: Arrays, data: Path, folder: Path) -> float:
    """Mean Dice over the held-back patients of all hospitals."""
    manifest = read_manifest(data, plan.task)
    cohorts = tuple(labelled(manifest.cohort(site)) for site in manifest.sites)
    cache = folder.parent / "cache"
    whole = Federation(
        plan=plan, initial=dict(start), cohorts=cohorts, folder=folder, cache=cache, noise_seed=1
    )
    finished = run_federation(whole, resume=True)
    scorer, model = Scorer(whole, "val"), released(finished.state, finished.plan)
    patients = [p for cohort in cohorts for p in scorer(model, cohort.site)]
    return statistics.fmean(p.mean_dice for p in patients if p.mean_dice is not None)


def _options() -> argparse.Namespace:
    """The command line, with the benchmark's settings where it has none of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="from `fedseg phantoms`")
    parser.add_argument("--start", type=Path, required=True, help="from private_hippocampus.py")
    parser.add_argument("--arm", default="private-8-1e-5", help="or same-part: no guarantee")
    parser.add_argument("--out", type=Path, default=Path("results/private_parts"))
    parser.add_argument("--rates", type=lambda t: [float(r) for r in t.split(",")], default=[1, 2])
    parser.add_argument("--parts", default=";".join(PARTS), help="separated by semicolons")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, value in study.SETTINGS.items():
        setattr(options, name, value)
    options.rounds = None
    return options


if __name__ == "__main__":
    main()
