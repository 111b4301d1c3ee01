"""`fedseg-site validate`: what models are worth on this hospital's own held-back patients.

Each case that was measured is kept under a digest of model, case and settings, so that a validation
that was killed goes on, and one with another model measures only that. The result and its page name
patients: they are for their owner alone and nothing of them leaves. At a site the audit has an
entry with the result's digest before anybody can accept a model on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from torch import nn

from fedseg.durable import write_atomically
from fedseg.errors import DataError
from fedseg.evaluation.calibration import Reliability
from fedseg.evaluation.inference import predict_mask
from fedseg.evaluation.measuring import (
    CaseRecord,
    Measuring,
    measure_case,
    patient_of,
    reliability_of,
)
from fedseg.evaluation.observations import PatientValidation
from fedseg.evaluation.thresholds import Thresholds
from fedseg.evaluation.validating import Setting, validated
from fedseg.evaluation.validation import Candidate, ValidationResult
from fedseg.imaging.cache import CaseCache
from fedseg.learning.repeatable import repeatable
from fedseg.modelfile import ModelHeader, load_model
from fedseg.models.devices import require_device
from fedseg.models.zoo import build_network, load_tensors
from sites.audit import record, utc_now
from sites.folder import SiteFolder
from sites.heldback import HeldBack, House
from sites.notes import write_note
from sites.rights import as_owner_of, make_folder

if TYPE_CHECKING:
    from fedseg.imaging.cases import Case
    from fedseg.reports.figures import Overlay

RESULT, REPORT, MEASURED = "validation.json", "report.html", "measured"
MAX_RECORD_BYTES = 1024 * 1024
PREPARED_BY = ("dimensions", "spacing_mm", "normalisation")
NAMES = {"federated": "global", "personal": "own"}
_TRAINED_ON = {
    "federated": "patients of every hospital of {study}, {rounds} rounds",
    "personal": "patients of every hospital of {study}, {rounds} rounds, and with a part or all of "
    "it patients of this hospital alone",
    "finetuned": "patients of every hospital of {study}, {rounds} rounds, then patients of this "
    "hospital alone",
    "local": "patients of this hospital alone",
    "pooled": "patients of every hospital of {study}, in one place",
    "initial": "no patient of {study}: it is what the study starts from",
}


@dataclass(frozen=True)
class Entrant:
    """A model file that is to be compared."""

    path: Path
    header: ModelHeader
    candidate: Candidate


@dataclass(frozen=True)
class Wanted:
    """How a validation is to be done.

    Attributes:
        lesions: labels that are lesions.
        tolerance_mm: of surface Dice; None takes that of the first model's plan.
        thresholds: as set beforehand.
        suppress_below: smaller subgroups are suppressed.
    """

    lesions: tuple[str, ...] = ()
    tolerance_mm: float | None = None
    thresholds: Thresholds | None = None
    suppress_below: int = 5


def entrants(paths: Sequence[Path], local: Path | None) -> tuple[Entrant, ...]:
    """The models to compare, each with a name of its own.

    Args:
        local: a model file that was trained here alone, whatever it says.

    Raises:
        DataError: none, one twice, or models of different channels or labels.
        TrustError: a file is no model.
    """
    files = [*paths, *((local,) if local else ())]
    if not files:
        raise DataError("name at least one model file, or one with --local")
    headers = [load_model(path)[0] for path in files]
    kinds = [NAMES.get(header.arm, header.arm) for header in headers]
    if local is not None:
        kinds[-1] = "local"
    names = [
        kind if kinds.count(kind) == 1 else f"{kind} ({path.stem})"
        for kind, path in zip(kinds, files, strict=True)
    ]
    digests = [header.model_digest for header in headers]
    if len(set(digests)) < len(digests) or len(set(names)) < len(names):
        raise DataError("two of the files hold the same model, or have the same name: name it once")
    task = headers[0].plan.task
    for header in headers:
        own = header.plan.task
        if (own.labels, own.channels) != (task.labels, task.channels):
            raise DataError(
                "the models have different channels or labels, so they cannot be compared on the "
                "same patients: validate those of one task together"
            )
    return tuple(
        Entrant(path, header, _candidate(name, kind, path, header))
        for name, kind, path, header in zip(names, kinds, files, headers, strict=True)
    )


def validate_here(
    found: Sequence[Entrant],
    patients: HeldBack,
    wanted: Wanted,
    *,
    site: str,
    cache: Path,
    measured: Path,
    device: str,
    created: str,
    notes: tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda _case: None,
) -> tuple[ValidationResult, list[Overlay]]:
    """Measure every model on every held-back patient, and draw the worst.

    Args:
        site: what the hospital is called.
        cache: of prepared cases.
        measured: a folder, where measured cases are kept and found; made when one is kept.
        created: ISO 8601, UTC.
        notes: more warnings.
        progress: called once for each case of each model.

    Returns:
        The result, and the pictures that its page wants.

    Raises:
        DataError: a lesion label is unknown, or a case cannot be read.
        StorageError: a record cannot be written.
    """
    require_device(device)
    plan = found[0].header.plan
    unknown = sorted(set(wanted.lesions) - set(plan.task.labels))
    if unknown:
        known = ", ".join(plan.task.labels)
        raise DataError(f"--lesions names {unknown[0][:80]!r}, but the labels are: {known}")
    tolerance_mm = wanted.tolerance_mm or plan.evaluation.tolerance_mm
    rows: dict[str, list[PatientValidation]] = {}
    voxels: dict[str, list[Reliability]] = {}
    for each in found:
        how = Measuring(each.header.plan, patients.cohort.label_map, wanted.lesions, tolerance_mm)
        model = _Model(each, device, CaseCache(cache, each.header.plan.task))
        name = each.candidate.name
        rows[name], voxels[name] = [], []
        for patient, cases in patients.cohort.by_patient():
            records = [_measured(model, case, how, measured, progress) for case in cases]
            rows[name].append(patient_of(name, patient, records))
            voxels[name].append(reliability_of(records))
    setting = Setting(
        site=site,
        created=created,
        split=patients.split,
        tolerance_mm=tolerance_mm,
        labels=plan.task.labels,
        suppress_below=wanted.suppress_below,
        lesions=wanted.lesions,
        left_out=patients.left_out,
        traits=patients.traits,
        thresholds=wanted.thresholds,
        notes=(*notes, *_prepared_apart(found)),
    )
    result = validated([each.candidate for each in found], rows, voxels, setting)
    return result, _overlays(result, found, patients, cache, device)


def keep(
    result: ValidationResult,
    overlays: Sequence[Overlay],
    found: Sequence[Entrant],
    place: Path,
    house: House | None,
    now: Callable[[], str] = utc_now,
) -> None:
    """Write the result and its page, readable by their owner alone, and audit the result.

    Args:
        place: a folder without a result.
        house: whose audit has it.

    Raises:
        TrustError: the audit was changed.
        StorageError: a file cannot be written.
    """
    from fedseg.reports.acceptance import write_acceptance

    make_folder(place)
    page, data = place / REPORT, result.model_dump_json(indent=1).encode() + b"\n"
    plans = {each.header.plan_digest: each.header.plan for each in found}
    with as_owner_of(place):
        write_acceptance(result, overlays, page, plans=plans)
        page.chmod(0o600)
    if house is not None:
        record(
            house.folder,
            house.key,
            "validated",
            now,
            study=result.study,
            name=place.name,
            validation=hashlib.sha256(data).hexdigest(),
            models=[each.candidate.model_digest for each in found],
            split=result.split,
            patients=len(result.patients_of(result.candidates[0].name)),
            thresholds=bool(result.thresholds and result.thresholds.asked),
            decision=result.verdict.decision,
            recommended=result.verdict.recommended,
        )
    write_note(place / RESULT, data)


def new_place(folder: SiteFolder, study: str, created: str) -> Path:
    """Where a new validation of a site goes: validations/STUDY-TIME."""
    moment = created.partition("+")[0].replace("-", "").replace(":", "")
    place, count = folder.validations / f"{study}-{moment}", 1
    while place.exists():
        count += 1
        place = folder.validations / f"{study}-{moment}-{count}"
    return place


def thresholds_moved(
    folder: SiteFolder, found: Sequence[Entrant], thresholds: Thresholds | None
) -> tuple[str, ...]:
    """A warning where one of the models was measured here under other thresholds before."""
    digests = {each.candidate.model_digest for each in found}
    for path in sorted(folder.validations.glob(f"*/{RESULT}")):
        try:
            before = ValidationResult.model_validate_json(path.read_bytes())
        except (ValidationError, OSError):
            continue
        same = digests & {candidate.model_digest for candidate in before.candidates}
        if same and before.thresholds != thresholds:
            return (
                "the thresholds are not those of an earlier validation of the same model "
                f"({path.parent.name}): what was changed after seeing results was not set "
                "beforehand",
            )
    return ()


def _prepared_apart(found: Sequence[Entrant]) -> Iterator[str]:
    """A warning for each way in which the models' tasks prepare the same images differently."""
    for field in PREPARED_BY:
        said: dict[str, list[str]] = {}
        for each in found:
            value = each.header.plan.task.model_dump(mode="json")[field]
            said.setdefault(json.dumps(value), []).append(each.candidate.name)
        if len(said) > 1:
            ways = "; ".join(f"{', '.join(names)}: {value}" for value, names in said.items())
            yield (
                f"the models' images are not prepared alike ({field} is {ways}): what differs "
                "between them is not the training alone"
            )


