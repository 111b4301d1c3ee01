"""The end of every simulated study: each hospital fine-tunes what it would use, for itself.

A hospital does here what `fedseg-site finetune` does there. One with too few patients uses the
shared model as it is. Nothing of this is shared, and no guarantee covers it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort, Split
from fedseg.imaging.fingerprint import fingerprint
from fedseg.learning.finetune import Finetuning
from fedseg.learning.finetuned import Finetuned, finetune_to_the_end
from fedseg.learning.stopping import TooFewError, divided
from fedseg.simulation.federation import Federation, site_folder
from sites.patients import PreparedPatients

SIMULATED = Finetuning(steps=100, check_every=20, patience=2)
KEPT = "finetuning.safetensors"
_MEMORY_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class OwnModels:
    """What the hospitals made of the shared model.

    Attributes:
        tuned: site -> its fine-tuned model.
        reasons: site -> why it uses the shared model as it is.
        cpu_s: CPU seconds, all hospitals together; what a kill took is not counted.
    """

    tuned: Mapping[str, Finetuned]
    reasons: Mapping[str, str]
    cpu_s: float

    @property
    def steps(self) -> int:
        """Gradient steps, all hospitals together."""
        return sum(tuned.steps for tuned in self.tuned.values())


def finetune_everywhere(
    whole: Federation,
    model_at: Callable[[str], Mapping[str, NDArray[Any]]],
    settings: Finetuning,
    *,
    final: Split,
    folder: Path,
    say: Callable[[str], None],
) -> OwnModels:
    """Fine-tune at every hospital, or go on with what was killed.

    Args:
        model_at: what a hospital uses once the study is over.
        settings: their seed is replaced by the plan's.
        final: the split that everything is measured on.
        folder: of the checkpoints.
        say: is told what is done.

    Raises:
        DataError: the folder holds fine-tuning by other settings; and as `finetune`.
        NotFiniteError: training ran away.
    """
    settings = settings.model_copy(update={"seed": whole.plan.training.seed})
    cache = CaseCache(whole.cache, whole.plan.task)
    data = fingerprint(whole.cohorts)
    tuned: dict[str, Finetuned] = {}
    reasons: dict[str, str] = {}
    clock = time.process_time()
    for number, cohort in enumerate(whole.cohorts, start=1):
        say(f"fine-tuning at {cohort.site} ({number} of {len(whole.cohorts)})")
        kept = site_folder(folder, cohort.site) / KEPT
        try:
            parts = divided(cohort, seed=settings.seed, final=final)
        except TooFewError as error:
            reasons[cohort.site] = str(error)
            say(f"{cohort.site} uses the shared model as it is: {error}")
            continue
        tuned[cohort.site] = finetune_to_the_end(
            whole.plan,
            model_at(cohort.site),
            _prepared(parts.training, cache),
            _prepared(parts.stopping, cache),
            settings,
            site=cohort.site,
            kept=kept,
            data=data[cohort.site],
            device=whole.device,
        )
    return OwnModels(tuned, reasons, round(time.process_time() - clock, 2))


def _prepared(cohort: Cohort, cache: CaseCache) -> PreparedPatients:
    """Patients whose cases are loaded when they are drawn."""
    return PreparedPatients(cohort, cache, _MEMORY_BYTES)
