"""One federation on one machine: a trainer for every hospital, a coordinator for all.

Flower carries the bytes between them, in this process or on Ray; the two apps are the ones that
run for real, and so is everything that they call.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from coordinator.app import make_app as make_server_app
from coordinator.rounds.events import Event, Observer, StageClosed, nobody
from coordinator.rounds.study import Study
from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.rounds import StudyState, first_state, fresh_attempts
from fedseg.aggregation.server import Model
from fedseg.errors import DataError, MissingExtraError, PlanError, RoundError
from fedseg.imaging.cases import Cohort
from fedseg.plan import StudyPlan
from fedseg.quiet import QUIET
from fedseg.result import StageRecord
from fedseg.simulation.attacks import RETRAINING, Handle, Means, label_swapped
from fedseg.simulation.inprocess import InProcessGrid
from fedseg.simulation.rehearsal import Fault, with_faults
from sites.app import make_app as make_client_app
from sites.journal import Journal

logger = logging.getLogger(__name__)

Engine = Literal["inprocess", "ray"]
CHECKPOINT = "checkpoint.safetensors"
SCRATCH = "scratch"
_PARTITION = "partition-id"
_LOOPBACK = "127.0.0.1"
_QUIET = {
    **QUIET,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: Ray takes 127.0.0.1 for its node
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Federation:
    """Everything that one simulated study needs.

    Attributes:
        plan: built.
        initial: the tensors whose digest the plan holds.
        cohorts: one a site.
        left_out: unusable cases by site, already removed from the cohorts.
        folder: the study's own place; the coordinator's checkpoint and each site's state.
        cache: prepared cases, shared by all sites of a simulation.
        device: of torch, for every trainer.
        faults: rehearsed ones.
        noise_seed: repeats the noise of a private plan, which then protects nobody.
        every_label: the plan's labels must each be annotated by a site; False for a baseline.
    """

    plan: StudyPlan
    initial: Model
    cohorts: tuple[Cohort, ...]
    folder: Path
    cache: Path
    left_out: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"
    faults: tuple[Fault, ...] = ()
    noise_seed: int | None = None
    every_label: bool = True

    @property
    def checkpoint(self) -> Path:
        """Where the coordinator's state lies."""
        return self.folder / CHECKPOINT


@dataclass(frozen=True)
class Finished:
    """A study that ran to its end.

    Attributes:
        plan: the one it ran by; a baseline's is not the federation's.
        stage_s: wall seconds of each stage of the history; 0 where a kill lost the note of it.
        cpu_s: CPU seconds of training, rounds that were repeated after a kill included.
    """

    plan: StudyPlan
    state: StudyState
    stage_s: tuple[float, ...]
    cpu_s: float


def run_federation(
    federation: Federation,
    *,
    engine: Engine = "inprocess",
    resume: bool = False,
    observe: Observer = nobody,
    arrange: Callable[[list[int]], list[int]] = sorted,
) -> Finished:
    """Run a study to its end, or go on with one that was stopped.

    Args:
        resume: continue from the checkpoint where there is one; without it there must be none.
        observe: is told of every event.
        arrange: the order in which the in-process engine serves nodes; it changes no result.

    Raises:
        PlanError: see `require_sites`.
        RoundError: too few sites answered as often as the plan allows; a checkpoint that is not
            to be overwritten.
        PrivacyError: a private plan's noise is weaker than its promise.
    """
    plan = federation.plan
    require_sites(federation)
    state = _starting_state(federation, resume)
    _register(federation)
    seconds = Journal(federation.folder / "stages.jsonl")
    store = _CheckpointStore(federation.checkpoint, plan)

    def timed(event: Event) -> None:
        if isinstance(event, StageClosed):
            seconds.write("stage", at=_key(event.record), wall_s=round(event.wall_s, 3))
        observe(event)

    if state.position is not None:

        def run(grid: Grid) -> None:
            nodes = len(federation.cohorts)
            study = Study(
                grid,
                plan,
                store,
                nodes=nodes,
                observe=timed,
                every_label=federation.every_label,
                scratch=federation.folder / SCRATCH,
            )
            study.run(state)

        try:
            with _quiet():
                if engine == "ray":
                    _run_on_ray(federation, run)
                else:
                    run(_inprocess_grid(federation, arrange))
        finally:
            _forget_trainers(federation)
    finished = _without_heads(load_state(federation.checkpoint, plan))
    spent = {entry["at"]: entry["wall_s"] for entry in seconds.read("stage")}
    return Finished(
        plan=plan,
        state=finished,
        stage_s=tuple(spent.get(_key(record), 0.0) for record in finished.history),
        cpu_s=sum(_compute_of(federation, cohort.site) for cohort in federation.cohorts),
    )


