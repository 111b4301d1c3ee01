"""`fedseg-site finetune`: a model trained on with this hospital's own patients, for this hospital.

What comes out was made from patients without a guarantee, so it does not leave: it is written for
its owner alone, says so in its header, and no study can start from it. Patients who withdrew are
left out. The audit has an entry for every model that was made, before its file is there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from fedseg.arrays import digest_of
from fedseg.errors import DataError
from fedseg.imaging.cache import CaseCache
from fedseg.learning.finetune import Finetuning, State
from fedseg.learning.finetuned import Finetuned, finetune_to_the_end, save_finetuned
from fedseg.learning.stopping import Division, divided
from fedseg.modelfile import ModelHeader, load_model
from fedseg.models.devices import require_device
from sites.audit import record, utc_now
from sites.heldback import House
from sites.origins import keep_note
from sites.own_patients import Patients
from sites.patients import PreparedPatients
from sites.rights import as_owner_of

UNFINISHED = ".unfinished"
VAIN = "finetuned_in_vain"


def finetune_here(
    start: Path,
    patients: Patients,
    settings: Finetuning,
    *,
    out: Path,
    cache: Path,
    owner: House | None,
    device: str,
    progress: Callable[[State], None],
    now: Callable[[], str] = utc_now,
) -> tuple[Finetuned, Division]:
    """Fine-tune a model file into another, or go on with what was killed.

    Args:
        start: the model file.
        out: a new model file.
        owner: whose audit has it; None for a researcher without a site.
        progress: is told of every look at the stopping patients.

    Returns:
        What it came to, and who was trained on. Where nothing was better than the start, no file
        was written.

    Raises:
        DataError: `out` is there, too few patients, or another fine-tuning was begun there.
        PlanError: the network has nothing to train of that kind.
        NotFiniteError: training ran away.
        TrustError, StorageError: a file cannot be trusted or written.
    """
    require_device(device)
    header, model = load_model(start)
    kept = out.with_name(out.name + UNFINISHED)
    require_new(out)
    parts = divided(patients.cohort, seed=settings.seed)
    prepared = CaseCache(cache, header.plan.task)
    with as_owner_of(owner.folder.trainer) if owner else nullcontext():
        tuned = finetune_to_the_end(
            header.plan,
            model,
            PreparedPatients(parts.training, prepared),
            PreparedPatients(parts.stopping, prepared),
            settings,
            site=patients.cohort.site,
            kept=kept,
            data=patients.fingerprint,
            device=device,
            progress=progress,
        )
    if owner is not None:
        _audit(owner, header, tuned, parts, settings, out, now)
    released = header.released or header.model_digest
    with as_owner_of(owner.folder.trainer) if owner else nullcontext():
        if tuned.best_check:
            save_finetuned(out, header.plan, tuned, rounds=header.rounds, released=released)
        kept.unlink(missing_ok=True)
    return tuned, parts


def require_new(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        DataError: something is there.
    """
    if out.exists():
        raise DataError(f"{out.name} is there already: name another file with --out")


def _audit(
    owner: House,
    start: ModelHeader,
    tuned: Finetuned,
    parts: Division,
    settings: Finetuning,
    out: Path,
    now: Callable[[], str],
) -> None:
    """Enter what was made of whom."""
    made = bool(tuned.best_check)
    seen = (*parts.training.patients, *parts.stopping.patients)
    record(
        owner.folder,
        owner.key,
        "finetuned" if made else VAIN,
        now,
        study=start.plan.study,
        plan=start.plan_digest,
        start=start.model_digest,
        model=digest_of(tuned.model) if made else None,
        file=out.name if made else None,
        trained_on=keep_note(owner.folder, owner.key, seen) if made else None,
        kind=settings.kind,
        steps=tuned.steps,
        training_patients=len(parts.training.patients),
        stopping_patients=len(parts.stopping.patients),
    )
