"""The study's run: what the ServerApp does from its start to its end, or until it is killed.

One ServerApp works on a study, held by a lock; it goes on from the checkpoint and stores a state
after every stage, so it may be killed at any moment. Once all rounds are closed it writes the
released model, and stays until every enrolled site has it.
"""

from __future__ import annotations

import logging
import time

from flwr.serverapp import Grid

from coordinator.folder import StudyFolder
from coordinator.office.audit import audit_of
from coordinator.office.key import unattended_key
from coordinator.office.registry import current_roll
from coordinator.rounds.study import Study
from coordinator.running.recorder import Recorder
from coordinator.running.superlink import SuperLink
from coordinator.sealing.exchange import SealedExchange
from fedseg.aggregation.checkpoint import load_state
from fedseg.aggregation.rounds import StudyState, first_state, fresh_attempts
from fedseg.arrays import digest_of
from fedseg.errors import FedsegError
from fedseg.logs import configure
from fedseg.modelfile import load_model, save_model
from fedseg.plan import StudyPlan
from fedseg.reports.card import card_of_history
from fedseg.reports.cardpage import write_card
from fedseg.sole import sole

logger = logging.getLogger(__name__)

TAKE_OVER_S = 10.0
FIRST_S, LATER_S = 60.0, 30.0
LOOK_AGAIN_S = 0.5
OFFER_AGAIN_S = 5.0


def serve(grid: Grid, folder: StudyFolder) -> None:
    """Run a study to its end.

    Raises:
        BusyError: another ServerApp works on it.
        FedsegError: the study cannot go on; the reason is in its log and its progress.
    """
    configure(None, also=folder.log("study"))
    with sole(folder.study_lock, "a run works on this study", patience_s=TAKE_OVER_S):
        try:
            _serve(grid, folder)
        except FedsegError as error:
            logger.error("the run ends: %s", error)
            raise
        except Exception:
            logger.exception("the run ends over an error of ours")
            raise


def _serve(grid: Grid, folder: StudyFolder) -> None:
    """Go on from the stored state."""
    key, plan = unattended_key(folder), folder.plan()
    state = starting_state(folder, plan)
    sites = tuple(site.name for site in current_roll(folder).roll.sites)
    recorder = Recorder(folder, plan, state, audit_of(folder, key), sites=sites)
    study = Study(
        grid,
        plan,
        recorder,
        nodes=plan.aggregation.minimum_sites,
        observe=recorder,
        exchange=SealedExchange(plan, key, registry=folder.registry, outbox=folder.outbox),
        reask=True,
        paused=folder.paused.exists,
        scratch=folder.scratch,
        own_models=folder.own_models,
    )
    with recorder.presence(SuperLink(folder, folder.settings())):
        try:
            _gather(grid, len(sites), LATER_S if state.history else FIRST_S)
            state = study.run(state)
            _release(folder, plan, state, sites)
            while study.lacking(state):
                state = study.redeliver(state)
                time.sleep(OFFER_AGAIN_S)
        except FedsegError as error:
            recorder.failed(str(error))
            raise


def _gather(grid: Grid, sites: int, patience_s: float) -> None:
    """Give every enrolled site a moment to come on line; who is late joins between stages."""
    until = time.monotonic() + patience_s
    while len(list(grid.get_node_ids())) < sites and time.monotonic() < until:
        time.sleep(LOOK_AGAIN_S)


def _release(
    folder: StudyFolder, plan: StudyPlan, state: StudyState, sites: tuple[str, ...]
) -> None:
    """Write the released model and its card, once."""
    model = state.server.released(plan.aggregation)
    if not folder.model.exists():
        save_model(folder.model, plan, model, arm="federated", rounds=state.server.steps)
    if not folder.card.exists():
        card = card_of_history(plan, state.history, digest_of(model), sites=sites)
        write_card(card, folder.card)


def starting_state(folder: StudyFolder, plan: StudyPlan) -> StudyState:
    """The stored state, or the first one; a stage that used up its attempts gets them back.

    Raises:
        FedsegError: checkpoint or initial model are damaged, or of another plan.
    """
    if folder.checkpoint.exists():
        return fresh_attempts(load_state(folder.checkpoint, plan), plan)
    return first_state(plan, load_model(folder.initial)[1])
