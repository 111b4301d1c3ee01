"""The half of a site that sees patients: `handle(task: bytes) -> bytes`, and nothing else goes out.

Long-lived, so that network and prepared cases stay warm. It takes only tasks of the plan it was
made with; whatever goes wrong, an answer with one coarse code leaves and the reason stays here, in
the site's journal. Training and evaluation are functions of task and cohort: a task that comes
again gives the same answer. The last task brings the released model, which is stored for use.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import numpy as np
import torch

from fedseg.arrays import Arrays, digest_of
from fedseg.durable import Buffer
from fedseg.errors import DataError, FedsegError, NotFiniteError, PlanError, TrustError
from fedseg.evaluation.evaluate import evaluate_cohort
from fedseg.imaging.cache import CaseCache
from fedseg.imaging.cases import Cohort
from fedseg.learning.local import train_round
from fedseg.logs import without_its_text
from fedseg.modelfile import load_model, save_model
from fedseg.models.zoo import build_network, load_tensors, state_tensors
from fedseg.plan import StudyPlan
from fedseg.result import mean_scores
from fedseg.updates import (
    AnswerHeader,
    Body,
    Enlisted,
    Evaluated,
    Received,
    RefusalCode,
    Refused,
    TaskHeader,
    Trained,
    open_task,
    seal_answer,
    task_digest,
)
from sites.journal import Journal
from sites.patients import PreparedPatients
from sites.state import OptimiserStates

logger = logging.getLogger(__name__)


class Trainer:
    """One hospital's trainer for one study."""

    def __init__(
        self,
        plan: StudyPlan,
        cohort: Cohort,
        cache: CaseCache,
        folder: Path,
        *,
        models: Path,
        left_out: int = 0,
        device: str = "cpu",
    ) -> None:
        """Make a trainer.

        Args:
            plan: what the hospital approved; it has an initial model.
            cohort: the site's usable cases of all splits.
            cache: where prepared cases are kept.
            folder: the site's own place for optimiser states and its journal.
            models: where released models are kept, a file a study.
            left_out: cases that the check found unusable; only their number is told.
            device: of torch.
        """
        self._plan, self._cohort, self._left_out = plan, cohort, left_out
        self._network = build_network(plan.model, plan.task).to(torch.device(device))
        self._patients = PreparedPatients(cohort.split("train"), cache)
        self._cache = cache
        self._states = OptimiserStates(folder / "state", plan)
        self._journal = Journal(folder / "journal.jsonl")
        self._model_file = models / f"{plan.study}.safetensors"
        self._lock = threading.Lock()

    def handle(self, task: Buffer) -> bytes:
        """Answer one task. Never raises: a refusal is an answer with one coarse code."""
        with self._lock:
            delta: Arrays | None = None
            body: Body
            try:
                body, delta = self._work(task)
            except Exception as error:
                body = Refused(code=_code_of(error))
                self._note(body, error)
            header = AnswerHeader(task=task_digest(task), site=self._cohort.site, body=body)
            return seal_answer(header, delta)

    def _work(self, task: Buffer) -> tuple[Body, Arrays | None]:
        """Open a task and do what its stage asks for."""
        header, model = open_task(task, self._plan)
        if header.stage == "enlist":
            return self._enlist(), None
        if header.stage == "evaluate":
            return self._evaluate(header, model), None
        if header.stage == "release":
            return self._receive(header, model), None
        return self._train(header, model)

    def _note(self, refused: Refused, error: Exception) -> None:
        """Keep the reason of a refusal here; a full disk must not turn it into silence."""
        if not isinstance(error, FedsegError):
            said = "a task failed for a reason that fedseg does not know; its journal has the text"
            logger.error(said, extra=without_its_text(error))
        try:
            self._journal.write("refused", code=refused.code, reason=f"{error}")
        except OSError:
            logger.exception("the journal cannot be written: make room or mend its rights")

    def _enlist(self) -> Enlisted:
        """Say what the cohort brings."""
        parts = {name: self._cohort.split(name) for name in ("train", "val", "test")}
        self._journal.write("enlisted")
        return Enlisted(
            patients={name: len(part.patients) for name, part in parts.items()},
            cases={name: len(part.cases) for name, part in parts.items()},
            left_out=self._left_out,
        )

    def _train(self, header: TaskHeader, model: Arrays) -> tuple[Trained, Arrays]:
        """Train one round from the task's model; the delta and the next optimiser state."""
        load_tensors(self._network, model)
        clock = time.thread_time if self._plan.training.threads == 1 else time.process_time
        state, started = self._states.before(header.round), clock()
        outcome = train_round(
            self._network,
            self._patients,
            self._plan,
            round_=header.round,
            site=self._cohort.site,
            optimiser_state=state,
            anchor=model,
        )
        spent = clock() - started
        trained = state_tensors(self._network)
        delta = {name: np.subtract(trained[name], model[name]) for name in model}
        self._states.store(header.round, outcome.optimiser_state)
        self._journal.write(
            "trained", round=header.round, steps=outcome.steps, cpu_s=round(spent, 4)
        )
        patients = len(self._patients)
        return Trained(patients=patients, steps=outcome.steps, loss=outcome.loss), delta

    def _evaluate(self, header: TaskHeader, model: Arrays) -> Evaluated:
        """Mean metrics over the site's `val` patients."""
        load_tensors(self._network, model)
        held_back = self._cohort.split("val")
        metrics = self._plan.evaluation.metrics
        patients = evaluate_cohort(self._network, held_back, self._cache, self._plan, metrics)
        self._journal.write("evaluated", round=header.round, patients=len(patients))
        return Evaluated(patients=len(patients), scores=mean_scores(patients, metrics))

    def _receive(self, header: TaskHeader, model: Arrays) -> Received:
        """Store the released model where the hospital finds it, once it fits the network."""
        load_tensors(self._network, model)
        path, plan = self._model_file, self._plan
        self._refuse_another(path, header)
        save_model(path, plan, model, arm="federated", rounds=header.round)
        self._journal.write("received", round=header.round, model=header.model)
        return Received(model=digest_of(model))

    def _refuse_another(self, path: Path, header: TaskHeader) -> None:
        """A study has one final model: who has the study key cannot exchange it in use."""
        if not path.exists():
            return
        stored = load_model(path)[0]
        if stored.plan_digest == header.plan and stored.model_digest != header.model:
            raise TrustError(
                "another final model of this study came than the one that is kept in "
                f"models/{path.name}; move that file away if the consortium says that it was wrong"
            )


def _code_of(error: Exception) -> RefusalCode:
    """The coarse code that leaves."""
    codes: tuple[tuple[type[Exception], RefusalCode], ...] = (
        (PlanError, "plan"),
        (TrustError, "task"),
        (DataError, "data"),
        (NotFiniteError, "not_finite"),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), "failed")
