"""What the audit finds of planted faults, and how often it refutes an honest mechanism.

    python benchmarks/private_audit.py [--canaries 2000] [--seed 1] [--honest 400] [--json]

Rows: full batch and Poisson sampling at a claimed epsilon of 1 (delta 1e-5), each honest and with
the four faults of the tests. `at_least` is the 95 % lower bound on which the verdict rests,
`any_mechanism` the one without assumptions. Then honest audits of 200 canaries with other seeds:
how many lie above the claim, which 5 % of them may.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from audited_plans import FAULTS, SIZES, audited_plan

from fedseg.learning.private import private_gradient
from fedseg.privacy.audit.bounds import llr, of_schedule
from fedseg.privacy.audit.canaries import transcript
from fedseg.privacy.audit.report import CONFIDENCE, judged, whole_study

ARMS = {"full batch, 5 steps": (1.0, 5), "rate 0.25, 8 steps": (0.25, 8)}


def faults(canaries: int, seed: int):
    for arm, (rate, steps) in ARMS.items():
        plan = audited_plan(rate=rate, steps=steps)
        for fault, step in {"none (honest)": private_gradient, **FAULTS}.items():
            found = judged(plan, transcript(plan, SIZES, canaries, seed, step=step))
            yield {
                "arm": arm,
                "fault": fault,
                "claimed": found.claimed,
                "at_least": round(found.bound.epsilon, 3),
                "ceiling": round(found.bound.ceiling, 2),
                "any_mechanism": round(found.any_mechanism.epsilon, 3),
                "any_ceiling": round(found.any_mechanism.ceiling, 2),
                "noise_p": found.checks[0].p,
                "verdict": found.verdict,
            }


def honest(audits: int):
    for arm, (rate, steps) in ARMS.items():
        plan = audited_plan(rate=rate, steps=steps)
        work, above = whole_study(plan), 0
        for seed in range(audits):
            seen = transcript(plan, SIZES, 200, seed)
            scores = llr(seen.values, rate)
            bound = of_schedule(scores, seen.members, work, 1e-5, CONFIDENCE)
            above += bound.epsilon > 1.0
        yield {"arm": arm, "audits": audits, "above the claim": above}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--canaries", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--honest", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [*faults(options.canaries, options.seed), *honest(options.honest)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{name}: {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
