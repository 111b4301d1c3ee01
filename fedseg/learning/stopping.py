"""Which of a hospital's patients fine-tuning trains on, and which tell it when to stop.

Whoever tells when to stop may not be trained on, and may not be among those on whom the result is
measured in the end. Where a cohort has a split `test`, that is the final test, and `val` tells when
to stop. Where it has none, `val` is kept for the final measurement, and every fifth patient of
`train`, at least one, is taken out of it. The shared model may have been trained on these: they
then speak for it, and against what fine-tuning makes of it, never the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedseg.arrays import seed_for
from fedseg.errors import DataError
from fedseg.evaluation.evaluate import labelled
from fedseg.imaging.cases import Cohort, Split

LEAST_TRAINED = 2
TAKEN = 5


class TooFewError(DataError):
    """A cohort has too few labelled patients to fine-tune on."""


@dataclass(frozen=True)
class Division:
    """A cohort's labelled patients in three parts that share nobody.

    Attributes:
        training: what fine-tuning follows.
        stopping: what tells it when to stop.
        final: the split that neither touches.
    """

    training: Cohort
    stopping: Cohort
    final: Split


def divided(cohort: Cohort, *, seed: int, final: Split | None = None) -> Division:
    """Divide a cohort for fine-tuning, by patient.

    Args:
        cohort: usable cases of one site; unlabelled ones play no part.
        seed: of who is taken out of `train`; the same patients give the same parts.
        final: where the result will be measured; by default `test` where the cohort has labelled
            test patients, else `val`.

    Raises:
        TooFewError: too few patients; the message says how many are needed.
    """
    train, val, test = (labelled(cohort.split(name)) for name in ("train", "val", "test"))
    final = final or ("test" if test.cases else "val")
    if final == "test" and val.cases:
        _require(train, LEAST_TRAINED, "beside those of `val`, who tell when to stop")
        return Division(train, val, final)
    _require(train, LEAST_TRAINED + 1, "since one of them tells when to stop")
    names = train.patients
    rng = np.random.default_rng(seed_for(seed, cohort.site, 0, "stopping"))
    count = max(1, len(names) // TAKEN)
    taken = {names[i] for i in rng.permutation(len(names))[:count]}
    stopping = train.without(c.name for c in train.cases if c.patient not in taken)
    training = train.without(c.name for c in train.cases if c.patient in taken)
    return Division(training, stopping, final)


def _require(train: Cohort, needed: int, why: str) -> None:
    """Refuse to fine-tune on next to nobody."""
    count = len(train.patients)
    if count < needed:
        raise TooFewError(
            f"fine-tuning needs at least {needed} labelled patients in the split train, {why}, "
            f"and {'there is' if count == 1 else 'there are'} {count or 'none'}: label more, or "
            "use the shared model as it is"
        )
