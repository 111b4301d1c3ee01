"""Studies that nobody ran: plausible results for the tests of what reads them."""

from __future__ import annotations

import numpy as np

from fedseg.plan import StudyPlan
from fedseg.reports.figures import Overlay, Rank
from fedseg.result import (
    Arm,
    ArmName,
    PatientScores,
    Run,
    SiteAnswer,
    SiteFailure,
    SiteSummary,
    StageRecord,
    StudyResult,
)

HOSPITALS = ("hospital_1", "hospital_2", "hospital_3", "hospital_4", "hospital_5")
LEVELS: dict[ArmName, float] = {
    "pooled": 0.868,
    "federated": 0.861,
    "finetuned": 0.865,
    "local": 0.79,
    "initial": 0.5,
}
MODEL_BYTES = 4_860_000


def make_plan(
    labels: tuple[str, ...] = ("anterior", "posterior"), dimensions: int = 3
) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "study": "hippocampus-mr",
            "task": {
                "dimensions": dimensions,
                "channels": [{"name": "T1w", "modality": "MR"}],
                "labels": {name: value for value, name in enumerate(labels, start=1)},
                "spacing_mm": [1.0] * dimensions,
                "patch_size": [32] * dimensions,
            },
            "aggregation": {"rounds": 20},
            "training": {"schedule": {"warmup_rounds": 1}},
        }
    )


def make_patients(
    arm: ArmName,
    sites: tuple[str, ...] = HOSPITALS,
    labels: tuple[str, ...] = ("anterior", "posterior"),
    count: int = 11,
    scored: bool = True,
) -> tuple[PatientScores, ...]:
    noise = {"pooled": 0.3, "federated": 0.5, "finetuned": 0.5, "local": 1.6, "initial": 1.0}
    patients = []
    for number, site in enumerate(sites):
        rng = np.random.default_rng(number)
        for index in range(count):
            hard = float(rng.gamma(2.0, 0.015)) + 0.012 * (number == 3)
            own = float(rng.normal(0, 0.008)) + (0.02 * number if arm == "local" else 0)
            base = noise[arm] * rng.normal(0, 0.011) + LEVELS[arm] + 0.03 - hard - own
            wave = {name: base + 0.02 * np.cos(k) for k, name in enumerate(labels)}
            dice = {name: float(np.clip(v, 0, 1)) if scored else None for name, v in wave.items()}
            patients.append(
                PatientScores(
                    site=site,
                    patient=f"P{number}{index:03d}",
                    cases=1,
                    dice=dice,
                    hd95_mm={k: None if v is None else 9 * (1 - v) + 0.3 for k, v in dice.items()},
                    nsd={k: None if v is None else min(1.0, v + 0.09) for k, v in dice.items()},
                )
            )
    return tuple(patients)


def make_stages(
    rounds: int, sites: tuple[str, ...], labels: tuple[str, ...]
) -> tuple[StageRecord, ...]:
    rng = np.random.default_rng(7)
    enlist = StageRecord(
        round=0,
        stage="enlist",
        attempt=1,
        bytes_down=412 * len(sites),
        bytes_up=530 * len(sites),
        answers=tuple(
            SiteAnswer(site=s, patients=30 + 4 * k, bytes_up=530) for k, s in enumerate(sites)
        ),
        failures=(),
    )
    stages = [enlist]
    for number in range(1, rounds + 1):
        failed = sites[2:3] if number in (5, 6) else ()
        present = [site for site in sites if site not in failed]
        fall = 0.16 + 1.1 * np.exp(-number / 4)
        answers = tuple(
            SiteAnswer(
                site=site,
                patients=30 + 4 * k,
                steps=20,
                loss=float(fall + 0.02 * k + rng.normal(0, 0.015)),
                bytes_up=MODEL_BYTES + 700,
            )
            for k, site in enumerate(present)
        )
        failures = tuple(
            SiteFailure(site=site, code="not-finite", reason="a tensor of the update holds NaN")
            for site in failed
        )
        stages.append(
            StageRecord(
                round=number,
                stage="train",
                attempt=1,
                bytes_down=MODEL_BYTES * len(sites),
                bytes_up=sum(answer.bytes_up for answer in answers),
                answers=answers,
                failures=failures,
            )
        )
        if number % 4 == 0 or number == rounds:
            stages.append(_evaluation(number, sites, labels, rng))
    received = tuple(SiteAnswer(site=site, patients=0, bytes_up=400) for site in sites)
    stages.append(
        StageRecord(
            round=rounds,
            stage="release",
            attempt=1,
            bytes_down=MODEL_BYTES * len(sites),
            bytes_up=400 * len(sites),
            answers=received,
            failures=(),
        )
    )
    return tuple(stages)


