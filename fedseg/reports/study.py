"""OUT/report.html: one study on one page that a radiologist can read and print.

The page is a single file: its style, charts (SVG) and pictures (JPEG) are inside, it runs no
script, and its content policy forbids every outside resource. Names from the data are escaped.
It shows images of patients and their identifiers: treat it like the data it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import yaml

from fedseg.aggregation.suspicions import NOISY
from fedseg.durable import write_atomically
from fedseg.evaluation.estimates import FEWEST
from fedseg.measures import Metric
from fedseg.privacy.words import outputs_of
from fedseg.reports import crosssite, findings, ownmodels, traffic
from fedseg.reports.charts import Curve, curve_chart, dice_chart
from fedseg.reports.curves import ALL, points
from fedseg.reports.figures import RANKS, Overlay, label_colours, overlay_pictures
from fedseg.reports.page import data_uri, date, environment
from fedseg.reports.privacy import privacy_of, sent
from fedseg.result import StudyResult

FEW_PATIENTS = 10
SPLITS = ("train", "val", "test")
ARM_TITLES = {
    "initial": "Initial",
    "local": "Local",
    "federated": "Federated",
    "finetuned": "Fine-tuned",
    "pooled": "Pooled",
}
METRICS: tuple[tuple[Metric, str, int], ...] = (
    ("dice", "Dice", 3),
    ("hd95", "HD95 in mm", 2),
    ("nsd", "Surface Dice (NSD)", 3),
)
STAGE_WORDS = {
    "enlist": "Enlist: count the patients",
    "train": "Train",
    "evaluate": "Evaluate",
    "own": "Evaluate each hospital’s own model",
    "release": "Release: bring the final model",
    "total": "Total",
}


def write_report(result: StudyResult, overlays: Sequence[Overlay], path: Path) -> None:
    """Write the page; an existing file is replaced in one step.

    Args:
        overlays: patients to show, of any hospitals; grouped by hospital, best to worst.
        path: the file.

    Raises:
        StorageError: it cannot be written; the page before it is untouched.
    """
    page = environment(bytes=_bytes, duration=_duration).get_template("study.html")
    write_atomically(path, page.render(_content(result, overlays)).encode())


def _content(result: StudyResult, overlays: Sequence[Overlay]) -> dict[str, Any]:
    """All that the template shows."""
    tables = [
        {"table": findings.table(result, metric), "title": title, "digits": digits}
        for metric, title, digits in METRICS
        if metric in result.plan.evaluation.metrics
    ]
    return {
        "result": result,
        "plan": result.plan,
        "verdict": findings.verdict(result),
        "tables": tables,
        "labels": {name: findings.label_means(result, name) for name in result.plan.task.labels},
        "arm_titles": ARM_TITLES,
        "splits": [s for s in SPLITS if any(site.patients.get(s) for site in result.sites)],
        "dice_chart": _dice_chart(result),
        "across": _across(result),
        "curves": _curve_charts(result),
        "overlays": _overlay_groups(result, overlays),
        "colours": label_colours(result.plan.task.labels),
        "stage_words": STAGE_WORDS,
        "sent": sent(result.plan),
        "privacy": privacy_of(result),
        "withheld": [o.name for o in outputs_of(result.plan) if o.openness == "none"],
        "stages": traffic.by_stage(result) if result.stages else (),
        "rounds": traffic.by_round(result),
        "failures": traffic.failures(result),
        "suspicious": findings.suspicious(result),
        "compared": any(a.update_norm is not None for s in result.stages for a in s.answers),
        "noisy": NOISY if result.plan.private is not None else "",
        "limits": _limits(result),
        "settings": _settings(result),
        "partial": _partial(result),
        "parameters": _parameters(result),
        "started": date(result.run.started),
    }


def _dice_chart(result: StudyResult) -> str | None:
    """Every patient's Dice as a data URI, or None where nobody has one."""
    values: dict[str, dict[str, list[float]]] = {site.name: {} for site in result.sites}
    for name in findings.ARMS:
        for patient in arm.patients if (arm := result.arm(name)) else ():
            if patient.mean_dice is not None:
                by_arm = values.setdefault(patient.site, {})
                by_arm.setdefault(name, []).append(patient.mean_dice)
    return data_uri(dice_chart(values), "svg+xml") if any(values.values()) else None


def _across(result: StudyResult) -> dict[str, Any] | None:
    """The shared model over hospitals: as it is, and as a coordinator would know it.

    None where there is nothing to compare, as with a single hospital.
    """
    found = crosssite.simulated(result)
    said = () if found is None else crosssite.sentences(found)
    if not said:
        return None
    sites = [site.name for site in result.sites]
    own = ownmodels.own_models(result.plan, result.stages, sites)
    return {
        "found": found,
        "said": said,
        "known": crosssite.across(result.plan, result.stages, sites),
        "titles": {metric: title for metric, title, _ in METRICS},
        "standing": crosssite.STANDING_WORDS,
        "own": ownmodels.beside_table(result.plan, own),
        "own_models": _own_models(own, sites),
        "sites": sites,
    }