class _Model:
    """A candidate's network, loaded when the first case needs it."""

    def __init__(self, entrant: Entrant, device: str, cache: CaseCache) -> None:
        self.entrant, self.cache = entrant, cache
        self._device = device
        self._network: nn.Module | None = None

    @property
    def network(self) -> nn.Module:
        """The network with the model in it."""
        if self._network is None:
            plan = self.entrant.header.plan
            self._network = build_network(plan.model, plan.task)
            load_tensors(self._network, load_model(self.entrant.path)[1])
            self._network.to(self._device)
        return self._network


def _measured(
    model: _Model, case: Case, how: Measuring, kept: Path, progress: Callable[[str], None]
) -> CaseRecord:
    """A case's record: the one that is kept, or a new one."""
    key = how.key(model.entrant.header.model_digest, case)
    path = kept / f"{key}.json"
    found = _kept(path, key)
    if found is None:
        found = measure_case(model.network, case, model.cache, how, key)
        make_folder(make_folder(kept.parent) / kept.name)
        write_atomically(path, found.model_dump_json().encode(), mode=0o600)
    progress(case.name)
    return found


def _kept(path: Path, key: str) -> CaseRecord | None:
    """What was kept of a case; a record that is damaged is measured again."""
    if not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
        return None
    try:
        found = CaseRecord.model_validate_json(path.read_bytes())
    except ValidationError:
        return None
    return found if found.key == key else None


