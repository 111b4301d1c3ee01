"""A simulated federation run to its end, or on from where it was stopped.

A trainer for every hospital, a coordinator for all, on one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.serverapp import Grid

from coordinator.rounds.events import Event, Observer, StageClosed, nobody
from coordinator.rounds.study import Study
from fedseg.aggregation.checkpoint import load_state, save_state
from fedseg.aggregation.rounds import StudyState, first_state, fresh_attempts
from fedseg.errors import RoundError
from fedseg.plan import StudyPlan
from fedseg.result import StageRecord
from fedseg.simulation.engines import Engine, serve
from fedseg.simulation.federation import Federation, require_sites, site_folder
from sites.journal import Journal

SCRATCH = "scratch"
OWN_MODELS = "own"


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
                own_models=federation.folder / OWN_MODELS,
            )
            study.run(state)

        serve(federation, run, engine=engine, arrange=arrange)
    finished = _without_heads(load_state(federation.checkpoint, plan))
    spent = {entry["at"]: entry["wall_s"] for entry in seconds.read("stage")}
    return Finished(
        plan=plan,
        state=finished,
        stage_s=tuple(spent.get(_key(record), 0.0) for record in finished.history),
        cpu_s=sum(_compute_of(federation, cohort.site) for cohort in federation.cohorts),
    )


def _register(federation: Federation) -> None:
    """Have every site of a private plan register it, before any worker opens a ledger."""
    if federation.plan.private is None:
        return
    from fedseg.simulation.accounts import register

    for cohort in federation.cohorts:
        register(federation.plan, cohort, site_folder(federation.folder, cohort.site))


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


class _CheckpointStore:
    """The coordinator's store: one file, replaced atomically."""

    def __init__(self, path: Path, plan: StudyPlan) -> None:
        self._path, self._plan = path, plan

    def save(self, state: StudyState) -> None:
        """Keep a state in place of the one before."""
        save_state(self._path, self._plan, state)


def _without_heads(state: StudyState) -> StudyState:
    """The history less the heads of ledgers: they are other ones in every equal study."""
    history = tuple(
        record.model_copy(
            update={"answers": tuple(a.model_copy(update={"head": None}) for a in record.answers)}
        )
        for record in state.history
    )
    return replace(state, history=history)


def _key(record: StageRecord) -> str:
    """A stage's name in the notes of how long it took."""
    return f"{record.round} {record.stage} {record.attempt} {record.owner or ''}".rstrip()


def _compute_of(federation: Federation, site: str) -> float:
    """CPU seconds of training at one site, from its journal."""
    journal = Journal(site_folder(federation.folder, site) / "journal.jsonl")
    return sum(float(entry["cpu_s"]) for entry in journal.read("trained"))