def _own_models(found: ownmodels.OwnModels | None, sites: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each own model: worst, spread, mean, then its Dice at every hospital."""
    rows = []
    for owner, across in (found.measured if found else {}).items():
        dice = {s.site: s.values.get("dice") for s in across.scores}
        rows.append(
            {
                "owner": owner,
                "spread": ownmodels.dice_of(across),
                "dice": [dice.get(site) for site in sites],
            }
        )
    return rows


def _curve_charts(result: StudyResult) -> list[dict[str, str]]:
    """Loss and Dice by round as data URIs, as far as the sites sent them."""
    charts = []
    for metric, title, label in (
        ("loss", "Training loss", "Loss (Dice + cross-entropy)"),
        ("dice", "Dice on held-back patients (val)", "Dice (mean over labels)"),
    ):
        lines: dict[str, dict[int, float]] = {}
        for point in points(result):
            if point.metric == metric and not point.label:
                lines.setdefault(point.site, {})[point.round] = point.value
        curves = [
            Curve(site or "all, mean", tuple(line), tuple(line.values()), bold=site == ALL)
            for site, line in sorted(lines.items(), key=lambda item: (item[0] == ALL, item[0]))
        ]
        if curves:
            mean = curves[-1]
            alt = (
                f"{title} by round, one line a hospital and the mean in bold: the mean goes from "
                f"{findings.number(mean.values[0])} in round {mean.rounds[0]} to "
                f"{findings.number(mean.values[-1])} in round {mean.rounds[-1]}."
            )
            svg = curve_chart(curves, label)
            charts.append({"uri": data_uri(svg, "svg+xml"), "title": title, "alt": alt})
    return charts


def _overlay_groups(
    result: StudyResult, overlays: Sequence[Overlay]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Pictures by hospital, in the order best, median, worst."""
    ordered = sorted(overlays, key=lambda o: (o.site, RANKS.index(o.rank), o.patient))
    groups = []
    for site, members in groupby(ordered, lambda overlay: overlay.site):
        shown = []
        for overlay in members:
            plain, outlined = overlay_pictures(overlay, result.plan.task.labels)
            shown.append(
                {
                    "overlay": overlay,
                    "plain": data_uri(plain, "jpeg"),
                    "outlined": data_uri(outlined, "jpeg"),
                }
            )
        groups.append((site, shown))
    return groups


def _limits(result: StudyResult) -> list[str]:
    """What the numbers of this very study do not say."""
    limits = []
    arm = result.arm("federated")
    sizes = {site.name: len(arm.of_site(site.name)) if arm else 0 for site in result.sites}
    none = [name for name, size in sizes.items() if size == 0]
    few = [f"{name} ({size})" for name, size in sizes.items() if 0 < size < FEW_PATIENTS]
    if none:
        limits.append(f"No patients were held back for measuring at {', '.join(none)}.")
    if few:
        limits.append(
            f"Fewer than {FEW_PATIENTS} patients were measured at {', '.join(few)}: intervals from "
            f"so few are wide, and often still too narrow; of fewer than {FEWEST} there is none."
        )
    limits.append(
        "Intervals say how much the means would vary with other patients of the same kind. They do "
        "not hold the chance of training itself: one run, one seed."
    )
    if len(result.arms) > 1:
        limits.append(
            "The arms did not necessarily train equally long; see “Compute” before comparing them."
        )
    limits += _about_own_models(result)
    limits.append(
        "Hospitals may differ in scanners, patients and in who drew the labels; a low score does "
        "not tell which."
    )
    limits.append(
        "All hospitals were simulated on one computer. Networks, firewalls and absent staff were "
        "not part of the study."
    )
    limits.append("Research software: nothing on this page supports a clinical decision.")
    return limits


def _about_own_models(result: StudyResult) -> list[str]:
    """What fine-tuned models are, and where there is none."""
    own, shared = result.arm("finetuned"), result.arm("federated")
    if own is None:
        return []
    said = [
        "Fine-tuned models were trained on each hospital’s own patients and stay there: no "
        "guarantee covers them."
    ]
    same = [site for site, model in own.models.items() if shared and model == shared.models[site]]
    if same:
        said.append(
            f"At {', '.join(same)} fine-tuning found nothing better for the patients who tell when "
            "to stop, or had too few patients: the shared model is measured there."
        )
    return said


def _settings(result: StudyResult) -> str:
    """The plan as YAML, its long list of tensors left to the plan itself."""
    value = result.plan.model_dump(mode="json")
    if value["initial"]:
        value["initial"]["tensors"] = f"{len(value['initial']['tensors'])} tensors"
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None))


def _partial(result: StudyResult) -> dict[str, str]:
    """What each hospital annotates, in words; empty where all annotate everything."""
    labels = result.plan.task.labels
    told: dict[str, str] = {}
    for site in result.sites:
        own = tuple(labels) if site.annotated is None else site.annotated
        lacking = [name for name in labels if name not in own]
        told[site.name] = ", ".join(own)
        if lacking:
            told[site.name] += f"; not annotated here: {', '.join(lacking)}"
    return told if any("not annotated" in words for words in told.values()) else {}


def _parameters(result: StudyResult) -> int | None:
    """Numbers in one model, or None where the plan was not built."""
    initial = result.plan.initial
    if initial is None:
        return None
    return sum(prod(tensor.shape) for tensor in initial.tensors)


def _bytes(size: int) -> str:
    """A size in decimal units: 950 B, 4.9 MB."""
    amount, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 999.95 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def _duration(seconds: float) -> str:
    """A time for people: 41 s, 5 min 12 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