def _overlays(
    result: ValidationResult,
    found: Sequence[Entrant],
    patients: HeldBack,
    cache: Path,
    device: str,
) -> list[Overlay]:
    """The pictures that the page wants: a patient's first case, as the shown model sees it."""
    from fedseg.reports.acceptance import patients_to_show, shown_candidate
    from fedseg.reports.figures import Overlay

    shown = shown_candidate(result)
    entrant = next(each for each in found if each.candidate == shown)
    plan = entrant.header.plan
    model = _Model(entrant, device, CaseCache(cache, plan.task))
    cases, scores = dict(patients.cohort.by_patient()), result.patients_of(shown.name)
    pictures = []
    for patient in patients_to_show(result):
        prepared = model.cache.load(cases[patient][0], patients.cohort.label_map)
        assert prepared.label is not None  # a case without one is not held back
        with repeatable(plan.training.threads, 0, next(model.network.parameters()).device):
            mask = predict_mask(model.network, prepared, plan.task, plan.evaluation.overlap)
        pictures.append(
            Overlay(
                site=result.site,
                patient=patient,
                rank="worst",
                dice=next(each.dice for each in scores if each.patient == patient),
                image=prepared.image[0],
                truth=prepared.label,
                prediction=mask,
                spacing_mm=prepared.spacing_mm,
            )
        )
    return pictures


def _candidate(name: str, kind: str, path: Path, header: ModelHeader) -> Candidate:
    """What a result says of a model file."""
    arm = "local" if kind == "local" else header.arm
    trained_on = _TRAINED_ON.get(arm, "as its file says: {arm}").format(
        study=header.plan.study, rounds=header.rounds, arm=arm
    )
    return Candidate(
        name=name,
        file=path.name,
        model_digest=header.model_digest,
        plan_digest=header.plan_digest,
        study=header.plan.study,
        arm=header.arm,
        rounds=header.rounds,
        released=header.released,
        private=header.private,
        trained_on=trained_on,
    )
