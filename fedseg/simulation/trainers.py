"""The trainers of a simulation's sites, made where their first task is worked on.

An engine asks for the trainer of a node; it is kept until the study ends. A rehearsed fault stands
between the engine and an honest trainer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from flwr.app import Context

from fedseg.imaging.cases import Cohort
from fedseg.plan import StudyPlan
from fedseg.security.consent import Consent
from fedseg.simulation.attacks import Handle, Means, label_swapped
from fedseg.simulation.federation import Federation, site_folder
from fedseg.simulation.rehearsal import Fault, with_faults
from sites.journal import Journal

PARTITION = "partition-id"


class SimulatedSites:
    """Finds the trainer of a Flower node; it travels to Ray's workers, trainers are made there.

    Args:
        federation: the sites.
        patience_s: how long a task may keep its worker; None where the engine itself sees to it.
    """

    def __init__(self, federation: Federation, patience_s: float | None = None) -> None:
        self._federation = replace(federation, initial={})  # it travels with every message
        self._patience_s = patience_s

    def __call__(self, context: Context) -> Handle:
        """The `handle` of the site with this node's partition number."""
        cohort = self._federation.cohorts[int(context.node_config[PARTITION])]
        key = (str(self._federation.folder), cohort.site)
        if key not in _TRAINERS:
            _TRAINERS[key] = _make_handle(self._federation, cohort)
        if self._patience_s is None:
            return _TRAINERS[key]
        return _bounded(_TRAINERS[key], self._patience_s)


_TRAINERS: dict[tuple[str, str], Handle] = {}


def forget_trainers(federation: Federation) -> None:
    """Free the networks and prepared cases of a study's trainers in this process."""
    for cohort in federation.cohorts:
        _TRAINERS.pop((str(federation.folder), cohort.site), None)


def _make_handle(federation: Federation, cohort: Cohort) -> Handle:
    """A trainer's `handle`, with the faults that are rehearsed at this site."""
    import torch

    folder = site_folder(federation.folder, cohort.site)
    torch.set_num_threads(federation.plan.training.threads)
    try:
        handle = _trained_at(federation, cohort, folder)
        own = [fault for fault in federation.faults if fault.site == cohort.site]
        return with_faults(handle, own, _means(federation, cohort, folder, own)) if own else handle
    except Exception as error:
        Journal(folder / "journal.jsonl").write("failed", reason=f"no trainer: {error}")
        raise


def _means(federation: Federation, cohort: Cohort, folder: Path, own: Sequence[Fault]) -> Means:
    """What a site's attacks need: a trainer on exchanged labels, and one of every colluder's data.

    They work in folders of their own inside the attacker's, and count as nobody's compute.
    """
    kinds = {fault.kind for fault in own}
    swapped, colluders = None, {}
    if "label_swap" in kinds:
        exchanged = label_swapped(cohort, federation.plan.task)
        swapped = _trained_at(federation, exchanged, folder / "attack" / "labels")
    if "alie" in kinds:
        together = {fault.site for fault in federation.faults if fault.kind == "alie"}
        colluders = {
            other.site: _trained_at(federation, other, folder / "attack" / other.site)
            for other in federation.cohorts
            if other.site in together - {cohort.site}
        }
    return Means(federation.plan.training.seed, swapped, colluders)


def _trained_at(federation: Federation, cohort: Cohort, folder: Path) -> Handle:
    """The `handle` of an honest trainer, which remembers its rounds in a folder."""
    from fedseg.imaging.cache import CaseCache
    from fedseg.simulation.accounts import account_of, seeded
    from sites.trainer import Trainer

    plan, noise = federation.plan, seeded(federation.noise_seed)
    return Trainer(
        plan,
        cohort,
        CaseCache(federation.cache, plan.task),
        folder,
        models=folder / "models",
        left_out=federation.left_out.get(cohort.site, 0),
        device=federation.device,
        account=account_of(plan, folder) if plan.private is not None else None,
        noise=noise,
        vouch=_vouched(plan, cohort.site),
    ).handle


def _vouched(plan: StudyPlan, site: str) -> Callable[[str], Consent]:
    """Who simulates has the data of all: every site lets its own model go, and nobody signs."""
    return lambda model: Consent(study=plan.study, plan=plan.digest, site=site, model=model)


def _bounded(handle: Handle, patience_s: float) -> Handle:
    """The same `handle`, but a task that takes too long raises TimeoutError and is left behind."""

    def bounded(task: bytes) -> bytes:
        answer: Future[bytes] = Future()

        def work() -> None:
            try:
                answer.set_result(handle(task))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=work, daemon=True, name="fedseg-task").start()
        return answer.result(timeout=patience_s)

    return bounded