def require_sites(federation: Federation) -> None:
    """Check that the data have the sites that are asked for.

    Raises:
        PlanError: the plan wants more sites than there are, or a fault one that is not there.
        DataError: too few of the sites have a patient to train on.
    """
    names = [cohort.site for cohort in federation.cohorts]
    needed = federation.plan.aggregation.minimum_sites
    if len(names) < needed:
        raise PlanError(
            f"aggregation.minimum_sites is {needed}, but the data have {len(names)} "
            "sites: lower it, or divide the data with --partition iid --sites N"
        )
    idle = [c.site for c in federation.cohorts if not c.split("train").cases]
    if len(names) - len(idle) < needed:
        raise DataError(
            f"{len(names) - len(idle)} of {len(names)} sites have a usable training patient, the "
            f"plan needs {needed}; none at {', '.join(idle)}: `fedseg-site check` names each case "
            "with its remedy"
        )
    rounds = federation.plan.aggregation.rounds
    never = [fault for fault in federation.faults if fault.round and fault.round > rounds]
    if never:
        raise PlanError(f"the fault {never[0]} would never happen: the plan has {rounds} rounds")
    _require_paid(federation)
    strangers = sorted({fault.site for fault in federation.faults} - set(names))
    if strangers:
        raise PlanError(
            f"a fault is rehearsed at {strangers[0]}, but the sites are {', '.join(names)}"
        )


def _require_paid(federation: Federation) -> None:
    """Refuse attacks that train beside the ledger of a private plan."""
    unpaid = [fault for fault in federation.faults if fault.kind in RETRAINING]
    if federation.plan.private is not None and unpaid:
        raise PlanError(
            f"the attack {unpaid[0]} trains a second time, which no ledger pays for: under a "
            "guarantee rehearse sign_flip or scaled_noise"
        )


def _register(federation: Federation) -> None:
    """Have every site of a private plan register it, before any worker opens a ledger."""
    if federation.plan.private is None:
        return
    from fedseg.simulation.accounts import register

    for cohort in federation.cohorts:
        register(federation.plan, cohort, site_folder(federation.folder, cohort.site))


def _without_heads(state: StudyState) -> StudyState:
    """The history less the heads of ledgers: they are other ones in every equal study."""
    history = tuple(
        record.model_copy(
            update={"answers": tuple(a.model_copy(update={"head": None}) for a in record.answers)}
        )
        for record in state.history
    )
    return replace(state, history=history)


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
        cohort = self._federation.cohorts[int(context.node_config[_PARTITION])]
        key = (str(self._federation.folder), cohort.site)
        if key not in _TRAINERS:
            _TRAINERS[key] = _make_handle(self._federation, cohort)
        if self._patience_s is None:
            return _TRAINERS[key]
        return _bounded(_TRAINERS[key], self._patience_s)


_TRAINERS: dict[tuple[str, str], Handle] = {}


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
    ).handle


def _forget_trainers(federation: Federation) -> None:
    """Free the networks and prepared cases of a study's trainers in this process."""
    for cohort in federation.cohorts:
        _TRAINERS.pop((str(federation.folder), cohort.site), None)


