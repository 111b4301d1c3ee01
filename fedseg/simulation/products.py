"""What a simulated study leaves behind: models, result, curves, card and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedseg.durable import write_atomically
from fedseg.learning.finetuned import save_finetuned
from fedseg.modelfile import LOCAL, save_model
from fedseg.result import StudyResult
from fedseg.simulation.federation import Federation
from fedseg.simulation.finetuning import OwnModels
from fedseg.simulation.overlays import overlays_of
from fedseg.simulation.running import Finished
from fedseg.simulation.scoring import Scorer, released, used_at


def write_products(
    result: StudyResult,
    trained: Mapping[str, Finished],
    own: OwnModels | None,
    whole: Federation,
    scorer: Scorer,
    out: Path,
) -> None:
    """Write models, curves, card and report, and last of all the result.

    Args:
        trained: every arm by name.
        own: of hospitals that fine-tuned.
        whole: the federation as it was trained.
        scorer: holds the patients on whom everything was measured.
        out: the study's folder.

    Raises:
        StorageError: the folder cannot be written.
    """
    from fedseg.reports.card import card_of_result
    from fedseg.reports.cardpage import CARD, write_card
    from fedseg.reports.curves import write_curves
    from fedseg.reports.study import write_report

    rounds = result.plan.aggregation.rounds
    for key, finished in trained.items():
        name = "model" if key == "federated" else "model-" + key.replace(":", "-")
        arm = key.partition(":")[0]
        mode = 0o600 if arm == LOCAL else 0o644
        model = released(finished.state, finished.plan)
        seeded = whole.noise_seed is not None and finished.plan.private is not None
        path = out / f"{name}.safetensors"
        save_model(path, finished.plan, model, arm=arm, rounds=rounds, seeded=seeded, mode=mode)
    for site, tuned in own.tuned.items() if own else ():
        path, released_ = out / f"model-finetuned-{site}.safetensors", result.model_digest
        save_finetuned(path, result.plan, tuned, rounds=rounds, released=released_)
    final = released(trained["federated"].state, result.plan)
    overlays = overlays_of(
        result,
        lambda site: scorer.holding(used_at(whole, site, final)),
        scorer.federation.cohorts,
        scorer.cache,
        scorer.split,
    )
    write_card(card_of_result(result), out / CARD)
    write_curves(result, out)
    write_report(result, overlays, out / "report.html")
    write_atomically(out / "result.json", result.to_json().encode())
