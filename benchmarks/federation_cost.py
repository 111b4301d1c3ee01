"""What federation costs: process CPU and memory beside a plain loop that takes the same steps.

    python benchmarks/federation_cost.py [--json] [--seeds 5] [--only plain,inprocess] [--out DIR]

Arms: `plain` (a PyTorch loop, site after site), `inprocess` and `ray` (fedseg), `flower` (Flower's
own FedAvg strategy on Ray) and `nvflare` (its simulator, in a virtual environment that is made
below DIR). Each run is a fresh process; runs of the arms alternate, and the median over the runs is
given. A run that is there already is not repeated: call again to resume, or with more --seeds.

What is counted is CPU of every process of an arm, user plus system. `total` is from the process's
start to its last round; `study` leaves out the start: imports and reading of the study everywhere,
and for Ray and Flower the start of the workers too, up to the first training task. NVFlare has no
such moment (it starts its sites while they train), so that it has a `total` alone. Evaluation is
off: cohorts have no patients to evaluate. What fedseg writes as it goes along (the sites' optimiser
states, the coordinator's state after every stage) is NOT left out: it is part of its cost here.

On a busy machine CPU time itself wanders by some percent between equal runs. `around` does not: it
is what the in-process arm spent outside its training function, in percent of what it spent inside,
both in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path
from typing import Any

from cost_arms import ARMS, prepare
from processes import FailedCommandError, measure

HERE = Path(__file__).resolve().parent
QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
AIM = 1.05


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The study that all arms run."""
    return {
        "patch": arguments.patch,
        "model": {
            "options": {"channels": arguments.channels, "residual_units": 0, "norm": "instance"}
        },
        "training": {
            "optimiser": {"name": "adamw", "learning_rate": 1e-3, "state": "keep"},
            "steps_per_round": arguments.steps,
            "batch_size": 2,
            "gradient_clip_norm": 1.0,
            "augmentation": {"rotation_degrees": 10, "scaling": 0.1, "noise": 0.05, "gamma": 0.1},
            "seed": 1,
        },
        "aggregation": {"rounds": arguments.rounds, "minimum_sites": 5},
        "evaluation": {"metrics": ["dice"], "every_rounds": arguments.rounds},
    }


def main() -> None:
    """Run what is missing and print the table."""
    arguments = _parse()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="federation-cost-"))
    settings = settings_of(arguments)
    work = out / "study"
    note = out / "settings.json"
    stamp = json.dumps({"patients": arguments.patients, **settings}, sort_keys=True)
    if note.exists() and note.read_text() != stamp:
        raise SystemExit(f"{out} holds runs of other settings: give another --out")
    if not note.exists():
        prepare(work, patients=arguments.patients, settings=dict(settings))
        note.write_text(stamp)
    left_out: dict[str, str] = {}
    for seed in range(arguments.seeds):
        for arm in arguments.only:
            if arm not in left_out:
                reason = _run(arm, seed, out, work)
                if reason:
                    left_out[arm] = reason
    result = summary(out, arguments, left_out)
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def _run(arm: str, seed: int, out: Path, work: Path) -> str | None:
    """One run of one arm, unless it is there; returns why it cannot be run."""
    record = out / "runs" / f"{arm}-{seed}.json"
    if record.exists():
        return None
    python = sys.executable
    if arm == "nvflare":
        python, reason = _nvflare_python(out)
        if reason:
            return reason
    record.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as place:
        command = [python, str(HERE / "cost_arms.py"), arm, str(work), place]
        log = out / "runs" / f"{arm}-{seed}.log"
        try:
            cost = measure(command, environment=QUIET, log=log)
        except FailedCommandError as error:
            return f"it fails here: {str(error)[-400:]} (see {log})"
    record.write_text(
        json.dumps(
            {
                "total_s": cost.cpu_s,
                "study_s": cost.cpu_s - cost.cpu_at["ready"] if "ready" in cost.cpu_at else None,
                "peak_mb": cost.peak_mb,
                "processes": cost.processes,
                "wall_s": cost.wall_s,
                "load": os.getloadavg()[0],
                **cost.said,
            }
        )
    )
    print(f"{arm} {seed}: {cost.cpu_s:.1f} s CPU", file=sys.stderr)
    return None


