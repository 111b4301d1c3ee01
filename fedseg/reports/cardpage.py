"""A model card as Markdown: front matter that model hubs read, then Mitchell's sections in order.

Text from the study is escaped, so that a label's name is never markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from fedseg.durable import write_atomically
from fedseg.measures import Metric
from fedseg.reports.card import MeasuredSite, ModelCard
from fedseg.reports.crosssite import STANDING_WORDS

CARD = "model-card.md"
TITLES: dict[Metric, str] = {"dice": "Dice", "hd95": "HD95 in mm", "nsd": "Surface Dice"}
_ARMS = {
    "federated": "the study’s shared model",
    "personal": "the study’s shared model with this hospital’s own parts",
}


def write_card(card: ModelCard, path: Path) -> None:
    """Write path (Markdown) and beside it the same as .json, each in one step.

    Raises:
        StorageError: one cannot be written.
    """
    write_atomically(path.with_suffix(".json"), card.to_json().encode())
    write_atomically(path, to_markdown(card).encode())


def to_markdown(card: ModelCard) -> str:
    """The whole card; equal cards give equal text."""
    parts = [
        f"---\n{_front_matter(card)}---",
        f"# Model card: {_safe(card.study)}",
        f"**{_safe(card.guarantee[0])}**" if card.standing != "kept" else "",
        *_details(card),
        *_uses(card),
        *_factors_and_metrics(card),
        *_evaluation(card),
        *_training(card),
        *_quantities(card),
        "## Ethical considerations",
        "Images stayed in their hospitals. Privacy guarantee to the patients trained on:",
        _bullets(card.guarantee),
        "## Caveats and recommendations",
        _bullets(card.caveats),
        "Not told by anybody:",
        _bullets(card.missing),
        *_loading(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: ModelCard) -> str:
    """YAML for model hubs; results as far as they left the hospitals, the worst first."""
    tags = ["medical-imaging", "image-segmentation", "federated-learning", "fedseg"]
    tags += sorted({channel.modality.lower() for channel in card.channels})
    tags += {"kept": ["differential-privacy"], "not private": ["not-private"], "none": []}[
        card.standing
    ]
    value: dict[str, object] = {
        "library_name": "fedseg",
        "pipeline_tag": "image-segmentation",
        "tags": tags,
    }
    results = [
        {
            "task": {"type": "image-segmentation"},
            "dataset": {"name": f"held-back patients of {site.site}", "type": "not-public"},
            "metrics": [
                {"type": metric, "name": TITLES[metric], "value": round(mean, 6)}
                for metric, mean in site.means.items()
            ],
        }
        for site in card.measured
        if site.means
    ]
    if results:
        value["model-index"] = [{"name": card.study, "results": results}]
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def _details(card: ModelCard) -> list[str]:
    """Who made what, when, from which plan."""
    size = f", {card.parameters:,} parameters" if card.parameters is not None else ""
    facts = [
        ("Study", card.study),
        ("Trained as", _ARMS.get(card.arm, card.arm)),
        ("Network", f"{card.network}, version {card.network_version}{size}"),
        ("Training", f"{card.rounds} rounds of {card.steps_per_round} steps at every hospital"),
        ("Joined by", f"{card.strategy}, of at least {card.minimum_sites} hospitals a round"),
        ("Card written by", f"the {card.writer}, fedseg {card.fedseg}"),
    ]
    digests = [
        ("Plan", card.plan),
        ("Model", card.model),
        ("Made from the shared model", card.released),
        ("Started from", card.initial),
    ]
    rows = [f"- {name}: {_safe(value)}" for name, value in facts]
    rows += [f"- {name} (SHA-256): `{value}`" for name, value in digests if value]
    return ["## Model details", "\n".join(rows)]


def _uses(card: ModelCard) -> list[str]:
    """What it segments, and what nobody has tried."""
    images = ", ".join(f"{channel.name} ({channel.modality})" for channel in card.channels)
    spacing = " × ".join(f"{side:g}" for side in card.spacing_mm)
    return [
        "## Intended use",
        f"- Segmenting {_safe(', '.join(card.labels))} in {_safe(images)}, {card.dimensions}-D, "
        f"prepared at {spacing} mm.\n"
        "- Intended users: not told by the plan.",
        "Out of scope:",
        "- Other structures, channels or modalities than these: the study trained on no others.\n"
        "- A hospital that has not validated it on its own patients.\n"
        "- Decisions about a patient without a physician."
        + ("\n- Any use outside of this hospital." if card.stays else ""),
    ]


def _factors_and_metrics(card: ModelCard) -> list[str]:
    """What the numbers are split by, and what they are."""
    words: dict[Metric, str] = {
        "dice": "Dice: overlap with the segmentation drawn by hand, 0 none, 1 identical",
        "hd95": "HD95: the distance in mm that 95 % of both surfaces keep; smaller is better",
        "nsd": f"Surface Dice: the share of both surfaces within {card.tolerance_mm:g} mm",
    }
    return [
        "## Factors",
        "Numbers are given by hospital and by label. By age, sex, disease or scanner they are not "
        "told.",
        "## Metrics",
        _bullets(f"{words[metric]}." for metric in card.metrics)
        + "\n- Each is a mean over a hospital’s held-back patients.",
    ]


def _evaluation(card: ModelCard) -> list[str]:
    """On whom it was measured."""
    if not card.measured:
        return ["## Evaluation data", "Not told."]
    after = f"after round {card.measured_after}" if card.measured_after is not None else "never"
    rows = [[s.site, _count(s.patients), STANDING_WORDS[s.standing]] for s in card.measured]
    return [
        "## Evaluation data",
        f"Patients whom each hospital held back from training (split “val”), last measured "
        f"{after}. They were measured during the study too, so they are no test set.",
        _table(["Hospital", "Held-back patients", "Numbers"], rows),
    ]


def _training(card: ModelCard) -> list[str]:
    """On whom it was trained."""
    if card.training is None:
        return ["## Training data", "Not told to a hospital: who else took part, and how many."]
    rows = [[s.site, _count(s.patients), str(s.rounds)] for s in card.training]
    return [
        "## Training data",
        _table(["Hospital", "Training patients", "Rounds answered"], rows),
    ]


def _quantities(card: ModelCard) -> list[str]:
    """The worst hospital first."""
    parts = ["## Quantitative analyses", *(_safe_code(said) for said in card.findings)]
    known = [site for site in card.measured if site.means]
    if card.spread:
        head = ["Metric", "Worst", "at", "Worst against mean", "Deviation", "Jain", "Best", "Mean"]
        rows = [
            [
                TITLES[s.metric],
                _number(s.worst),
                s.worst_site,
                _number(s.worst - s.mean),
                _number(s.deviation),
                _number(s.jain, 4),
                f"{_number(s.best)} ({s.best_site})",
                _number(s.mean),
            ]
            for s in card.spread
        ]
        parts.append(_table(head, rows))
    if known:
        head = ["Hospital", *(TITLES[m] for m in card.metrics), *(f"Dice {n}" for n in card.labels)]
        parts.append(_table(head, [_row(site, card) for site in known]))
    return parts


def _row(site: MeasuredSite, card: ModelCard) -> list[str]:
    """One hospital's numbers."""
    means = [_number(site.means.get(metric)) for metric in card.metrics]
    return [site.site, *means, *(_number(site.dice.get(label)) for label in card.labels)]