def _key(record: StageRecord) -> str:
    """A stage's name in the notes of how long it took."""
    return f"{record.round} {record.stage} {record.attempt}"


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


def site_folder(folder: Path, site: str) -> Path:
    """One site's own place in a simulated study."""
    return folder / "sites" / site


class _CheckpointStore:
    """The coordinator's store: one file, replaced atomically."""

    def __init__(self, path: Path, plan: StudyPlan) -> None:
        self._path, self._plan = path, plan

    def save(self, state: StudyState) -> None:
        """Keep a state in place of the one before."""
        save_state(self._path, self._plan, state)


def _starting_state(federation: Federation, resume: bool) -> StudyState:
    """The stored state when a study is resumed, else the first one."""
    if federation.checkpoint.exists():
        if not resume:
            raise RoundError(
                f"{federation.folder.name} holds a study already: go on with --resume, or give "
                "another --out"
            )
        return fresh_attempts(load_state(federation.checkpoint, federation.plan), federation.plan)
    return first_state(federation.plan, federation.initial)


def _inprocess_grid(
    federation: Federation, arrange: Callable[[list[int]], list[int]]
) -> InProcessGrid:
    """Our Grid, with a node a site."""
    _forget_trainers(federation)
    share = federation.plan.aggregation.round_timeout_s / (len(federation.cohorts) + 1)
    contexts = {
        1000 + i: Context(
            run_id=1,
            node_id=1000 + i,
            node_config={_PARTITION: i},
            state=RecordDict(),
            run_config={},
        )
        for i in range(len(federation.cohorts))
    }
    app = make_client_app(SimulatedSites(federation))
    return InProcessGrid(app, contexts, patience_s=share, arrange=arrange)


def _run_on_ray(federation: Federation, run: Callable[[Grid], None]) -> None:
    """Flower's simulation engine: each core's worker serves one node at a time."""
    try:
        import ray
        from flwr.simulation import run_simulation
    except ImportError:
        raise MissingExtraError("simulation", "ray") from None
    if ray.util.get_node_ip_address() != _LOOPBACK:  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "Ray was imported before the study began and would listen on the network: run the "
            "study in a process of its own"
        )
    failure: list[BaseException] = []

    def guarded(grid: Grid) -> None:
        try:
            run(grid)
        except BaseException as error:
            failure.append(error)

    patience_s = federation.plan.aggregation.round_timeout_s
    resources: dict[str, Any] = {"num_cpus": federation.plan.training.threads, "num_gpus": 0.0}
    if federation.device != "cpu":
        resources["num_gpus"] = 1.0 / len(federation.cohorts)
    try:
        run_simulation(
            server_app=make_server_app(guarded),
            client_app=make_client_app(SimulatedSites(federation, patience_s)),
            num_supernodes=len(federation.cohorts),
            backend_config={
                "init_args": {
                    "include_dashboard": False,
                    "_node_ip_address": _LOOPBACK,
                    "log_to_driver": False,
                    "logging_level": logging.ERROR,
                },
                "client_resources": resources,
            },
        )
    finally:
        ray.shutdown()
    if failure:
        raise failure[0]


@contextmanager
def _quiet() -> Any:
    """No telemetry, update checks or news of Flower's, for us and for every process we start."""
    before = {name: os.environ.get(name) for name in _QUIET}
    flower = logging.getLogger("flwr")
    level = flower.level
    os.environ.update(_QUIET)
    flower.setLevel(logging.ERROR)
    try:
        yield
    finally:
        flower.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _compute_of(federation: Federation, site: str) -> float:
    """CPU seconds of training at one site, from its journal."""
    journal = Journal(site_folder(federation.folder, site) / "journal.jsonl")
    return sum(float(entry["cpu_s"]) for entry in journal.read("trained"))