def _nvflare_python(out: Path) -> tuple[str, str | None]:
    """Python of an environment with NVFlare over this one's packages, and why there is none."""
    place = out / "nvflare"
    python = place / "bin" / "python"
    if not (place / "installed").exists():
        venv.create(place, with_pip=True, clear=True)
        packages = next((place / "lib").glob("python*")) / "site-packages"
        own = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "project.pth").write_text("\n".join(own))
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "nvflare"]
        done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=900)
        if done.returncode:
            return "", f"it does not install here: {done.stderr.strip()[-300:]}"
        (place / "installed").touch()
    return str(python), None


def summary(out: Path, arguments: argparse.Namespace, left_out: dict[str, str]) -> dict[str, Any]:
    """Medians by arm, and that all arms did the same work."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for arm in arguments.only:
        paths = sorted((out / "runs").glob(f"{arm}-*.json"))[: arguments.seeds]
        if paths:
            runs[arm] = [json.loads(path.read_text()) for path in paths]
    return {
        "date": date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "settings": json.loads((out / "settings.json").read_text()),
        "arms": {arm: _arm(own, runs.get("plain", [])) for arm, own in runs.items()},
        "left_out": left_out,
        "aim": {"arm": "inprocess", "study_ratio_at_most": AIM},
    }


def _arm(own: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of one arm, alone and as multiples of the plain loop's run beside each run."""
    found: dict[str, Any] = {"runs": len(own)}
    found |= {key: own[0][key] for key in ("steps", "processes")}
    pairs = list(zip(own, plain, strict=False))
    for key in ("study_s", "total_s", "peak_mb", "wall_s"):
        values = [run[key] for run in own]
        if None in values:
            continue
        found[key] = round(statistics.median(values), 3)
        found[f"{key}_range"] = [round(min(values), 3), round(max(values), 3)]
        if pairs:
            shares = [run[key] / beside[key] for run, beside in pairs]
            found[f"{key}_ratio"] = round(statistics.median(shares), 4)
            beside = statistics.median(run[key] for run in plain)
            found[f"{key}_ratio_of_medians"] = round(found[key] / beside, 4)
    inside = [run for run in own if "in_training_s" in run and run["processes"] == 1]
    if inside:
        shares = [run["study_s"] / run["in_training_s"] - 1 for run in inside]
        found["around_percent"] = round(100 * statistics.median(shares), 2)
    if pairs:
        keys = ("steps", "first")
        found["same_work"] = all(run[key] == one[key] for run, one in pairs for key in keys)
    return found


def table(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [
        f"{result['date']}, {result['machine']}; CPU seconds, median",
        f"{'arm':10} {'runs':>4} {'steps':>5} {'study':>8} {'ratio':>6} {'total':>8} {'ratio':>6} "
        f"{'peak MB':>8} {'ratio':>6}  same work",
    ]
    nothing = float("nan")
    for name, arm in result["arms"].items():
        study, total, peak = (
            (arm.get(key, nothing), arm.get(f"{key}_ratio", nothing))
            for key in ("study_s", "total_s", "peak_mb")
        )
        lines.append(
            f"{name:10} {arm['runs']:4d} {arm['steps']:5d} {study[0]:8.2f} {study[1]:6.3f} "
            f"{total[0]:8.2f} {total[1]:6.3f} {peak[0]:8.0f} {peak[1]:6.2f}  "
            f"{'yes' if arm.get('same_work') else 'no'}"
            + (f"  around {arm['around_percent']} %" if "around_percent" in arm else "")
        )
    lines += [f"{name}: left out, {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines).replace("nan", "  -")


def _processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _parse() -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(ARMS):
            raise argparse.ArgumentTypeError(f"arms are {', '.join(ARMS)}")
        return [arm for arm in ARMS if arm in chosen]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm")
    parser.add_argument("--only", type=names, default=list(ARMS), help="arms, divided by commas")
    parser.add_argument("--out", type=Path, help="keeps runs; call again to resume")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="a site and round")
    parser.add_argument("--patients", type=int, default=8, help="about how many a site")
    parser.add_argument("--patch", type=numbers, default=[32, 48, 32])
    parser.add_argument("--channels", type=numbers, default=[24, 48, 96, 192])
    return parser.parse_args()


if __name__ == "__main__":
    main()