def _loading(card: ModelCard) -> list[str]:
    """How it is used."""
    images = " ".join(f"IMAGE{place}" for place in range(1, len(card.channels) + 1))
    return [
        "## How to load it",
        f"The file `{card.file}` holds tensors and plan, and no code. Images go in the order of "
        f"the channels: {_safe(', '.join(channel.name for channel in card.channels))}.",
        f"```sh\nfedseg predict {card.file} {images} --out masks\n```",
        "```python\nfrom pathlib import Path\n\nfrom fedseg.modelfile import load_model\n"
        "from fedseg.models.zoo import build_network, load_tensors\n\n"
        f'header, tensors = load_model(Path("{card.file}"))\n'
        "network = build_network(header.plan.model, header.plan.task)\n"
        "load_tensors(network, tensors)\n```",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _bullets(texts: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {_safe_code(text)}" for text in texts)


def _count(patients: int | None) -> str:
    """A number of patients, or that it was not told."""
    return "not told" if patients is None else f"{patients}"


def _number(value: float | None, digits: int = 3) -> str:
    """A true minus sign, or a dash where there is no number."""
    return "–" if value is None else f"{value + 0.0:.{digits}f}".replace("-", "−")


def _cell(text: str) -> str:
    """Text of a table's cell."""
    return text if text == "---" else _safe(text)


def _safe(text: str) -> str:
    """Text that is no markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def _safe_code(text: str) -> str:
    """The same, with `commands` between backticks left as they are."""
    pieces = text.split("`")
    return "`".join(_safe(piece) if place % 2 == 0 else piece for place, piece in enumerate(pieces))
