"""What a caller asks of a simulated study beside its plan, and what it is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from coordinator.rounds.events import Event
from fedseg.learning.finetune import Finetuning
from fedseg.simulation.baselines import Baseline
from fedseg.simulation.engines import Engine
from fedseg.simulation.finetuning import SIMULATED
from fedseg.simulation.rehearsal import Fault


@dataclass(frozen=True)
class Options:
    """How a study is simulated; none of it changes what the plan asks for.

    Attributes:
        engine: `inprocess`, or `ray` for several workers at once.
        resume: go on with what lies in the output folder.
        baselines: which arms to train beside the federation.
        faults: hospitals that fail on purpose.
        table: which CSV of the data folder to read.
        partition: divide data that name no sites: `iid` or `dirichlet:ALPHA`.
        sites: how many sites to divide them into; 5 where it is not said.
        device: of torch.
        initial: start from this model instead of the plan's seed (its digest is the plan's).
        noise_seed: repeats the noise of a private plan: everything is marked as not private.
        without: (site, label): what a hospital is trained as if it did not annotate. Models are
            still measured on all that is drawn there.
        finetune: how each hospital fine-tunes in the end; None leaves it out.
    """

    engine: Engine = "inprocess"
    resume: bool = False
    baselines: tuple[Baseline, ...] = ()
    faults: tuple[Fault, ...] = ()
    table: str | None = None
    partition: str | None = None
    sites: int | None = None
    device: str = "cpu"
    initial: Mapping[str, NDArray[Any]] | None = None
    noise_seed: int | None = None
    without: tuple[tuple[str, str], ...] = ()
    finetune: Finetuning | None = SIMULATED


@dataclass(frozen=True)
class Progress:
    """An event of one arm; `arm` is federated, pooled or local:SITE."""

    arm: str
    event: Event | str


Watcher = Callable[[Progress], None]