def _evaluation(
    number: int, sites: tuple[str, ...], labels: tuple[str, ...], rng: np.random.Generator
) -> StageRecord:
    rise = 0.87 - 0.75 * np.exp(-number / 4)
    answers = []
    for k, site in enumerate(sites):
        dice = {name: float(rise - 0.012 * k + rng.normal(0, 0.006)) for name in labels}
        scores = {
            "dice": dice,
            "hd95": {name: 8 * (1 - score) for name, score in dice.items()},
            "nsd": {name: min(1.0, score + 0.08) for name, score in dice.items()},
        }
        answers.append(SiteAnswer(site=site, patients=11, scores=scores, bytes_up=900))
    return StageRecord(
        round=number,
        stage="evaluate",
        attempt=1,
        bytes_down=MODEL_BYTES * len(sites),
        bytes_up=900 * len(sites),
        answers=tuple(answers),
        failures=(),
    )


def make_result(
    *,
    sites: tuple[str, ...] = HOSPITALS,
    labels: tuple[str, ...] = ("anterior", "posterior"),
    arms: tuple[ArmName, ...] = ("federated", "pooled", "local"),
    count: int = 11,
    rounds: int = 20,
    scored: bool = True,
    dimensions: int = 3,
    rehearsed: tuple[str, ...] = (),
    plan: StudyPlan | None = None,
) -> StudyResult:
    plan = plan or make_plan(labels, dimensions)
    own = {site: f"{k:x}" * 64 for k, site in enumerate(sites, start=1)}
    return StudyResult(
        plan=plan,
        plan_digest=plan.digest,
        model_digest="a" * 64,
        split="val",
        rehearsed_faults=rehearsed,
        sites=tuple(
            SiteSummary(
                name=site,
                patients={"train": 30 + 4 * k, "val": count},
                cases={"train": 30 + 4 * k, "val": count},
                left_out=int(k == 1),
            )
            for k, site in enumerate(sites)
        ),
        stages=make_stages(rounds, sites, labels),
        arms=tuple(
            Arm(
                name=name,
                models=own if name == "local" else dict.fromkeys(sites, name[0] * 8 + "0" * 56),
                gradient_steps=2000 if name == "federated" else 1600,
                patients=make_patients(name, sites, labels, count, scored),
            )
            for name in arms
        ),
        run=Run(
            engine="inprocess",
            started="2026-02-03T10:20:30+00:00",
            versions={"fedseg": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
            cores=2,
            wall_s=312.4,
            compute_s={
                name: {"federated": 412.0, "pooled": 301.5, "local": 330.1, "finetuned": 12.0}[name]
                for name in arms
                if name != "initial"
            },
            stage_s=tuple(9.5 for _ in make_stages(rounds, sites, labels)),
        ),
    )


def make_overlay(
    site: str = "hospital_1",
    patient: str = "P0001",
    rank: Rank = "median",
    labels: int = 2,
    shape: tuple[int, int, int] = (38, 52, 36),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    error: float = 1.5,
    seed: int = 0,
) -> Overlay:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    noise = rng.normal(0, 1, shape).astype(np.float32)
    smooth = noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)
    image = 0.25 * smooth + np.sin(4 * grid[0] + 2 * grid[1]) + 0.6 * (grid[2] < 0.7)
    truth, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for value in range(1, labels + 1):
        centre = np.array([0.1, -0.45 + 0.9 * (value - 1) / max(1, labels - 1), 0.05 * value])
        for mask, shift in ((truth, 0.0), (prediction, error / shape[1])):
            away = (grid - (centre + shift)[:, None, None, None]) / np.array(
                [0.35, 0.9 / max(2, labels), 0.4]
            ).reshape(3, 1, 1, 1)
            mask[(away**2).sum(axis=0) < 1] = value
    image = image + 0.9 * (truth > 0)
    return Overlay(
        site=site,
        patient=patient,
        rank=rank,
        dice=0.86,
        image=image.astype(np.float32),
        truth=truth,
        prediction=prediction,
        spacing_mm=spacing_mm,
    )


def make_overlays(sites: tuple[str, ...] = HOSPITALS, labels: int = 2) -> tuple[Overlay, ...]:
    errors: dict[Rank, float] = {"best": 0.6, "median": 1.8, "worst": 5.0}
    return tuple(
        make_overlay(site, f"P{k}{int(error)}", rank, labels, error=error, seed=10 * k + int(error))
        for k, site in enumerate(sites)
        for rank, error in errors.items()
    )
