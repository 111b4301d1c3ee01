"""`fedseg-site train-local`: a model that this hospital trains without the others.

It is trained as the study that the hospital approved is trained (network, preparation, steps,
losses, seed), on this hospital's patients alone, less those who withdrew, so that `validate` can
say what taking part is worth here. It comes from patients without a guarantee, so it does not
leave: it is written for its owner alone, says `local` in its header, and no study can start from
it. The audit has an entry before the file is there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedseg.aggregation.server import Model
from fedseg.alone import plan_alone
from fedseg.arrays import Arrays, digest_of
from fedseg.errors import DataError
from fedseg.evaluation.evaluate import labelled
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort
from fedseg.learning.alone import train_alone
from fedseg.learning.stopping import LEAST_TRAINED, TooFewError
from fedseg.modelfile import LOCAL, load_model, save_model
from fedseg.models.devices import require_device
from fedseg.models.zoo import initial_model
from fedseg.plan import StudyPlan
from sites.audit import record, utc_now
from sites.finetuning import UNFINISHED, require_new
from sites.heldback import House
from sites.origins import keep_note
from sites.own_patients import Patients
from sites.patients import PreparedPatients
from sites.rights import as_owner_of

TRAINED = "trained_locally"


def start_of(plan: StudyPlan, given: Path | None) -> Model:
    """The tensors that a study starts from: those of a file, or of the plan's seed.

    Raises:
        DataError: the file is another model, or the seed does not give the study's.
        TrustError: the file is no model.
    """
    model = initial_model(plan)[1] if given is None else load_model(given)[1]
    if digest_of(model) == plan.built.digest:
        return model
    if given is None:
        raise DataError(
            f"{plan.study} starts from a model that its seed does not give here (it was trained "
            "before, or torch has another version): ask the consortium for the file "
            "*.initial.safetensors beside its plan, and name it with --initial"
        )
    raise DataError(
        f"{given.name} is not the model that {plan.study} starts from: its digest is "
        f"{digest_of(model)[:12]}, the plan says {plan.built.digest[:12]}; ask the consortium for "
        "the file *.initial.safetensors beside its plan"
    )


def trainable(patients: Patients) -> Cohort:
    """The patients of `train`.

    Raises:
        TooFewError: too few of them have a label.
    """
    train = patients.cohort.split("train")
    count = len(labelled(train).patients)
    if count < LEAST_TRAINED:
        raise TooFewError(
            f"a local model needs at least {LEAST_TRAINED} labelled patients in the split train, "
            f"and there {'is' if count == 1 else 'are'} {count or 'none'}: label more, then "
            "`fedseg-site plan approve` with the new data"
        )
    return train


def train_here(
    plan: StudyPlan,
    initial: Model,
    patients: Patients,
    owner: House,
    *,
    out: Path,
    device: str,
    progress: Callable[[float], None],
    now: Callable[[], str] = utc_now,
) -> tuple[float, ...]:
    """Train a model alone into a file, or go on with what was killed.

    Args:
        plan: of the study, as it was approved.
        initial: what the study starts from.
        owner: whose audit has it.
        out: a new model file.
        progress: is told of every round's mean loss, of those before a kill at once.

    Returns:
        The mean loss of each round.

    Raises:
        DataError: `out` is there, too few patients, or other training was begun there.
        PlanError: the network has nothing to train as the plan says.
        NotFiniteError, RoundError: training ran away.
        TrustError, StorageError: a file cannot be trusted or written.
    """
    require_device(device)
    require_new(out)
    train, own = trainable(patients), plan_alone(plan)
    kept = out.with_name(out.name + UNFINISHED)
    with as_owner_of(owner.folder.trainer):
        model, losses = train_alone(
            own,
            initial,
            PreparedPatients(train, CaseCache(owner.folder.cache, own.task)),
            site=train.site,
            kept=kept,
            data=patients.fingerprint,
            device=device,
            progress=progress,
        )
    _audit(owner, plan, own, model, train, out, now)
    with as_owner_of(owner.folder.trainer):
        save_model(out, own, model, arm=LOCAL, rounds=own.aggregation.rounds, mode=0o600)
        kept.unlink(missing_ok=True)
    return losses


def _audit(
    owner: House,
    plan: StudyPlan,
    own: StudyPlan,
    model: Arrays,
    train: Cohort,
    out: Path,
    now: Callable[[], str],
) -> None:
    """Enter what was made of whom, by which approved plan."""
    record(
        owner.folder,
        owner.key,
        TRAINED,
        now,
        study=plan.study,
        plan=plan.digest,
        start=plan.built.digest,
        model=digest_of(model),
        file=out.name,
        trained_on=keep_note(owner.folder, owner.key, train.patients),
        rounds=own.aggregation.rounds,
        steps=own.aggregation.rounds * own.training.steps_per_round,
        training_patients=len(train.patients),
    )
